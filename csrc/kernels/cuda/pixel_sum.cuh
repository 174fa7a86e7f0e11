// Sums of outer products over pixels, the gradients of the weights: a 64 x 64 tile of the result a block, pixels cut
// into splits whose partial results a second kernel adds in a fixed order, so that results are reproducible.
#pragma once

#include "kernels/cuda/fragments.cuh"
#include "kernels/cuda/pixel_sum_shape.h"

namespace tensorcomp::cuda {

template <typename E>
class PixelSumBlock {
 public:
  using Storage = typename E::Storage;
  static constexpr int kBytes = sizeof(Storage);
  using Fragments = TurnedFragments<E, sum_pitch(kBytes)>;

  TC_DEVICE explicit PixelSumBlock(const PixelSumParams& params)
      : p(params),
        work(sum_work(params, block_index())),
        shared(shared_memory()),
        lane(thread_index() % 32),
        warp(warp_index()),
        pixels(params.batch * params.h.grid * params.w.grid) {
    // Copied piece by piece, whatever a thread loads has the same channels, and with them the same tap.
    a_side = left_side(thread_index() % kPieces);
    b_side = right_side(thread_index() % kPieces);
  }

  TC_DEVICE void run() {
    const int64_t chunks = (pixels + kSumPixels - 1) / kSumPixels, all = chunks * p.ring;
    const int64_t share = (all + p.splits - 1) / p.splits;
    const int64_t begin = work.split * share, end = begin + share < all ? begin + share : all;
    const bool sums_bias = p.partial_bias != nullptr && work.n == 0;
    Accumulators<2, 4> acc;
    acc.clear();
    float bias = 0.0f;
    // Chunks are loaded one after the other: where one ends the next begins, and counting on is cheaper than dividing.
    int32_t q = static_cast<int32_t>(begin / chunks);
    int64_t in_slice = begin % chunks;
    Cursor at = cursor_at(in_slice * kSumPixels);
    const auto load = [&](int64_t c) {
      if (c < end) {
        load_chunks(at, in_slice * kSumPixels, q, static_cast<int>(c % kSumStages));
        if (++in_slice == chunks) {
          in_slice = 0;
          ++q;
          at = cursor_at(0);
        }
      }
      copy_commit();
    };
#pragma unroll
    for (int i = 0; i < kSumStages - 1; ++i) load(begin + i);
    for (int64_t c = begin; c < end; ++c) {
      copy_wait<kSumStages - 2>();
      sync_block();  // chunk c is there for all, and nobody reads chunk c - 1 any more
      load(c + kSumStages - 1);
      sync_warp();
      const int stage = static_cast<int>(c % kSumStages);
      multiply(acc, a_chunk(stage), b_chunk(stage));
      if (sums_bias) bias += sum_column(a_chunk(stage));
    }
    copy_wait<0>();
    store(acc);
    if (sums_bias) store_bias(bias);
  }

 private:
  TC_DEVICE char* a_chunk(int stage) const { return shared + stage * 2 * sum_chunk_bytes(kBytes); }
  TC_DEVICE char* b_chunk(int stage) const { return a_chunk(stage) + sum_chunk_bytes(kBytes); }

  static constexpr int32_t kElements = 16 / kBytes;
  static constexpr int32_t kPieces = kSumTile / kElements;  // of a row of a chunk
  static constexpr int32_t kRows = kSumThreads / kPieces;   // of a chunk that the block loads at a time

  // What 16 bytes of a row of a chunk are.
  struct Side {
    int32_t channel = 0;
    bool inside = false;  // of the matrix
    int64_t shift_h = 0, shift_w = 0;
  };

  TC_DEVICE Side left_side(int32_t piece) const {
    const int64_t row = work.m + piece * kElements;
    const int32_t tap = static_cast<int32_t>(row / p.m_pitch);
    const int32_t channel = static_cast<int32_t>(row - static_cast<int64_t>(tap) * p.m_pitch);
    return {channel, tap < p.h.taps * p.w.taps && channel < p.m, p.h.offset + tap / p.w.taps * p.h.gap,
            p.w.offset + tap % p.w.taps * p.w.gap};
  }
  TC_DEVICE Side right_side(int32_t piece) const {
    const int32_t channel = work.n + piece * kElements;
    return {channel, channel < p.n, 0, 0};
  }

  struct Pixel {
    bool there;
    int32_t n, h, w;
  };

  TC_DEVICE Pixel pixel_of(int64_t index) const {
    if (index >= pixels) return {false, 0, 0, 0};
    const int64_t row = index / p.w.grid;
    return {true, static_cast<int32_t>(row / p.h.grid), static_cast<int32_t>(row % p.h.grid),
            static_cast<int32_t>(index % p.w.grid)};
  }

  // The pixel of this thread's row, which steps from one row of the block's to the next.
  struct Cursor {
    Pixel pixel;
    int64_t index;
  };

