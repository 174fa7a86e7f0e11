// Shared by the CUDA ops of the embedding: arguments to a problem of the kernels.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/cuda/embedding_launch.h"
#include "kernels/cuda/embedding_plan.h"
#include "ops/cuda/device_utils.h"

namespace tensorcomp::ops::cuda {

// Of the kernels here, not of the CPU's.
using tensorcomp::cuda::EmbeddingParams;

constexpr const char* kEmbeddingName = "ttm_embedding";

// Indices and cores, dense, and the problem they are.
struct EmbeddingCall {
  // Raises where cores do not fit each other, or the table has more rows than they.
  EmbeddingCall(const Tensor& given_indices, const std::vector<Tensor>& given, int64_t rows, int64_t padding)
      : indices(dense(given_indices)) {
    const bool wide = indices.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || indices.scalar_type() == ScalarType::Int, kEmbeddingName,
                    ": indices must be int64 or int32");
    STD_TORCH_CHECK(!given.empty(), kEmbeddingName, ": cores must hold at least one");
    for (size_t k = 0; k < given.size(); ++k) {
      const Tensor& core = given[k];
      const Tensor& before = given[(k + given.size() - 1) % given.size()];
      const int64_t rank = before.dim() == 4 ? before.size(3) : -1;
      STD_TORCH_CHECK(core.dim() == 4 && core.numel() > 0 && core.size(0) == rank, kEmbeddingName, ": cores[", k,
                      "] must be [r, vocab_k, dim_k, r'] with r = ", rank, ", got ", sizes_of(core));
      STD_TORCH_CHECK(
          core.scalar_type() == given[0].scalar_type() && core.get_device_index() == indices.get_device_index(),
          kEmbeddingName, ": cores must have one dtype and lie on the device of the indices");
    }
    // The kernels count sizes of a core in 32 bits, and so many cores.
    constexpr int64_t kMost = int64_t{1} << 31;
    fits = served(given[0]) && given.size() <= kMostEmbeddingCores && indices.numel() < kMost;
    STD_TORCH_CHECK(rows >= 1, kEmbeddingName, ": num_embeddings must be at least 1, got ", rows);
    int64_t vocab = 1;
    for (const Tensor& core : given) {
      vocab = core.size(1) > rows / vocab ? rows : vocab * core.size(1);
      STD_TORCH_CHECK(dim <= kMost / core.size(2), kEmbeddingName, ": rows of more than 2**31 numbers");
      dim *= core.size(2);
      fits = fits && core.numel() < kMost;
    }
    STD_TORCH_CHECK(vocab >= rows, kEmbeddingName, ": num_embeddings must be at most the product of all vocab_k, got ",
                    rows);
    if (!fits) return;
    problem.element = element_of(given[0], false);
    problem.count = indices.numel();
    problem.indices = indices.const_data_ptr();
    problem.wide = wide;
    problem.rows = rows;
    problem.padding = padding;
    problem.cores = static_cast<int32_t>(given.size());
    for (const Tensor& core : given) {
      EmbeddingCore& to = problem.core[cores.size()];
      cores.push_back(dense(core));
      to.rank_in = static_cast<int32_t>(core.size(0));
      to.vocab = static_cast<int32_t>(core.size(1));
      to.dim = static_cast<int32_t>(core.size(2));
      to.rank_out = static_cast<int32_t>(core.size(3));
      to.data = cores.back().const_data_ptr();
    }
  }

  // Whether the kernels take it; then the sizes of its shared memory are filled in.
  bool taken(const CallDevice& device, bool backward) {
    return fits && !device.old() && plan_embedding(problem, device.limits(), backward);
  }

  Tensor indices;
  std::vector<Tensor> cores;
  EmbeddingParams problem;
  int64_t dim = 1;
  bool fits = true;
};

}  // namespace tensorcomp::ops::cuda
