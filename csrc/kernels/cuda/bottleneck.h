// Problems of the CUDA kernels, plain structs; nothing of torch and nothing of the device.
//
// One kernel serves the bottleneck convolution (Tucker-2, TT, CP, TR), the two-factor linear layer (no core) and the
// data path of both backward passes: enter the rank space, apply the core, leave it, where the first and the last may
// be left out. A second one sums outer products over pixels: the gradients of the weights.
#pragma once

#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/params.h"

namespace tensorcomp::cuda {

// Storage and arithmetic; sums are kept in float32. kFloat32 splits every factor in two TF32 numbers, which is nearly
// as exact as float32; kTf32 rounds float32 storage to TF32 once.
enum class Element : int32_t { kFloat32 = 0, kTf32 = 1, kFloat16 = 2, kBfloat16 = 3 };

TC_HOST_DEVICE constexpr int element_bytes(Element element) {
  return element == Element::kFloat32 || element == Element::kTf32 ? 4 : 2;
}

enum class Core : int32_t { kFull = 0, kDepthwise = 1, kNone = 2 };

// Ranks are padded to this in shared memory, in rank-space images and in packed weights, each ring index for itself.
constexpr int kRankPad = 16;

TC_HOST_DEVICE constexpr int32_t rank_padded(int64_t rank) {
  return static_cast<int32_t>((rank + kRankPad - 1) / kRankPad * kRankPad);
}

// One spatial direction: which input positions a grid of output positions gathers, tap by tap.
//   input  = grid * step + offset + i * gap        for i in [0, taps)
//   kernel = tap + i * tap_step                    the index of that tap in the core
//   output = first + grid * out_step
// A convolution is one grid. Its transpose, for the gradient of the input, is one grid a phase of the stride.
struct Axis {
  int64_t in = 1, grid = 1;
  int32_t step = 1, taps = 1, offset = 0, gap = 1;
  int32_t tap = 0, tap_step = 1;
  int64_t first = 0, out_step = 1;
};

// A tile of `images` x `rows` x `columns` grid positions, and the launch that goes with it; from plan_tile.
struct Tile {
  int32_t images = 1, rows = 1, columns = 1;
  int32_t warps = 4;
  int32_t blocks_m = 2, blocks_n = 4;  // 16-row and 8-column blocks of accumulators a warp holds
  int32_t region_rows = 0;             // most input pixels a tile touches, rounded up to 16
  int32_t shared_bytes = 0;
  int64_t tiles_n = 0, tiles_h = 0, tiles_w = 0;
};

struct BottleneckParams {
  Element element = Element::kFloat32;
  Core core = Core::kFull;
  int64_t batch = 0;
  Axis h, w;
  int32_t c_in = 0, c_out = 0;
  int32_t rank_in = 0, rank_out = 0;  // of one ring index; equal where there is no full core
  int32_t ring = 1;                   // the core is shared by so many slices of the rank space
  int32_t kernel_h = 1, kernel_w = 1;

  // An image of c_in channels, of any strides. Without `enter` they are the rank space itself: rank_in channels, or all
  // ring slices of a rank-space image, padding included.
  bool enter = true;
  const void* x = nullptr;
  Strides4 x_strides;

  // With `leave`: the image of c_out channels. `rank_image`, where not null, takes what would leave, as a rank-space
  // image of (batch, out_height, out_width, ring * padded rank_out), dense.
  bool leave = true;
  void* y = nullptr;
  Strides4 y_strides;
  void* rank_image = nullptr;
  int64_t out_height = 0, out_width = 0;

  // Packed by launch_pack; of those not used, null.
  const void* enter_fragments = nullptr;
  const void* core_fragments = nullptr;  // depthwise: float32 [kernel_h * kernel_w, padded rank]
  const void* leave_fragments = nullptr;
  const void* bias = nullptr;  // [c_out] or null

  Tile tile;
};

// A matrix [k, n] a tap, of any strides, to the order in which tensor cores take it. Both sides may be cut into ring
// slices, each padded to kRankPad.
struct PackParams {
  int32_t bytes = 4;     // of an element; the packed form of 4-byte elements has a high and a low TF32 part
  int32_t k = 0, n = 0;  // of one slice
  int32_t ring_k = 1, ring_n = 1;
  bool pad_k = false;  // each slice of k padded to kRankPad; else k as a whole to one step
  int32_t kernel_h = 1, kernel_w = 1;
  int64_t stride_k = 0, stride_n = 0, stride_h = 0, stride_w = 0;  // in elements
  const void* from = nullptr;
  void* to = nullptr;
};

// Packed one after the other by one launch: every launch costs a few microseconds.
constexpr int kMostPacks = 5;
struct PackBatch {
  int32_t count = 0;
  PackParams item[kMostPacks];
};

// Core of a depthwise convolution, [rank, kernel_h, kernel_w] of any strides, to float32 [kernel_h * kernel_w, padded].
struct PackDepthwiseParams {
  Element element = Element::kFloat32;
  int32_t rank = 0, kernel_h = 1, kernel_w = 1;
  int64_t stride_rank = 0, stride_h = 0, stride_w = 0;
  const void* from = nullptr;
  void* to = nullptr;
};

// partial[split][tap * m_pitch + m][n] = sum over the split's share of ring indices q and grid pixels p of
//   a[image, input(p, tap), q * a_slice + m] * b[image, output(p), q * b_slice + n]
// and, where partial_bias is not null (one tap), partial_bias[split][m] = sum of a. a_slice and b_slice are channels
// from one ring index to the next. Taps lie side by side in the rows of the result, so that a tile of it holds several
// of a small rank. With `diagonal` only tiles that hold elements of m == n are computed, and a row of partial has the
// columns of its tile alone.
struct PixelSumParams {
  Element element = Element::kFloat32;
  int64_t batch = 0;
  Axis h, w;
  int32_t m = 0, n = 0, ring = 1;
  int32_t m_pitch = 0;  // sum_row_pitch(m, diagonal), at least m
  int64_t a_slice = 0, b_slice = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  Strides4 a_strides, b_strides;
  bool diagonal = false;
  int64_t splits = 1;
  float* partial = nullptr;
  float* partial_bias = nullptr;
};

// out[m * stride_m + column(n) * stride_n + tap_h * stride_h + tap_w * stride_w] = sum of partial over splits, where
// columns are numbered without the padding of ring slices; depthwise (diagonal): one element a rank and tap.
struct PixelSumFinishParams {
  Element element = Element::kFloat32;
  int64_t splits = 1;
  int32_t taps_h = 1, taps_w = 1, m = 0, n = 0, m_pitch = 0;
  int32_t slice = 0, slice_padded = 0;  // of n; slice == slice_padded where nothing is padded
  bool diagonal = false;
  const float* partial = nullptr;
  const float* partial_bias = nullptr;
  void* out = nullptr;
  int64_t stride_m = 0, stride_n = 0, stride_h = 0, stride_w = 0;
  void* out_bias = nullptr;  // [m] or null
};

}  // namespace tensorcomp::cuda
