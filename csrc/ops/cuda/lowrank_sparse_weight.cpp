// torch.ops.tensorcomp.lowrank_sparse_weight and its backward op for CUDA. Schemas, fake kernels and autograd are in
// tensorcomp_ext/ops.

#include <limits>
#include <tuple>

#include "kernels/cuda/lowrank_sparse_launch.h"
#include "ops/arguments.h"
#include "ops/cuda/device_utils.h"

namespace tensorcomp::ops::cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kName = "lowrank_sparse_weight";

MatrixSource source_of(const Tensor& t) {
  return matrix_source(t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1),
                       static_cast<int32_t>(t.element_size()));
}

// Factors are small beside the weight: other layouts are copied.
Tensor in_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

MatrixSource mask_of(const Tensor& mask, bool bits, int64_t columns, int32_t tile_columns) {
  return mask_source(mask.const_data_ptr(), bits, mask.size(0), columns, mask.stride(0), mask.stride(1), tile_columns);
}

// Empty weights are left to the oracle, and sizes that 32 bits cannot count.
bool in_range(const Tensor& a, const Tensor& b) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (!served(a) || a.dim() != 2 || b.dim() != 2) return false;
  return a.size(0) > 0 && b.size(1) > 0 && std::max({a.size(0), a.size(1), b.size(1)}) <= kMost;
}

bool plan(WeightParams& p, const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& mask, bool masking,
          bool allow_tf32, const CallDevice& device) {
  p.element = element_of(a, allow_tf32);
  p.m = a.size(0);
  p.n = b.size(1);
  p.rank = static_cast<int32_t>(a.size(1));
  p.masking = masking;
  p.bits = mask.scalar_type() == ScalarType::Byte;
  p.a = source_of(a);
  p.b = source_of(b);
  p.values = source_of(values);
  p.mask = mask_of(mask, p.bits, p.n, weight_columns(element_bytes(p.element)));
  return !device.old() && plan_weight(p, device.limits());
}

Tensor lowrank_sparse_weight(const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& mask, bool masking,
                             bool allow_tf32) {
  check_sparse_weight(kName, a, b, values, "values", mask);
  if (in_range(a, b)) {
    const CallDevice device(a);
    const Tensor left = in_rows(a), right = in_rows(b);
    WeightParams p;
    if (plan(p, left, right, values, mask, masking, allow_tf32, device)) {
      Tensor w = contiguous_on<2>(a, {p.m, p.n});
      p.w = w.mutable_data_ptr();
      TC_CHECK_LAUNCH(launch_weight(p, device.stream()));
      return w;
    }
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(a), from(b), from(values), from(mask), from(masking), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::lowrank_sparse_weight_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Gradients call_reference(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& mask, bool masking,
                         int64_t mask_out, bool allow_tf32) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 7> stack{from(grad),    from(a),        from(b),         from(mask),
                                    from(masking), from(mask_out), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("tensorcomp::lowrank_sparse_weight_backward_reference", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

// (1 - M) * G times the other factor: the gradient of a, or of b. None where the device has not the shared memory.
std::optional<Tensor> masked_product(bool of_a, const Tensor& grad, const Tensor& factor, const Tensor& mask,
                                     bool allow_tf32, const CallDevice& device) {
  const Tensor other = in_rows(factor);
  MaskedProductParams p;
  p.element = element_of(grad, allow_tf32);
  p.of_a = of_a;
  p.bits = mask.scalar_type() == ScalarType::Byte;
  p.m = of_a ? grad.size(0) : other.size(1);
  p.n = of_a ? other.size(0) : grad.size(1);
  p.summed = grad.size(of_a ? 1 : 0);
  const int32_t bytes = element_bytes(p.element);
  p.grad = source_of(grad);
  p.mask = mask_of(mask, p.bits, grad.size(1), of_a ? kChunkBytes / bytes : weight_columns(bytes));
  p.other = source_of(other);
  if (!plan_masked_product(p, device.limits())) return std::nullopt;
  Tensor out = contiguous_on<2>(grad, {p.m, p.n});
  const Tensor scratch = bytes_on(grad, static_cast<size_t>(p.splits * p.m * p.n) * sizeof(float));
  p.partial = static_cast<float*>(scratch.mutable_data_ptr());
  TC_CHECK_LAUNCH(launch_masked_product(p, out.mutable_data_ptr(), device.stream()));
  return out;
}

// Gradients of a, b and the values; those whose bit is not in `mask_out` are empty.
Gradients lowrank_sparse_weight_backward(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& mask,
                                         bool masking, int64_t mask_out, bool allow_tf32) {
  check_sparse_weight(kName, a, b, grad, "grad", mask);
  const CallDevice device(a);
  if (!in_range(a, b) || device.old()) return call_reference(grad, a, b, mask, masking, mask_out, allow_tf32);
  const auto wanted = [mask_out](int bit) { return (mask_out >> bit & 1) != 0; };
  const auto empty = [&] { return contiguous_on<1>(a, {0}); };
  const bool rank = a.size(1) > 0;
  Gradients found{empty(), empty(), empty()};
  auto& [grad_a, grad_b, grad_values] = found;
  // What is added leaves the gradient of A B whole: the library's products, by the settings that hold for them.
  if (wanted(0) && !(rank && masking)) grad_a = dense(torch::stable::matmul(grad, torch::stable::transpose(b, 0, 1)));
  if (wanted(1) && !(rank && masking)) grad_b = dense(torch::stable::matmul(torch::stable::transpose(a, 0, 1), grad));
  if (rank && masking) {
    std::optional<Tensor> of_a, of_b;
    if (wanted(0)) of_a = masked_product(true, grad, b, mask, allow_tf32, device);
    if (wanted(1)) of_b = masked_product(false, grad, a, mask, allow_tf32, device);
    if (of_a.has_value() != wanted(0) || of_b.has_value() != wanted(1)) {
      return call_reference(grad, a, b, mask, masking, mask_out, allow_tf32);
    }
    if (wanted(0)) grad_a = *of_a;
    if (wanted(1)) grad_b = *of_b;
  }
  if (wanted(2)) {
    MaskedParams p;
    p.element = element_of(a, allow_tf32);
    p.m = a.size(0);
    p.n = b.size(1);
    p.bits = mask.scalar_type() == ScalarType::Byte;
    p.grad = source_of(grad);
    p.mask = mask_of(mask, p.bits, p.n, weight_columns(element_bytes(p.element)));
    grad_values = contiguous_on<2>(a, {p.m, p.n});
    p.out = grad_values.mutable_data_ptr();
    TC_CHECK_LAUNCH(launch_masked(p, device.stream()));
  }
  return found;
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("lowrank_sparse_weight", TORCH_BOX(&tensorcomp::ops::cuda::lowrank_sparse_weight));
  m.impl("lowrank_sparse_weight_backward", TORCH_BOX(&tensorcomp::ops::cuda::lowrank_sparse_weight_backward));
}
