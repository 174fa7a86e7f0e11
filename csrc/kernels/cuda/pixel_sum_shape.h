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
TC_HOST_DEVICE int32_t sum_pitch(int32_t bytes) { return (kSumTile + 8) * bytes; }
TC_HOST_DEVICE int32_t sum_chunk_bytes(int32_t bytes) { return kSumPixels * sum_pitch(bytes); }
TC_HOST_DEVICE int32_t sum_shared_bytes(int32_t bytes) { return 2 * kSumStages * sum_chunk_bytes(bytes); }

TC_HOST_DEVICE int32_t sum_tiles(int32_t size) { return (size + kSumTile - 1) / kSumTile; }

// What a block computes.
struct SumWork {
  int32_t tap_h, tap_w, m, n;  // m, n: first of the tile
  int64_t split;
};

TC_HOST_DEVICE int64_t sum_blocks(const PixelSumParams& p) {
  const int64_t tiles = p.diagonal ? sum_tiles(p.m) : static_cast<int64_t>(sum_tiles(p.m)) * sum_tiles(p.n);
  return tiles * p.h.taps * p.w.taps * p.splits;
}

TC_HOST_DEVICE SumWork sum_work(const PixelSumParams& p, int64_t block) {
  // Tiles of one split and tap come together: they share what they read.
  const int64_t tiles = p.diagonal ? sum_tiles(p.m) : static_cast<int64_t>(sum_tiles(p.m)) * sum_tiles(p.n);
  const int32_t tile = static_cast<int32_t>(block % tiles);
  const int32_t tap = static_cast<int32_t>(block / tiles % (p.h.taps * p.w.taps));
  const int32_t across = p.diagonal ? 0 : sum_tiles(p.n);
  return {tap / p.w.taps, tap % p.w.taps, (p.diagonal ? tile : tile / across) * kSumTile,
          (p.diagonal ? tile : tile % across) * kSumTile, block / tiles / (p.h.taps * p.w.taps)};
}

}  // namespace tensorcomp::cuda
