#include "bottleneck_problem.h"

#include "phases.h"

namespace tensorcomp::ops {
namespace {

std::string ranks(const ConvKind& kind, const char* rank) {
  return kind.depthwise ? "R" : kind.ring == 1 ? rank : std::string("ring ") + rank;
}

}  // namespace

BottleneckShape checked_shape(const ConvKind& kind, const Tensor& core, const Tensor& factor_out,
                              const Tensor& factor_in) {
  const char* const form = kind.depthwise ? "[R, 1, kH, kW]" : "[R_out, R_in, kH, kW]";
  STD_TORCH_CHECK(kind.ring >= 1, kind.op, ": ring must be an int >= 1, got ", kind.ring);
  STD_TORCH_CHECK(!kind.depthwise || kind.ring == 1, kind.op, ": ring must be 1 where depthwise=True, got ", kind.ring);
  STD_TORCH_CHECK(core.dim() == 4, kind.op, ": core must be ", form, ", got ", sizes_of(core));
  STD_TORCH_CHECK(core.numel() > 0 && (!kind.depthwise || core.size(1) == 1), kind.op, ": core must be ", form,
                  " with no empty mode, got ", sizes_of(core));
  const int64_t rank_in = kind.depthwise ? core.size(0) : core.size(1);
  const auto check_factor = [&](const Tensor& factor, const char* name, const char* channels, const char* rank,
                                int64_t wanted) {
    STD_TORCH_CHECK(factor.dim() == 2 && factor.size(1) == wanted, kind.op, ": ", name, " must be [", channels, ", ",
                    ranks(kind, rank), "] with ", ranks(kind, rank), " = ", wanted, ", got ", sizes_of(factor));
  };
  check_factor(factor_out, "factor_out", "C_out", "R_out", kind.ring * core.size(0));
  check_factor(factor_in, "factor_in", "C_in", "R_in", kind.ring * rank_in);
  for (const Tensor* t : {&factor_out, &factor_in}) {
    STD_TORCH_CHECK(t->scalar_type() == core.scalar_type() && t->is_cpu(), kind.op,
                    ": core and factors must have one dtype and lie on the CPU");
  }
  BottleneckShape s;
  s.dtype = kernel_dtype(core);
  s.c_in = factor_in.size(0);
  s.rank_in = rank_in;
  s.rank_out = core.size(0);
  s.c_out = factor_out.size(0);
  s.kernel_h = core.size(2);
  s.kernel_w = core.size(3);
  s.ring = kind.ring;
  s.depthwise = kind.depthwise;
  return s;
}

BottleneckConvParams checked_problem(const ConvKind& kind, const BottleneckShape& s, const Tensor& x,
                                     const ConvGeometry& g) {
  STD_TORCH_CHECK(x.dim() == 4, kind.op, ": x must be [N, C_in, H, W], got ", sizes_of(x));
  STD_TORCH_CHECK(x.size(1) == s.c_in, kind.op, ": factor_in must be [C_in, ", ranks(kind, "R_in"),
                  "] with C_in = ", x.size(1), ", got [", s.c_in, ", ", s.mid(), "]");
  STD_TORCH_CHECK(x.is_cpu() && has_native_dtype(x) && kernel_dtype(x) == s.dtype, kind.op,
                  ": x must lie on the CPU and have the dtype of the weights");
  STD_TORCH_CHECK(g.stride[0] > 0 && g.stride[1] > 0 && g.dilation[0] > 0 && g.dilation[1] > 0, kind.op,
                  ": stride and dilation must be >= 1");
  for (const int64_t pad : g.padding) STD_TORCH_CHECK(pad >= 0, kind.op, ": padding must be >= 0, got ", pad);
  BottleneckConvParams p;
  p.shape = s;
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.stride_h = g.stride[0];
  p.stride_w = g.stride[1];
  p.pad_top = g.padding[0];
  p.pad_left = g.padding[2];
  p.dilation_h = g.dilation[0];
  p.dilation_w = g.dilation[1];
  const int64_t rows = p.height + g.padding[0] + g.padding[1] - p.dilation_h * (s.kernel_h - 1) - 1;
  const int64_t columns = p.width + g.padding[2] + g.padding[3] - p.dilation_w * (s.kernel_w - 1) - 1;
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, kind.op, ": the padded input is smaller than the dilated kernel");
  p.out_height = rows / p.stride_h + 1;
  p.out_width = columns / p.stride_w + 1;
  p.x = x.const_data_ptr();
  p.x_strides = strides4(x);
  return p;
}

