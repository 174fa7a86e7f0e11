// Shared by the forward and backward ops of the Tucker-2 convolution.
#pragma once

#include <array>
#include <vector>

#include "tensor_utils.h"

namespace tensorcomp::ops {

struct ConvGeometry {
  std::array<int64_t, 2> stride;
  std::array<int64_t, 4> padding;  // top, bottom, left, right
  std::array<int64_t, 2> dilation;
};

ConvGeometry conv_geometry(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation);

// Sizes of the weights; raises where they do not fit each other.
BottleneckShape checked_shape(const Tensor& core, const Tensor& factor_out, const Tensor& factor_in);

// Everything of the problem but the output; raises where x or the geometry do not fit.
BottleneckConvParams checked_problem(const BottleneckShape& s, const Tensor& x, const ConvGeometry& g);

int64_t bottleneck_macs(const BottleneckConvParams& p);

}  // namespace tensorcomp::ops
