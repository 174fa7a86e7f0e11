// torch.ops.tensorcomp.lowrank_sparse_linear_backward on the CPU: the pair's gradients, and what the sparse part adds.

#include <tuple>

#include "arguments.h"
#include "lowrank_sparse_linear.h"
#include "phases.h"

namespace tensorcomp::ops {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kName = "lowrank_sparse_linear_backward";

Gradients call_reference(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& values,
                         const Tensor& offsets, const Tensor& positions, int64_t mask) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 8> stack{from(grad),   from(x),       from(a),         from(b),
                                    from(values), from(offsets), from(positions), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("tensorcomp::lowrank_sparse_linear_backward_reference", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

// A tensor whose rows have one distance, and that distance.
Tensor in_rows(const Tensor& t, int64_t* rows, int64_t* distance) {
  if (rows_of(t, rows, distance)) return t;
  Tensor copied = torch::stable::contiguous(t);
  rows_of(copied, rows, distance);
  return copied;
}

// Gradients of x, a, b, the values and the bias; those whose bit is not in `mask` are empty.
Gradients lowrank_sparse_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b,
                                         const Tensor& values, const Tensor& offsets, const Tensor& positions,
                                         int64_t mask) {
  check_like(kName, "x", x, "a", a);
  check_like(kName, "grad", grad, "a", a);
  if (!sparse_linear_fits(a, b)) {
    checked_sparse(kName, a, b, values, offsets, positions);
    return call_reference(grad, x, a, b, values, offsets, positions, mask);
  }
  const SparseParts sparse = checked_sparse(kName, a, b, values, offsets, positions);
  const std::vector<int64_t> numbers = pair_numbers(b.size(1), a.size(1), a.size(0));
  const ChainProgram& program = known_chain(kName, numbers.data(), static_cast<int64_t>(numbers.size())).program;
  const auto bit = [mask](int from) { return mask >> from & 1; };
  // Of a chain: x, the bias, then the matrices.
  const int64_t of_pair = bit(0) | bit(4) << 1 | bit(2) << 2 | bit(1) << 3;
  std::vector<Tensor> pair = chain_gradients(kName, program, grad, x, {b, a}, of_pair);
  SparseLinearBackwardParams q;
  q.dtype = kernel_dtype(x);
  Tensor grad_values = empty_contiguous({bit(3) ? sparse.matrix.count : 0}, q.dtype);
  if (x.numel() == 0) {
    grad_values = torch::stable::zero_(grad_values);
  } else if (bit(0) || bit(3)) {
    q.sparse = sparse.matrix;
    const Tensor rows = in_rows(x, &q.rows, &q.x_row), grads = in_rows(grad, &q.rows, &q.grad_row);
    q.x = rows.const_data_ptr();
    q.grad = grads.const_data_ptr();
    if (bit(0)) q.grad_x = pair[0].mutable_data_ptr();
    if (bit(3)) q.grad_values = grad_values.mutable_data_ptr();
    const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(q.dtype);
    const SparseLinearBackwardPlan plan =
        kernels.linear_backward_plan(q, useful_threads(q.rows, 2 * sparse.matrix.count));
    Tensor scratch = empty_bytes(plan.scratch_bytes);
    q.scratch = scratch.mutable_data_ptr();
    run_phases(plan.phases, plan.parts,
               [&](int64_t phase, int64_t part) { kernels.linear_backward_run(q, plan, phase, part); });
  }
  return {pair[0], pair[3], pair[2], grad_values, pair[1]};
}

}  // namespace
}  // namespace tensorcomp::ops

STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "lowrank_sparse_linear_backward(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor values, Tensor offsets, Tensor "
      "positions, int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("lowrank_sparse_linear_backward", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_linear_backward));
}
