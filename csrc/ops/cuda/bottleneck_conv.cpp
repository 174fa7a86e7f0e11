// torch.ops.tensorcomp.tucker2_conv2d and bottleneck_conv2d for CUDA, and the packed forms for inference. Schemas, fake
// kernels and autograd are in tensorcomp_ext/ops.

#include "ops/cuda/bottleneck_conv.h"

#include <initializer_list>
#include <limits>

namespace tensorcomp::ops::cuda {

ConvWindow conv_window(const char* op, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation) {
  ConvWindow w;
  w.stride = pair_of(op, "stride", stride);
  w.dilation = pair_of(op, "dilation", dilation);
  if (padding.size() == 4) {
    w.padding = {padding[0], padding[1], padding[2], padding[3]};
  } else {
    const auto pads = pair_of(op, "padding", padding);
    w.padding = {pads[0], pads[0], pads[1], pads[1]};
  }
  return w;
}

ConvSizes conv_sizes(const ConvKind& kind, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in) {
  const char* op = kind.op;
  STD_TORCH_CHECK(core.dim() == 4 && core.numel() > 0, op,
                  ": core must be [R_out, R_in, kH, kW] with no empty mode, got ", sizes_of(core));
  STD_TORCH_CHECK(kind.ring >= 1 && (!kind.depthwise || (kind.ring == 1 && core.size(1) == 1)), op,
                  ": ring must be >= 1, and 1 with a depthwise core [R, 1, kH, kW]");
  const int64_t rank_out = core.size(0), rank_in = kind.depthwise ? rank_out : core.size(1);
  STD_TORCH_CHECK(factor_out.dim() == 2 && factor_out.size(1) == kind.ring * rank_out, op,
                  ": factor_out must be [C_out, ", kind.ring * rank_out, "], got ", sizes_of(factor_out));
  STD_TORCH_CHECK(factor_in.dim() == 2 && factor_in.size(1) == kind.ring * rank_in, op, ": factor_in must be [C_in, ",
                  kind.ring * rank_in, "], got ", sizes_of(factor_in));
  for (const Tensor* t : {&factor_out, &factor_in}) {
    STD_TORCH_CHECK(t->scalar_type() == core.scalar_type() && t->get_device_index() == core.get_device_index(), op,
                    ": core and factors must have one dtype and lie on one device");
  }
  return {rank_out, rank_in, core.size(2), core.size(3), factor_in.size(0), factor_out.size(0)};
}

Convolution conv_problem(const ConvKind& kind, const ConvSizes& sizes, const ConvWindow& window, const Tensor& x,
                         bool allow_tf32, bool from_rank) {
  const char* op = kind.op;
  const int64_t channels = from_rank ? kind.ring * sizes.rank_in : sizes.c_in;
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == channels, op, ": x must be [N, ", channels, ", H, W], got ",
                  sizes_of(x));
  STD_TORCH_CHECK(served(x), op, ": x must be float32, float16 or bfloat16");
  for (const int64_t v : {window.stride[0], window.stride[1], window.dilation[0], window.dilation[1]}) {
    STD_TORCH_CHECK(v >= 1, op, ": stride and dilation must be >= 1, got ", v);
  }
  for (const int64_t pad : window.padding) STD_TORCH_CHECK(pad >= 0, op, ": padding must be >= 0, got ", pad);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  const auto check_range = [&](std::initializer_list<int64_t> values) {
    for (const int64_t v : values) {
      STD_TORCH_CHECK(v <= kMost, op,
                      ": batch, image, ranks, channels, stride, padding and dilated kernel must be at most ", kMost,
                      ", got ", v);
    }
  };
  check_range({x.size(0), x.size(2), x.size(3), sizes.rank_out, sizes.rank_in, sizes.c_in, sizes.c_out, kind.ring,
               sizes.kernel_h, sizes.kernel_w, window.stride[0], window.stride[1], window.padding[0], window.padding[1],
               window.padding[2], window.padding[3], window.dilation[0], window.dilation[1]});
  check_range({kind.ring * sizes.rank_in, kind.ring * sizes.rank_out, window.dilation[0] * sizes.kernel_h,
               window.dilation[1] * sizes.kernel_w});
  Convolution c;
  c.element = element_of(x, allow_tf32);
  c.core = kind.depthwise ? Core::kDepthwise : Core::kFull;
  c.batch = x.size(0);
  c.height = x.size(2);
  c.width = x.size(3);
  c.c_in = static_cast<int32_t>(sizes.c_in);
  c.rank_in = static_cast<int32_t>(sizes.rank_in);
  c.rank_out = static_cast<int32_t>(sizes.rank_out);
  c.c_out = static_cast<int32_t>(sizes.c_out);
  c.ring = static_cast<int32_t>(kind.ring);
  c.kernel_h = static_cast<int32_t>(sizes.kernel_h);
  c.kernel_w = static_cast<int32_t>(sizes.kernel_w);
  c.stride_h = static_cast<int32_t>(window.stride[0]);
  c.stride_w = static_cast<int32_t>(window.stride[1]);
  c.pad_top = static_cast<int32_t>(window.padding[0]);
  c.pad_left = static_cast<int32_t>(window.padding[2]);
  c.dilation_h = static_cast<int32_t>(window.dilation[0]);
  c.dilation_w = static_cast<int32_t>(window.dilation[1]);
  const int64_t rows = c.height + window.padding[0] + window.padding[1] - window.dilation[0] * (sizes.kernel_h - 1) - 1;
  const int64_t columns =
      c.width + window.padding[2] + window.padding[3] - window.dilation[1] * (sizes.kernel_w - 1) - 1;
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": the padded input is smaller than the dilated kernel");
  c.out_height = rows / c.stride_h + 1;
  c.out_width = columns / c.stride_w + 1;
  return c;
}

