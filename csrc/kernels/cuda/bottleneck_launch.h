// Launches of the CUDA kernels, on a given stream; nothing waits, nothing is kept between calls.
#pragma once

#ifdef TENSORCOMP_EMULATE_CUDA
#include "kernels/cuda/device.cuh"
#else
#include <cuda_runtime.h>
#endif

#include "kernels/cuda/bottleneck.h"

namespace tensorcomp::cuda {

// `tile` of params must come from plan_tile, `blocks` from launch_blocks (plan.h).
cudaError_t launch_bottleneck(const BottleneckParams& params, int64_t blocks, cudaStream_t stream);
cudaError_t launch_pack(const PackBatch& batch, cudaStream_t stream);
cudaError_t launch_pack_depthwise(const PackDepthwiseParams& params, cudaStream_t stream);
cudaError_t launch_pixel_sum(const PixelSumParams& params, cudaStream_t stream);
cudaError_t launch_pixel_sum_finish(const PixelSumFinishParams& params, cudaStream_t stream);

// One a type of element, so that they compile side by side.
template <typename E>
cudaError_t launch_bottleneck_of(const BottleneckParams& params, int64_t blocks, cudaStream_t stream);

}  // namespace tensorcomp::cuda