  TC_DEVICE Cursor cursor_at(int64_t first) const {
    const int64_t index = first + thread_index() / kPieces;
    // Beyond the last pixel it counts on, for nothing.
    Pixel pixel = pixel_of(index < pixels ? index : 0);
    pixel.there = index < pixels;
    return {pixel, index};
  }

  TC_DEVICE void advance(Cursor& at) const {
    at.index += kRows;
    at.pixel.w += step_w;
    if (at.pixel.w >= columns) {
      at.pixel.w -= columns;
      ++at.pixel.h;
    }
    at.pixel.h += step_h;
    if (at.pixel.h >= rows) {
      at.pixel.h -= rows;
      ++at.pixel.n;
    }
    at.pixel.n += step_n;
    at.pixel.there = at.index < pixels;
  }

  // kSumPixels pixels of both matrices; zeros beyond their channels, beyond the last pixel and on the border.
  TC_DEVICE void load_chunks(Cursor& at, int64_t first, int32_t q, int stage) {
    const Storage* a = static_cast<const Storage*>(p.a) + q * p.a_slice;
    const Storage* b = static_cast<const Storage*>(p.b) + q * p.b_slice;
#pragma unroll
    for (int32_t turn = 0; turn < kSumPixels / kRows; ++turn) {
      const int32_t row = turn * kRows + thread_index() / kPieces, piece = thread_index() % kPieces;
      if (a_vectors) load_left(a_chunk(stage), a, at.pixel, row, piece, a_side);
      if (b_vectors) load_right(b_chunk(stage), b, at.pixel, row, piece, b_side);
      advance(at);
    }
    if (a_vectors && b_vectors) return;
    // Channels that lie apart: neighbouring threads take neighbouring pixels.
    for (int32_t i = thread_index(); i < kSumPixels * kPieces; i += kSumThreads) {
      const int32_t row = i % kSumPixels, piece = i / kSumPixels;
      const Pixel pixel = pixel_of(first + row);
      if (!a_vectors) load_left(a_chunk(stage), a, pixel, row, piece, left_side(piece));
      if (!b_vectors) load_right(b_chunk(stage), b, pixel, row, piece, right_side(piece));
    }
  }

  TC_DEVICE void load_left(char* chunk, const Storage* from, const Pixel& at, int32_t row, int32_t piece,
                           const Side& side) const {
    const int64_t y = at.h * p.h.step + side.shift_h, x = at.w * p.w.step + side.shift_w;
    const bool gathered = at.there && y >= 0 && y < p.h.in && x >= 0 && x < p.w.in;
    load_piece(chunk + row * sum_pitch(kBytes) + piece * 16, from, p.a_strides, at.n, y, x, side.channel, p.m,
               side.inside && gathered, a_vectors);
  }

  TC_DEVICE void load_right(char* chunk, const Storage* from, const Pixel& at, int32_t row, int32_t piece,
                            const Side& side) const {
    load_piece(chunk + row * sum_pitch(kBytes) + piece * 16, from, p.b_strides, at.n, at.h, at.w, side.channel, p.n,
               side.inside && at.there, b_vectors);
  }

  static TC_DEVICE void load_piece(char* to, const Storage* from, const Strides4& s, int64_t n, int64_t h, int64_t w,
                                   int32_t channel, int32_t channels, bool inside, bool vectors) {
    const Storage* at = inside ? from + n * s.n + h * s.h + w * s.w + channel * s.c : from;
    if (vectors) {
      copy_async(to, at, inside ? piece_bytes<Storage>(channels - channel) : 0);
    } else {
      gather_piece<E>(to, at, s.c, inside ? channels - channel : 0);
    }
  }

  // Whether the channels of a pixel can be copied 16 bytes at a time.
  static TC_DEVICE bool takes_vectors(const void* image, const Strides4& s, int64_t slice) {
    return s.c == 1 && s.n % kElements == 0 && s.h % kElements == 0 && s.w % kElements == 0 && slice % kElements == 0 &&
           reinterpret_cast<uintptr_t>(image) % 16 == 0;
  }

  // Warps take quarters of the tile, 32 x 32.
  TC_DEVICE int32_t quarter_m() const { return warp / 2 * 32; }
  TC_DEVICE int32_t quarter_n() const { return warp % 2 * 32; }

  TC_DEVICE void multiply(Accumulators<2, 4>& acc, const char* a, const char* b) const {
    if (work.m + quarter_m() >= sum_rows(p) || work.n + quarter_n() >= p.n) return;
    multiply_chunk<E, Fragments, Fragments, kSumPixels * kBytes / kStepBytes>(acc, a, b, quarter_m(), quarter_n(),
                                                                              lane);
  }

  // Two threads a column of A, every second pixel each.
  TC_DEVICE float sum_column(const char* a) const {
    const int32_t column = thread_index() % kSumTile, half = thread_index() / kSumTile;
    float sum = 0.0f;
    for (int32_t pixel = half; pixel < kSumPixels; pixel += 2) {
      sum += E::to_float(reinterpret_cast<const Storage*>(a + pixel * sum_pitch(kBytes))[column]);
    }
    return sum;
  }

