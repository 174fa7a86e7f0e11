// Launches of the kernels of packed sparse matrices, on a given stream; nothing waits, nothing is kept between calls.
#pragma once

#include "kernels/cuda/bottleneck_launch.h"
#include "kernels/cuda/sparse_rows.h"

namespace tensorcomp::cuda {

// Params must come from plan_sparse_forward, plan_sparse_values and plan_sparse_input (sparse_rows.h). The latter two
// want columns: `expanded` of the launch before them, where the matrix has bits.
cudaError_t launch_sparse_forward(const SparseRowsParams& params, cudaStream_t stream);
cudaError_t launch_sparse_columns(const SparseRowsParams& params, cudaStream_t stream);
cudaError_t launch_sparse_values(const SparseRowsParams& params, cudaStream_t stream);
cudaError_t launch_sparse_input(const SparseRowsParams& params, cudaStream_t stream);

}  // namespace tensorcomp::cuda
