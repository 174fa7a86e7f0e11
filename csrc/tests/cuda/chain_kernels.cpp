// The CUDA kernel of chains as plain C++, for the emulator.
#include "kernels/cuda/chain.cu"
#include "kernels/cuda/chain_bfloat16.cu"
#include "kernels/cuda/chain_float16.cu"
#include "kernels/cuda/chain_float32.cu"
#include "kernels/cuda/chain_tf32.cu"
#include "kernels/cuda/linear_chain.cpp"
