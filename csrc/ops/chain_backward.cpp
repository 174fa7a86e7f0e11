// torch.ops.tensorcomp.chain_backward and two_factor_linear_backward on the CPU.

#include <tuple>

#include "chain.h"
#include "phases.h"

namespace tensorcomp::ops {
namespace {

Tensor zeroed(Tensor t) { return torch::stable::zero_(t); }

Tensor like_rows(const Tensor& t, DType dtype) { return empty_contiguous({t.sizes().begin(), t.sizes().end()}, dtype); }

}  // namespace

std::vector<Tensor> chain_gradients(const char* name, const ChainProgram& program, const Tensor& grad, const Tensor& x,
                                    const std::vector<Tensor>& matrices, int64_t mask) {
  std::vector<Tensor> held;
  const std::vector<const void*> at = checked_matrices(name, program, matrices, &held);
  STD_TORCH_CHECK(x.is_cpu() && matrices[0].scalar_type() == x.scalar_type() && x.dim() >= 1 &&
                      x.size(x.dim() - 1) == program.in_features,
                  name, ": x must be [..., in_features] with in_features = ", program.in_features,
                  ", on the CPU and of the matrices' dtype, got ", sizes_of(x));
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim() &&
                      grad.size(x.dim() - 1) == program.out_features &&
                      std::equal(x.sizes().begin(), x.sizes().end() - 1, grad.sizes().begin()),
                  name, ": grad must have the shape, dtype and device of the result, got ", sizes_of(grad));
  ChainBackwardParams q;
  q.dtype = kernel_dtype(x);
  q.program = &program;
  const auto wanted = [mask](int bit) { return (mask >> bit & 1) != 0; };
  const auto empty = [&] { return empty_cpu<1>({0}, {1}, torch_dtype(q.dtype)); };
  std::vector<Tensor> found{wanted(0) ? like_rows(x, q.dtype) : empty(),
                            wanted(1) ? empty_cpu<1>({program.out_features}, {1}, torch_dtype(q.dtype)) : empty()};
  for (int i = 0; i < program.count; ++i) {
    const ChainStep& s = program.steps[i];
    found.push_back(wanted(2 + i) ? empty_cpu<2>({s.n_size, s.k_size}, {s.k_size, 1}, torch_dtype(q.dtype)) : empty());
  }
  if (x.numel() == 0) {
    for (Tensor& t : found) t = zeroed(t);
    return found;
  }
  Tensor rows = x, grads = grad;
  if (!rows_of(rows, &q.rows, &q.x_row)) {
    rows = torch::stable::contiguous(x);
    rows_of(rows, &q.rows, &q.x_row);
  }
  if (!rows_of(grads, &q.rows, &q.grad_row)) {
    grads = torch::stable::contiguous(grad);
    rows_of(grads, &q.rows, &q.grad_row);
  }
  q.x = rows.const_data_ptr();
  q.grad = grads.const_data_ptr();
  if (wanted(0)) q.grad_x = found[0].mutable_data_ptr();
  if (wanted(1)) q.grad_bias = found[1].mutable_data_ptr();
  for (int i = 0; i < program.count; ++i) {
    q.matrices[i] = at[static_cast<size_t>(i)];
    if (wanted(2 + i)) q.grad_matrices[i] = found[static_cast<size_t>(2 + i)].mutable_data_ptr();
  }
  const ChainKernels& kernels = kernel_table().chain(q.dtype);
  const int64_t threads = std::min(q.rows, useful_threads(q.rows, 3 * program.macs));
  const ChainBackwardPlan plan = kernels.backward_plan(q, threads);
  Tensor scratch = empty_bytes(plan.scratch_bytes);
  q.scratch = scratch.mutable_data_ptr();
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.backward_run(q, plan, phase, part); });
  return found;
}

namespace {

std::vector<Tensor> chain_backward(const Tensor& grad, const Tensor& x, std::vector<Tensor> matrices,
                                   std::vector<int64_t> numbers, int64_t mask, bool allow_tf32) {
  ChainProgram program;
  if (has_native_dtype(x) && decode_chain(numbers, &program)) {
    return chain_gradients("chain_backward", program, grad, x, matrices, mask);
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(grad), from(x), from(matrices), from(numbers), from(mask), from(allow_tf32)};
  STD_TORCH_CHECK(
      torch_call_dispatcher("tensorcomp::chain_backward_reference", "", stack.data(), TORCH_ABI_VERSION) == 0,
      "chain_backward", no_such_program(numbers));
  return torch::stable::detail::to<std::vector<Tensor>>(stack[0]);
}

using PairGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, a, b and the bias.
PairGradients two_factor_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b,
                                         int64_t mask, bool allow_tf32) {
  constexpr const char* kName = "two_factor_linear_backward";
  check_factors(kName, a, b);
  const std::vector<int64_t> numbers = pair_numbers(b.size(1), a.size(1), a.size(0));
  ChainProgram program;
  if (has_native_dtype(x) && decode_chain(numbers, &program)) {
    const int64_t chain_mask = (mask & 1) | (mask >> 3 & 1) << 1 | (mask >> 2 & 1) << 2 | (mask >> 1 & 1) << 3;
    const std::vector<Tensor> found = chain_gradients(kName, program, grad, x, {b, a}, chain_mask);
    return {found[0], found[3], found[2], found[1]};
  }
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 6> stack{from(grad), from(x), from(a), from(b), from(mask), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::two_factor_linear_backward_reference", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/_chain_autograd.py and _two_factor_autograd.py too.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "chain_backward(Tensor grad, Tensor x, Tensor[] matrices, int[] "
      "program, int output_mask, "
      "bool allow_tf32=False) -> Tensor[]");
  m.def(
      "two_factor_linear_backward(Tensor grad, Tensor x, Tensor a, Tensor b, "
      "int output_mask, "
      "bool allow_tf32=False) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("chain_backward", TORCH_BOX(&tensorcomp::ops::chain_backward));
  m.impl("two_factor_linear_backward", TORCH_BOX(&tensorcomp::ops::two_factor_linear_backward));
}
