// The CUDA kernels as plain C++, for the emulator.
#include "kernels/cuda/bottleneck.cu"
#include "kernels/cuda/bottleneck_bfloat16.cu"
#include "kernels/cuda/bottleneck_float16.cu"
#include "kernels/cuda/bottleneck_float32.cu"
#include "kernels/cuda/bottleneck_tf32.cu"
#include "kernels/cuda/convolution.cpp"
#include "kernels/cuda/convolution_backward.cpp"
#include "kernels/cuda/pixel_sum.cu"
