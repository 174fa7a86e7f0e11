// torch.ops.tensorcomp.two_factor_linear and its packed form on the CPU: the chain of two matrices.

#include "chain.h"

namespace tensorcomp::ops {

void check_factors(const char* name, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && a.size(1) > 0, name, ": a must be [out, R] with R >= 1, got ", sizes_of(a));
  STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == a.size(1), name, ": b must be [R, in] with R = ", a.size(1), ", got ",
                  sizes_of(b));
}

namespace {

Tensor call_reference(const Tensor& x, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                      bool allow_tf32) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(x), from(a), from(b), from(bias), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::two_factor_linear_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor two_factor_linear(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> bias,
                         bool allow_tf32) {
  constexpr const char* kName = "two_factor_linear";
  check_factors(kName, a, b);
  ChainProgram program;
  if (!has_native_dtype(x) || !decode_chain(pair_numbers(b.size(1), a.size(1), a.size(0)), &program)) {
    return call_reference(x, a, b, bias,
                          allow_tf32);  // features may be none at all
  }
  STD_TORCH_CHECK(x.is_cpu() && a.scalar_type() == x.scalar_type(),
                  "two_factor_linear: x must lie on the CPU and have the dtype "
                  "of the factors");
  std::vector<Tensor> held;
  const std::vector<const void*> at = checked_matrices(kName, program, {b, a}, &held);
  return run_chain({kName, bias}, program, x, nullptr, at.data());
}

Tensor two_factor_linear_pack(const Tensor& a, const Tensor& b) {
  constexpr const char* kName = "two_factor_linear_pack";
  check_factors(kName, a, b);
  return pack_chain(kName, pair_numbers(b.size(1), a.size(1), a.size(0)), {b, a});
}

// sizes: out, rank, in and, for other devices, allow_tf32
Tensor two_factor_linear_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias,
                                std::vector<int64_t> sizes) {
  constexpr const char* kName = "two_factor_linear_packed";
  STD_TORCH_CHECK(sizes.size() == 3 || sizes.size() == 4, kName, ": sizes must hold 3 or 4 ints, got ", sizes.size());
  STD_TORCH_CHECK(x.is_cpu() && has_native_dtype(x), kName, ": x must be float32 or bfloat16 on the CPU");
  const PackedChain made = checked_packed(kName, pair_numbers(sizes[2], sizes[1], sizes[0]), kernel_dtype(x), packed);
  return run_chain({kName, bias}, made.chain->program, x, made.matrices, nullptr);
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/two_factor_linear.py too, for installations without native code.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "two_factor_linear(Tensor x, Tensor a, Tensor b, Tensor? bias=None, "
      "bool allow_tf32=False) -> Tensor");
  m.def("two_factor_linear_pack(Tensor a, Tensor b) -> Tensor");
  m.def(
      "two_factor_linear_packed(Tensor x, Tensor packed, Tensor? bias, int[] "
      "sizes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("two_factor_linear", TORCH_BOX(&tensorcomp::ops::two_factor_linear));
  m.impl("two_factor_linear_pack", TORCH_BOX(&tensorcomp::ops::two_factor_linear_pack));
  m.impl("two_factor_linear_packed", TORCH_BOX(&tensorcomp::ops::two_factor_linear_packed));
}
