// Where things lie: tiles of the grid, the input region a tile touches, rows of shared memory. Plain index arithmetic
// for host and device, so that the host's tests can go through it position by position.
#pragma once

#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/host_device.h"

namespace tensorcomp::cuda {

// A chunk of an input pixel's channels in shared memory, and how far apart pixels lie: 16 bytes of padding bring eight
// rows that are read together to different banks.
constexpr int kChunkBytes = 64;
constexpr int kRowPadBytes = 16;
constexpr int kChunkPitch = kChunkBytes + kRowPadBytes;
constexpr int kChunkStages = 3;

// Positions [begin, begin + size) of one direction.
struct Span {
  int64_t begin = 0;
  int32_t size = 0;
};

// Input positions that grid positions [begin, begin + size) gather, borders cut off.
TC_HOST_DEVICE Span input_span(const Axis& axis, const Span& grid) {
  if (axis.taps == 0 || grid.size == 0) return {0, 0};
  const int64_t reach = static_cast<int64_t>(axis.taps - 1) * axis.gap;
  const int64_t low = grid.begin * axis.step + axis.offset + (reach < 0 ? reach : 0);
  const int64_t high = (grid.begin + grid.size - 1) * axis.step + axis.offset + (reach > 0 ? reach : 0);
  const int64_t begin = low < 0 ? 0 : low, end = high + 1 < axis.in ? high + 1 : axis.in;
  return {begin < axis.in ? begin : 0, static_cast<int32_t>(end > begin ? end - begin : 0)};
}

// The most input positions that `size` grid positions can touch.
TC_HOST_DEVICE int64_t most_inputs(const Axis& axis, int64_t size) {
  if (axis.taps == 0 || size == 0) return 0;
  const int64_t gap = axis.gap < 0 ? -axis.gap : axis.gap;
  const int64_t touched = (size - 1) * axis.step + (axis.taps - 1) * gap + 1;
  return touched < axis.in ? touched : axis.in;
}

// One tile: its grid positions and the input region under them.
struct TileSpan {
  Span n, h, w;     // grid
  Span in_h, in_w;  // input
  TC_HOST_DEVICE int32_t pixels() const { return n.size * h.size * w.size; }
  TC_HOST_DEVICE int32_t region() const { return n.size * in_h.size * in_w.size; }
};

TC_HOST_DEVICE Span tile_part(int64_t index, int32_t step, int64_t whole) {
  const int64_t begin = index * step, left = whole - begin;
  return {begin, static_cast<int32_t>(left < step ? left : step)};
}

TC_HOST_DEVICE TileSpan tile_span(const BottleneckParams& p, int64_t index) {
  const Tile& t = p.tile;
  TileSpan s;
  // Neighbours in a row come one after the other, so that the input they share is still in the cache.
  s.w = tile_part(index % t.tiles_w, t.columns, p.w.grid);
  s.h = tile_part(index / t.tiles_w % t.tiles_h, t.rows, p.h.grid);
  s.n = tile_part(index / t.tiles_w / t.tiles_h, t.images, p.batch);
  const bool gathers = p.core != Core::kNone;
  s.in_h = gathers ? input_span(p.h, s.h) : s.h;
  s.in_w = gathers ? input_span(p.w, s.w) : s.w;
  return s;
}

// Position of a row of shared memory within a box of images x rows x columns.
struct Place {
  int32_t n, h, w;
};

TC_HOST_DEVICE Place place_of(int32_t row, int32_t rows, int32_t columns) {
  const int32_t image = rows * columns;
  const int32_t n = row / image, rest = row - n * image;
  const int32_t h = rest / columns;
  return {n, h, rest - h * columns};
}

// Where the rank-space row of a grid position begins its search, relative to the region: add the taps' gaps.
struct Anchor {
  int32_t base, h, w;  // base: the image's first row; h below zero by more than any kernel: no position at all
};

constexpr int32_t kNowhere = -(1 << 29);

TC_HOST_DEVICE Anchor anchor_of(const BottleneckParams& p, const TileSpan& s, int32_t pixel) {
  if (pixel >= s.pixels()) return {0, kNowhere, 0};
  const Place at = place_of(pixel, s.h.size, s.w.size);
  return {at.n * s.in_h.size * s.in_w.size,
          static_cast<int32_t>((s.h.begin + at.h) * p.h.step + p.h.offset - s.in_h.begin),
          static_cast<int32_t>((s.w.begin + at.w) * p.w.step + p.w.offset - s.in_w.begin)};
}

// The region's row that a tap reads, or `none` on the border.
TC_HOST_DEVICE int32_t region_row(const TileSpan& s, const Anchor& a, int32_t tap_h, int32_t tap_w, int32_t none) {
  const int32_t h = a.h + tap_h, w = a.w + tap_w;
  const bool inside = static_cast<uint32_t>(h) < static_cast<uint32_t>(s.in_h.size) &&
                      static_cast<uint32_t>(w) < static_cast<uint32_t>(s.in_w.size);
  return inside ? a.base + h * s.in_w.size + w : none;
}

// Shared memory of a block, in bytes from its start.
//   first:  U, the region in rank space and one row of zeros; where there is a core, later what goes out
//   second: chunks of the input on their way in; then V, what the core made; without a core, later what goes out
struct SharedLayout {
  int32_t u_pitch = 0, v_pitch = 0, out_pitch = 0;
  int32_t second = 0, row_offsets = 0, total = 0;
};

TC_HOST_DEVICE int32_t shared_max(int32_t a, int32_t b) { return a > b ? a : b; }

TC_HOST_DEVICE SharedLayout shared_layout(const BottleneckParams& p) {
  const Tile& t = p.tile;
  const int32_t bytes = element_bytes(p.element), rows = t.warps * t.blocks_m * 16;
  SharedLayout s;
  s.u_pitch = p.ring * rank_padded(p.rank_in) * bytes + kRowPadBytes;
  s.v_pitch = p.ring * rank_padded(p.rank_out) * bytes + kRowPadBytes;
  s.out_pitch = t.blocks_n * 8 * bytes + kRowPadBytes;
  const bool core = p.core != Core::kNone;
  const int32_t out = p.leave ? rows * s.out_pitch : 0;
  const int32_t u = (t.region_rows + 1) * s.u_pitch;
  const int32_t chunks = p.enter ? kChunkStages * rows * kChunkPitch : 0;
  s.second = core ? shared_max(u, out) : u;
  s.row_offsets = s.second + (core ? shared_max(chunks, rows * s.v_pitch) : shared_max(chunks, out));
  s.total = s.row_offsets + shared_max(rows, p.enter ? t.region_rows : 0) * 8;
  return s;
}

// Fragments of a packed matrix.
TC_HOST_DEVICE int32_t steps_of(int32_t elements, int32_t bytes) {
  const int32_t step = 32 / bytes;
  return (elements + step - 1) / step;
}

struct PackedShape {
  int32_t steps, pairs;  // along k and n; a pair of 8-column blocks is one fragment
  int64_t fragments;     // over all taps, parts counted singly
};

TC_HOST_DEVICE PackedShape packed_shape(const PackParams& p) {
  const int32_t k = p.pad_k ? p.ring_k * rank_padded(p.k) : p.k;
  // Outside rank space n is not cut into slices, and padded to a pair of blocks, which is as much.
  const int32_t steps = steps_of(k, p.bytes), pairs = p.ring_n * rank_padded(p.n) / 16;
  const int64_t parts = p.bytes == 4 ? 2 : 1;
  return {steps, pairs, parts * steps * pairs * p.kernel_h * p.kernel_w};
}

}  // namespace tensorcomp::cuda
