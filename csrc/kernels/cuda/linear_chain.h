// A chain of products on a device, forward and backward: what to pack, what to launch in which order, and how much
// scratch memory it takes. Host code over plain pointers; nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cuda/chain_launch.h"
#include "kernels/cuda/chain_plan.h"

namespace tensorcomp::cuda {

// Rows of x, or of a gradient, of any strides in elements.
struct ChainRows {
  const void* data = nullptr;
  int64_t count = 0, row = 0, feature = 1;
};

struct ChainCall {
  const void* bias = nullptr;
  const void* residual = nullptr;  // [rows, out], dense
  bool relu = false;
};

// Results of backward; null ones are not computed. Dense: x [rows, in], bias [out], matrices as given.
struct ChainGradients {
  void* x = nullptr;
  void* bias = nullptr;
  std::vector<void*> matrices;
};

// Packed matrices serve any number of rows, and float32 as well as TF32. With `transposed` the program is that of the
// gradients, whose matrices are those of the forward one, turned.
size_t chain_packed_bytes(const Program& program, Element element);
cudaError_t pack_chain(const Program& program, Element element, const std::vector<const void*>& matrices,
                       bool transposed, void* packed, cudaStream_t stream);

// `p` from chain_params. All data pointers on the device; `packed` 16-byte aligned. y is dense.
cudaError_t forward_chain(ChainParams p, const DeviceLimits& device, const ChainRows& x, const void* packed,
                          const ChainCall& call, void* y, cudaStream_t stream);

// Rows whose states are in scratch memory at once.
int64_t chain_backward_rows(const Program& program, Element element, int64_t rows);
// Scratch memory of backward, 256-byte aligned.
size_t chain_backward_scratch(const Program& program, Element element, const DeviceLimits& device, int64_t rows,
                              int64_t rows_at_once, const ChainGradients& wanted);
cudaError_t backward_chain(const Program& program, Element element, const DeviceLimits& device, const ChainRows& grad,
                           const ChainRows& x, int64_t rows_at_once, const std::vector<const void*>& matrices,
                           const ChainGradients& wanted, void* scratch, cudaStream_t stream);

}  // namespace tensorcomp::cuda
