// AVX-512 with the BW, DQ and VL extensions.

#include "isa_begin.h"

#if defined(TC_X86)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prfchw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prfchw")
#endif

#define TC_AVX512 1

namespace tensorcomp::avx512 {
namespace {
#include "isa.inl.h"
}  // namespace

BottleneckKernels bottleneck_float32() { return Bottleneck<Float32>::table(); }
BottleneckKernels bottleneck_bfloat16() { return Bottleneck<Bfloat16Widened>::table(); }
EmbeddingKernels embedding_float32() { return Embedding<Float32Entry>::table(); }
EmbeddingKernels embedding_bfloat16() { return Embedding<Bfloat16Entry>::table(); }
ChainKernels chain_float32() { return Chain<Float32>::table(); }
ChainKernels chain_bfloat16() { return Chain<Bfloat16Widened>::table(); }
ContractKernels contract() { return contract_kernels(); }
LowrankSparseKernels lowrank_sparse_float32() { return LowrankSparse<Float32>::table(); }
LowrankSparseKernels lowrank_sparse_bfloat16() { return LowrankSparse<Bfloat16Widened>::table(); }
double fma_peak(double seconds) { return measure_peak<FloatDot>(seconds); }
}  // namespace tensorcomp::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
