// torch.ops.tensorcomp.tucker2_conv2d_backward on the CPU.

#include <vector>

#include "bottleneck_problem.h"

namespace tensorcomp::ops {
namespace {

Gradients call_reference(const Tensor& grad, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                         const Tensor& factor_in, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t mask,
                         bool allow_tf32) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 10> stack{from(grad),   from(x),       from(core),     from(factor_out), from(factor_in),
                                     from(stride), from(padding), from(dilation), from(mask),       from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::tucker2_conv2d_backward_reference", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

Gradients tucker2_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                                  const Tensor& factor_in, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, int64_t mask, bool allow_tf32) {
  if (has_native_dtype(x)) {
    const ConvKind kind{"tucker2_conv2d_backward"};
    const ConvGeometry geometry = conv_geometry(kind, stride, padding, dilation);
    const auto found = run_backward(kind, grad, x, core, factor_out, factor_in, geometry, mask);
    if (found) return *found;
  }
  return call_reference(grad, x, core, factor_out, factor_in, stride, padding, dilation, mask, allow_tf32);
}

}  // namespace
}  // namespace tensorcomp::ops

STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "tucker2_conv2d_backward(Tensor grad, Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, "
      "int[2] stride, int[2] padding, int[2] dilation, int output_mask, bool allow_tf32=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("tucker2_conv2d_backward", TORCH_BOX(&tensorcomp::ops::tucker2_conv2d_backward));
}
