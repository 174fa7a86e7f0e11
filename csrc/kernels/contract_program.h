// A network of cores contracted pair by pair, forward and backward, written out as strided products.
#pragma once

#include "chain_program.h"

namespace tensorcomp {

constexpr int kMaxContractCores = 12, kMaxContractDims = kMaxChainDims, kMaxContractLabels = 31;
constexpr int kMaxContractPairs = kMaxContractCores - 1;
constexpr int kMaxContractTensors = kMaxContractCores + kMaxContractPairs;

// A core, an intermediate or the result: its modes in the order in which they lie in memory, without gaps.
struct ContractTensor {
  int dims = 0;
  int label[kMaxContractDims] = {};
  int64_t elements = 1;
  int64_t at = 0;  // intermediates: where they begin in the saved buffer
};

// One of a pair's three tensors from the other two. `x` is read where it lies, as a single row; `y` is packed.
struct ContractProduct {
  ChainStep step;
  int x = 0, y = 0;  // which of the pair
};

// first, second and their product result. Labels of both are summed over, those of size 1 that nothing else has are
// dropped; each product of `products` makes the tensor,
// or its gradient, whose place it has: result = first second, or first from result and second, or second.
struct ContractPair {
  int tensors[3] = {};
  ContractProduct products[3];
  int64_t macs = 0;                         // of each product
  int forward_wave = 0, backward_wave = 0;  // pairs of one wave do not wait for each other
};

struct ContractProgram {
  int cores = 0, pairs = 0;  // pairs[i] makes tensors[cores + i]
  int forward_waves = 0, backward_waves = 0;
  int64_t size[kMaxContractLabels + 1] = {};  // of each label, from 1
  ContractTensor tensors[kMaxContractTensors];
  ContractPair pair[kMaxContractPairs];
  int64_t saved = 0;  // elements of all intermediates
  int64_t macs = 0;   // of all pairs, forward

  const ContractTensor& result() const { return tensors[cores + pairs - 1]; }
};

// A core's sizes.
struct ContractShape {
  int dims = 0;
  const int64_t* sizes = nullptr;
};

// Reads what encode() of tensorcomp_ext/ops/_contract_program.py wrote, for cores of these sizes, and lays out the
// intermediates. False: no program of theirs, one that keeps a label it should sum over or the other way round, or one
// too large for the kernels.
bool decode_contract(const int64_t* numbers, int64_t count, const ContractShape* shapes, int cores,
                     ContractProgram* program);

// Orders the modes of the intermediates so that forward and backward take the least time, and writes out the products.
void lay_out(ContractProgram* program);

}  // namespace tensorcomp
