// AVX-512 with the bfloat16 dot product: only the bfloat16 kernels differ from isa_avx512.cpp.

#include "isa_begin.h"

#if defined(TC_X86)
#if defined(__clang__)
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,prfchw"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,prfchw")
#endif

#define TC_AVX512 1
#define TC_BF16_DOT 1
namespace tensorcomp::avx512_bf16 {
namespace {
#include "isa.inl.h"
}  // namespace

BottleneckKernels bottleneck_bfloat16() { return Bottleneck<Bfloat16Pairs, Bfloat16Widened>::table(); }
ChainKernels chain_bfloat16() { return Chain<Bfloat16Pairs, Bfloat16Widened>::table(); }
LowrankSparseKernels lowrank_sparse_bfloat16() { return LowrankSparse<Bfloat16Pairs, Bfloat16Widened>::table(); }
double fma_peak_bfloat16(double seconds) { return measure_peak<PairDot>(seconds); }
}  // namespace tensorcomp::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
