// The CPU kernels of every instruction set behind one table, chosen once at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../lowrank_sparse.h"
#include "../params.h"
#include "../sparse_matrix.h"
#include "../sparse_panels.h"

#if defined(__x86_64__) && !defined(TENSORCOMP_PORTABLE)
#define TC_X86 1
#endif

namespace tensorcomp {

// Bottleneck convolution of one element type on one instruction set. `threads` is the number of parts the caller
// will run; it must be the same in all calls for one problem.
struct BottleneckKernels {
  size_t (*packed_bytes)(const BottleneckShape&);
  void (*pack)(const BottleneckShape&, const BottleneckWeights&, void* to);
  size_t (*packed_bytes_for)(const BottleneckConvParams&, int64_t threads);
  void (*pack_for)(const BottleneckConvParams&, int64_t threads, const BottleneckWeights&, void* to);
  BottleneckPlan (*plan)(const BottleneckConvParams&, int64_t threads);
  void (*run)(const BottleneckConvParams&, int64_t threads, int64_t phase, int64_t part);
  BottleneckPlan (*backward_plan)(const BottleneckBackwardParams&, int64_t threads);
  void (*backward_run)(const BottleneckBackwardParams&, int64_t threads, int64_t phase, int64_t part);
};

// Embedding of one element type. `parts` pieces of forward, and of both phases of backward (the rows, then the sums
// over the pieces); all pieces of a phase before the next phase.
struct EmbeddingKernels {
  size_t (*scratch_bytes)(const EmbeddingParams&, int64_t parts, bool backward);
  void (*run)(const EmbeddingParams&, int64_t parts, int64_t part);
  void (*backward_run)(const EmbeddingParams&, int64_t parts, int64_t phase, int64_t part);
};

// Chain of products of one element type on one instruction set.
struct ChainKernels {
  size_t (*packed_bytes)(const ChainProgram&);
  // One matrix [n, k] for each step, contiguous; packed for any number of rows.
  void (*pack)(const ChainProgram&, const void* const* matrices, void* to);
  ChainPlan (*plan)(const ChainParams&, int64_t threads);
  void (*run)(const ChainParams&, const ChainPlan&, int64_t phase, int64_t part);
  ChainBackwardPlan (*backward_plan)(const ChainBackwardParams&, int64_t threads);
  void (*backward_run)(const ChainBackwardParams&, const ChainBackwardPlan&, int64_t phase, int64_t part);
};

// Contractions of float32 cores.
struct ContractKernels {
  ContractPlan (*plan)(const ContractParams&, int64_t threads);
  void (*run)(const ContractParams&, const ContractPlan&, int64_t phase, int64_t part);
};

// Low-rank + sparse weights of one element type on one instruction set.
struct LowrankSparseKernels {
  SparseWeightPlan (*weight_plan)(const SparseWeightParams&, int64_t threads);
  void (*weight_run)(const SparseWeightParams&, const SparseWeightPlan&, int64_t phase, int64_t part);
  SparseWeightBackwardPlan (*weight_backward_plan)(const SparseWeightBackwardParams&, int64_t threads);
  void (*weight_backward_run)(const SparseWeightBackwardParams&, const SparseWeightBackwardPlan&, int64_t phase,
                              int64_t part);
  // What is wrong with a sparse matrix; the functions below take those with which nothing is. The same for every
  // element type: values are not looked at.
  SparseFault (*fault)(const SparseMatrix&);
  SparseLinearPlan (*linear_plan)(const SparseLinearParams&, int64_t threads);
  void (*linear_run)(const SparseLinearParams&, const SparseLinearPlan&, int64_t phase, int64_t part);
  SparseLinearBackwardPlan (*linear_backward_plan)(const SparseLinearBackwardParams&, int64_t threads);
  void (*linear_backward_run)(const SparseLinearBackwardParams&, const SparseLinearBackwardPlan&, int64_t phase,
                              int64_t part);
  // In panels: one phase of `parts` pieces.
  size_t (*panels_scratch_bytes)(const SparsePanelsParams&, int64_t parts);
  void (*panels_run)(const SparsePanelsParams&, int64_t parts, int64_t part);
};

struct KernelTable {
  const char* name;  // "avx512_bf16" | "avx512" | "avx2" | "portable"
  int32_t id;
  BottleneckKernels bottleneck_float32;
  BottleneckKernels bottleneck_bfloat16;
  ChainKernels chain_float32;
  ChainKernels chain_bfloat16;
  double (*fma_peak)(bool bfloat16, double seconds);
  EmbeddingKernels embedding_float32;
  EmbeddingKernels embedding_bfloat16;
  ContractKernels contract;
  LowrankSparseKernels lowrank_sparse_float32;
  LowrankSparseKernels lowrank_sparse_bfloat16;

  const BottleneckKernels& bottleneck(DType dtype) const {
    return dtype == DType::kFloat32 ? bottleneck_float32 : bottleneck_bfloat16;
  }
  const EmbeddingKernels& embedding(DType dtype) const {
    return dtype == DType::kFloat32 ? embedding_float32 : embedding_bfloat16;
  }
  const LowrankSparseKernels& lowrank_sparse(DType dtype) const {
    return dtype == DType::kFloat32 ? lowrank_sparse_float32 : lowrank_sparse_bfloat16;
  }
  const ChainKernels& chain(DType dtype) const { return dtype == DType::kFloat32 ? chain_float32 : chain_bfloat16; }
};

// The table in use: the best this processor has, or what TENSORCOMP_CPU_ISA or the cap below allows.
const KernelTable& kernel_table();

}  // namespace tensorcomp

extern "C" {
// Name of the instruction set in use.
const char* tensorcomp_isa();
// Comma-separated names of those this processor can run, best first.
const char* tensorcomp_isa_available();
// Use `name` or the next worse one this processor has; null or "" removes the cap. Nonzero: unknown name.
int tensorcomp_set_isa_cap(const char* name);
// FLOP/s of the calling thread in a loop of independent fused multiply-adds (or bfloat16 pair products).
double tensorcomp_fma_peak(int bfloat16, double seconds);
// Bytes read plus bytes written a second by the calling thread copying `bytes` from src to dst over and over.
double tensorcomp_copy_bandwidth(void* dst, const void* src, size_t bytes, double seconds);
}
