// Reads programs of contractions.

#include <initializer_list>

#include "../contract_program.h"

namespace tensorcomp {
namespace {

// Labels of a tensor, five bits each, the first one lowest; zero ends them.
bool read_labels(int64_t number, ContractTensor* tensor, uint32_t* mask) {
  if (number < 0) return false;
  *mask = 0;
  tensor->dims = 0;
  for (; number != 0; number >>= 5) {
    const int label = static_cast<int>(number & 31);
    if (label == 0 || tensor->dims == kMaxContractDims || (*mask >> label & 1)) return false;
    *mask |= 1u << label;
    tensor->label[tensor->dims++] = label;
  }
  return true;
}

// total *= by, for by >= 1; false where the product is more than `most`.
bool grow(int64_t& total, int64_t by, int64_t most) {
  if (total > most / by) return false;
  total *= by;
  return true;
}

bool count_elements(const int64_t* size, ContractTensor* tensor) {
  tensor->elements = 1;
  for (int d = 0; d < tensor->dims; ++d) {
    if (!grow(tensor->elements, size[tensor->label[d]], kMaxChainElements)) return false;
  }
  return true;
}

bool all_one(const int64_t* size, uint32_t labels) {
  for (int label = 1; label <= kMaxContractLabels; ++label) {
    if ((labels >> label & 1) && size[label] != 1) return false;
  }
  return true;
}

// The modes of a pair's product, in any order.
bool multiply_labels(const ContractTensor& first, const ContractTensor& second, uint32_t kept, ContractTensor* result) {
  for (const ContractTensor* from : {&first, &second}) {
    for (int d = 0; d < from->dims; ++d) {
      if (!(kept >> from->label[d] & 1)) continue;
      if (result->dims == kMaxContractDims) return false;
      result->label[result->dims++] = from->label[d];
    }
  }
  return true;
}

}  // namespace

bool decode_contract(const int64_t* numbers, int64_t count, const ContractShape* shapes, int cores,
                     ContractProgram* program) {
  ContractProgram& p = *program;
  p = ContractProgram{};
  if (cores < 2 || cores > kMaxContractCores || count != 2 * cores) return false;
  p.cores = cores;
  p.pairs = cores - 1;
  uint32_t mask[kMaxContractTensors] = {};  // labels of a tensor that waits to be multiplied
  bool waits[kMaxContractTensors] = {};
  for (int i = 0; i < cores; ++i) {
    ContractTensor& core = p.tensors[i];
    if (!read_labels(numbers[i], &core, &mask[i]) || core.dims != shapes[i].dims) return false;
    waits[i] = true;
    for (int d = 0; d < core.dims; ++d) {
      int64_t& size = p.size[core.label[d]];
      if (shapes[i].sizes[d] < 1 || (size != 0 && size != shapes[i].sizes[d])) return false;
      size = shapes[i].sizes[d];
    }
    if (!count_elements(p.size, &core)) return false;
  }
  ContractTensor result;
  uint32_t result_mask;
  if (!read_labels(numbers[cores], &result, &result_mask)) return false;
  int forward[kMaxContractTensors] = {};  // waves after which a tensor is there
  for (int i = 0; i < p.pairs; ++i) {
    const int made = cores + i;
    const int64_t places = numbers[made + 1];
    const int64_t first = places & 31, second = places >> 5;
    if (places < 0 || second >= made || first >= second || !waits[first] || !waits[second]) return false;
    waits[first] = waits[second] = false;
    uint32_t elsewhere = result_mask;
    for (int t = 0; t < made; ++t) elsewhere |= waits[t] ? mask[t] : 0;
    const uint32_t summed = mask[first] & mask[second], kept = (mask[first] ^ mask[second]) & elsewhere;
    if ((summed & elsewhere) || !all_one(p.size, (mask[first] ^ mask[second]) & ~elsewhere)) return false;
    ContractPair& pair = p.pair[i];
    pair.tensors[0] = static_cast<int>(first);
    pair.tensors[1] = static_cast<int>(second);
    pair.tensors[2] = made;
    mask[made] = kept;
    waits[made] = true;
    ContractTensor& to = p.tensors[made];
    if (!multiply_labels(p.tensors[first], p.tensors[second], kept, &to) || !count_elements(p.size, &to)) return false;
    pair.macs = to.elements;
    for (int d = 0; d < p.tensors[first].dims; ++d) {
      const int label = p.tensors[first].label[d];
      if ((summed >> label & 1) && !grow(pair.macs, p.size[label], kMaxChainMacs)) return false;
    }
    p.macs += pair.macs;
    if (p.macs > kMaxChainMacs) return false;
    pair.forward_wave = forward[first] > forward[second] ? forward[first] : forward[second];
    forward[made] = pair.forward_wave + 1;
    if (i + 1 < p.pairs) {
      to.at = p.saved;
      p.saved += to.elements;
    }
  }
  const int last = cores + p.pairs - 1;
  if (mask[last] != result_mask) return false;
  for (int d = 0; d < result.dims; ++d) p.tensors[last].label[d] = result.label[d];
  int backward[kMaxContractTensors] = {};
  for (int i = p.pairs; i-- > 0;) {
    ContractPair& pair = p.pair[i];
    pair.backward_wave = backward[pair.tensors[2]];
    backward[pair.tensors[0]] = backward[pair.tensors[1]] = pair.backward_wave + 1;
    if (pair.backward_wave >= p.backward_waves) p.backward_waves = pair.backward_wave + 1;
  }
  p.forward_waves = forward[last];
  lay_out(program);
  return true;
}

}  // namespace tensorcomp
