// Gradients of the low-rank + sparse weight: M * G in one pass, and products with (1 - M) * G, which is never stored:
// each chunk of G is masked where it has arrived in shared memory. Splits of the summed dimension leave partial results
// that another kernel adds in order, so that results are reproducible.
#pragma once

#include <type_traits>

#include "kernels/cuda/lowrank_sparse_weight.cuh"

namespace tensorcomp::cuda {

// A warp a row, four pieces of 16 bytes a lane.
constexpr int kMaskedWarps = 8;
constexpr int kMaskedPieces = 4;

template <typename Storage>
TC_HOST_DEVICE int64_t masked_across(const MaskedParams& p) {
  constexpr int64_t kColumns = 32 * kMaskedPieces * 16 / static_cast<int64_t>(sizeof(Storage));
  return (p.n + kColumns - 1) / kColumns;
}

// Bits of the mask for 16 bytes of a row, whose first entry is a multiple of what they hold.
template <int kElements>
TC_DEVICE uint32_t piece_bits(const MaskedParams& p, const uint8_t* row, int64_t at) {
  if (p.bits) return row[at / 8 * p.mask.column] >> at % 8 & ((1u << kElements) - 1);
  uint32_t found = 0;
  if (p.mask.width > 0) {
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(row + at + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) found |= word >> 8 * e & 0xff ? 1u << (i + e) : 0u;
    }
    return found;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) found |= row[(at + i) * p.mask.column] != 0 ? 1u << i : 0u;
  return found;
}

template <typename E>
TC_KERNEL(32 * kMaskedWarps, 2)
masked_kernel(const TC_GRID_CONSTANT MaskedParams p) {
  using Storage = typename E::Storage;
  constexpr int32_t kElements = 16 / sizeof(Storage);
  const int64_t across = masked_across<Storage>(p);
  const int64_t row = block_index() / across * kMaskedWarps + warp_index();
  const int64_t first = (block_index() % across * kMaskedPieces * 32 + thread_index() % 32) * kElements;
  if (row >= p.m) return;
  const auto* grad = static_cast<const Storage*>(p.grad.data) + row * p.grad.row;
  const auto* mask = static_cast<const uint8_t*>(p.mask.data) + row * p.mask.row;
  auto* out = static_cast<Storage*>(p.out) + row * p.n;
  if (p.grad.width == 16 && p.n % kElements == 0) {
    Words4 found[kMaskedPieces];
    uint32_t bits[kMaskedPieces];
    // All loads are on their way before the first store.
#pragma unroll
    for (int i = 0; i < kMaskedPieces; ++i) {
      const int64_t at = first + i * 32 * kElements;
      if (at >= p.n) continue;
      found[i] = load_constant(reinterpret_cast<const Words4*>(grad + at));
      bits[i] = piece_bits<kElements>(p, mask, at);
    }
#pragma unroll
    for (int i = 0; i < kMaskedPieces; ++i) {
      const int64_t at = first + i * 32 * kElements;
      if (at < p.n) store_streaming(reinterpret_cast<Words4*>(out + at), only_kept<Storage>(found[i], bits[i]));
    }
    return;
  }
  for (int i = 0; i < kMaskedPieces; ++i) {
    const int64_t at = first + i * 32 * kElements;
    for (int64_t e = at; e < p.n && e < at + kElements; ++e) {
      const bool kept = p.bits ? (mask[e / 8 * p.mask.column] >> e % 8 & 1) != 0 : mask[e * p.mask.column] != 0;
      out[e] = kept ? grad[e * p.grad.column] : Storage{};
    }
  }
}

// A tile of G' Bᵀ (kOfA) or Aᵀ G', one split of it.
template <typename E, bool kOfA>
class MaskedProductBlock {
 public:
  using T = WeightTile<E>;
  using Storage = typename E::Storage;
  static constexpr int32_t kTurnedPitch = wide_pitch(T::kBytes, kWeightRows);
  using LeftFragments = std::conditional_t<kOfA, RowFragments<E, kChunkPitch>, TurnedFragments<E, kTurnedPitch>>;
  using RightFragments = std::conditional_t<kOfA, RowFragments<E, kChunkPitch>, TurnedFragments<E, T::kPitch>>;

  TC_DEVICE explicit MaskedProductBlock(const MaskedProductParams& params)
      : p(params),
        layout(masked_product_layout(params)),
        shared(shared_memory()),
        lane(thread_index() % 32),
        warp(warp_index()),
        // Tiles of one split come together: they share what they read of G.
        row(block_index() % tiles() / across() * kWeightRows),
        column(block_index() % tiles() % across() * T::kColumns),
        split(block_index() / tiles()) {}

