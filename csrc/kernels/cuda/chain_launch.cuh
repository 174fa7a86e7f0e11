// The chain kernel's forms for one type of element; included by the file of that type.
#pragma once

#include "kernels/cuda/chain.cuh"
#include "kernels/cuda/chain_launch.h"

namespace tensorcomp::cuda {

// What a launch can be given.
static_assert(sizeof(ChainParams) <= 4096);

// 64 accumulators a thread at most, so that two blocks of 256 threads fit a multiprocessor's registers.
template <typename E, int kM, int kN>
TC_KERNEL(256, 2)
chain_kernel(const TC_GRID_CONSTANT ChainParams p) {
  ChainBlock<E, kM, kN>(p).run();
}

template <typename E>
cudaError_t launch_chain_of(const ChainParams& p, int64_t blocks, cudaStream_t stream) {
  const int threads = p.tile.warps * 32;
  const size_t shared = static_cast<size_t>(p.tile.shared_bytes);
  if (p.tile.blocks_n == 4) return launch(&chain_kernel<E, 2, 4>, blocks, threads, shared, stream, p);
  if constexpr (E::kParts == 1) {
    if (p.tile.blocks_n == 8) return launch(&chain_kernel<E, 2, 8>, blocks, threads, shared, stream, p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace tensorcomp::cuda
