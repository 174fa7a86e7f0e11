// What every CUDA kernel is launched with: a plain struct a problem, and a checked launch on a given stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace tensorcomp {

// Core [rank_out, rank_in, kernel_h, kernel_w] of any strides to dense [kernel_h, kernel_w, rank_in,
// rank_out]: one matrix a tap, output ranks innermost. Elements are moved, not computed with, so only their
// size matters.
struct Tucker2PackParams {
  int32_t element_bytes = 0;  // 2 or 4
  int64_t rank_out = 0, rank_in = 0, kernel_h = 0, kernel_w = 0;
  int64_t stride_out = 0, stride_in = 0, stride_h = 0, stride_w = 0;  // of the core, in elements
  const void* core = nullptr;
  void* packed = nullptr;
};

cudaError_t launch_tucker2_pack(const Tucker2PackParams& params, cudaStream_t stream);

#ifdef __CUDACC__

constexpr int kThreads = 256;
// Grid-stride kernels: enough blocks to fill any device, far below every grid limit.
constexpr int64_t kMostBlocks = 8192;

// Launches a kernel over `count` independent elements. An empty problem launches nothing: a grid of no blocks
// is an error to CUDA. The error of this launch is returned and cleared; nothing waits for the device.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_elementwise(void (*kernel)(Parameters...), int64_t count, cudaStream_t stream,
                               Arguments... arguments) {
  if (count == 0) {
    return cudaSuccess;
  }
  const int64_t blocks = std::min((count + kThreads - 1) / kThreads, kMostBlocks);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

#endif  // __CUDACC__

}  // namespace tensorcomp
