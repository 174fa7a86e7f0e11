#include "kernels/cuda/bottleneck_launch.h"

#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/pack.cuh"

namespace tensorcomp::cuda {
namespace {

constexpr int kThreads = 256;

// Grid-stride kernels: enough blocks to fill any device, far below every grid limit.
int64_t elementwise_blocks(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return blocks < 8192 ? blocks : 8192;
}

}  // namespace

cudaError_t launch_bottleneck(const BottleneckParams& params, int64_t blocks, cudaStream_t stream) {
  return with_element(params.element,
                      [&](auto e) { return launch_bottleneck_of<decltype(e)>(params, blocks, stream); });
}

cudaError_t launch_pack(const PackBatch& batch, cudaStream_t stream) {
  int64_t most = 0;
  for (int i = 0; i < batch.count; ++i) most = std::max(most, pack_words(batch.item[i]));
  return launch(&pack_kernel, elementwise_blocks(most), kThreads, 0, stream, batch);
}

cudaError_t launch_pack_depthwise(const PackDepthwiseParams& params, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(params.kernel_h) * params.kernel_w * rank_padded(params.rank);
  return with_element(params.element, [&](auto e) {
    return launch(&pack_depthwise_kernel<decltype(e)>, elementwise_blocks(count), kThreads, 0, stream, params, count);
  });
}

}  // namespace tensorcomp::cuda
