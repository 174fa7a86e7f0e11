// torch.ops.tensorcomp.lowrank_sparse_linear on the CPU: the sparse product goes into the result, then the pair's is
// added to it.

#include "lowrank_sparse_linear.h"

#include <stdexcept>

#include "arguments.h"

namespace tensorcomp::ops {

bool sparse_linear_fits(const Tensor& a, const Tensor& b) {
  return has_native_dtype(a) && a.dim() == 2 && b.dim() == 2 && a.numel() > 0 && b.numel() > 0;
}

namespace {

// In the words of check_packed() in tensorcomp_ext/ops/lowrank_sparse_packing.py.
std::string words_for(SparseFault fault, const SparseMatrix& s) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  switch (fault) {
    case SparseFault::kEnds:
      return "offsets must begin with 0 and end with nnz = " + number(s.count) + ", got " + number(s.offsets[0]) +
             " and " + number(s.offsets[s.m * s.segments()]);
    case SparseFault::kDescends: return "offsets must not descend";
    case SparseFault::kBitBehind: return "positions must have no bit behind column " + number(s.n - 1);
    case SparseFault::kBitCount: return "positions must have as many bits as packed.offsets counts";
    case SparseFault::kColumn: return "positions must be columns below " + number(s.n);
    default: return "positions must ascend within every row";
  }
}

}  // namespace

SparseParts checked_places(const char* name, int64_t m, int64_t n, const Tensor& values, const Tensor& offsets,
                           const Tensor& positions) {
  check_sparse_places(name, m, n, values, offsets, positions);
  STD_TORCH_CHECK(values.is_cpu(), name, ": every tensor must lie on the CPU, got values on ", device_name(values));
  SparseParts made{{}, dense(values), dense(offsets), dense(positions)};
  SparseMatrix& s = made.matrix;
  s.m = m;
  s.n = n;
  s.count = values.size(0);
  if (positions.scalar_type() == ScalarType::Byte) {
    s.bits = static_cast<const uint8_t*>(made.positions.const_data_ptr());
  } else {
    s.columns = static_cast<const uint16_t*>(made.positions.const_data_ptr());
  }
  s.values = made.values.const_data_ptr();
  s.offsets = static_cast<const int32_t*>(made.offsets.const_data_ptr());
  const SparseFault fault = kernel_table().lowrank_sparse(DType::kFloat32).fault(s);
  if (fault != SparseFault::kNone) throw std::invalid_argument(std::string(name) + ": packed." + words_for(fault, s));
  return made;
}

SparseParts checked_sparse(const char* name, const Tensor& a, const Tensor& b, const Tensor& values,
                           const Tensor& offsets, const Tensor& positions) {
  check_sparse_layer(name, a, b, values, offsets, positions);
  return checked_places(name, a.size(0), b.size(1), values, offsets, positions);
}

namespace {

constexpr const char* kName = "lowrank_sparse_linear";

class SparseBefore final : public ChainBefore {
 public:
  SparseBefore(const SparseMatrix& matrix, DType dtype) : kernels_(kernel_table().lowrank_sparse(dtype)) {
    p_.dtype = dtype;
    p_.sparse = matrix;
  }
  int64_t macs() const override { return p_.sparse.count; }
  int64_t begin(const ChainParams& call, int64_t parts) override {
    p_.rows = call.rows;
    p_.x = call.x;
    p_.x_row = call.x_row;
    p_.y = call.y;
    plan_ = kernels_.linear_plan(p_, parts);
    scratch_ = empty_bytes(plan_.scratch_bytes);
    p_.scratch = scratch_->mutable_data_ptr();
    return plan_.phases;
  }
  void run(int64_t phase, int64_t part) override { kernels_.linear_run(p_, plan_, phase, part); }

 private:
  const LowrankSparseKernels& kernels_;
  SparseLinearParams p_;
  SparseLinearPlan plan_;
  std::optional<Tensor> scratch_;
};

Tensor lowrank_sparse_linear(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& values,
                             std::optional<Tensor> bias, const Tensor& offsets, const Tensor& positions) {
  if (!sparse_linear_fits(a, b)) {
    // An error of the oracle would lose its type and words on the way through here.
    checked_sparse(kName, a, b, values, offsets, positions);
    check_like(kName, "x", x, "a", a);
    using torch::stable::detail::from;
    std::array<StableIValue, 7> stack{from(x),    from(a),       from(b),        from(values),
                                      from(bias), from(offsets), from(positions)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::lowrank_sparse_linear_reference", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const SparseParts parts = checked_sparse(kName, a, b, values, offsets, positions);
  check_like(kName, "x", x, "a", a);
  const std::vector<int64_t> numbers = pair_numbers(b.size(1), a.size(1), a.size(0));
  const ChainProgram& program = known_chain(kName, numbers.data(), static_cast<int64_t>(numbers.size())).program;
  std::vector<Tensor> held;
  const std::vector<const void*> at = checked_matrices(kName, program, {b, a}, &held);
  SparseBefore before(parts.matrix, kernel_dtype(x));
  ChainCall call{kName, bias};
  call.before = &before;
  return run_chain(call, program, x, nullptr, at.data());
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/_lowrank_sparse_linear_autograd.py too, for installations without native
// code.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "lowrank_sparse_linear(Tensor x, Tensor a, Tensor b, Tensor values, Tensor? bias, Tensor offsets, Tensor "
      "positions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("lowrank_sparse_linear", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_linear));
}
