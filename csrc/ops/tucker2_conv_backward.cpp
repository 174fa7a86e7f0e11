// torch.ops.tensorcomp.tucker2_conv2d_backward on the CPU.

#include <tuple>
#include <vector>

#include "../kernels/cpu/dispatch.h"
#include "phases.h"
#include "tensor_utils.h"
#include "tucker2_conv.h"

namespace tensorcomp::ops {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

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

Tensor zeroed(Tensor t) { return torch::stable::zero_(t); }

// Gradients of x, core, factor_out, factor_in and bias; those whose bit is not in `mask` are empty.
Gradients tucker2_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                                  const Tensor& factor_in, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, int64_t mask, bool allow_tf32) {
  if (!has_native_dtype(x)) {
    return call_reference(grad, x, core, factor_out, factor_in, stride, padding, dilation, mask, allow_tf32);
  }
  const BottleneckShape s = checked_shape(core, factor_out, factor_in);
  BottleneckBackwardParams q;
  q.forward = checked_problem(s, x, conv_geometry(stride, padding, dilation));
  const BottleneckConvParams& p = q.forward;
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == p.batch && grad.size(1) == s.c_out &&
                      grad.size(2) == p.out_height && grad.size(3) == p.out_width &&
                      grad.scalar_type() == x.scalar_type() && grad.is_cpu(),
                  "tucker2_conv2d_backward: grad must have the shape, dtype and device of the output");
  const auto wanted = [mask](int bit) { return (mask >> bit & 1) != 0; };
  const auto empty = [&] { return empty_cpu<1>({0}, {1}, torch_dtype(s.dtype)); };
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return empty_cpu<2>({rows, columns}, {columns, 1}, torch_dtype(s.dtype));
  };
  const bool channels_last = suggests_channels_last(x);
  Tensor grad_x = wanted(0) ? empty_image(p.batch, s.c_in, p.height, p.width, channels_last, s.dtype) : empty();
  Tensor grad_core = wanted(1) ? empty_image(s.rank_out, s.rank_in, s.kernel_h, s.kernel_w, false, s.dtype) : empty();
  Tensor grad_out = wanted(2) ? matrix(s.c_out, s.rank_out) : empty();
  Tensor grad_in = wanted(3) ? matrix(s.c_in, s.rank_in) : empty();
  Tensor grad_bias = wanted(4) ? empty_cpu<1>({s.c_out}, {1}, torch_dtype(s.dtype)) : empty();
  if (x.numel() == 0 && grad.numel() != 0) {
    // Only borders were multiplied: nothing but the bias has a gradient to sum.
    return call_reference(grad, x, core, factor_out, factor_in, stride, padding, dilation, mask, allow_tf32);
  }
  if (grad.numel() == 0) {
    return {zeroed(grad_x), zeroed(grad_core), zeroed(grad_out), zeroed(grad_in), zeroed(grad_bias)};
  }
  const auto dense = [](const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); };
  const Tensor c = dense(core), out = dense(factor_out), in = dense(factor_in);
  q.weights = {c.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()};
  q.grad_y = grad.const_data_ptr();
  q.grad_y_strides = strides4(grad);
  if (wanted(0)) {
    q.grad_x = grad_x.mutable_data_ptr();
    q.grad_x_strides = strides4(grad_x);
    if (channels_last) q.grad_x_strides.c = 1;
  }
  if (wanted(1)) q.grad_core = grad_core.mutable_data_ptr();
  if (wanted(2)) q.grad_factor_out = grad_out.mutable_data_ptr();
  if (wanted(3)) q.grad_factor_in = grad_in.mutable_data_ptr();
  if (wanted(4)) q.grad_bias = grad_bias.mutable_data_ptr();

  const BottleneckKernels& kernels = kernel_table().bottleneck(s.dtype);
  const int64_t threads = useful_threads(2 * bottleneck_macs(p));
  const BottleneckPlan plan = kernels.backward_plan(q, threads);
  Tensor scratch = empty_bytes(plan.scratch_bytes);
  q.scratch = scratch.mutable_data_ptr();
  run_phases(plan.phases, plan.parts,
             [&](int64_t phase, int64_t part) { kernels.backward_run(q, threads, phase, part); });
  return {grad_x, grad_core, grad_out, grad_in, grad_bias};
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
