// Sums of outer products over pixels, the gradients of the weights: a 64 x 64 tile of the result a block, pixels cut
// into splits whose partial results a second kernel adds in a fixed order, so that results are reproducible.
#pragma once

#include "kernels/cuda/pixel_sum_shape.h"
#include "kernels/cuda/stages.cuh"

namespace tensorcomp::cuda {

// Fragments of 16-bit matrices that lie [pixel][column]: transposed on their way to registers.
template <typename E, bool kSplit, int kBytes>
struct SumFragments {
  static TC_DEVICE void left(Left<E>& to, const char* chunk, int32_t step, int32_t column, int lane) {
    const int32_t pixel = step * 16 + lane / 16 * 8 + lane % 8, at = column + lane / 8 % 2 * 8;
    load_matrices_transposed(to.a, chunk + pixel * sum_pitch(2) + at * 2);
    to.prepare();
  }
  // Two 8-column blocks.
  static TC_DEVICE void right(uint32_t (&high)[4], uint32_t (&)[4], const char* chunk, int32_t step, int32_t column,
                              int lane) {
    const int32_t pixel = step * 16 + lane / 8 % 2 * 8 + lane % 8, at = column + lane / 16 * 8;
    load_matrices_transposed(high, chunk + pixel * sum_pitch(2) + at * 2);
  }
};

// 32-bit ones: element by element.
template <typename E, bool kSplit>
struct SumFragments<E, kSplit, 4> {
  static TC_DEVICE uint32_t at(const char* chunk, int32_t pixel, int32_t column) {
    return *reinterpret_cast<const uint32_t*>(chunk + pixel * sum_pitch(4) + column * 4);
  }
  static TC_DEVICE void left(Left<E>& to, const char* chunk, int32_t step, int32_t column, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.a[i] = at(chunk, step * 8 + lane % 4 + i / 2 * 4, column + lane / 4 + i % 2 * 8);
    }
    to.prepare();
  }
  static TC_DEVICE void right(uint32_t (&high)[4], uint32_t (&low)[4], const char* chunk, int32_t step, int32_t column,
                              int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = at(chunk, step * 8 + lane % 4 + i % 2 * 4, column + lane / 4 + i / 2 * 8);
      if (kSplit) {
        split_tf32(bits, high[i], low[i]);
      } else {
        high[i] = round_to_tf32(bits_to_float(bits));
      }
    }
  }
};

template <typename E>
class PixelSumBlock {
 public:
  using Storage = typename E::Storage;
  static constexpr int kBytes = sizeof(Storage);
  using Fragments = SumFragments<E, E::kParts == 2, kBytes>;

  TC_DEVICE explicit PixelSumBlock(const PixelSumParams& params)
      : p(params),
        work(sum_work(params, block_index())),
        shared(shared_memory()),
        lane(thread_index() % 32),
        warp(thread_index() / 32),
        pixels(params.batch * params.h.grid * params.w.grid) {}

  TC_DEVICE void run() {
    const int64_t chunks = (pixels + kSumPixels - 1) / kSumPixels, all = chunks * p.ring;
    const int64_t share = (all + p.splits - 1) / p.splits;
    const int64_t begin = work.split * share, end = begin + share < all ? begin + share : all;
    const bool sums_bias = p.partial_bias != nullptr && work.n == 0 && work.tap_h == 0 && work.tap_w == 0;
    Accumulators<2, 4> acc;
    acc.clear();
    float bias = 0.0f;
    const auto load = [&](int64_t c) {
      if (c < end) load_chunks(c % chunks * kSumPixels, static_cast<int32_t>(c / chunks), stage_of(c));
      copy_commit();
    };
#pragma unroll
    for (int i = 0; i < kSumStages - 1; ++i) load(begin + i);
    for (int64_t c = begin; c < end; ++c) {
      copy_wait<kSumStages - 2>();
      sync_block();  // chunk c is there for all, and nobody reads chunk c - 1 any more
      load(c + kSumStages - 1);
      multiply(acc, a_chunk(stage_of(c)), b_chunk(stage_of(c)));
      if (sums_bias) bias += sum_column(a_chunk(stage_of(c)));
    }
    copy_wait<0>();
    store(acc);
    if (sums_bias) store_bias(bias);
  }

