// Shared by the ops of the low-rank + sparse linear layer.
#pragma once

#include "../kernels/sparse_matrix.h"
#include "chain.h"

namespace tensorcomp::ops {

// The parts of a packed sparse matrix, contiguous.
struct SparseParts {
  SparseMatrix matrix;
  Tensor values, offsets, positions;
};

// Whether the kernels take a layer like this; others go to the oracle.
bool sparse_linear_fits(const Tensor& a, const Tensor& b);

// Raises std::runtime_error where the tensors are none of a matrix [m, n], std::invalid_argument, which Python sees as
// ValueError, where the numbers in them are not. Values may be of any dtype.
SparseParts checked_places(const char* name, int64_t m, int64_t n, const Tensor& values, const Tensor& offsets,
                           const Tensor& positions);

// As above, of a [m, r] and b [r, n], in their dtype.
SparseParts checked_sparse(const char* name, const Tensor& a, const Tensor& b, const Tensor& values,
                           const Tensor& offsets, const Tensor& positions);

}  // namespace tensorcomp::ops
