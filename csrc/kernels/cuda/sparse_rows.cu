#include <algorithm>

#include "kernels/cuda/sparse_rows_backward.cuh"
#include "kernels/cuda/sparse_rows_launch.h"
#include "kernels/cuda/stages.cuh"

namespace tensorcomp::cuda {
namespace {

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

// Calls `body` with the rows of a group as a constant, a power of two up to kMost.
template <int kMost, typename Body>
cudaError_t with_group(int32_t group, Body&& body) {
  if (group == kMost) return body(Constant<kMost>{});
  if constexpr (kMost > 1) {
    return with_group<kMost / 2>(group, body);
  } else {
    return cudaErrorInvalidValue;
  }
}

int64_t row_blocks(const SparseRowsParams& p) {
  return std::min<int64_t>(detail::ceil_div(p.sparse.m, kSparseWarps), 65536);
}

}  // namespace

cudaError_t launch_sparse_forward(const SparseRowsParams& p, cudaStream_t stream) {
  return with_storage(p.element, [&](auto e) {
    using E = decltype(e);
    return with_group<16 / sizeof(typename E::Storage)>(p.group, [&](auto group) {
      return launch(&sparse_forward_kernel<E, decltype(group)::value>, p.blocks * p.groups(), kSparseThreads,
                    static_cast<size_t>(p.shared_bytes), stream, p);
    });
  });
}

cudaError_t launch_sparse_columns(const SparseRowsParams& p, cudaStream_t stream) {
  return with_storage(p.element, [&](auto e) {
    return launch(&sparse_columns_kernel<decltype(e)>, row_blocks(p), kSparseThreads, 0, stream, p);
  });
}

cudaError_t launch_sparse_values(const SparseRowsParams& p, cudaStream_t stream) {
  return with_storage(p.element, [&](auto e) {
    using E = decltype(e);
    return with_group<16 / sizeof(typename E::Storage)>(p.group, [&](auto group) {
      return launch(&sparse_values_kernel<E, decltype(group)::value>, p.blocks, kSparseThreads,
                    static_cast<size_t>(p.shared_bytes), stream, p);
    });
  });
}

cudaError_t launch_sparse_input(const SparseRowsParams& p, cudaStream_t stream) {
  return with_storage(p.element, [&](auto e) {
    using E = decltype(e);
    const cudaError_t error = with_group<8>(p.group, [&](auto group) {
      return launch(&sparse_input_kernel<E, decltype(group)::value>, p.splits * p.groups(), kSparseThreads,
                    static_cast<size_t>(p.shared_bytes), stream, p);
    });
    if (error != cudaSuccess) return error;
    const int64_t all = p.groups() * p.sparse.n * p.group;
    return launch(&sparse_input_finish_kernel<E>, std::min<int64_t>(detail::ceil_div(all, 256), 65536), 256, 0, stream,
                  p);
  });
}

}  // namespace tensorcomp::cuda
