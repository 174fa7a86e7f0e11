// torch.ops.tensorcomp.tucker2_conv2d_backward and bottleneck_conv2d_backward for CUDA.

#include <tuple>

#include "ops/cuda/bottleneck_conv.h"

namespace tensorcomp::ops::cuda {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <size_t kCount>
Results call_reference(const char* name, std::array<StableIValue, kCount> stack) {
  using torch::stable::detail::to;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

// Gradients of x, core, factor_out, factor_in and bias; those whose bit is not in `mask` are empty. Null where the
// oracle has to serve.
std::optional<Results> conv2d_backward(const ConvKind& kind, const Tensor& grad, const Tensor& x, const Tensor& core,
                                       const Tensor& factor_out, const Tensor& factor_in,
                                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation, int64_t mask, bool allow_tf32) {
  if (!served(x)) return std::nullopt;
  const CallDevice device(x);
  const ConvSizes sizes = conv_sizes(kind, core, factor_out, factor_in);
  const Convolution c = conv_problem(kind, sizes, conv_window(kind.op, stride, padding, dilation), x, allow_tf32);
  STD_TORCH_CHECK(core.scalar_type() == x.scalar_type() && core.get_device_index() == x.get_device_index(), kind.op,
                  ": x and the weights must have one dtype and lie on one device");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == c.batch && grad.size(1) == c.c_out &&
                      grad.size(2) == c.out_height && grad.size(3) == c.out_width &&
                      grad.scalar_type() == x.scalar_type() && grad.get_device_index() == x.get_device_index(),
                  kind.op, ": grad must have the shape, dtype and device of the output");
  if (!kernels_take(c, device) || (x.numel() == 0 && grad.numel() != 0)) return std::nullopt;
  const auto wanted = [mask](int bit) { return (mask >> bit & 1) != 0; };
  const auto empty = [&] { return contiguous_on<1>(x, {0}); };
  Tensor grad_x = wanted(0) ? image_on(x, c.batch, c.c_in, c.height, c.width, suggests_channels_last(x)) : empty();
  Tensor grad_core =
      wanted(1) ? contiguous_on<4>(x, {core.size(0), core.size(1), core.size(2), core.size(3)}) : empty();
  Tensor grad_out = wanted(2) ? contiguous_on<2>(x, {factor_out.size(0), factor_out.size(1)}) : empty();
  Tensor grad_in = wanted(3) ? contiguous_on<2>(x, {factor_in.size(0), factor_in.size(1)}) : empty();
  Tensor grad_bias = wanted(4) ? contiguous_on<1>(x, {c.c_out}) : empty();
  if (grad.numel() == 0) {
    for (Tensor* t : {&grad_x, &grad_core, &grad_out, &grad_in, &grad_bias}) torch::stable::zero_(*t);
    return Results{grad_x, grad_core, grad_out, grad_in, grad_bias};
  }
  Gradients g;
  if (wanted(0)) {
    g.x = grad_x.mutable_data_ptr();
    g.x_strides = image_strides(grad_x);
  }
  if (wanted(1)) g.core = grad_core.mutable_data_ptr();
  if (wanted(2)) g.factor_out = grad_out.mutable_data_ptr();
  if (wanted(3)) g.factor_in = grad_in.mutable_data_ptr();
  if (wanted(4)) g.bias = grad_bias.mutable_data_ptr();
  const DeviceLimits limits = device.limits();
  Tensor scratch = bytes_on(x, backward_scratch(c, limits, g));
  const Tensor k = dense(core), out = dense(factor_out), in = dense(factor_in);
  TC_CHECK_LAUNCH(backward(c, limits, image_of(grad), image_of(x),
                           {k.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()}, g,
                           scratch.mutable_data_ptr(), device.stream()));
  return Results{grad_x, grad_core, grad_out, grad_in, grad_bias};
}

Results tucker2_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                                const Tensor& factor_in, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                std::vector<int64_t> dilation, int64_t mask, bool allow_tf32) {
  using torch::stable::detail::from;
  const auto found = conv2d_backward({"tucker2_conv2d_backward"}, grad, x, core, factor_out, factor_in, stride, padding,
                                     dilation, mask, allow_tf32);
  if (found.has_value()) return *found;
  return call_reference<10>("tensorcomp::tucker2_conv2d_backward_reference",
                            {from(grad), from(x), from(core), from(factor_out), from(factor_in), from(stride),
                             from(padding), from(dilation), from(mask), from(allow_tf32)});
}

Results bottleneck_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                                   const Tensor& factor_in, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation, int64_t mask, int64_t ring, bool depthwise,
                                   bool allow_tf32) {
  using torch::stable::detail::from;
  const auto found = conv2d_backward({"bottleneck_conv2d_backward", ring, depthwise}, grad, x, core, factor_out,
                                     factor_in, stride, padding, dilation, mask, allow_tf32);
  if (found.has_value()) return *found;
  return call_reference<12>("tensorcomp::bottleneck_conv2d_backward_reference",
                            {from(grad), from(x), from(core), from(factor_out), from(factor_in), from(stride),
                             from(padding), from(dilation), from(mask), from(ring), from(depthwise), from(allow_tf32)});
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("tucker2_conv2d_backward", TORCH_BOX(&tensorcomp::ops::cuda::tucker2_conv2d_backward));
  m.impl("bottleneck_conv2d_backward", TORCH_BOX(&tensorcomp::ops::cuda::bottleneck_conv2d_backward));
}
