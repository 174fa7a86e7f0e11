#include "kernels/cuda/launch.h"

namespace tensorcomp {
namespace {

// Neighbouring threads write neighbouring output ranks: stores coalesce, and the strided reads of so small a
// tensor are served by L2.
template <typename Element>
__global__ void __launch_bounds__(kThreads) pack_kernel(Tucker2PackParams p, int64_t count) {
  const Element* core = static_cast<const Element*>(p.core);
  Element* packed = static_cast<Element*>(p.packed);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t out = i % p.rank_out;
    const int64_t in = i / p.rank_out % p.rank_in;
    const int64_t tap = i / p.rank_out / p.rank_in;
    packed[i] =
        core[out * p.stride_out + in * p.stride_in + tap / p.kernel_w * p.stride_h + tap % p.kernel_w * p.stride_w];
  }
}

}  // namespace

cudaError_t launch_tucker2_pack(const Tucker2PackParams& params, cudaStream_t stream) {
  const int64_t count = params.rank_out * params.rank_in * params.kernel_h * params.kernel_w;
  switch (params.element_bytes) {
    case 2: return launch_elementwise(&pack_kernel<uint16_t>, count, stream, params, count);
    case 4: return launch_elementwise(&pack_kernel<uint32_t>, count, stream, params, count);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace tensorcomp
