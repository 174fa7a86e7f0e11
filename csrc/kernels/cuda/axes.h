// The gathers that convolutions and their gradients are made of, one direction at a time.
#pragma once

#include <cstdint>
#include <numeric>

#include "kernels/cuda/bottleneck.h"

namespace tensorcomp::cuda {

// Every position reads itself.
inline Axis pixel_axis(int64_t size) {
  Axis a;
  a.in = a.grid = size;
  return a;
}

inline Axis convolution_axis(int64_t in, int64_t out, int32_t kernel, int32_t stride, int32_t pad, int32_t dilation) {
  Axis a;
  a.in = in;
  a.grid = out;
  a.step = stride;
  a.taps = kernel;
  a.offset = -pad;
  a.gap = dilation;
  return a;
}

// The transpose: which positions of the convolution's output (`out` of them) the input positions phase, phase + stride,
// ... receive from. Position i hears of tap k from (i + pad - k * dilation) / stride where that is whole: for a phase
// always the same taps, every stride / gcd(stride, dilation)-th.
inline Axis transposed_axis(int64_t out, int64_t in, int32_t kernel, int32_t stride, int32_t pad, int32_t dilation,
                            int32_t phase) {
  Axis a;
  a.in = out;
  a.grid = in > phase ? (in - phase + stride - 1) / stride : 0;
  a.step = 1;
  a.first = phase;
  a.out_step = stride;
  const int32_t common = std::gcd(stride, dilation);
  a.tap_step = stride / common;
  a.gap = -(dilation / common);
  a.taps = 0;
  for (int32_t k = 0; k < kernel && k < a.tap_step; ++k) {
    const int64_t reach = static_cast<int64_t>(phase) + pad - static_cast<int64_t>(k) * dilation;
    if (reach % stride != 0) continue;
    a.tap = k;
    a.offset = static_cast<int32_t>(reach / stride);
    a.taps = (kernel - k + a.tap_step - 1) / a.tap_step;
    break;
  }
  return a;
}

}  // namespace tensorcomp::cuda
