#include "kernels/cuda/pixel_sum.cuh"

#include "kernels/cuda/bottleneck_launch.h"

namespace tensorcomp::cuda {

cudaError_t launch_pixel_sum(const PixelSumParams& params, cudaStream_t stream) {
  const size_t shared = static_cast<size_t>(sum_shared_bytes(element_bytes(params.element)));
  return with_element(params.element, [&](auto e) {
    return launch(&pixel_sum_kernel<decltype(e)>, sum_blocks(params), kSumThreads, shared, stream, params);
  });
}

cudaError_t launch_pixel_sum_finish(const PixelSumFinishParams& params, cudaStream_t stream) {
  const int64_t columns = params.diagonal ? 1 : params.n;
  int64_t count = static_cast<int64_t>(params.taps_h) * params.taps_w * params.m * columns;
  if (params.out == nullptr) count = 0;
  if (params.out_bias != nullptr) count += params.m;
  return with_element(params.element, [&](auto e) {
    return launch(&pixel_sum_finish_kernel<decltype(e)>, finish_blocks(count, params.splits), kFinishWarps * 32,
                  kFinishWarps * 32 * sizeof(float), stream, params, count);
  });
}

}  // namespace tensorcomp::cuda
