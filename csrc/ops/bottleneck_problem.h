// Shared by the CPU ops of bottleneck convolutions: checks, and running the kernels.
#pragma once

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/cpu/dispatch.h"
#include "tensor_utils.h"

namespace tensorcomp::ops {

// Which op is called, as messages name it, and the form of its core.
struct ConvKind {
  const char* op;
  int64_t ring = 1;
  bool depthwise = false;
};

struct ConvGeometry {
  std::array<int64_t, 2> stride;
  std::array<int64_t, 4> padding;  // top, bottom, left, right
  std::array<int64_t, 2> dilation;
};

ConvGeometry conv_geometry(const ConvKind& kind, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// Sizes of the weights; raises where they do not fit each other.
BottleneckShape checked_shape(const ConvKind& kind, const Tensor& core, const Tensor& factor_out,
                              const Tensor& factor_in);

// Everything of the problem but the output; raises where x or the geometry do not fit.
BottleneckConvParams checked_problem(const ConvKind& kind, const BottleneckShape& s, const Tensor& x,
                                     const ConvGeometry& g);

int64_t bottleneck_macs(const BottleneckConvParams& p);

// What a call adds to the convolution.
struct ConvTail {
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
  bool relu = false;
};

// Runs a checked problem; `weights` are packed for it, or null where p.packed is set.
Tensor run_forward(const ConvKind& kind, BottleneckConvParams& p, const Tensor& x, const ConvTail& tail,
                   const BottleneckWeights* weights);

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, core, factor_out, factor_in and bias; those whose bit is not in `mask` are empty. None where only
// borders were multiplied: no tensor but the bias has a gradient to sum then.
std::optional<Gradients> run_backward(const ConvKind& kind, const Tensor& grad, const Tensor& x, const Tensor& core,
                                      const Tensor& factor_out, const Tensor& factor_in, const ConvGeometry& geometry,
                                      int64_t mask);

// A header of 64 bytes and all forms of the weights.
Tensor pack_weights(const ConvKind& kind, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in);

// The forward pass with packed weights. The first fourteen of `geometry`: the core's shape, c_in, c_out, stride (2),
// padding (4), dilation (2).
Tensor run_packed(const ConvKind& kind, const Tensor& x, const Tensor& packed, const ConvTail& tail,
                  const std::vector<int64_t>& geometry);

}  // namespace tensorcomp::ops
