// torch.ops.tensorcomp.ttm_embedding on the CPU: check, order the indices, allocate, run the kernel's pieces on torch's
// thread pool.

#include "ttm_embedding.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "../kernels/cpu/dispatch.h"
#include "phases.h"

namespace tensorcomp::ops {

bool embedding_fits(const std::vector<Tensor>& cores) {
  return cores.size() >= 2 && cores.size() <= static_cast<size_t>(kMaxEmbeddingCores) && has_native_dtype(cores[0]);
}

namespace {

// What Python sees as IndexError, as of torch's own embedding.
[[noreturn]] void refuse_index(int64_t index, int64_t num_embeddings) {
  throw std::out_of_range("ttm_embedding: indices must be in [0, " + std::to_string(num_embeddings) + "), got " +
                          std::to_string(index));
}

template <class Index>
void check_indices(const Tensor& indices, int64_t num_embeddings) {
  const Tensor flat = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  const Index* data = static_cast<const Index*>(flat.const_data_ptr());
  for (int64_t i = 0; i < flat.numel(); ++i) {
    if (data[i] < 0 || data[i] >= num_embeddings) refuse_index(data[i], num_embeddings);
  }
}

}  // namespace

EmbeddingProblem embedding_problem(const Tensor& indices, const std::vector<Tensor>& cores, int64_t num_embeddings,
                                   int64_t padding_idx) {
  EmbeddingProblem made;
  EmbeddingShape& s = made.shape;
  s.dtype = kernel_dtype(cores[0]);
  s.cores = static_cast<int64_t>(cores.size());
  s.num_embeddings = num_embeddings;
  s.padding_idx = padding_idx;
  int64_t padded = 1;
  for (size_t k = 0; k < cores.size(); ++k) {
    const Tensor& core = cores[k];
    STD_TORCH_CHECK(core.dim() == 4 && core.numel() > 0, "ttm_embedding: cores[", k,
                    "] must be [r, vocab_k, dim_k, r'] with no empty mode");
    STD_TORCH_CHECK(core.is_cpu() && core.scalar_type() == cores[0].scalar_type(),
                    "ttm_embedding: cores must have one dtype and lie on the CPU");
    STD_TORCH_CHECK(k == 0 || core.size(0) == s.rank[k], "ttm_embedding: cores[", k,
                    "] must be [r, vocab_k, dim_k, r'] with r = ", s.rank[k], ", got r = ", core.size(0));
    STD_TORCH_CHECK(core.size(1) < int64_t{1} << 31, "ttm_embedding: vocab_k must be below 2**31");
    s.rank[k] = core.size(0);
    s.vocab[k] = core.size(1);
    s.dim[k] = core.size(2);
    s.rank[k + 1] = core.size(3);
    STD_TORCH_CHECK(padded <= (int64_t{1} << 62) / s.vocab[k], "ttm_embedding: more rows than 2**62");
    padded *= s.vocab[k];
    STD_TORCH_CHECK(made.dim <= (int64_t{1} << 31) / s.dim[k], "ttm_embedding: rows of more than 2**31 numbers");
    made.dim *= s.dim[k];
    made.macs += s.rank[0] * made.dim * s.rank[k] * (k + 1 < cores.size() ? s.rank[k + 1] : 1);
    made.cores.push_back(core.is_contiguous() ? core : torch::stable::contiguous(core));
  }
  STD_TORCH_CHECK(s.rank[s.cores] == s.rank[0], "ttm_embedding: the last rank must be the first, ", s.rank[0], ", got ",
                  s.rank[s.cores]);
  STD_TORCH_CHECK(num_embeddings >= 1 && num_embeddings <= padded, "ttm_embedding: num_embeddings must be in [1, ",
                  padded, "], the product of all vocab_k, got ", num_embeddings);
  STD_TORCH_CHECK(padding_idx >= -1 && padding_idx < num_embeddings, "ttm_embedding: padding_idx must be -1 or in [0, ",
                  num_embeddings, "), got ", padding_idx);
  const bool wide = indices.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(indices.is_cpu() && (wide || indices.scalar_type() == ScalarType::Int),
                  "ttm_embedding: indices must be int64 or int32 and lie on the CPU");
  const Tensor flat = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  const int64_t count = flat.numel();
  const void* data = flat.const_data_ptr();
  made.order = wide ? embedding_order(s, static_cast<const int64_t*>(data), count)
                    : embedding_order(s, static_cast<const int32_t*>(data), count);
  if (const int64_t at = made.order.wrong; at >= 0) {
    refuse_index(wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at], num_embeddings);
  }
  made.macs *= made.order.rows();
  EmbeddingParams& p = made.params;
  p.shape = s;
  for (size_t k = 0; k < cores.size(); ++k) p.core[k] = made.cores[k].const_data_ptr();
  p.rows = made.order.rows();
  p.digits = made.order.digits.data();
  p.first = made.order.first.data();
  p.place = made.order.place.data();
  return made;
}

namespace {

Tensor call_reference(const Tensor& indices, const std::vector<Tensor>& cores, int64_t num_embeddings,
                      int64_t padding_idx) {
  // Here, because what Python raises below arrives as an error of another type.
  if (indices.scalar_type() == ScalarType::Long) check_indices<int64_t>(indices, num_embeddings);
  if (indices.scalar_type() == ScalarType::Int) check_indices<int32_t>(indices, num_embeddings);
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(indices), from(cores), from(num_embeddings), from(padding_idx)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::ttm_embedding_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor ttm_embedding(const Tensor& indices, std::vector<Tensor> cores, int64_t num_embeddings, int64_t padding_idx) {
  if (!embedding_fits(cores)) return call_reference(indices, cores, num_embeddings, padding_idx);
  EmbeddingProblem problem = embedding_problem(indices, cores, num_embeddings, padding_idx);
  EmbeddingParams& p = problem.params;
  const auto index_sizes = indices.sizes();
  std::vector<int64_t> sizes(index_sizes.begin(), index_sizes.end());
  sizes.push_back(problem.dim);
  Tensor y = empty_contiguous(sizes, problem.shape.dtype);
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const size_t row_bytes = static_cast<size_t>(problem.dim) * (problem.shape.dtype == DType::kFloat32 ? 4 : 2);
  for (const int64_t place : problem.order.padding)
    std::memset(to + static_cast<size_t>(place) * row_bytes, 0, row_bytes);
  if (p.rows == 0) return y;
  p.y = to;
  const EmbeddingKernels& kernels = kernel_table().embedding(problem.shape.dtype);
  const int64_t parts = std::min(useful_threads(problem.macs), p.rows);
  Tensor scratch = empty_bytes(kernels.scratch_bytes(p, parts, false));
  p.scratch = scratch.mutable_data_ptr();
  run_phases(1, parts, [&](int64_t, int64_t part) { kernels.run(p, parts, part); });
  return y;
}

}  // namespace
}  // namespace tensorcomp::ops

STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def("ttm_embedding(Tensor indices, Tensor[] cores, int num_embeddings, int padding_idx=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) { m.impl("ttm_embedding", TORCH_BOX(&tensorcomp::ops::ttm_embedding)); }