  TC_DEVICE void store(const Accumulators<2, 4>& acc) const {
    const int64_t all_rows = sum_rows(p);
    // On the diagonal a tile keeps its own columns only.
    const int32_t pitch = sum_columns(p), from = p.diagonal ? work.n : 0;
    float* to = p.partial + work.split * all_rows * pitch;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t m = work.m + quarter_m() + 16 * i + lane / 4 + 8 * (e / 2);
          const int32_t n = work.n + quarter_n() + 8 * j + 2 * (lane % 4) + e % 2;
          if (m < all_rows && n < p.n) to[m * pitch + n - from] = acc.value[i][j][e];
        }
      }
    }
  }

  TC_DEVICE void store_bias(float sum) const {
    float* halves = reinterpret_cast<float*>(shared);
    sync_block();  // nobody reads chunks any more
    halves[thread_index()] = sum;
    sync_block();
    const int64_t m = work.m + thread_index();
    if (thread_index() < kSumTile && m < p.m) {
      p.partial_bias[work.split * p.m + m] = halves[thread_index()] + halves[thread_index() + kSumTile];
    }
  }

  const PixelSumParams& p;
  const SumWork work;
  char* const shared;
  const int lane, warp;
  const int64_t pixels;
  // Sizes of the grid are at most 2^31: the bindings see to it.
  const int32_t rows = static_cast<int32_t>(p.h.grid), columns = static_cast<int32_t>(p.w.grid);
  const int32_t step_w = kRows % columns, step_h = kRows / columns % rows, step_n = kRows / columns / rows;
  Side a_side, b_side;
  const bool a_vectors = takes_vectors(p.a, p.a_strides, p.a_slice);
  const bool b_vectors = takes_vectors(p.b, p.b_strides, p.b_slice);
};

template <typename E>
TC_KERNEL(kSumThreads, 4)
pixel_sum_kernel(const TC_GRID_CONSTANT PixelSumParams p) {
  PixelSumBlock<E>(p).run();
}

// A lane an element of the result; `ways` warps share the splits, and the first of them adds what they found, in order.
constexpr int kFinishWarps = 16;

TC_HOST_DEVICE int finish_ways(int64_t splits) {
  int ways = 1;
  while (ways < kFinishWarps && ways < splits) ways *= 2;
  return ways;
}

TC_HOST_DEVICE int64_t finish_blocks(int64_t count, int64_t splits) {
  const int64_t at_once = 32 * kFinishWarps / finish_ways(splits);
  return (count + at_once - 1) / at_once;
}

template <typename E>
TC_KERNEL(kFinishWarps * 32, 2)
pixel_sum_finish_kernel(const TC_GRID_CONSTANT PixelSumFinishParams p, int64_t count) {
  using Storage = typename E::Storage;
  const int lane = thread_index() % 32, warp = warp_index(), ways = finish_ways(p.splits), way = warp % ways;
  const int64_t columns = p.diagonal ? 1 : p.n, taps = p.taps_h * p.taps_w;
  const int64_t sums = p.out == nullptr ? 0 : taps * p.m * columns;
  const int64_t i = (block_index() * (kFinishWarps / ways) + warp / ways) * 32 + lane;
  const bool is_bias = i >= sums;
  const int64_t m = is_bias ? i - sums : i / columns % p.m, tap = is_bias ? 0 : i / columns / p.m;
  const int64_t n = p.diagonal ? 0 : i % columns;
  float sum = 0.0f;
  if (i < count) {
    const int64_t pitch = p.diagonal ? kSumTile : p.n, column = p.diagonal ? m % kSumTile : n;
    const float* from = is_bias ? p.partial_bias + m : p.partial + (tap * p.m_pitch + m) * pitch + column;
    const int64_t step = is_bias ? p.m : taps * p.m_pitch * pitch;
#pragma unroll 8
    for (int64_t split = way; split < p.splits; split += ways) sum += from[split * step];
  }
  float* found = reinterpret_cast<float*>(shared_memory());
  found[warp * 32 + lane] = sum;
  sync_block();
  const int64_t slice = n / p.slice_padded, rest = n - slice * p.slice_padded;
  if (way != 0 || i >= count || (!is_bias && !p.diagonal && rest >= p.slice)) return;
  for (int other = 1; other < ways; ++other) sum += found[(warp + other) * 32 + lane];
  if (is_bias) {
    static_cast<Storage*>(p.out_bias)[m] = E::from_float(sum);
  } else {
    static_cast<Storage*>(p.out)[m * p.stride_m + (slice * p.slice + rest) * p.stride_n + tap / p.taps_w * p.stride_h +
                                 tap % p.taps_w * p.stride_w] = E::from_float(sum);
  }
}

}  // namespace tensorcomp::cuda
