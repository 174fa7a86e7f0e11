// torch.ops.tensorcomp.ttm_embedding_backward on the CPU.

#include "../kernels/cpu/dispatch.h"
#include "phases.h"
#include "ttm_embedding.h"

namespace tensorcomp::ops {
namespace {

std::vector<Tensor> call_reference(const Tensor& grad, const Tensor& indices, const std::vector<Tensor>& cores,
                                   int64_t num_embeddings, int64_t padding_idx, int64_t mask) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(grad),           from(indices),     from(cores),
                                    from(num_embeddings), from(padding_idx), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::ttm_embedding_backward_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<std::vector<Tensor>>(stack[0]);
}

// Gradients of the cores; those whose bit is not in `mask` are empty.
std::vector<Tensor> ttm_embedding_backward(const Tensor& grad, const Tensor& indices, std::vector<Tensor> cores,
                                           int64_t num_embeddings, int64_t padding_idx, int64_t mask) {
  if (!embedding_fits(cores)) return call_reference(grad, indices, cores, num_embeddings, padding_idx, mask);
  EmbeddingProblem problem = embedding_problem(indices, cores, num_embeddings, padding_idx);
  EmbeddingParams& p = problem.params;
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == cores[0].scalar_type() && grad.dim() == indices.dim() + 1 &&
                      grad.numel() == indices.numel() * problem.dim,
                  "ttm_embedding_backward: grad must have the shape, dtype and device of the output");
  const Tensor dy = grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  p.grad_y = dy.const_data_ptr();
  std::vector<Tensor> found;
  for (size_t k = 0; k < cores.size(); ++k) {
    const bool wanted = (mask >> k & 1) != 0;
    const auto sizes = cores[k].sizes();
    found.push_back(torch::stable::new_empty(
        cores[k], wanted ? std::vector<int64_t>(sizes.begin(), sizes.end()) : std::vector<int64_t>{0}));
    if (!wanted) continue;
    if (p.rows == 0) torch::stable::zero_(found[k]);
    p.grad_core[k] = found[k].mutable_data_ptr();
  }
  if (p.rows == 0) return found;
  const EmbeddingKernels& kernels = kernel_table().embedding(problem.shape.dtype);
  const int64_t parts = std::min(useful_threads(3 * problem.macs), p.rows);
  Tensor scratch = empty_bytes(kernels.scratch_bytes(p, parts, true));
  p.scratch = scratch.mutable_data_ptr();
  run_phases(2, parts, [&](int64_t phase, int64_t part) { kernels.backward_run(p, parts, phase, part); });
  return found;
}

}  // namespace
}  // namespace tensorcomp::ops

STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def(
      "ttm_embedding_backward(Tensor grad, Tensor indices, Tensor[] cores, int num_embeddings, int padding_idx, "
      "int output_mask) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("ttm_embedding_backward", TORCH_BOX(&tensorcomp::ops::ttm_embedding_backward));
}
