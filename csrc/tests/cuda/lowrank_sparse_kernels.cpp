// The low-rank + sparse CUDA kernels as plain C++, for the emulator.
#include "kernels/cuda/lowrank_sparse_gradients.cu"
#include "kernels/cuda/lowrank_sparse_weight.cu"
#include "kernels/cuda/sparse_rows.cu"
