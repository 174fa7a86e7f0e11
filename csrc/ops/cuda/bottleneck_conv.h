// Shared by the CUDA ops of bottleneck convolutions: arguments to a problem of the kernels.
#pragma once

#include <optional>

#include "ops/cuda/device_utils.h"

namespace tensorcomp::ops::cuda {

// Names for messages, and how the weights are cut.
struct ConvKind {
  const char* op;
  int64_t ring = 1;
  bool depthwise = false;
};

struct ConvSizes {
  int64_t rank_out, rank_in, kernel_h, kernel_w, c_in, c_out;
};

struct ConvWindow {
  std::array<int64_t, 2> stride, dilation;
  std::array<int64_t, 4> padding;  // top, bottom, left, right
};

ConvWindow conv_window(const char* op, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation);

// Raises where weights do not fit each other.
ConvSizes conv_sizes(const ConvKind& kind, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in);

// Raises where x has not four dimensions or the wrong channels, or is smaller than the kernel. With `from_rank` x is
// the rank space.
Convolution conv_problem(const ConvKind& kind, const ConvSizes& sizes, const ConvWindow& window, const Tensor& x,
                         bool allow_tf32, bool from_rank = false);

Tensor run_conv(const Convolution& c, const CallDevice& device, const Tensor& x, const Tensor& packed,
                const std::optional<Tensor>& bias, bool from_rank, const char* op);

// Weights in the order of the kernels.
Tensor pack_conv(const Convolution& c, const CallDevice& device, const Tensor& core, const Tensor& factor_out,
                 const Tensor& factor_in);

}  // namespace tensorcomp::ops::cuda