  TC_DEVICE void run() {
    const int64_t chunks = (p.summed + T::kSummed - 1) / T::kSummed, share = (chunks + p.splits - 1) / p.splits;
    const int64_t begin = split * share, end = begin + share < chunks ? begin + share : chunks;
    typename T::Sums acc;
    acc.clear();
    const auto load = [&](int64_t chunk) {
      if (chunk < end) load_chunks(chunk);
      copy_commit();
    };
    for (int32_t i = 0; i + 1 < p.stages; ++i) load(begin + i);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (p.stages == 3) {
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      sync_block();  // the chunk is there for all, and nobody reads the one before it
      load(chunk + p.stages - 1);
      hide(stage(chunk));
      sync_block();  // and masked
      // Rows beyond the rank are many where it is small.
      if (row + T::warp_row(warp) < p.m && column + T::warp_column(warp) < p.n) {
        const char *grad = stage(chunk) + layout.grad, *other = stage(chunk) + layout.other;
        multiply_chunk<E, LeftFragments, RightFragments, T::kSteps>(acc, kOfA ? grad : other, kOfA ? other : grad,
                                                                    T::warp_row(warp), T::warp_column(warp), lane);
      }
    }
    copy_wait<0>();
    store(acc);
  }

 private:
  TC_DEVICE int64_t across() const { return (p.n + T::kColumns - 1) / T::kColumns; }
  TC_DEVICE int64_t tiles() const { return (p.m + kWeightRows - 1) / kWeightRows * across(); }
  TC_DEVICE char* stage(int64_t chunk) const { return shared + chunk % p.stages * layout.chunk; }

  // Rows of G in a chunk, and columns.
  static constexpr int32_t kGradRows = kOfA ? kWeightRows : T::kSummed;
  static constexpr int32_t kGradColumns = kOfA ? T::kSummed : T::kColumns;
  static constexpr int32_t kGradPitch = kOfA ? kChunkPitch : T::kPitch;

  TC_DEVICE void load_chunks(int64_t chunk) const {
    const int64_t summed = chunk * T::kSummed, first_row = kOfA ? row : summed, first = kOfA ? summed : column;
    char* to = stage(chunk);
    copy_box<Storage, kGradColumns * T::kBytes>(to + layout.grad, kGradPitch, p.grad, first_row, first, 0, kGradRows);
    if (p.bits) {
      copy_mask_box<kGradColumns / 8>(to + layout.mask, p.mask, first_row, first / 8, 0, kGradRows);
    } else {
      copy_mask_box<kGradColumns>(to + layout.mask, p.mask, first_row, first, 0, kGradRows);
    }
    if constexpr (kOfA) {
      copy_box<Storage, kChunkBytes>(to + layout.other, kChunkPitch, p.other, column, summed, 0, T::kColumns);
    } else {
      copy_box<Storage, kWeightRows * T::kBytes>(to + layout.other, kTurnedPitch, p.other, summed, row, 0, T::kSummed);
    }
  }

  TC_DEVICE void hide(char* at) const {
    constexpr int32_t kPieces = kGradColumns / T::kElements;
    const int32_t mask_pitch = mask_bytes(p.bits, kGradColumns);
    for (int32_t i = thread_index(); i < kGradRows * kPieces; i += block_threads()) {
      const int32_t of_chunk = i / kPieces, piece = i % kPieces;
      auto* words = reinterpret_cast<Words4*>(at + layout.grad + of_chunk * kGradPitch + piece * 16);
      const uint32_t kept =
          kept_bits<T::kElements>(at + layout.mask + of_chunk * mask_pitch, p.bits, piece * T::kElements);
      *words = only_kept<Storage>(*words, ~kept);
    }
  }

  TC_DEVICE void store(const typename T::Sums& acc) const {
    float* to = p.partial + split * p.m * p.n;
#pragma unroll
    for (int i = 0; i < T::kM; ++i) {
#pragma unroll
      for (int j = 0; j < T::kN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t m = row + T::warp_row(warp) + 16 * i + lane / 4 + 8 * (e / 2);
          const int64_t n = column + T::warp_column(warp) + 8 * j + 2 * (lane % 4) + e % 2;
          if (m < p.m && n < p.n) to[m * p.n + n] = acc.value[i][j][e];
        }
      }
    }
  }

  const MaskedProductParams& p;
  const MaskedProductLayout layout;
  char* const shared;
  const int lane, warp;
  const int64_t row, column, split;
};

template <typename E, bool kOfA>
TC_KERNEL(kWeightThreads, 2)
masked_product_kernel(const TC_GRID_CONSTANT MaskedProductParams p) {
  MaskedProductBlock<E, kOfA>(p).run();
}

}  // namespace tensorcomp::cuda
