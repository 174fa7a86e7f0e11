// The CUDA kernels of embeddings as plain C++, for the emulator.
#include "kernels/cuda/embedding.cu"
