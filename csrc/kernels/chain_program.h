// A chain of matrix products over the modes of each row, written out as strided products.
#pragma once

#include <cstdint>

namespace tensorcomp {

constexpr int kMaxChainSteps = 12, kMaxChainDims = 12;
// Elements of a row between any two steps and of a matrix, and multiply-adds of a row: what kernels compute from them,
// bytes for some rows and threads, stays within 63 bits.
constexpr int64_t kMaxChainElements = int64_t{1} << 40, kMaxChainMacs = int64_t{1} << 60;

struct ChainDim {
  int64_t size = 1;
  int64_t in = 0, out = 0;  // strides, in elements
};

// One product: out[rows, n] = sum over k of in[rows, k] * matrix[n, k].
struct ChainStep {
  int64_t in_size = 1, out_size = 1, k_size = 1, n_size = 1;  // elements of a row of x before and after, of the matrix
  int row_count = 0, k_count = 0, n_count = 0;
  ChainDim rows[kMaxChainDims];  // dims that are kept: strides in the row before and after; ascending `in` last
  ChainDim k[kMaxChainDims];     // dims summed over: strides in the row before and in the matrix's columns
  ChainDim n[kMaxChainDims];     // dims brought: strides in the matrix's rows and in the row after
};

struct ChainProgram {
  int count = 0;
  ChainStep steps[kMaxChainSteps];
  int64_t in_features = 1, out_features = 1;
  int64_t macs = 0;  // of one row
};

// Reads what Program.encode() of tensorcomp_ext/ops/_chain_program.py wrote. False: no program, or one with more steps
// or dims or larger rows or matrices than the kernels take; the oracle tells which.
bool decode_chain(const int64_t* numbers, int64_t count, ChainProgram* program);

// The step that takes gradients back: the matrix's rows are summed over, its columns brought.
ChainStep transposed(const ChainStep& step);

}  // namespace tensorcomp
