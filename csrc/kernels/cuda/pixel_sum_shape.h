// How sums over pixels are cut into blocks; index arithmetic for host and device.
#pragma once

#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/host_device.h"

namespace tensorcomp::cuda {

constexpr int kSumTile = 64;
constexpr int kSumThreads = 128;
constexpr int kSumPixels = 32;  // of a chunk in shared memory
constexpr int kSumStages = 3;

// 16-bit rows of 64 and 8 more: eight rows read together lie in different banks. 32-bit rows of 64 and 8 more: four
// rows of eight columns do.
TC_HOST_DEVICE constexpr int32_t sum_pitch(int32_t bytes) { return (kSumTile + 8) * bytes; }
TC_HOST_DEVICE int32_t sum_chunk_bytes(int32_t bytes) { return kSumPixels * sum_pitch(bytes); }
TC_HOST_DEVICE int32_t sum_shared_bytes(int32_t bytes) { return 2 * kSumStages * sum_chunk_bytes(bytes); }

// Rows of the result from tap to tap. Pieces of 16 bytes belong to one tap; on the diagonal whole tiles do.
TC_HOST_DEVICE int32_t sum_row_pitch(int32_t m, bool diagonal) {
  const int32_t unit = diagonal ? kSumTile : kRankPad;
  return (m + unit - 1) / unit * unit;
}

TC_HOST_DEVICE int64_t sum_rows(const PixelSumParams& p) {
  return static_cast<int64_t>(p.h.taps) * p.w.taps * p.m_pitch;
}

// Columns of the partial results: on the diagonal those of one tile.
TC_HOST_DEVICE int32_t sum_columns(const PixelSumParams& p) { return p.diagonal ? kSumTile : p.n; }

TC_HOST_DEVICE int64_t sum_tiles(int64_t size) { return (size + kSumTile - 1) / kSumTile; }

// What a block computes.
struct SumWork {
  int64_t m;  // first row of the result
  int32_t n;  // and column
  int64_t split;
};

TC_HOST_DEVICE int64_t sum_blocks(const PixelSumParams& p) {
  return sum_tiles(sum_rows(p)) * (p.diagonal ? 1 : sum_tiles(p.n)) * p.splits;
}

TC_HOST_DEVICE SumWork sum_work(const PixelSumParams& p, int64_t block) {
  // Tiles of one split come together: they share what they read.
  const int64_t down = sum_tiles(sum_rows(p)), across = p.diagonal ? 1 : sum_tiles(p.n), tile = block % (down * across);
  const int64_t m = tile / across * kSumTile;
  return {m, static_cast<int32_t>(p.diagonal ? m % p.m_pitch : tile % across * kSumTile), block / (down * across)};
}

}  // namespace tensorcomp::cuda
