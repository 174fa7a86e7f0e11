#include "kernels/cuda/lowrank_sparse_gradients.cuh"
#include "kernels/cuda/lowrank_sparse_launch.h"

namespace tensorcomp::cuda {

cudaError_t launch_masked(const MaskedParams& p, cudaStream_t stream) {
  return with_element(p.element, [&](auto e) {
    using E = decltype(e);
    const int64_t down = (p.m + kMaskedWarps - 1) / kMaskedWarps;
    return launch(&masked_kernel<E>, down * masked_across<typename E::Storage>(p), 32 * kMaskedWarps, 0, stream, p);
  });
}

cudaError_t launch_masked_product(const MaskedProductParams& p, void* out, cudaStream_t stream) {
  const int64_t blocks = masked_product_tiles(p) * p.splits;
  const cudaError_t error = with_element(p.element, [&](auto e) {
    using E = decltype(e);
    const auto kernel = p.of_a ? &masked_product_kernel<E, true> : &masked_product_kernel<E, false>;
    return launch(kernel, blocks, kWeightThreads, static_cast<size_t>(p.shared_bytes), stream, p);
  });
  if (error != cudaSuccess) return error;
  PixelSumFinishParams finish;
  finish.element = p.element;
  finish.splits = p.splits;
  finish.m = finish.m_pitch = static_cast<int32_t>(p.m);
  finish.n = finish.slice = finish.slice_padded = static_cast<int32_t>(p.n);
  finish.partial = p.partial;
  finish.out = out;
  finish.stride_m = p.n;
  finish.stride_n = 1;
  return launch_pixel_sum_finish(finish, stream);
}

}  // namespace tensorcomp::cuda
