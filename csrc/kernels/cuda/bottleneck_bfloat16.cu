#include "kernels/cuda/bottleneck_launch.cuh"

namespace tensorcomp::cuda {

template cudaError_t launch_bottleneck_of<Bfloat16>(const BottleneckParams&, int64_t, cudaStream_t);

}  // namespace tensorcomp::cuda
