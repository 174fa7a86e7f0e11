// Launches of the low-rank + sparse kernels, on a given stream; nothing waits, nothing is kept between calls.
#pragma once

#include "kernels/cuda/bottleneck_launch.h"
#include "kernels/cuda/lowrank_sparse.h"

namespace tensorcomp::cuda {

// Stages and shared memory of params must come from plan_weight and plan_masked_product (lowrank_sparse.h).
cudaError_t launch_weight(const WeightParams& params, cudaStream_t stream);
cudaError_t launch_masked(const MaskedParams& params, cudaStream_t stream);
// Adds the splits to `out`, dense.
cudaError_t launch_masked_product(const MaskedProductParams& params, void* out, cudaStream_t stream);

}  // namespace tensorcomp::cuda
