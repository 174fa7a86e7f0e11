#include "kernels/cuda/chain_launch.h"
#include "kernels/cuda/elements.cuh"

namespace tensorcomp::cuda {

cudaError_t launch_chain(const ChainParams& params, int64_t blocks, cudaStream_t stream) {
  return with_element(params.element, [&](auto e) { return launch_chain_of<decltype(e)>(params, blocks, stream); });
}

}  // namespace tensorcomp::cuda
