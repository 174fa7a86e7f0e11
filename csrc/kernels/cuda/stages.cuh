// The stages of the bottleneck kernel, each a product of a warp's rows with packed weights.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/tile.h"

namespace tensorcomp::cuda {

// Accumulators of a warp: kM blocks of 16 rows, kN blocks of 8 columns.
template <int kM, int kN>
struct Accumulators {
  float value[kM][kN][4];
  TC_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) value[i][j][e] = 0.0f;
  }
};

// Which part of a packed matrix a product reads: all its steps, from fragment column `pair` on.
struct Right {
  const Words4* fragments;
  int32_t pairs;  // fragments from step to step
  int32_t pair;   // first one read
};

// The first `valid` columns of an A fragment as it comes from shared memory; zeros behind them.
template <typename E>
TC_DEVICE void keep_columns(uint32_t (&a)[4], int32_t valid, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (sizeof(typename E::Storage) == 2) {
      const int32_t column = 2 * (lane % 4) + i / 2 * 8;
      a[i] = column >= valid ? 0u : column + 1 >= valid ? a[i] & 0xffffu : a[i];
    } else {
      a[i] = lane % 4 + i / 2 * 4 >= valid ? 0u : a[i];
    }
  }
}

// acc += A B over one step, for the first kBlocks blocks of rows and kPairs pairs of 8-column blocks: straight code,
// so that the loads of a step are on their way together. `rows[i]` is this thread's ldmatrix row of block i. With
// kPartial only the first `valid` columns of A are its own.
template <typename E, int kBlocks, int kPairs, bool kPartial = false, int kM, int kN>
TC_DEVICE void multiply_step(Accumulators<kM, kN>& acc, const char* const (&rows)[kM], const Right& right, int32_t step,
                             int lane, int32_t valid = 0) {
  constexpr int kParts = sizeof(typename E::Storage) == 4 ? 2 : 1;
  const Words4* fragment =
      right.fragments + (static_cast<int64_t>(step) * right.pairs + right.pair) * kParts * 32 + lane;
  Left<E> left[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    load_matrices(left[i].a, rows[i]);
    if constexpr (kPartial) keep_columns<E>(left[i].a, valid, lane);
    left[i].prepare();
  }
  // Not more at a time than registers hold beside the accumulators.
  constexpr int kGroup = E::kParts == 2 ? 2 : 4;
#pragma unroll
  for (int g = 0; g < kPairs; g += kGroup) {
    Words4 high[kGroup], low[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup && g + j < kPairs; ++j) {
      high[j] = load_constant(fragment + (g + j) * kParts * 32);
      low[j] = E::kParts == 2 ? load_constant(fragment + (g + j) * kParts * 32 + 32) : high[j];
    }
#pragma unroll
    for (int j = 0; j < 2 * kGroup && 2 * g + j < 2 * kPairs; ++j) {
      const uint32_t b[2] = {high[j / 2].word[j % 2 * 2], high[j / 2].word[j % 2 * 2 + 1]};
      const uint32_t b_low[2] = {low[j / 2].word[j % 2 * 2], low[j / 2].word[j % 2 * 2 + 1]};
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) left[i].multiply(acc.value[i][2 * g + j], b, b_low);
    }
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `body` with a number of 1 to kMost as a constant.
template <int kMost, typename Body>
TC_DEVICE void with_constant(int number, const Body& body) {
  if constexpr (kMost > 1) {
    if (number < kMost) {
      with_constant<kMost - 1>(number, body);
      return;
    }
  }
  body(Constant<kMost>{});
}

// Calls `body` with the blocks of rows and the pairs of columns in use as constants; with no rows, not at all.
template <int kM, int kN, typename Body>
TC_DEVICE void with_shape(int blocks, int pairs, const Body& body) {
  if (blocks == 0) return;
  with_constant<kM>(blocks, [&](auto b) { with_constant<kN / 2>(pairs, [&](auto n) { body(b, n); }); });
}

// Two neighbouring elements, aligned.
template <typename E>
TC_DEVICE void store_pair(char* to, float first, float second) {
  using Storage = typename E::Storage;
  struct alignas(2 * sizeof(Storage)) Pair {
    Storage a, b;
  };
  *reinterpret_cast<Pair*>(to) = {E::from_float(first), E::from_float(second)};
}

// The accumulators of block i as rows of shared memory, columns from `to` on; rows from `rows` on are left out.
// Thread l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next of each 8-column block.
template <typename E, int kM, int kN>
TC_DEVICE void store_block(const Accumulators<kM, kN>& acc, int i, char* to, int32_t pitch, int32_t rows,
                           int32_t columns, int lane) {
  constexpr int kBytes = sizeof(typename E::Storage);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    if (row >= rows) continue;
    char* at = to + row * pitch + 2 * (lane % 4) * kBytes;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (j < columns) store_pair<E>(at + j * 8 * kBytes, acc.value[i][j][2 * half], acc.value[i][j][2 * half + 1]);
    }
  }
}

TC_DEVICE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

// Loads 16 bytes of channels of a pixel from memory of any strides: elements beyond `channels` are zero.
template <typename E>
TC_DEVICE void gather_piece(char* to, const typename E::Storage* from, int64_t stride, int32_t channels) {
  using Storage = typename E::Storage;
  constexpr int kElements = 16 / sizeof(Storage);
  struct alignas(16) Piece {
    Storage element[kElements];
  };
  Piece piece;
#pragma unroll
  for (int e = 0; e < kElements; ++e) piece.element[e] = e < channels ? from[e * stride] : Storage{};
  *reinterpret_cast<Piece*>(to) = piece;
}

// Bytes of a piece that hold so many elements.
template <typename Storage>
TC_DEVICE int32_t piece_bytes(int32_t elements) {
  return least(elements * static_cast<int32_t>(sizeof(Storage)), 16);
}

// Brings a chunk of channels of `rows` pixels to shared memory. `offsets[row]` is the pixel's first channel, in
// elements, or below zero for zeros. Channels that lie next to each other and aligned come asynchronously.
template <typename E>
TC_DEVICE void load_chunk(char* to, const void* image, const int64_t* offsets, int32_t rows, int64_t channel_stride,
                          int32_t channels, int32_t first, bool vectors) {
  using Storage = typename E::Storage;
  constexpr int kElements = 16 / sizeof(Storage), kPieces = kChunkBytes / 16;
  const Storage* from = static_cast<const Storage*>(image);
  for (int32_t i = thread_index(); i < rows * kPieces; i += block_threads()) {
    // Neighbouring threads take neighbouring memory: channels of one pixel, or pixels of one channel.
    const int32_t row = vectors || channel_stride == 1 ? i / kPieces : i % rows;
    const int32_t piece = vectors || channel_stride == 1 ? i % kPieces : i / rows;
    const int32_t channel = first + piece * kElements;
    const int64_t offset = offsets[row];
    const bool inside = offset >= 0 && channel < channels;
    char* at = to + row * kChunkPitch + piece * 16;
    if (vectors) {
      copy_async(at, inside ? from + offset + channel : from, inside ? piece_bytes<Storage>(channels - channel) : 0);
    } else {
      gather_piece<E>(at, inside ? from + offset + channel * channel_stride : from, channel_stride,
                      inside ? channels - channel : 0);
    }
  }
}

}  // namespace tensorcomp::cuda
