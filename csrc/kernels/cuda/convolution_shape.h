// Sizes of a convolution, and whether a device can take them; host code without CUDA.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels/cuda/axes.h"
#include "kernels/cuda/plan.h"

namespace tensorcomp::cuda {

struct Convolution {
  Element element = Element::kFloat32;
  Core core = Core::kFull;  // kNone: a two-factor linear layer, batch = height = 1 and a pixel a row
  int64_t batch = 1, height = 1, width = 1, out_height = 1, out_width = 1;
  int32_t c_in = 0, rank_in = 0, rank_out = 0, c_out = 0, ring = 1;
  int32_t kernel_h = 1, kernel_w = 1;
  int32_t stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
};

namespace detail {

// The convolution as a problem of the kernel, without its data.
inline BottleneckParams problem(const Convolution& c) {
  BottleneckParams p;
  p.element = c.element;
  p.core = c.core;
  p.batch = c.batch;
  p.ring = c.ring;
  p.kernel_h = c.kernel_h;
  p.kernel_w = c.kernel_w;
  p.c_in = c.c_in;
  p.c_out = c.c_out;
  p.rank_in = c.rank_in;
  p.rank_out = c.rank_out;
  p.h = convolution_axis(c.height, c.out_height, c.kernel_h, c.stride_h, c.pad_top, c.dilation_h);
  p.w = convolution_axis(c.width, c.out_width, c.kernel_w, c.stride_w, c.pad_left, c.dilation_w);
  p.out_height = c.out_height;
  p.out_width = c.out_width;
  return p;
}

}  // namespace detail

// Whether the device's shared memory holds the tiles of forward and backward. False only for very large ranks.
inline bool fits(const Convolution& c, const DeviceLimits& device) {
  BottleneckParams there = detail::problem(c);
  if (!detail::smallest_tile(there, device)) return false;
  // Backward: the ranks change sides, and each phase of the stride gathers as much as stride 1 or less.
  BottleneckParams back = there;
  std::swap(back.rank_in, back.rank_out);
  std::swap(back.c_in, back.c_out);
  back.h.step = back.w.step = 1;
  back.h.in = c.out_height;
  back.w.in = c.out_width;
  return detail::smallest_tile(back, device);
}

}  // namespace tensorcomp::cuda
