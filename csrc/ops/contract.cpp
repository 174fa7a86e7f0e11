// torch.ops.tensorcomp.contract and contract_backward on the CPU: a network of cores in one call each way.

#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "../kernels/cpu/dispatch.h"
#include "phases.h"
#include "tensor_utils.h"

namespace tensorcomp::ops {
namespace {

// A program for cores of certain sizes; to lay one out takes longer than to run it.
struct KnownContraction {
  bool sound;
  ContractProgram program;
};

using Known = std::shared_ptr<const KnownContraction>;

struct HashOfNumbers {
  size_t operator()(const std::vector<int64_t>& numbers) const {
    uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
    for (const int64_t number : numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3;
    return static_cast<size_t>(hash ^ hash >> 32);
  }
};

Known known_contraction(const std::vector<Tensor>& cores, const std::vector<int64_t>& numbers) {
  constexpr size_t kMost = 512;  // of some 32 KB; shapes that never come back must not stay for ever
  static std::mutex mutex;
  static std::unordered_map<std::vector<int64_t>, Known, HashOfNumbers> known;
  if (cores.size() > kMaxContractCores || numbers.size() > 2 * kMaxContractCores) return nullptr;
  std::array<ContractShape, kMaxContractCores> shapes;
  // With both lengths in front, no other call has this key.
  std::vector<int64_t> key;
  key.reserve(2 + numbers.size() + cores.size() * (1 + kMaxContractDims));  // shapes point into it
  key.push_back(static_cast<int64_t>(numbers.size()));
  key.push_back(static_cast<int64_t>(cores.size()));
  key.insert(key.end(), numbers.begin(), numbers.end());
  for (size_t i = 0; i < cores.size(); ++i) {
    const auto sizes = cores[i].sizes();
    if (sizes.size() > kMaxContractDims) return nullptr;
    key.push_back(static_cast<int64_t>(sizes.size()));
    shapes[i] = {static_cast<int>(sizes.size()), key.data() + key.size()};
    key.insert(key.end(), sizes.begin(), sizes.end());
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  auto read = std::make_shared<KnownContraction>();
  read->sound = decode_contract(numbers.data(), static_cast<int64_t>(numbers.size()), shapes.data(),
                                static_cast<int>(cores.size()), &read->program);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= kMost) known.clear();
  return known[std::move(key)] = std::move(read);
}

// The program, or null where the oracle serves or tells what is wrong.
Known native_program(const char* name, const std::vector<Tensor>& cores, const std::vector<int64_t>& numbers) {
  if (cores.empty() || cores[0].scalar_type() != ScalarType::Float) return nullptr;
  const Known known = known_contraction(cores, numbers);
  if (!known || !known->sound) return nullptr;
  for (const Tensor& core : cores) {
    STD_TORCH_CHECK(core.is_cpu() && core.scalar_type() == ScalarType::Float, name,
                    ": cores must have one dtype and lie on the CPU");
  }
  return known;
}

std::vector<Tensor> dense_cores(const std::vector<Tensor>& cores, ContractParams* p) {
  std::vector<Tensor> held;
  held.reserve(cores.size());
  for (size_t i = 0; i < cores.size(); ++i) {
    held.push_back(dense(cores[i]));
    p->cores[i] = static_cast<const float*>(held.back().const_data_ptr());
  }
  return held;
}

void run_contraction(ContractParams& p, int64_t macs) {
  const ContractKernels& kernels = kernel_table().contract;
  const ContractPlan plan = kernels.plan(p, useful_threads(macs));
  constexpr size_t kSmall = 32 * 1024;  // a call's own stack serves
  alignas(64) char small[kSmall];
  std::optional<Tensor> scratch;
  if (plan.scratch_bytes > kSmall) scratch = empty_bytes(plan.scratch_bytes);
  p.scratch = scratch ? static_cast<char*>(scratch->mutable_data_ptr()) : small;
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.run(p, plan, phase, part); });
}

Tensor empty_floats(const ContractProgram& program, const ContractTensor& tensor) {
  std::array<int64_t, kMaxContractDims> sizes, strides;
  int64_t inside = 1;
  for (int d = tensor.dims; d-- > 0;) {
    sizes[static_cast<size_t>(d)] = program.size[tensor.label[d]];
    strides[static_cast<size_t>(d)] = inside;
    inside *= sizes[static_cast<size_t>(d)];
  }
  return empty_cpu(tensor.dims, sizes.data(), strides.data(), aoti_torch_dtype_float32());
}

// The result, and the intermediates in an order of the kernels' own.
std::tuple<Tensor, Tensor> contract(std::vector<Tensor> cores, std::vector<int64_t> numbers) {
  const Known known = native_program("contract", cores, numbers);
  if (!known) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 2> stack{from(cores), from(numbers)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::contract_reference", "", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  const ContractProgram& program = known->program;
  ContractParams p;
  p.program = &program;
  const std::vector<Tensor> held = dense_cores(cores, &p);
  Tensor result = empty_floats(program, program.result());
  Tensor saved = empty_cpu<1>({program.saved}, {1}, aoti_torch_dtype_float32());
  p.result = static_cast<float*>(result.mutable_data_ptr());
  p.saved = static_cast<float*>(saved.mutable_data_ptr());
  run_contraction(p, program.macs);
  return {result, saved};
}

// Gradients of the cores; those whose bit is not in `mask` are empty.
std::vector<Tensor> contract_backward(const Tensor& grad, std::vector<Tensor> cores, const Tensor& saved,
                                      std::vector<int64_t> numbers, int64_t mask) {
  constexpr const char* kName = "contract_backward";
  const Known known = native_program(kName, cores, numbers);
  if (!known) {
    using torch::stable::detail::from;
    std::array<StableIValue, 5> stack{from(grad), from(cores), from(saved), from(numbers), from(mask)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("tensorcomp::contract_backward_reference", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<std::vector<Tensor>>(stack[0]);
  }
  const ContractProgram& program = known->program;
  // However it is folded.
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == ScalarType::Float && grad.numel() == program.result().elements,
                  kName, ": grad must have the dtype, device and ", program.result().elements,
                  " entries of the result, got ", sizes_of(grad));
  STD_TORCH_CHECK(saved.is_cpu() && saved.scalar_type() == ScalarType::Float && saved.dim() == 1 &&
                      saved.numel() == program.saved && saved.is_contiguous(),
                  kName, ": saved must come from contract, [", program.saved, "], got ", sizes_of(saved));
  ContractParams p;
  p.program = &program;
  const std::vector<Tensor> held = dense_cores(cores, &p);
  const Tensor whole = dense(grad);
  p.grad = static_cast<const float*>(whole.const_data_ptr());
  p.saved = static_cast<float*>(const_cast<void*>(saved.const_data_ptr()));
  std::vector<Tensor> found;
  found.reserve(cores.size());
  for (int i = 0; i < program.cores; ++i) {
    const bool wanted = mask >> i & 1;
    found.push_back(wanted ? empty_floats(program, program.tensors[i])
                           : empty_cpu<1>({0}, {1}, aoti_torch_dtype_float32()));
    if (!wanted) continue;
    p.wanted |= 1u << i;
    p.grad_cores[i] = static_cast<float*>(found.back().mutable_data_ptr());
  }
  int64_t macs = 0;
  for (int i = 0; i < program.pairs; ++i) {
    const ContractPair& pair = program.pair[i];
    const bool first = p.wanted >> pair.tensors[0] & 1, second = p.wanted >> pair.tensors[1] & 1;
    if (first || second) p.wanted |= 1u << pair.tensors[2];
    macs += (first + second) * pair.macs;
  }
  run_contraction(p, macs);
  return found;
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/contract.py too.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def("contract(Tensor[] cores, int[] program) -> (Tensor, Tensor)");
  m.def("contract_backward(Tensor grad, Tensor[] cores, Tensor saved, int[] program, int output_mask) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("contract", TORCH_BOX(&tensorcomp::ops::contract));
  m.impl("contract_backward", TORCH_BOX(&tensorcomp::ops::contract_backward));
}
