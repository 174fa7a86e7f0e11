// Launches of the embedding kernels, on a given stream; nothing waits, nothing is kept between calls.
#pragma once

#include "kernels/cuda/bottleneck_launch.h"
#include "kernels/cuda/embedding.h"

namespace tensorcomp::cuda {

// Sizes of params must come from plan_embedding (embedding_plan.h).
cudaError_t launch_embedding(const EmbeddingParams& params, cudaStream_t stream);
// What backward sorts by; then, with the cores' `sorted` and `order`, the gradients.
cudaError_t launch_embedding_digits(const EmbeddingParams& params, cudaStream_t stream);
cudaError_t launch_embedding_backward(const EmbeddingParams& params, cudaStream_t stream);

}  // namespace tensorcomp::cuda
