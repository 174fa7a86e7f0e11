// torch.ops.tensorcomp.ttm_embedding and ttm_embedding_backward for CUDA. Schemas, fake kernels and autograd are in
// tensorcomp_ext/ops. Nothing waits for the device, so all of it can be captured in a graph.

#include "ops/cuda/ttm_embedding.h"

namespace tensorcomp::ops::cuda {
namespace {

// An uninitialised dense tensor of any number of dimensions.
Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor ttm_embedding(const Tensor& indices, std::vector<Tensor> cores, int64_t num_embeddings, int64_t padding_idx) {
  EmbeddingCall call(indices, cores, num_embeddings, padding_idx);
  const CallDevice device(indices);
  if (!call.taken(device, false)) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(indices), from(cores), from(num_embeddings), from(padding_idx)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::ttm_embedding_reference", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(call.dim);
  Tensor y = empty_of(cores[0], sizes, dtype_of(cores[0]));
  call.problem.y = y.mutable_data_ptr();
  TC_CHECK_LAUNCH(launch_embedding(call.problem, device.stream()));
  return y;
}

// Sorts each row; equal numbers stay in order, so that sums do.
std::array<Tensor, 2> stable_sort(const Tensor& numbers) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(numbers), from(std::optional<bool>(true)), from(int64_t{1}), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::vector<Tensor> reference_backward(const Tensor& grad, const Tensor& indices, const std::vector<Tensor>& cores,
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
  EmbeddingCall call(indices, cores, num_embeddings, padding_idx);
  EmbeddingParams& p = call.problem;
  const CallDevice device(indices);
  const int64_t count = indices.numel();
  STD_TORCH_CHECK(grad.dim() == indices.dim() + 1 && grad.numel() == count * call.dim &&
                      grad.scalar_type() == cores[0].scalar_type() &&
                      grad.get_device_index() == indices.get_device_index(),
                  kEmbeddingName, ": grad must have the shape, dtype and device of the output");
  if (!call.taken(device, true)) {
    return reference_backward(grad, indices, cores, num_embeddings, padding_idx, mask);
  }
  std::vector<Tensor> found;
  int64_t wanted = 0;
  for (size_t k = 0; k < cores.size(); ++k) {
    const bool asked = (mask >> k & 1) != 0;
    wanted += asked;
    const Tensor& core = cores[k];
    found.push_back(asked ? contiguous_on<4>(core, {core.size(0), core.size(1), core.size(2), core.size(3)})
                          : contiguous_on<1>(core, {0}));
    if (asked) p.core[k].gradient = found[k].mutable_data_ptr();
  }
  if (wanted == 0 || count == 0) {
    for (Tensor& t : found) torch::stable::zero_(t);
    return found;
  }
  const Tensor digits = empty_of(indices, {wanted, count}, aoti_torch_dtype_int32());
  p.digits = static_cast<int32_t*>(digits.mutable_data_ptr());
  TC_CHECK_LAUNCH(launch_embedding_digits(p, device.stream()));
  const auto [sorted, order] = stable_sort(digits);
  p.chunk = embedding_chunk(count, static_cast<int32_t>(wanted), device.limits());
  const int64_t chunks = (count + p.chunk - 1) / p.chunk;
  int64_t partials = 0;
  for (int32_t k = 0; k < p.cores; ++k) partials += p.core[k].gradient != nullptr ? 2 * chunks * p.core[k].slice() : 0;
  const Tensor scratch = bytes_on(grad, static_cast<size_t>(partials) * sizeof(float));
  const int32_t* digit_at = static_cast<const int32_t*>(sorted.const_data_ptr());
  const int64_t* row_at = static_cast<const int64_t*>(order.const_data_ptr());
  float* partial = static_cast<float*>(scratch.mutable_data_ptr());
  for (int32_t k = 0; k < p.cores; ++k) {
    EmbeddingCore& core = p.core[k];
    if (core.gradient == nullptr) continue;
    core.sorted = digit_at;
    core.order = row_at;
    core.partial = partial;
    digit_at += count;
    row_at += count;
    partial += 2 * chunks * core.slice();
  }
  const Tensor rows = dense(grad);
  p.grad = rows.const_data_ptr();
  TC_CHECK_LAUNCH(launch_embedding_backward(p, device.stream()));
  return found;
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("ttm_embedding", TORCH_BOX(&tensorcomp::ops::cuda::ttm_embedding));
  m.impl("ttm_embedding_backward", TORCH_BOX(&tensorcomp::ops::cuda::ttm_embedding_backward));
}
