// The compiler's own vector types: what every processor can run.

#include "isa_begin.h"

namespace tensorcomp::portable {
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
}  // namespace tensorcomp::portable
