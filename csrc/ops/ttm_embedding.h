// What forward and backward of the TTM embedding share.
#pragma once

#include <vector>

#include "../kernels/cpu/embedding_order.h"
#include "tensor_utils.h"

namespace tensorcomp::ops {

struct EmbeddingProblem {
  EmbeddingShape shape;
  EmbeddingOrder order;
  std::vector<Tensor> cores;  // contiguous
  EmbeddingParams params;     // y, gradients and scratch to be filled in
  int64_t dim = 1;
  int64_t macs = 0;  // of the different rows, had they no digits in common
};

// Whether the kernels take cores like these at all; others go to the oracle.
bool embedding_fits(const std::vector<Tensor>& cores);

// Throws std::runtime_error where the arguments do not fit, std::out_of_range for an index out of range.
EmbeddingProblem embedding_problem(const Tensor& indices, const std::vector<Tensor>& cores, int64_t num_embeddings,
                                   int64_t padding_idx);

}  // namespace tensorcomp::ops