 private:
  static TC_DEVICE int stage_of(int64_t chunk) { return static_cast<int>(chunk % kSumStages); }
  TC_DEVICE char* a_chunk(int stage) const { return shared + stage * 2 * sum_chunk_bytes(kBytes); }
  TC_DEVICE char* b_chunk(int stage) const { return a_chunk(stage) + sum_chunk_bytes(kBytes); }

  TC_DEVICE void load_chunks(int64_t first, int32_t q, int stage) {
    load_side(a_chunk(stage), p.a, p.a_strides, q * p.a_slice, work.m, p.m, first, true);
    load_side(b_chunk(stage), p.b, p.b_strides, q * p.b_slice, work.n, p.n, first, false);
  }

  // kSumPixels pixels by kSumTile channels from `channel` on; zeros beyond `channels`, beyond the last pixel and where
  // the tap lies on the border.
  TC_DEVICE void load_side(char* to, const void* image, const Strides4& strides, int64_t slice, int32_t channel,
                           int32_t channels, int64_t first, bool gathered) {
    constexpr int32_t kElements = 16 / kBytes, kPieces = kSumTile / kElements;
    const Storage* from = static_cast<const Storage*>(image);
    const bool vectors = strides.c == 1 && strides.n % kElements == 0 && strides.h % kElements == 0 &&
                         strides.w % kElements == 0 && slice % kElements == 0 &&
                         reinterpret_cast<uintptr_t>(image) % 16 == 0;
    for (int32_t i = thread_index(); i < kSumPixels * kPieces; i += kSumThreads) {
      const int32_t row = strides.c == 1 ? i / kPieces : i % kSumPixels;
      const int32_t piece = strides.c == 1 ? i % kPieces : i / kSumPixels;
      const int32_t at = channel + piece * kElements;
      int64_t offset = at < channels ? pixel_offset(first + row, strides, gathered) : -1;
      char* place = to + row * sum_pitch(kBytes) + piece * 16;
      const bool inside = offset >= 0;
      offset += slice + at * strides.c;
      if (vectors && (at + kElements <= channels || at >= channels)) {
        copy_async(place, inside ? from + offset : from, inside ? 16 : 0);
      } else {
        gather_piece<E>(place, inside ? from + offset : from, strides.c, inside ? channels - at : 0);
      }
    }
  }

  // Elements from the start of an image to the pixel that belongs to a grid pixel; -1 where there is none.
  TC_DEVICE int64_t pixel_offset(int64_t pixel, const Strides4& strides, bool gathered) const {
    if (pixel >= pixels) return -1;
    int64_t n, h, w;
    if (pixels <= 0x7fffffff) {  // divisions of 32 bits take a quarter of the time
      const uint32_t columns = static_cast<uint32_t>(p.w.grid), rows = static_cast<uint32_t>(p.h.grid);
      const uint32_t at = static_cast<uint32_t>(pixel), row = at / columns, image = row / rows;
      n = image, h = row - image * rows, w = at - row * columns;
    } else {
      const int64_t row = pixel / p.w.grid;
      n = row / p.h.grid, h = row % p.h.grid, w = pixel % p.w.grid;
    }
    if (!gathered) return n * strides.n + h * strides.h + w * strides.w;
    const int64_t y = h * p.h.step + p.h.offset + work.tap_h * p.h.gap;
    const int64_t x = w * p.w.step + p.w.offset + work.tap_w * p.w.gap;
    if (y < 0 || y >= p.h.in || x < 0 || x >= p.w.in) return -1;
    return n * strides.n + y * strides.h + x * strides.w;
  }

  // Warps take quarters of the tile, 32 x 32.
  TC_DEVICE int32_t quarter_m() const { return warp / 2 * 32; }
  TC_DEVICE int32_t quarter_n() const { return warp % 2 * 32; }

