#include <algorithm>

#include "kernels/cuda/embedding_backward.cuh"
#include "kernels/cuda/embedding_launch.h"

namespace tensorcomp::cuda {
namespace {

constexpr int kThreads = 256;

// Grid-stride kernels: enough blocks to fill any device, far below every grid limit.
int64_t stride_blocks(int64_t count, int64_t each) { return std::min<int64_t>((count + each - 1) / each, 65536); }

// No tensor cores here: float32 is exact whether TF32 is allowed or not.
template <typename Body>
cudaError_t with_storage(Element element, Body&& body) {
  switch (element) {
    case Element::kFloat16: return body(Float16{});
    case Element::kBfloat16: return body(Bfloat16{});
    case Element::kTf32:
    case Element::kFloat32: break;
  }
  return body(Float32Storage{});
}

}  // namespace

cudaError_t launch_embedding(const EmbeddingParams& p, cudaStream_t stream) {
  return with_storage(p.element, [&](auto e) {
    return launch(&embedding_kernel<decltype(e)>, stride_blocks(p.count, p.warps), p.warps * 32,
                  static_cast<size_t>(p.shared_bytes), stream, p);
  });
}

cudaError_t launch_embedding_digits(const EmbeddingParams& p, cudaStream_t stream) {
  return with_storage(p.element, [&](auto e) {
    return launch(&embedding_digits_kernel<decltype(e)>, stride_blocks(p.count, kThreads), kThreads, 0, stream, p);
  });
}

cudaError_t launch_embedding_backward(const EmbeddingParams& p, cudaStream_t stream) {
  int64_t cores = 0, slices = 0;
  for (int32_t k = 0; k < p.cores; ++k) {
    if (p.core[k].gradient == nullptr) continue;
    ++cores;
    slices += p.core[k].vocab;
  }
  const int64_t chunks = (p.count + p.chunk - 1) / p.chunk * cores;
  return with_storage(p.element, [&](auto e) {
    const cudaError_t error = launch(&embedding_backward_kernel<decltype(e)>, (chunks + p.warps - 1) / p.warps,
                                     p.warps * 32, static_cast<size_t>(p.shared_bytes), stream, p);
    if (error != cudaSuccess) return error;
    return launch(&embedding_finish_kernel<decltype(e)>, (slices + kThreads / 32 - 1) / (kThreads / 32), kThreads, 0,
                  stream, p);
  });
}

}  // namespace tensorcomp::cuda
