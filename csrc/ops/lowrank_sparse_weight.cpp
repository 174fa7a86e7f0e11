// torch.ops.tensorcomp.lowrank_sparse_weight and its backward op on the CPU: check, allocate, run the kernel's pieces
// on torch's thread pool.

#include <tuple>

#include "../kernels/cpu/dispatch.h"
#include "arguments.h"
#include "phases.h"

namespace tensorcomp::ops {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kName = "lowrank_sparse_weight";
constexpr int64_t kMoved = 8;  // multiply-adds in the time an entry is read and written

// A matrix whose rows are contiguous; rows of an expanded tensor may be one and the same.
Tensor in_rows(const Tensor& t) {
  const bool fits = (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= 0);
  return fits ? t : torch::stable::contiguous(t);
}

int64_t row_of(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

bool fits(const Tensor& a, const Tensor& b) { return has_native_dtype(a) && a.size(0) > 0 && b.size(1) > 0; }

// Tensors that are read as they lie, kept until the call ends.
struct Problem {
  SparseWeightShape shape;
  Tensor a, b, mask, entries;
};

// `entries` is what has the weight's shape: the values or the gradient.
Problem problem_of(const Tensor& a, const Tensor& b, const Tensor& entries, const Tensor& mask, bool masking) {
  const int64_t m = a.size(0), rank = a.size(1), n = b.size(1);
  const bool bits = mask.scalar_type() == ScalarType::Byte;
  Problem made{{}, in_rows(a), in_rows(b), in_rows(mask), in_rows(entries)};
  SparseWeightShape& s = made.shape;
  s.dtype = kernel_dtype(a);
  s.m = m;
  s.n = n;
  s.rank = rank;
  s.masking = masking;
  s.bits = bits;
  s.mask = static_cast<const uint8_t*>(made.mask.const_data_ptr());
  s.mask_row = row_of(made.mask);
  s.a = made.a.const_data_ptr();
  s.b = made.b.const_data_ptr();
  s.a_row = row_of(made.a);
  s.b_row = row_of(made.b);
  return made;
}

// allow_tf32 is for other devices.
Tensor lowrank_sparse_weight(const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& mask, bool masking,
                             bool allow_tf32) {
  check_sparse_weight(kName, a, b, values, "values", mask);
  if (!fits(a, b)) {
    using torch::stable::detail::from;
    std::array<StableIValue, 6> stack{from(a), from(b), from(values), from(mask), from(masking), from(allow_tf32)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::lowrank_sparse_weight_reference", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const Problem problem = problem_of(a, b, values, mask, masking);
  SparseWeightParams p;
  p.shape = problem.shape;
  p.values = problem.entries.const_data_ptr();
  p.values_row = row_of(problem.entries);
  Tensor w = empty_contiguous({p.shape.m, p.shape.n}, p.shape.dtype);
  p.w = w.mutable_data_ptr();
  const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(p.shape.dtype);
  const SparseWeightPlan plan = kernels.weight_plan(p, useful_threads(p.shape.m * p.shape.n, p.shape.rank + kMoved));
  Tensor scratch = empty_bytes(plan.scratch_bytes);
  p.scratch = scratch.mutable_data_ptr();
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.weight_run(p, plan, phase, part); });
  return w;
}

// Gradients of a, b and the values; those whose bit is not in `mask_out` are empty.
Gradients lowrank_sparse_weight_backward(const Tensor& grad, const Tensor& a, const Tensor& b, const Tensor& mask,
                                         bool masking, int64_t mask_out, bool allow_tf32) {
  check_sparse_weight(kName, a, b, grad, "grad", mask);
  if (!fits(a, b)) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 7> stack{from(grad),    from(a),        from(b),         from(mask),
                                      from(masking), from(mask_out), from(allow_tf32)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("tensorcomp::lowrank_sparse_weight_backward_reference", "",
                                                        stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }
  const Problem problem = problem_of(a, b, grad, mask, masking);
  SparseWeightBackwardParams q;
  q.shape = problem.shape;
  q.grad = problem.entries.const_data_ptr();
  q.grad_row = row_of(problem.entries);
  const auto made = [&](int bit, int64_t rows, int64_t columns, void** at) {
    const bool wanted = (mask_out >> bit & 1) != 0;
    Tensor t = empty_contiguous(wanted ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0}, q.shape.dtype);
    if (wanted && t.numel() > 0) *at = t.mutable_data_ptr();
    return t;
  };
  const SparseWeightShape& s = q.shape;
  Gradients found{made(0, s.m, s.rank, &q.grad_a), made(1, s.rank, s.n, &q.grad_b), made(2, s.m, s.n, &q.grad_values)};
  const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(s.dtype);
  const SparseWeightBackwardPlan plan = kernels.weight_backward_plan(q, useful_threads(s.m * s.n, 2 * s.rank + kMoved));
  Tensor scratch = empty_bytes(plan.scratch_bytes);
  q.scratch = scratch.mutable_data_ptr();
  run_phases(plan.phases, plan.parts,
             [&](int64_t phase, int64_t part) { kernels.weight_backward_run(q, plan, phase, part); });
  return found;
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/_lowrank_sparse_weight_autograd.py too, for installations without native
// code.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "lowrank_sparse_weight(Tensor a, Tensor b, Tensor values, Tensor mask, bool masking, bool allow_tf32=False) -> "
      "Tensor");
  m.def(
      "lowrank_sparse_weight_backward(Tensor grad, Tensor a, Tensor b, Tensor mask, bool masking, int output_mask, "
      "bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("lowrank_sparse_weight", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_weight));
  m.impl("lowrank_sparse_weight_backward", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_weight_backward));
}
