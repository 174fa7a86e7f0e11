// torch.ops.tensorcomp.lowrank_sparse_weight and its backward op on the CPU: check, allocate, run the kernel's pieces
// on torch's thread pool.

#include <tuple>

#include "../kernels/cpu/dispatch.h"
#include "phases.h"
#include "tensor_utils.h"

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

bool fits(const Tensor& a, const Tensor& b) {
  return has_native_dtype(a) && a.dim() == 2 && b.dim() == 2 && a.size(0) > 0 && b.size(1) > 0;
}

// Tensors that are read as they lie, kept until the call ends.
struct Problem {
  SparseWeightShape shape;
  Tensor a, b, mask, entries;
};

// `entries` is what has the weight's shape: the values or the gradient.
Problem checked(const Tensor& a, const Tensor& b, const Tensor& entries, const char* what, const Tensor& mask,
                bool masking) {
  const int64_t m = a.size(0), rank = a.size(1), n = b.size(1);
  STD_TORCH_CHECK(b.size(0) == rank, kName, ": b must be [r, n] with r = ", rank, ", got ", sizes_of(b));
  STD_TORCH_CHECK(entries.dim() == 2 && entries.size(0) == m && entries.size(1) == n, kName, ": ", what,
                  " must be [m, n] = [", m, ", ", n, "], got ", sizes_of(entries));
  for (const Tensor* t : {&a, &b, &entries}) {
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == a.scalar_type(), kName, ": a, b and ", what,
                    " must have one dtype and lie on the CPU");
  }
  const bool bits = mask.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(mask.is_cpu() && (bits || mask.scalar_type() == ScalarType::Bool), kName,
                  ": mask must be bool or uint8 and lie on the CPU");
  const int64_t width = bits ? (n + 7) / 8 : n;
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == m && mask.size(1) == width, kName, ": mask must be [", m, ", ",
                  width, "], got ", sizes_of(mask));
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

Tensor lowrank_sparse_weight(const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& mask, bool masking) {
  if (!fits(a, b)) {
    using torch::stable::detail::from;
    std::array<StableIValue, 5> stack{from(a), from(b), from(values), from(mask), from(masking)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::lowrank_sparse_weight_reference", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const Problem problem = checked(a, b, values, "values", mask, masking);
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
                                         bool masking, int64_t mask_out) {
  if (!fits(a, b)) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 6> stack{from(grad), from(a), from(b), from(mask), from(masking), from(mask_out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("tensorcomp::lowrank_sparse_weight_backward_reference", "",
                                                        stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }
  const Problem problem = checked(a, b, grad, "grad", mask, masking);
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
  m.def("lowrank_sparse_weight(Tensor a, Tensor b, Tensor values, Tensor mask, bool masking) -> Tensor");
  m.def(
      "lowrank_sparse_weight_backward(Tensor grad, Tensor a, Tensor b, Tensor mask, bool masking, int output_mask) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("lowrank_sparse_weight", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_weight));
  m.impl("lowrank_sparse_weight_backward", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_weight_backward));
}
