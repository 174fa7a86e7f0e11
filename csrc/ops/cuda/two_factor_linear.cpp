// torch.ops.tensorcomp.two_factor_linear for CUDA, forward, backward and packed: a bottleneck without a core, whose
// pixels are the rows.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "ops/cuda/rows.h"

namespace tensorcomp::ops::cuda {
namespace {

constexpr const char* kName = "two_factor_linear";
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct PairSizes {
  int64_t out, rank, in;
};

// Empty features are summed by the oracle, and so many rows as 32 bits cannot count.
bool in_range(const PairSizes& s, int64_t rows) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  return std::min({s.out, s.rank, s.in}) >= 1 && std::max({s.out, s.rank, s.in, rows}) <= kMost;
}

Convolution pair_problem(const PairSizes& s, int64_t rows, Element element) {
  STD_TORCH_CHECK(in_range(s, rows), kName, ": features and rank must be at least 1 and of 31 bits, got ", s.out, ", ",
                  s.rank, ", ", s.in, " and ", rows, " rows");
  Convolution c;
  c.element = element;
  c.core = Core::kNone;
  c.width = c.out_width = rows;
  c.c_in = static_cast<int32_t>(s.in);
  c.rank_in = c.rank_out = static_cast<int32_t>(s.rank);
  c.c_out = static_cast<int32_t>(s.out);
  return c;
}

PairSizes checked_sizes(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), kName,
                  ": a must be [out, R] and b [R, in], got ", sizes_of(a), " and ", sizes_of(b));
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.get_device_index() == b.get_device_index(), kName,
                  ": a and b must have one dtype and lie on one device");
  return {a.size(0), a.size(1), b.size(1)};
}

Strides4 dense_rows(int64_t rows, int64_t features) { return {rows * features, 1, rows * features, features}; }

Tensor packed_pair(const Convolution& c, const CallDevice& device, const Tensor& a, const Tensor& b) {
  Tensor packed = bytes_on(a, packed_size(c));
  const Tensor out = dense(a), in = dense(b);
  TC_CHECK_LAUNCH(
      pack(c, {nullptr, out.const_data_ptr(), in.const_data_ptr(), true}, packed.mutable_data_ptr(), device.stream()));
  return packed;
}

Tensor run_pair(const Convolution& c, const CallDevice& device, const Tensor& x, const Tensor& packed,
                const std::optional<Tensor>& bias) {
  Tensor y = rows_like(x, c.c_out);
  const std::optional<Tensor> kept_bias = dense_bias(kName, "[" + std::to_string(c.c_out) + "]", bias, x, c.c_out);
  if (y.numel() == 0) return y;
  const Rows rows(x);
  TC_CHECK_LAUNCH(forward(c, device.limits(), rows.image, packed.const_data_ptr(),
                          kept_bias.has_value() ? kept_bias->const_data_ptr() : nullptr, false, y.mutable_data_ptr(),
                          dense_rows(c.width, c.c_out), device.stream()));
  return y;
}

