#include "kernels/cuda/chain_launch.cuh"

namespace tensorcomp::cuda {

template cudaError_t launch_chain_of<Tf32>(const ChainParams&, int64_t, cudaStream_t);

}  // namespace tensorcomp::cuda