int64_t bottleneck_macs(const BottleneckConvParams& p) {
  const BottleneckShape& s = p.shape;
  return p.batch *
         (p.height * p.width * s.c_in * s.mid() + p.out_height * p.out_width * (s.core_macs() + s.out() * s.c_out));
}

ConvGeometry conv_geometry(const ConvKind& kind, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const auto at = [](const std::vector<int64_t>& v, size_t i) { return v.size() == 1 ? v[0] : v[i]; };
  STD_TORCH_CHECK(stride.size() == 1 || stride.size() == 2, kind.op, ": stride must be an int or a pair");
  STD_TORCH_CHECK(dilation.size() == 1 || dilation.size() == 2, kind.op, ": dilation must be an int or a pair");
  STD_TORCH_CHECK(padding.size() == 1 || padding.size() == 2 || padding.size() == 4, kind.op,
                  ": padding must be an int, a pair or (top, bottom, left, right)");
  ConvGeometry g;
  g.stride = {at(stride, 0), at(stride, 1)};
  g.dilation = {at(dilation, 0), at(dilation, 1)};
  if (padding.size() == 4) {
    g.padding = {padding[0], padding[1], padding[2], padding[3]};
  } else {
    g.padding = {at(padding, 0), at(padding, 0), at(padding, 1), at(padding, 1)};
  }
  return g;
}

namespace {

// `residual` itself where it lies in memory as y does, else a copy that does.
Tensor in_layout_of(const ConvKind& kind, const Tensor& y, const Tensor& residual) {
  bool sizes = residual.dim() == 4;
  for (int64_t d = 0; sizes && d < 4; ++d) sizes = residual.size(d) == y.size(d);
  STD_TORCH_CHECK(sizes, kind.op, ": residual must be [N, C_out, H', W'] = ", sizes_of(y), ", got ",
                  sizes_of(residual));
  STD_TORCH_CHECK(residual.is_cpu() && residual.scalar_type() == y.scalar_type(), kind.op,
                  ": residual must lie on the CPU and have the dtype of x");
  bool same = true;
  for (int64_t d = 0; d < 4; ++d) same = same && (y.size(d) == 1 || residual.stride(d) == y.stride(d));
  if (same) return residual;
  Tensor copy = torch::stable::empty_like(y);
  torch::stable::copy_(copy, residual);
  return copy;
}

}  // namespace

Tensor run_forward(const ConvKind& kind, BottleneckConvParams& p, const Tensor& x, const ConvTail& tail,
                   const BottleneckWeights* weights) {
  const BottleneckKernels& kernels = kernel_table().bottleneck(p.shape.dtype);
  const std::optional<Tensor>& bias = tail.bias;
  const BottleneckShape& s = p.shape;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.c_out, kind.op,
                    ": bias must be [C_out] with C_out = ", s.c_out, ", got ", sizes_of(*bias));
    STD_TORCH_CHECK(bias->is_cpu() && has_native_dtype(*bias) && kernel_dtype(*bias) == s.dtype, kind.op,
                    ": bias must lie on the CPU and have the dtype of x");
  }
  const bool channels_last = suggests_channels_last(x);
  Tensor y = empty_image(p.batch, s.c_out, p.out_height, p.out_width, channels_last, s.dtype);
  if (y.numel() == 0) return y;
  p.y = y.mutable_data_ptr();
  p.y_strides = strides4(y);
  if (channels_last) p.y_strides.c = 1;
  p.relu = tail.relu;
  Tensor residual_held = y, bias_held = y;
  if (tail.residual) {
    residual_held = in_layout_of(kind, y, *tail.residual);
    p.residual = residual_held.const_data_ptr();
  }
  if (bias) {
    bias_held = dense(*bias);
    p.bias = bias_held.const_data_ptr();
  }
  const int64_t threads = useful_threads(bottleneck_macs(p));
  const BottleneckPlan plan = kernels.plan(p, threads);
  const size_t packed_bytes = weights ? (kernels.packed_bytes_for(p, threads) + 63) / 64 * 64 : 0;
  Tensor scratch = empty_bytes(plan.scratch_bytes + packed_bytes);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  if (weights) {
    kernels.pack_for(p, threads, *weights, memory);
    p.packed = memory;
  }
  p.scratch = memory + packed_bytes;
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.run(p, threads, phase, part); });
  return y;
}

}  // namespace tensorcomp::ops