  TC_DEVICE void multiply(Accumulators<2, 4>& acc, const char* a, const char* b) const {
    if (work.m + quarter_m() >= p.m || work.n + quarter_n() >= p.n) return;
    constexpr int kSteps = kSumPixels * kBytes / kStepBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Left<E> left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) Fragments::left(left[i], a, step, quarter_m() + 16 * i, lane);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t high[4], low[4] = {0, 0, 0, 0};
        Fragments::right(high, low, b, step, quarter_n() + 16 * pair, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t b_high[2] = {high[2 * half], high[2 * half + 1]};
          const uint32_t b_low[2] = {low[2 * half], low[2 * half + 1]};
#pragma unroll
          for (int i = 0; i < 2; ++i) left[i].multiply(acc.value[i][2 * pair + half], b_high, b_low);
        }
      }
    }
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
    const int64_t taps = p.h.taps * p.w.taps, tap = work.tap_h * p.w.taps + work.tap_w;
    float* to = p.partial + (work.split * taps + tap) * p.m * p.n;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t m = work.m + quarter_m() + 16 * i + lane / 4 + 8 * (e / 2);
          const int32_t n = work.n + quarter_n() + 8 * j + 2 * (lane % 4) + e % 2;
          if (m < p.m && n < p.n) to[static_cast<int64_t>(m) * p.n + n] = acc.value[i][j][e];
        }
      }
    }
  }

  TC_DEVICE void store_bias(float sum) const {
    float* halves = reinterpret_cast<float*>(shared);
    sync_block();  // nobody reads chunks any more
    halves[thread_index()] = sum;
    sync_block();
    const int32_t m = work.m + thread_index();
    if (thread_index() < kSumTile && m < p.m) {
      p.partial_bias[work.split * p.m + m] = halves[thread_index()] + halves[thread_index() + kSumTile];
    }
  }

  const PixelSumParams& p;
  const SumWork work;
  char* const shared;
  const int lane, warp;
  const int64_t pixels;
};

template <typename E>
TC_KERNEL(kSumThreads, 4)
pixel_sum_kernel(const TC_GRID_CONSTANT PixelSumParams p) {
  PixelSumBlock<E>(p).run();
}

// One thread an element of the result, summing the splits in order.
template <typename E>
TC_KERNEL(256, 1)
pixel_sum_finish_kernel(const TC_GRID_CONSTANT PixelSumFinishParams p, int64_t count) {
  using Storage = typename E::Storage;
  const int64_t columns = p.diagonal ? 1 : p.n, taps = p.taps_h * p.taps_w;
  const int64_t matrix = static_cast<int64_t>(p.m) * p.n, sums = p.out == nullptr ? 0 : taps * p.m * columns;
  for (int64_t i = block_index() * block_threads() + thread_index(); i < count; i += grid_blocks() * block_threads()) {
    const bool is_bias = i >= sums;
    const int64_t m = is_bias ? i - sums : i / columns % p.m, tap = i / columns / p.m;
    const int64_t n = p.diagonal ? m : i % columns;
    const float* from = is_bias ? p.partial_bias + m : p.partial + tap * matrix + m * p.n + n;
    const int64_t step = is_bias ? p.m : taps * matrix;
    const int64_t slice = n / p.slice_padded, rest = n - slice * p.slice_padded;
    if (!is_bias && !p.diagonal && rest >= p.slice) continue;
    float sum = 0.0f;
    for (int64_t split = 0; split < p.splits; ++split) sum += from[split * step];
    if (is_bias) {
      static_cast<Storage*>(p.out_bias)[m] = E::from_float(sum);
    } else {
      const int64_t column = p.diagonal ? 0 : slice * p.slice + rest;
      static_cast<Storage*>(
          p.out)[m * p.stride_m + column * p.stride_n + tap / p.taps_w * p.stride_h + tap % p.taps_w * p.stride_w] =
          E::from_float(sum);
    }
  }
}

}  // namespace tensorcomp::cuda
