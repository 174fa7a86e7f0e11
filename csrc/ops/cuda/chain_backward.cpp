// torch.ops.tensorcomp.chain_backward for CUDA.

#include "ops/cuda/chain.h"

namespace tensorcomp::ops::cuda {
namespace {

constexpr int kFirstMatrix = 2;  // bits before it: x, bias

// Gradients of x, bias and each matrix; those whose bit is not in `mask` are empty.
std::vector<Tensor> chain_backward(const Tensor& grad, const Tensor& x, std::vector<Tensor> matrices,
                                   std::vector<int64_t> program, int64_t mask, bool allow_tf32) {
  const CallDevice device(x);
  const Element element = element_of(x, allow_tf32);
  const PreparedChain& prepared = prepared_chain(program, element, device);
  const Program& steps = prepared.program;
  check_matrices(steps, matrices, x);
  const int64_t count = rows_of(kChainName, x, "x", steps.in());
  STD_TORCH_CHECK(rows_of(kChainName, grad, "grad", steps.out()) == count && grad.scalar_type() == x.scalar_type() &&
                      grad.get_device_index() == x.get_device_index(),
                  kChainName, ": grad must have the shape, dtype and device of the output");
  if (!served(x) || !takes_rows(prepared, count)) {
    using torch::stable::detail::from;
    std::array<StableIValue, 6> stack{from(grad), from(x), from(matrices), from(program), from(mask), from(allow_tf32)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::chain_backward_reference", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<std::vector<Tensor>>(stack[0]);
  }
  const auto wanted = [mask](size_t bit) { return (mask >> bit & 1) != 0; };
  std::vector<Tensor> found;
  found.push_back(wanted(0) ? rows_like(x, steps.in()) : contiguous_on<1>(x, {0}));
  found.push_back(contiguous_on<1>(x, {wanted(1) ? steps.out() : 0}));
  for (size_t i = 0; i < matrices.size(); ++i) {
    found.push_back(wanted(kFirstMatrix + i) ? contiguous_on<2>(x, {matrices[i].size(0), matrices[i].size(1)})
                                             : contiguous_on<1>(x, {0}));
  }
  if (count == 0) {
    for (Tensor& t : found) torch::stable::zero_(t);
    return found;
  }
  const auto place = [&](size_t i) { return wanted(i) ? found[i].mutable_data_ptr() : nullptr; };
  ChainGradients gradients;
  gradients.x = place(0);
  gradients.bias = place(1);
  for (size_t i = 0; i < matrices.size(); ++i) gradients.matrices.push_back(place(kFirstMatrix + i));
  const DeviceLimits limits = device.limits();
  const int64_t at_once = chain_backward_rows(steps, element, count);
  Tensor scratch = bytes_on(x, chain_backward_scratch(steps, element, limits, count, at_once, gradients));
  const DenseMatrices given(matrices);
  const Rows grad_rows(grad), x_rows(x);
  TC_CHECK_LAUNCH(backward_chain(steps, element, limits, chain_rows(grad_rows, count), chain_rows(x_rows, count),
                                 at_once, given.data, gradients, scratch.mutable_data_ptr(), device.stream()));
  return found;
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("chain_backward", TORCH_BOX(&tensorcomp::ops::cuda::chain_backward));
}
