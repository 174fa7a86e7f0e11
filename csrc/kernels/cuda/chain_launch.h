// Launches of the chain kernel, on a given stream; nothing waits, nothing is kept between calls.
#pragma once

#include "kernels/cuda/bottleneck_launch.h"
#include "kernels/cuda/chain.h"

namespace tensorcomp::cuda {

// `tile` of params must come from plan_chain, `blocks` from chain_blocks (chain_plan.h).
cudaError_t launch_chain(const ChainParams& params, int64_t blocks, cudaStream_t stream);

// One a type of element, so that they compile side by side.
template <typename E>
cudaError_t launch_chain_of(const ChainParams& params, int64_t blocks, cudaStream_t stream);

}  // namespace tensorcomp::cuda
