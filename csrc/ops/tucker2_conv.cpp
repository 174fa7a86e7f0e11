// torch.ops.tensorcomp.tucker2_conv2d and its packed form on the CPU: a bottleneck convolution without a ring.
// allow_tf32 is for other devices: no product is rounded here.

#include <vector>

#include "bottleneck_problem.h"

namespace tensorcomp::ops {
namespace {

// What the kernels cannot take goes to the oracle that Python registers; a plain C++ process has none.
Tensor call_reference(const Tensor& x, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in,
                      const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool allow_tf32) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),      from(core),    from(factor_out), from(factor_in), from(bias),
                                    from(stride), from(padding), from(dilation),   from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::tucker2_conv2d_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor tucker2_conv2d(const Tensor& x, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in,
                      std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, bool allow_tf32) {
  if (!has_native_dtype(x)) {
    return call_reference(x, core, factor_out, factor_in, bias, stride, padding, dilation, allow_tf32);
  }
  const ConvKind kind{"tucker2_conv2d"};
  const BottleneckShape s = checked_shape(kind, core, factor_out, factor_in);
  BottleneckConvParams p = checked_problem(kind, s, x, conv_geometry(kind, stride, padding, dilation));
  const Tensor c = dense(core), out = dense(factor_out), in = dense(factor_in);
  const BottleneckWeights weights{c.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()};
  return run_forward(kind, p, x, {bias, std::nullopt}, &weights);
}

Tensor tucker2_conv2d_pack(const Tensor& core, const Tensor& factor_out, const Tensor& factor_in) {
  return pack_weights({"tucker2_conv2d_pack"}, core, factor_out, factor_in);
}

Tensor tucker2_conv2d_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias,
                             std::vector<int64_t> geometry) {
  STD_TORCH_CHECK(geometry.size() == 14, "tucker2_conv2d_packed: geometry must hold 14 ints, got ", geometry.size());
  return run_packed({"tucker2_conv2d_packed"}, x, packed, {bias, std::nullopt}, geometry);
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/tucker2_conv.py too, for installations without native code.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "tucker2_conv2d(Tensor x, Tensor core, Tensor factor_out, Tensor factor_in, Tensor? bias=None, "
      "int[2] stride=1, int[2] padding=0, int[2] dilation=1, bool allow_tf32=False) -> Tensor");
  m.def("tucker2_conv2d_pack(Tensor core, Tensor factor_out, Tensor factor_in) -> Tensor");
  m.def("tucker2_conv2d_packed(Tensor x, Tensor packed, Tensor? bias, int[] geometry) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("tucker2_conv2d", TORCH_BOX(&tensorcomp::ops::tucker2_conv2d));
  m.impl("tucker2_conv2d_pack", TORCH_BOX(&tensorcomp::ops::tucker2_conv2d_pack));
  m.impl("tucker2_conv2d_packed", TORCH_BOX(&tensorcomp::ops::tucker2_conv2d_packed));
}
