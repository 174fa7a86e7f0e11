// Problem descriptions that the kernels take: plain sizes, strides and pointers, nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "chain_program.h"
#include "contract_program.h"

namespace tensorcomp {

enum class DType : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// A convolution through a bottleneck: pointwise C_in -> ring R_in, for every ring index the same spatial core
// R_in -> R_out, pointwise ring R_out -> C_out. Depthwise: rank_in == rank_out, and the core convolves each rank by
// itself.
struct BottleneckShape {
  DType dtype = DType::kFloat32;
  int64_t c_in = 0, rank_in = 0, rank_out = 0, c_out = 0;  // the ranks are the core's
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t ring = 1;  // 1 where depthwise
  bool depthwise = false;

  // Rank channels between the stages.
  int64_t mid() const { return ring * rank_in; }
  int64_t out() const { return ring * rank_out; }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t core_elements() const { return taps() * rank_out * (depthwise ? 1 : rank_in); }
  // Multiply-adds of the core an output pixel.
  int64_t core_macs() const { return ring * core_elements(); }
};

// Dense weights in torch's order: core [rank_out, rank_in or 1, kernel_h, kernel_w], factor_out
// [c_out, ring rank_out], factor_in [c_in, ring rank_in], all contiguous.
struct BottleneckWeights {
  const void* core = nullptr;
  const void* factor_out = nullptr;
  const void* factor_in = nullptr;
};

// Batch, channel, row and column strides, in elements.
struct Strides4 {
  int64_t n = 0, c = 0, h = 0, w = 0;
};

struct BottleneckConvParams {
  BottleneckShape shape;
  int64_t batch = 0, height = 0, width = 0;
  int64_t out_height = 0, out_width = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  const void* x = nullptr;
  Strides4 x_strides;
  void* y = nullptr;  // dense: channels-last where y_strides.c == 1, else contiguous
  Strides4 y_strides;
  const void* packed = nullptr;    // what the table's pack or pack_for function wrote
  bool packed_whole = false;       // pack, which serves any problem of this shape
  const void* bias = nullptr;      // [c_out] in the dtype of x, or null
  const void* residual = nullptr;  // added to y, with its strides and dtype; or null
  bool relu = false;               // negative results become zero, after everything is added
  void* scratch = nullptr;         // scratch_bytes() of the plan, 64-byte aligned
};

// How one call is cut: `phases` runs of `parts` independent pieces each, all pieces of a phase before the
// next phase. The caller runs the pieces on as many threads as it has.
struct BottleneckPlan {
  int64_t phases = 1;
  int64_t parts = 1;
  size_t scratch_bytes = 0;
};

// Gradients of the bottleneck convolution, in the dtype of the problem; null pointers are not computed. Weight
// gradients come in the orders of BottleneckWeights, contiguous; grad_bias is [c_out]; grad_x is dense.
struct BottleneckBackwardParams {
  BottleneckConvParams forward;  // x, sizes and geometry; y, packed, bias and scratch are not read
  BottleneckWeights weights;
  const void* grad_y = nullptr;
  Strides4 grad_y_strides;
  void* grad_x = nullptr;
  Strides4 grad_x_strides;
  void* grad_core = nullptr;
  void* grad_factor_out = nullptr;
  void* grad_factor_in = nullptr;
  void* grad_bias = nullptr;
  void* scratch = nullptr;  // scratch_bytes of the plan, 64-byte aligned
};

constexpr int64_t kMaxEmbeddingCores = 8;

// An embedding whose table is a train or, where the first rank is above 1, a ring of cores.
struct EmbeddingShape {
  DType dtype = DType::kFloat32;
  int64_t cores = 0;                          // 2 to kMaxEmbeddingCores
  int64_t rank[kMaxEmbeddingCores + 1] = {};  // rank[cores] is rank[0]
  int64_t vocab[kMaxEmbeddingCores] = {};     // each below 2^31
  int64_t dim[kMaxEmbeddingCores] = {};
  int64_t num_embeddings = 0;
  int64_t padding_idx = -1;  // or -1
};

// Rows of the table for the different ones among the indices of a call, in the order of embedding_order.h; backward
// alike, where grad_y takes the place of y. Everything contiguous.
struct EmbeddingParams {
  EmbeddingShape shape;
  const void* core[kMaxEmbeddingCores] = {};  // [rank, vocab, dim, next rank]
  int64_t rows = 0;
  const int32_t* digits = nullptr;  // [rows][cores]
  const int64_t* first = nullptr;   // [rows + 1]: where the places of each row begin
  const int64_t* place = nullptr;   // rows of y, or of grad_y, that hold this row
  void* y = nullptr;                // [places, dim]; places of padding are not written
  const void* grad_y = nullptr;
  void* grad_core[kMaxEmbeddingCores] = {};  // null where not wanted
  void* scratch = nullptr;                   // scratch_bytes of the table, 64-byte aligned
};

// A chain of products over the modes of every row of x.
struct ChainParams {
  DType dtype = DType::kFloat32;
  const ChainProgram* program = nullptr;
  int64_t rows = 0;
  const void* x = nullptr;  // each row contiguous, rows x_row elements apart
  int64_t x_row = 0;
  void* y = nullptr;               // [rows, out_features], contiguous, as is the residual
  const void* packed = nullptr;    // what the table's pack function wrote
  const void* bias = nullptr;      // [out_features] in the dtype of x, or null
  const void* residual = nullptr;  // added to y, or null
  bool relu = false;               // negative results become zero
  void* scratch = nullptr;         // scratch_bytes of the plan, 64-byte aligned
};

// How a call is cut, as BottleneckPlan, and where things lie in its scratch memory.
struct ChainPlan {
  int64_t phases = 1, parts = 1;
  size_t scratch_bytes = 0;
  int64_t block = 1;     // rows that go through all steps together
  bool shared = false;   // every stage of a block is cut among the parts; else the rows are
  bool enters = false;   // x is widened to `entered` first
  bool leaves = false;   // bias, residual and ReLU come after the last step, not in its store
  bool streams = false;  // y is written past the caches
  // Offsets in words; all but the tables, the bias and `own` are per block.
  int64_t entered = 0, ping = 0, pong = 0, last = 0, own = 0, own_words = 0, block_words = 0;
  int64_t taps = 0, bias = 0, temporary = 0;  // in the part's own memory
};

// Gradients of a chain, in the dtype of the problem; null pointers are not computed. Matrices come as they are given,
// contiguous, as does grad_x.
struct ChainBackwardParams {
  DType dtype = DType::kFloat32;
  const ChainProgram* program = nullptr;
  int64_t rows = 0;
  const void* x = nullptr;  // each row contiguous, rows x_row elements apart; so
                            // the gradient
  int64_t x_row = 0;
  const void* grad = nullptr;
  int64_t grad_row = 0;
  const void* matrices[kMaxChainSteps] = {};
  void* grad_x = nullptr;
  void* grad_bias = nullptr;
  void* grad_matrices[kMaxChainSteps] = {};
  void* scratch = nullptr;  // scratch_bytes of the plan, 64-byte aligned
};

// As ChainPlan. Offsets in words: of the packed matrices, and in a part's own memory.
struct ChainBackwardPlan {
  int64_t phases = 1, parts = 1;
  size_t scratch_bytes = 0;
  int64_t block = 1;
  int64_t forward[kMaxChainSteps] = {}, backward[kMaxChainSteps] = {};
  int64_t own = 0, own_words = 0;
  int64_t sums[kMaxChainSteps] = {}, between[kMaxChainSteps] = {};
  int64_t bias_sums = 0, summed_words = 0;
  int64_t entered = 0, grad_entered = 0, ping = 0, pong = 0, dense = 0, taps = 0, temporary = 0;
};

// A contraction of cores, or its gradients where `grad` is given. Everything float32 and contiguous.
struct ContractParams {
  const ContractProgram* program = nullptr;
  const float* cores[kMaxContractCores] = {};
  float* saved = nullptr;  // the intermediates: written, or read where gradients are made
  float* result = nullptr;
  const float* grad = nullptr;
  uint32_t wanted = 0;                        // tensors of the program whose gradients are made
  float* grad_cores[kMaxContractCores] = {};  // those of wanted cores
  void* scratch = nullptr;                    // scratch_bytes of the plan, 64-byte aligned
};

// As ChainPlan. Offsets in words: packed operands come first, then the intermediates' gradients.
struct ContractPlan {
  int64_t phases = 1, parts = 1;
  size_t scratch_bytes = 0;
  int64_t grads = 0, own = 0, own_words = 0;
};

}  // namespace tensorcomp
