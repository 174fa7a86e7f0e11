// Shared by the CUDA ops of chains: arguments to a problem of the kernels.
#pragma once

#include <deque>
#include <vector>

#include "kernels/cuda/linear_chain.h"
#include "ops/cuda/rows.h"

namespace tensorcomp::ops::cuda {

// Of the kernels here, not of the CPU's.
using tensorcomp::cuda::ChainParams;

constexpr const char* kChainName = "chain";

// What follows from a program, an element and a device; laying a program out takes the host longer than many calls
// take the device.
struct PreparedChain {
  std::vector<int64_t> numbers;
  Element element;
  int32_t shared_bytes;
  Program program;
  size_t packed_bytes, packed_size;  // without and with what tells it from others
  bool fits;                         // forward and backward
  ChainParams forward;               // where it fits
};

// Raises where the numbers are no program. Valid until the next call.
inline const PreparedChain& prepared_chain(const std::vector<int64_t>& numbers, Element element,
                                           const CallDevice& device) {
  constexpr size_t kMostKept = 64;
  thread_local std::deque<PreparedChain> kept;
  const DeviceLimits limits = device.limits();
  for (const PreparedChain& one : kept) {
    if (one.element == element && one.shared_bytes == limits.shared_per_block && one.numbers == numbers) return one;
  }
  const std::optional<Program> program = decode_program(numbers);
  STD_TORCH_CHECK(program.has_value(), kChainName, ": program does not describe a chain of products");
  std::vector<int64_t> packed_for = numbers;
  packed_for.push_back(element_bytes(element));
  packed_for.push_back(element == Element::kFloat16);
  const bool fits = !device.old() && chain_fits(*program, element, limits);
  // Sizes of what does not fit may be past the 32 bits that the kernels count in.
  const size_t bytes = fits ? chain_packed_bytes(*program, element) : 0;
  PreparedChain one{numbers, element,      limits.shared_per_block, *program, bytes, size_with_tag(bytes, packed_for),
                    fits,    ChainParams()};
  if (one.fits) one.forward = *chain_params(*program, element);
  if (kept.size() == kMostKept) kept.pop_front();
  kept.push_back(one);
  return kept.back();
}

// So many rows as 32 bits cannot count are left to the oracle.
inline bool takes_rows(const PreparedChain& chain, int64_t rows) { return chain.fits && rows < (int64_t{1} << 31); }

// Raises where there are too few or many, or one does not fit the program or the others.
inline void check_matrices(const Program& program, const std::vector<Tensor>& matrices, const Tensor& like) {
  STD_TORCH_CHECK(matrices.size() == program.steps.size(), kChainName, ": matrices must be one for each of ",
                  program.steps.size(), " steps, got ", matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& m = matrices[i];
    STD_TORCH_CHECK(m.dim() == 2 && m.size(0) == program.rows(i) && m.size(1) == program.columns(i), kChainName,
                    ": matrices[", i, "] must be [", program.rows(i), ", ", program.columns(i), "], got ", sizes_of(m));
    STD_TORCH_CHECK(m.scalar_type() == like.scalar_type() && m.get_device_index() == like.get_device_index(),
                    kChainName, ": x and the matrices must have one dtype and lie on one device");
  }
}

// Dense, and where each begins.
struct DenseMatrices {
  explicit DenseMatrices(const std::vector<Tensor>& matrices) {
    for (const Tensor& m : matrices) {
      kept.push_back(dense(m));
      data.push_back(kept.back().const_data_ptr());
    }
  }
  std::vector<Tensor> kept;
  std::vector<const void*> data;
};

inline ChainRows chain_rows(const Rows& rows, int64_t count) {
  return {rows.image.data, count, rows.image.strides.w, rows.image.strides.c};
}

}  // namespace tensorcomp::ops::cuda
