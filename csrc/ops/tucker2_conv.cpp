// torch.ops.tensorcomp.tucker2_conv2d and its packed form on the CPU: check, allocate, run the kernel's pieces on
// torch's thread pool. allow_tf32 is for other devices: no product is rounded here.

#include <string>
#include <vector>

#include "../kernels/cpu/dispatch.h"
#include "phases.h"
#include "tensor_utils.h"
#include "tucker2_conv.h"

namespace tensorcomp::ops {
namespace {

// In front of packed weights; 64 bytes keep what follows aligned.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x3270636e6574;  // "tencp2"
  int64_t magic, isa_and_dtype, c_in, rank_in, rank_out, c_out, kernel_h, kernel_w;
};
static_assert(sizeof(PackedHeader) == 64, "packed weights start at a cache line");

PackedHeader packed_header(const BottleneckShape& s, int64_t isa) {
  const int64_t isa_and_dtype = isa * 16 + static_cast<int64_t>(s.dtype);
  return {PackedHeader::kMagic, isa_and_dtype, s.c_in, s.rank_in, s.rank_out, s.c_out, s.kernel_h, s.kernel_w};
}

std::string list(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace

BottleneckShape checked_shape(const Tensor& core, const Tensor& factor_out, const Tensor& factor_in) {
  STD_TORCH_CHECK(core.dim() == 4, "tucker2_conv2d: core must be [R_out, R_in, kH, kW], got ", list(core));
  STD_TORCH_CHECK(core.numel() > 0, "tucker2_conv2d: core must be [R_out, R_in, kH, kW] with no empty mode, got ",
                  list(core));
  STD_TORCH_CHECK(factor_out.dim() == 2 && factor_out.size(1) == core.size(0),
                  "tucker2_conv2d: factor_out must be [C_out, R_out] with R_out = ", core.size(0), ", got ",
                  list(factor_out));
  STD_TORCH_CHECK(factor_in.dim() == 2 && factor_in.size(1) == core.size(1),
                  "tucker2_conv2d: factor_in must be [C_in, R_in] with R_in = ", core.size(1), ", got ",
                  list(factor_in));
  for (const Tensor* t : {&factor_out, &factor_in}) {
    STD_TORCH_CHECK(t->scalar_type() == core.scalar_type() && t->is_cpu(),
                    "tucker2_conv2d: core and factors must have one dtype and lie on the CPU");
  }
  BottleneckShape s;
  s.dtype = kernel_dtype(core);
  s.c_in = factor_in.size(0);
  s.rank_in = core.size(1);
  s.rank_out = core.size(0);
  s.c_out = factor_out.size(0);
  s.kernel_h = core.size(2);
  s.kernel_w = core.size(3);
  return s;
}

BottleneckConvParams checked_problem(const BottleneckShape& s, const Tensor& x, const ConvGeometry& g) {
  STD_TORCH_CHECK(x.dim() == 4, "tucker2_conv2d: x must be [N, C_in, H, W], got ", list(x));
  STD_TORCH_CHECK(x.size(1) == s.c_in, "tucker2_conv2d: factor_in must be [C_in, R_in] with C_in = ", x.size(1),
                  ", got [", s.c_in, ", ", s.rank_in, "]");
  STD_TORCH_CHECK(x.is_cpu() && has_native_dtype(x) && kernel_dtype(x) == s.dtype,
                  "tucker2_conv2d: x must lie on the CPU and have the dtype of the weights");
  STD_TORCH_CHECK(g.stride[0] > 0 && g.stride[1] > 0 && g.dilation[0] > 0 && g.dilation[1] > 0,
                  "tucker2_conv2d: stride and dilation must be >= 1");
  for (const int64_t pad : g.padding) STD_TORCH_CHECK(pad >= 0, "tucker2_conv2d: padding must be >= 0, got ", pad);
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
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "tucker2_conv2d: the padded input is smaller than the dilated kernel");
  p.out_height = rows / p.stride_h + 1;
  p.out_width = columns / p.stride_w + 1;
  p.x = x.const_data_ptr();
  p.x_strides = strides4(x);
  return p;
}

int64_t bottleneck_macs(const BottleneckConvParams& p) {
  const BottleneckShape& s = p.shape;
  return p.batch *
         (p.height * p.width * s.c_in * s.rank_in +
          p.out_height * p.out_width * (s.kernel_h * s.kernel_w * s.rank_in * s.rank_out + s.rank_out * s.c_out));
}

ConvGeometry conv_geometry(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation) {
  const auto at = [](const std::vector<int64_t>& v, size_t i) { return v.size() == 1 ? v[0] : v[i]; };
  STD_TORCH_CHECK(stride.size() == 1 || stride.size() == 2, "tucker2_conv2d: stride must be an int or a pair");
  STD_TORCH_CHECK(dilation.size() == 1 || dilation.size() == 2, "tucker2_conv2d: dilation must be an int or a pair");
  STD_TORCH_CHECK(padding.size() == 1 || padding.size() == 2 || padding.size() == 4,
                  "tucker2_conv2d: padding must be an int, a pair or (top, bottom, left, right)");
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

// Runs a prepared problem; weights are packed here unless the caller has them packed.
Tensor run_forward(BottleneckConvParams& p, const Tensor& x, const std::optional<Tensor>& bias,
                   const BottleneckWeights* weights, const BottleneckKernels& kernels) {
  const BottleneckShape& s = p.shape;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.c_out,
                    "tucker2_conv2d: bias must be [C_out] with C_out = ", s.c_out, ", got ", list(*bias));
    STD_TORCH_CHECK(bias->is_cpu() && has_native_dtype(*bias) && kernel_dtype(*bias) == s.dtype,
                    "tucker2_conv2d: bias must lie on the CPU and have the dtype of x");
  }
  const bool channels_last = suggests_channels_last(x);
  Tensor y = empty_image(p.batch, s.c_out, p.out_height, p.out_width, channels_last, s.dtype);
  if (y.numel() == 0) return y;
  p.y = y.mutable_data_ptr();
  p.y_strides = strides4(y);
  if (channels_last) p.y_strides.c = 1;
  Tensor bias_held = y;
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
  const BottleneckShape s = checked_shape(core, factor_out, factor_in);
  BottleneckConvParams p = checked_problem(s, x, conv_geometry(stride, padding, dilation));
  const Tensor c = dense(core), out = dense(factor_out), in = dense(factor_in);
  const BottleneckWeights weights{c.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()};
  return run_forward(p, x, bias, &weights, kernel_table().bottleneck(s.dtype));
}