Tensor two_factor_linear(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> bias,
                         bool allow_tf32) {
  if (served(x)) {
    const CallDevice device(x);
    const PairSizes sizes = checked_sizes(a, b);
    STD_TORCH_CHECK(a.scalar_type() == x.scalar_type() && a.get_device_index() == x.get_device_index(), kName,
                    ": x and the factors must have one dtype and lie on one device");
    const int64_t rows = rows_of(kName, x, "x", sizes.in);
    if (in_range(sizes, rows)) {
      const Convolution c = pair_problem(sizes, rows, element_of(x, allow_tf32));
      if (kernels_take(c, device)) return run_pair(c, device, x, packed_pair(c, device, a, b), bias);
    }
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(x), from(a), from(b), from(bias), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::two_factor_linear_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Gradients of x, a, b and bias; those whose bit is not in `mask` are empty.
Results two_factor_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b, int64_t mask,
                                   bool allow_tf32) {
  const CallDevice device(x);
  const PairSizes sizes = checked_sizes(a, b);
  const int64_t rows = rows_of(kName, x, "x", sizes.in);
  STD_TORCH_CHECK(rows_of(kName, grad, "grad", sizes.out) == rows && grad.scalar_type() == x.scalar_type() &&
                      a.scalar_type() == x.scalar_type() && grad.get_device_index() == x.get_device_index() &&
                      a.get_device_index() == x.get_device_index(),
                  kName, ": grad must have the shape, dtype and device of the output");
  const bool native = served(x) && in_range(sizes, rows);
  const Convolution c = native ? pair_problem(sizes, rows, element_of(x, allow_tf32)) : Convolution();
  if (!native || !kernels_take(c, device)) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 6> stack{from(grad), from(x), from(a), from(b), from(mask), from(allow_tf32)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::two_factor_linear_backward_reference", "", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
  }
  const auto wanted = [mask](int bit) { return (mask >> bit & 1) != 0; };
  const auto empty = [&] { return contiguous_on<1>(x, {0}); };
  Tensor grad_x = wanted(0) ? rows_like(x, sizes.in) : empty();
  Tensor grad_a = wanted(1) ? contiguous_on<2>(x, {sizes.out, sizes.rank}) : empty();
  Tensor grad_b = wanted(2) ? contiguous_on<2>(x, {sizes.rank, sizes.in}) : empty();
  Tensor grad_bias = wanted(3) ? contiguous_on<1>(x, {sizes.out}) : empty();
  if (rows == 0) {
    for (Tensor* t : {&grad_x, &grad_a, &grad_b, &grad_bias}) torch::stable::zero_(*t);
    return {grad_x, grad_a, grad_b, grad_bias};
  }
  Gradients g;
  g.factor_in_rank_first = true;
  if (wanted(0)) {
    g.x = grad_x.mutable_data_ptr();
    g.x_strides = dense_rows(rows, sizes.in);
  }
  if (wanted(1)) g.factor_out = grad_a.mutable_data_ptr();
  if (wanted(2)) g.factor_in = grad_b.mutable_data_ptr();
  if (wanted(3)) g.bias = grad_bias.mutable_data_ptr();
  const DeviceLimits limits = device.limits();
  Tensor scratch = bytes_on(x, backward_scratch(c, limits, g));
  const Tensor out = dense(a), in = dense(b);
  const Rows grad_rows(grad), x_rows(x);
  TC_CHECK_LAUNCH(backward(c, limits, grad_rows.image, x_rows.image,
                           {nullptr, out.const_data_ptr(), in.const_data_ptr(), true}, g, scratch.mutable_data_ptr(),
                           device.stream()));
  return {grad_x, grad_a, grad_b, grad_bias};
}

Tensor two_factor_linear_pack(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(served(a), kName, "_pack: factors must be float32, float16 or bfloat16");
  const PairSizes sizes = checked_sizes(a, b);
  const CallDevice device(a);
  return packed_pair(pair_problem(sizes, 1, element_of(a, false)), device, a, b);
}

// sizes: out, rank, in, allow_tf32
Tensor two_factor_linear_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias,
                                std::vector<int64_t> sizes) {
  STD_TORCH_CHECK(sizes.size() == 4, kName, "_packed: sizes must hold 4 ints, got ", sizes.size());
  STD_TORCH_CHECK(served(x), kName, "_packed: x must be float32, float16 or bfloat16");
  const CallDevice device(x);
  const Convolution c =
      pair_problem({sizes[0], sizes[1], sizes[2]}, rows_of(kName, x, "x", sizes[2]), element_of(x, sizes[3] != 0));
  STD_TORCH_CHECK(is_packed_for(c, packed, x), kName,
                  "_packed: the factors were packed for other sizes, another dtype or another device");
  STD_TORCH_CHECK(kernels_take(c, device), kName, "_packed: the rank is too large for this device's shared memory");
  return run_pair(c, device, x, packed, bias);
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("two_factor_linear", TORCH_BOX(&tensorcomp::ops::cuda::two_factor_linear));
  m.impl("two_factor_linear_backward", TORCH_BOX(&tensorcomp::ops::cuda::two_factor_linear_backward));
  m.impl("two_factor_linear_pack", TORCH_BOX(&tensorcomp::ops::cuda::two_factor_linear_pack));
  m.impl("two_factor_linear_packed", TORCH_BOX(&tensorcomp::ops::cuda::two_factor_linear_packed));
}
