// The gradients of bottleneck convolutions.

#include "bottleneck_problem.h"
#include "phases.h"

namespace tensorcomp::ops {
namespace {

Tensor zeroed(Tensor t) { return torch::stable::zero_(t); }

}  // namespace

std::optional<Gradients> run_backward(const ConvKind& kind, const Tensor& grad, const Tensor& x, const Tensor& core,
                                      const Tensor& factor_out, const Tensor& factor_in, const ConvGeometry& geometry,
                                      int64_t mask) {
  const BottleneckShape s = checked_shape(kind, core, factor_out, factor_in);
  BottleneckBackwardParams q;
  q.forward = checked_problem(kind, s, x, geometry);
  const BottleneckConvParams& p = q.forward;
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == p.batch && grad.size(1) == s.c_out &&
                      grad.size(2) == p.out_height && grad.size(3) == p.out_width &&
                      grad.scalar_type() == x.scalar_type() && grad.is_cpu(),
                  kind.op, ": grad must have the shape, dtype and device of the output");
  const auto wanted = [mask](int bit) { return (mask >> bit & 1) != 0; };
  const auto empty = [&] { return empty_cpu<1>({0}, {1}, torch_dtype(s.dtype)); };
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return empty_cpu<2>({rows, columns}, {columns, 1}, torch_dtype(s.dtype));
  };
  const bool channels_last = suggests_channels_last(x);
  Tensor grad_x = wanted(0) ? empty_image(p.batch, s.c_in, p.height, p.width, channels_last, s.dtype) : empty();
  Tensor grad_core = wanted(1)
                         ? empty_image(s.rank_out, s.depthwise ? 1 : s.rank_in, s.kernel_h, s.kernel_w, false, s.dtype)
                         : empty();
  Tensor grad_out = wanted(2) ? matrix(s.c_out, s.out()) : empty();
  Tensor grad_in = wanted(3) ? matrix(s.c_in, s.mid()) : empty();
  Tensor grad_bias = wanted(4) ? empty_cpu<1>({s.c_out}, {1}, torch_dtype(s.dtype)) : empty();
  if (x.numel() == 0 && grad.numel() != 0) return std::nullopt;
  if (grad.numel() == 0) {
    return Gradients{zeroed(grad_x), zeroed(grad_core), zeroed(grad_out), zeroed(grad_in), zeroed(grad_bias)};
  }
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
  return Gradients{grad_x, grad_core, grad_out, grad_in, grad_bias};
}

}  // namespace tensorcomp::ops