Tensor pack_conv(const Convolution& c, const CallDevice& device, const Tensor& core, const Tensor& factor_out,
                 const Tensor& factor_in) {
  Tensor packed = bytes_on(core, packed_size(c));
  const Tensor k = dense(core), out = dense(factor_out), in = dense(factor_in);
  TC_CHECK_LAUNCH(pack(c, {k.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()}, packed.mutable_data_ptr(),
                       device.stream()));
  return packed;
}

Tensor run_conv(const Convolution& c, const CallDevice& device, const Tensor& x, const Tensor& packed,
                const std::optional<Tensor>& bias, bool from_rank, const char* op) {
  Tensor y = image_on(x, c.batch, c.c_out, c.out_height, c.out_width, suggests_channels_last(x));
  const std::optional<Tensor> kept_bias =
      dense_bias(op, "[C_out] with C_out = " + std::to_string(c.c_out), bias, x, c.c_out);
  if (y.numel() == 0) return y;
  TC_CHECK_LAUNCH(forward(c, device.limits(), image_of(x), packed.const_data_ptr(),
                          kept_bias.has_value() ? kept_bias->const_data_ptr() : nullptr, from_rank,
                          y.mutable_data_ptr(), image_strides(y), device.stream()));
  return y;
}

namespace {

template <size_t kCount>
Tensor call_reference(const char* name, std::array<StableIValue, kCount> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Null where the oracle has to serve.
std::optional<Tensor> conv2d(const ConvKind& kind, const Tensor& x, const Tensor& core, const Tensor& factor_out,
                             const Tensor& factor_in, const std::optional<Tensor>& bias,
                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, bool allow_tf32) {
  if (!served(x)) return std::nullopt;
  const CallDevice device(x);
  const ConvSizes sizes = conv_sizes(kind, core, factor_out, factor_in);
  STD_TORCH_CHECK(core.scalar_type() == x.scalar_type() && core.get_device_index() == x.get_device_index(), kind.op,
                  ": x and the weights must have one dtype and lie on one device");
  const Convolution c = conv_problem(kind, sizes, conv_window(kind.op, stride, padding, dilation), x, allow_tf32);
  // Of an empty image only borders are multiplied: the result is the bias.
  if (!kernels_take(c, device) || (x.numel() == 0 && x.size(0) != 0)) return std::nullopt;
  if (x.numel() == 0) return image_on(x, c.batch, c.c_out, c.out_height, c.out_width, suggests_channels_last(x));
  return run_conv(c, device, x, pack_conv(c, device, core, factor_out, factor_in), bias, false, kind.op);
}

Tensor tucker2_conv2d(const Tensor& x, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in,
                      std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, bool allow_tf32) {
  using torch::stable::detail::from;
  const auto y =
      conv2d({"tucker2_conv2d"}, x, core, factor_out, factor_in, bias, stride, padding, dilation, allow_tf32);
  if (y.has_value()) return *y;
  return call_reference<9>("tensorcomp::tucker2_conv2d_reference",
                           {from(x), from(core), from(factor_out), from(factor_in), from(bias), from(stride),
                            from(padding), from(dilation), from(allow_tf32)});
}

Tensor bottleneck_conv2d(const Tensor& x, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in,
                         std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t ring, bool depthwise, bool allow_tf32) {
  using torch::stable::detail::from;
  const ConvKind kind{"bottleneck_conv2d", ring, depthwise};
  const auto y = conv2d(kind, x, core, factor_out, factor_in, bias, stride, padding, dilation, allow_tf32);
  if (y.has_value()) return *y;
  return call_reference<11>("tensorcomp::bottleneck_conv2d_reference",
                            {from(x), from(core), from(factor_out), from(factor_in), from(bias), from(stride),
                             from(padding), from(dilation), from(ring), from(depthwise), from(allow_tf32)});
}

Tensor tucker2_conv2d_pack(const Tensor& core, const Tensor& factor_out, const Tensor& factor_in) {
  const ConvKind kind{"tucker2_conv2d_pack"};
  STD_TORCH_CHECK(served(core), kind.op, ": weights must be float32, float16 or bfloat16");
  const ConvSizes sizes = conv_sizes(kind, core, factor_out, factor_in);
  const CallDevice device(core);
  Convolution c;
  c.element = element_of(core, false);
  c.c_in = static_cast<int32_t>(sizes.c_in);
  c.rank_in = static_cast<int32_t>(sizes.rank_in);
  c.rank_out = static_cast<int32_t>(sizes.rank_out);
  c.c_out = static_cast<int32_t>(sizes.c_out);
  c.kernel_h = static_cast<int32_t>(sizes.kernel_h);
  c.kernel_w = static_cast<int32_t>(sizes.kernel_w);
  return pack_conv(c, device, core, factor_out, factor_in);
}

// geometry: rank_out, rank_in, kernel_h, kernel_w, c_in, c_out, stride (2), padding (4), dilation (2), allow_tf32
Tensor run_packed(const char* op, const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& g, bool from_rank) {
  STD_TORCH_CHECK(g.size() == 14 || g.size() == 15, op, ": geometry must hold 14 or 15 ints, got ", g.size());
  const ConvKind kind{op};
  const ConvWindow window{{g[6], g[7]}, {g[12], g[13]}, {g[8], g[9], g[10], g[11]}};
  for (size_t i = 0; i < 6; ++i) STD_TORCH_CHECK(g[i] >= 1, op, ": geometry must hold sizes >= 1, got ", g[i]);
  const Convolution c =
      conv_problem(kind, {g[0], g[1], g[2], g[3], g[4], g[5]}, window, x, g.size() == 15 && g[14] != 0, from_rank);
  const CallDevice device(x);
  STD_TORCH_CHECK(is_packed_for(c, packed, x), op,
                  ": the weights were packed for other sizes, another dtype or another device: pack them again");
  STD_TORCH_CHECK(kernels_take(c, device), op, ": ranks too large for this device's shared memory");
  STD_TORCH_CHECK(x.numel() != 0 || x.size(0) == 0, op, ": x must have pixels, got ", sizes_of(x));
  if (x.numel() == 0) return image_on(x, c.batch, c.c_out, c.out_height, c.out_width, suggests_channels_last(x));
  return run_conv(c, device, x, packed, bias, from_rank, op);
}

Tensor tucker2_conv2d_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias,
                             std::vector<int64_t> geometry) {
  return run_packed("tucker2_conv2d_packed", x, packed, bias, geometry, false);
}

Tensor tucker2_conv2d_tail(const Tensor& z, const Tensor& packed, std::optional<Tensor> bias,
                           std::vector<int64_t> geometry) {
  return run_packed("tucker2_conv2d_tail", z, packed, bias, geometry, true);
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("tucker2_conv2d", TORCH_BOX(&tensorcomp::ops::cuda::tucker2_conv2d));
  m.impl("tucker2_conv2d_pack", TORCH_BOX(&tensorcomp::ops::cuda::tucker2_conv2d_pack));
  m.impl("tucker2_conv2d_packed", TORCH_BOX(&tensorcomp::ops::cuda::tucker2_conv2d_packed));
  m.impl("tucker2_conv2d_tail", TORCH_BOX(&tensorcomp::ops::cuda::tucker2_conv2d_tail));
  m.impl("bottleneck_conv2d", TORCH_BOX(&tensorcomp::ops::cuda::bottleneck_conv2d));
}