Tensor tucker2_conv2d_pack(const Tensor& core, const Tensor& factor_out, const Tensor& factor_in) {
  STD_TORCH_CHECK(has_native_dtype(core), "tucker2_conv2d_pack: weights must be float32 or bfloat16");
  const BottleneckShape s = checked_shape(core, factor_out, factor_in);
  const KernelTable& table = kernel_table();
  const BottleneckKernels& kernels = table.bottleneck(s.dtype);
  Tensor packed = empty_bytes(sizeof(PackedHeader) + kernels.packed_bytes(s));
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  *reinterpret_cast<PackedHeader*>(to) = packed_header(s, table.id);
  const Tensor c = dense(core), out = dense(factor_out), in = dense(factor_in);
  kernels.pack(s, {c.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()}, to + sizeof(PackedHeader));
  return packed;
}

// geometry: rank_out, rank_in, kernel_h, kernel_w, c_in, c_out, stride (2), padding (4), dilation (2)
Tensor tucker2_conv2d_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias,
                             std::vector<int64_t> geometry) {
  STD_TORCH_CHECK(geometry.size() == 14, "tucker2_conv2d_packed: geometry must hold 14 ints, got ", geometry.size());
  STD_TORCH_CHECK(has_native_dtype(x), "tucker2_conv2d_packed: x must be float32 or bfloat16");
  BottleneckShape s;
  s.dtype = kernel_dtype(x);
  s.rank_out = geometry[0];
  s.rank_in = geometry[1];
  s.kernel_h = geometry[2];
  s.kernel_w = geometry[3];
  s.c_in = geometry[4];
  s.c_out = geometry[5];
  ConvGeometry g;
  g.stride = {geometry[6], geometry[7]};
  g.padding = {geometry[8], geometry[9], geometry[10], geometry[11]};
  g.dilation = {geometry[12], geometry[13]};
  const KernelTable& table = kernel_table();
  const PackedHeader expected = packed_header(s, table.id);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
                  "tucker2_conv2d_packed: packed must come from tucker2_conv2d_pack");
  const char* from = static_cast<const char*>(packed.const_data_ptr());
  STD_TORCH_CHECK(std::equal(from, from + sizeof(PackedHeader), reinterpret_cast<const char*>(&expected)),
                  "tucker2_conv2d_packed: the weights were packed for other sizes, another dtype or another "
                  "instruction set: pack them again");
  STD_TORCH_CHECK(
      packed.numel() == static_cast<int64_t>(sizeof(PackedHeader) + table.bottleneck(s.dtype).packed_bytes(s)),
      "tucker2_conv2d_packed: packed is truncated");
  BottleneckConvParams p = checked_problem(s, x, g);
  p.packed = from + sizeof(PackedHeader);
  p.packed_whole = true;
  return run_forward(p, x, bias, nullptr, table.bottleneck(s.dtype));
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
