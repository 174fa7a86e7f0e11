// The bottleneck convolution and the two-factor linear layer on a device, forward and backward: what to pack, what to
// launch in which order, and how much scratch memory it takes. Host code over plain pointers; nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/bottleneck_launch.h"
#include "kernels/cuda/convolution_shape.h"

namespace tensorcomp::cuda {

struct Image {
  const void* data = nullptr;
  Strides4 strides;
};

// Contiguous: core [rank_out, rank_in, kernel_h, kernel_w] (depthwise [rank, 1, ...], without one null), factor_out
// [c_out, ring * rank_out], factor_in [c_in, ring * rank_in].
struct Weights {
  const void* core = nullptr;
  const void* factor_out = nullptr;
  const void* factor_in = nullptr;
  bool factor_in_rank_first = false;  // [rank_in, c_in] instead; without a ring
};

// Results of backward; null ones are not computed. Weights as in Weights, bias [c_out], x of any dense strides.
struct Gradients {
  void* x = nullptr;
  Strides4 x_strides;
  void* core = nullptr;
  void* factor_out = nullptr;
  void* factor_in = nullptr;
  void* bias = nullptr;
  bool factor_in_rank_first = false;
};

// Packed weights serve any batch and image, and float32 as well as TF32.
size_t packed_bytes(const Convolution& c);
cudaError_t pack(const Convolution& c, const Weights& weights, void* packed, cudaStream_t stream);

// y = the convolution of x. With `from_rank` x is the rank space itself, rank_in channels, and only core and last
// factor are applied. All data pointers on the device; `packed` 16-byte aligned.
cudaError_t forward(const Convolution& c, const DeviceLimits& device, const Image& x, const void* packed,
                    const void* bias, bool from_rank, void* y, const Strides4& y_strides, cudaStream_t stream);

// Scratch memory of backward, 256-byte aligned.
size_t backward_scratch(const Convolution& c, const DeviceLimits& device, const Gradients& wanted);
cudaError_t backward(const Convolution& c, const DeviceLimits& device, const Image& grad, const Image& x,
                     const Weights& weights, const Gradients& wanted, void* scratch, cudaStream_t stream);

}  // namespace tensorcomp::cuda
