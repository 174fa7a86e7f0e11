// Shared by the CUDA ops of chains: arguments to a problem of the kernels.
#pragma once

#include <vector>

#include "kernels/cuda/linear_chain.h"
#include "ops/cuda/rows.h"

namespace tensorcomp::ops::cuda {

constexpr const char* kChainName = "chain";

// Raises where the numbers are no program.
inline Program chain_program(const std::vector<int64_t>& numbers) {
  std::optional<Program> program = decode_program(numbers);
  STD_TORCH_CHECK(program.has_value(), kChainName, ": program does not describe a chain of products");
  return *program;
}

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

// So many rows as 32 bits cannot count are left to the oracle.
inline bool kernels_take(const Program& program, Element element, int64_t rows, const CallDevice& device) {
  return !device.old() && rows < (int64_t{1} << 31) && chain_fits(program, element, device.limits());
}

}  // namespace tensorcomp::ops::cuda
