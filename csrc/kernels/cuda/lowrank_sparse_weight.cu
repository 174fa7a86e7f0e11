#include "kernels/cuda/lowrank_sparse_launch.h"
#include "kernels/cuda/lowrank_sparse_weight.cuh"

namespace tensorcomp::cuda {

cudaError_t launch_weight(const WeightParams& p, cudaStream_t stream) {
  return with_element(p.element, [&](auto e) {
    return launch(&lowrank_sparse_weight_kernel<decltype(e)>, weight_blocks(p), kWeightThreads,
                  static_cast<size_t>(p.shared_bytes), stream, p);
  });
}

}  // namespace tensorcomp::cuda
