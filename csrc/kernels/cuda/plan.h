// How a problem is cut for a device; host code without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/pixel_sum_shape.h"
#include "kernels/cuda/tile.h"

namespace tensorcomp::cuda {

struct DeviceLimits {
  int32_t multiprocessors = 132;
  int32_t shared_per_block = 227 * 1024;  // opted in
  int32_t shared_per_multiprocessor = 228 * 1024;
};

namespace detail {

// Blocks of these tiles that run on a multiprocessor at once.
inline int32_t resident_blocks(const Tile& tile, const DeviceLimits& device) {
  constexpr int32_t kReserved = 1024;  // of shared memory, a block
  constexpr int32_t kWarps = 16;       // of 128 registers a thread
  return std::max(1, std::min(device.shared_per_multiprocessor / (tile.shared_bytes + kReserved), kWarps / tile.warps));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Predicted clocks of a launch: rounds of resident tiles, each bound by matrix instructions, by bytes, or by what one
// tile takes from its first load to its last store. The constants are rough figures of Hopper; they only rank tile
// sizes against each other.
inline double predicted_clocks(const BottleneckParams& p, const DeviceLimits& device) {
  constexpr double kClocksPerProduct = 2.0, kBytesPerClock = 20.0, kCachedBytesPerClock = 40.0, kLatency = 2500.0;
  const Tile& t = p.tile;
  const int32_t bytes = element_bytes(p.element);
  const double products = p.element == Element::kFloat32 ? 6.0 : p.element == Element::kTf32 ? 2.0 : 1.0;
  const int32_t pixels = t.images * t.rows * t.columns, rows = 16 * t.warps;
  const double region = (t.region_rows + rows - 1) / rows * t.warps, blocks = (pixels + rows - 1) / rows * t.warps;
  const double in = p.ring * ((p.rank_in + 7) / 8), out = p.ring * ((p.rank_out + 7) / 8);
  double work = 0;
  if (p.enter) work += region * ((p.c_in + 15) / 16) * in;
  if (p.core == Core::kFull) work += blocks * p.h.taps * p.w.taps * ((p.rank_in + 15) / 16) * out;
  if (p.core == Core::kDepthwise) work += blocks * p.h.taps * p.w.taps * out * 4;
  if (p.leave) work += blocks * out / 2 * ((p.c_out + 7) / 8);
  const double matrix = kClocksPerProduct * products * work;
  // What neighbouring tiles and further passes over the columns of a rank read again comes from the cache.
  const int32_t columns = 8 * t.blocks_n;
  const double passes = p.enter ? (p.ring * rank_padded(p.rank_in) + columns - 1) / columns : 1;
  const double once = static_cast<double>(std::min(pixels, t.region_rows)) * p.c_in +
                      static_cast<double>(pixels) * (p.leave ? p.c_out : p.ring * p.rank_out);
  const double again = (t.region_rows * passes - std::min(pixels, t.region_rows)) * p.c_in;
  const double memory = bytes * (once / kBytesPerClock + again / kCachedBytesPerClock);
  const int64_t tiles = t.tiles_n * t.tiles_h * t.tiles_w;
  const int64_t together = std::min<int64_t>(resident_blocks(t, device), ceil_div(tiles, device.multiprocessors));
  const double round = std::max({together * matrix, together * memory, kLatency + matrix + memory});
  return static_cast<double>(ceil_div(tiles, device.multiprocessors * together)) * round;
}

// Fills the tile's counts from its sizes; false where it does not fit the device.
inline bool complete(BottleneckParams& p, const DeviceLimits& device) {
  Tile& t = p.tile;
  // More positions than the warps have rows for would be left out.
  if (static_cast<int64_t>(t.images) * t.rows * t.columns > t.warps * t.blocks_m * 16) return false;
  t.tiles_n = ceil_div(p.batch, t.images);
  t.tiles_h = ceil_div(p.h.grid, t.rows);
  t.tiles_w = ceil_div(p.w.grid, t.columns);
  const int64_t h = p.core == Core::kNone ? t.rows : most_inputs(p.h, t.rows);
  const int64_t w = p.core == Core::kNone ? t.columns : most_inputs(p.w, t.columns);
  const int64_t region = ceil_div(t.images * h * w, 16) * 16;
  const int64_t widest = std::max(rank_padded(p.rank_in), rank_padded(p.rank_out)) * static_cast<int64_t>(p.ring);
  // Beyond this no layout fits, and its arithmetic in 32 bits could overflow.
  if (region > 65536 || widest > 32768) return false;
  t.region_rows = static_cast<int32_t>(region);
  const int64_t u = (region + 1) * (widest * element_bytes(p.element) + kRowPadBytes);
  if (u > device.shared_per_block) return false;
  t.shared_bytes = shared_layout(p).total;
  return t.shared_bytes <= device.shared_per_block;
}

// Accumulators a warp holds, for the wider of the ranks.
inline Tile tile_form(const BottleneckParams& p) {
  const int32_t widest = std::max(p.rank_in, p.rank_out) * (p.core == Core::kFull ? 1 : p.ring);
  Tile form;
  // Numbers in two parts take twice the registers: wider ranks go through in several passes.
  const bool split = p.element == Element::kFloat32;
  form.blocks_m = widest <= (split ? 32 : 64) ? 2 : 1;
  form.blocks_n = widest <= 32 ? 4 : widest <= 64 || split ? 8 : 16;
  return form;
}

// The smallest tile there is: one position, one warp.
inline bool smallest_tile(BottleneckParams& p, const DeviceLimits& device) {
  p.tile = tile_form(p);
  p.tile.warps = 1;
  return complete(p, device);
}

// A part of `size` in equal parts of at most `most`.
inline int32_t even_part(int64_t size, int64_t most) {
  return static_cast<int32_t>(ceil_div(size, ceil_div(size, most)));
}

}  // namespace detail

// Chooses the tile of the least predicted time, among a dozen: every launch pays for the choice. False where not even
// the smallest one fits the device's shared memory.
inline bool plan_tile(BottleneckParams& p, const DeviceLimits& device) {
  if (p.batch == 0 || p.h.grid == 0 || p.w.grid == 0) {
    p.tile = Tile();
    return true;
  }
  Tile form = detail::tile_form(p), best;
  double least = -1;
  for (const int32_t warps : {8, 4, 2}) {
    const int64_t most = static_cast<int64_t>(warps) * form.blocks_m * 16;
    int32_t tried = 0;
    for (const int64_t wanted : {most, int64_t{32}, int64_t{16}, int64_t{8}}) {
      const int32_t columns = detail::even_part(p.w.grid, std::min(wanted, most));
      if (columns == tried) continue;
      tried = columns;
      const int32_t rows = detail::even_part(p.h.grid, most / columns);
      const bool whole = rows == p.h.grid && columns == p.w.grid;
      form.warps = warps;
      form.columns = columns;
      form.rows = rows;
      form.images = whole ? detail::even_part(p.batch, most / (static_cast<int64_t>(rows) * columns)) : 1;
      p.tile = form;
      if (!detail::complete(p, device)) continue;
      const double clocks = detail::predicted_clocks(p, device);
      if (least < 0 || clocks < least) {
        least = clocks;
        best = p.tile;
      }
    }
  }
  // Ranks so large that none of these fits: fewer and fewer rows and columns.
  for (int32_t size = 16 * form.blocks_m; least < 0 && size >= 1; size /= 2) {
    form.warps = 1;
    form.images = 1;
    form.rows = std::min<int64_t>(p.h.grid, size / 4 < 1 ? 1 : size / 4);
    form.columns = std::min<int64_t>(p.w.grid, size < 4 ? size : 4);
    p.tile = form;
    if (detail::complete(p, device)) return true;
  }
  p.tile = best;
  return least >= 0;
}

// Blocks of a launch: each takes tiles in turn.
inline int64_t launch_blocks(const BottleneckParams& p, const DeviceLimits& device) {
  const int64_t tiles = p.tile.tiles_n * p.tile.tiles_h * p.tile.tiles_w;
  return std::min<int64_t>(tiles,
                           static_cast<int64_t>(device.multiprocessors) * detail::resident_blocks(p.tile, device));
}

// Splits of the pixels that fill the device about twice, each of at least eight chunks.
inline int64_t plan_splits(PixelSumParams p, const DeviceLimits& device) {
  p.splits = 1;
  const int64_t blocks = sum_blocks(p), chunks = detail::ceil_div(p.batch * p.h.grid * p.w.grid, kSumPixels) * p.ring;
  if (blocks == 0) return 1;
  return std::max<int64_t>(1, std::min(detail::ceil_div(8 * device.multiprocessors, blocks), chunks / 8));
}

}  // namespace tensorcomp::cuda
