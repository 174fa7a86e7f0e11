// torch.ops.tensorcomp.bottleneck_conv2d, its gradients and its packed form on the CPU. allow_tf32 is for other
// devices: no product is rounded here.

#include <vector>

#include "bottleneck_problem.h"

namespace tensorcomp::ops {
namespace {

// What the kernels cannot take goes to the oracle that Python registers; a plain C++ process has none.
Tensor call_reference(const Tensor& x, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in,
                      const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t ring,
                      bool depthwise, bool allow_tf32) {
  using torch::stable::detail::from;
  std::array<StableIValue, 11> stack{from(x),    from(core),      from(factor_out), from(factor_in),
                                     from(bias), from(stride),    from(padding),    from(dilation),
                                     from(ring), from(depthwise), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::bottleneck_conv2d_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor bottleneck_conv2d(const Tensor& x, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in,
                         std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t ring, bool depthwise, bool allow_tf32) {
  if (!has_native_dtype(x)) {
    return call_reference(x, core, factor_out, factor_in, bias, stride, padding, dilation, ring, depthwise, allow_tf32);
  }
  const ConvKind kind{"bottleneck_conv2d", ring, depthwise};
  const BottleneckShape s = checked_shape(kind, core, factor_out, factor_in);
  BottleneckConvParams p = checked_problem(kind, s, x, conv_geometry(kind, stride, padding, dilation));
  const Tensor c = dense(core), out = dense(factor_out), in = dense(factor_in);
  const BottleneckWeights weights{c.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()};
  return run_forward(kind, p, x, {bias, std::nullopt}, &weights);
}

Gradients call_backward_reference(const Tensor& grad, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                                  const Tensor& factor_in, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                  int64_t mask, int64_t ring, bool depthwise, bool allow_tf32) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 12> stack{from(grad),      from(x),      from(core),      from(factor_out),
                                     from(factor_in), from(stride), from(padding),   from(dilation),
                                     from(mask),      from(ring),   from(depthwise), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::bottleneck_conv2d_backward_reference", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

Gradients bottleneck_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                                     const Tensor& factor_in, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t mask, int64_t ring, bool depthwise,
                                     bool allow_tf32) {
  if (has_native_dtype(x)) {
    const ConvKind kind{"bottleneck_conv2d_backward", ring, depthwise};
    const ConvGeometry geometry = conv_geometry(kind, stride, padding, dilation);
    const auto found = run_backward(kind, grad, x, core, factor_out, factor_in, geometry, mask);
    if (found) return *found;
  }
  return call_backward_reference(grad, x, core, factor_out, factor_in, stride, padding, dilation, mask, ring, depthwise,
                                 allow_tf32);
}

Tensor bottleneck_conv2d_pack(const Tensor& core, const Tensor& factor_out, const Tensor& factor_in, int64_t ring,
                              bool depthwise) {
  return pack_weights({"bottleneck_conv2d_pack", ring, depthwise}, core, factor_out, factor_in);
}

// The last two of `geometry` are ring and depthwise.
Tensor bottleneck_conv2d_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias,
                                std::optional<Tensor> residual, std::vector<int64_t> geometry, bool relu) {
  STD_TORCH_CHECK(geometry.size() == 16, "bottleneck_conv2d_packed: geometry must hold 16 ints, got ", geometry.size());
  return run_packed({"bottleneck_conv2d_packed", geometry[14], geometry[15] != 0}, x, packed, {bias, residual, relu},
                    geometry);
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops too, for installations without native code.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "bottleneck_conv2d(Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, Tensor? bias=None, "
      "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int ring=1, bool depthwise=False, "
      "bool allow_tf32=False) -> Tensor");
  m.def(
      "bottleneck_conv2d_backward(Tensor grad, Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, "
      "int[2] stride, int[2] padding, int[2] dilation, int output_mask, int ring=1, bool depthwise=False, "
      "bool allow_tf32=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("bottleneck_conv2d_pack(Tensor core, Tensor factor_out, Tensor factor_in, int ring, bool depthwise) -> Tensor");
  m.def(
      "bottleneck_conv2d_packed(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[] geometry, bool relu) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("bottleneck_conv2d", TORCH_BOX(&tensorcomp::ops::bottleneck_conv2d));
  m.impl("bottleneck_conv2d_backward", TORCH_BOX(&tensorcomp::ops::bottleneck_conv2d_backward));
  m.impl("bottleneck_conv2d_pack", TORCH_BOX(&tensorcomp::ops::bottleneck_conv2d_pack));
  m.impl("bottleneck_conv2d_packed", TORCH_BOX(&tensorcomp::ops::bottleneck_conv2d_packed));
}
