// torch.ops.tensorcomp.chain and its packed form on the CPU: check, allocate, run the kernel's pieces on torch's thread
// pool. allow_tf32 is for other devices: no product is rounded here.

#include "chain.h"

#include "packed_header.h"
#include "phases.h"

namespace tensorcomp::ops {
namespace {

// In front of packed matrices.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x6e69616863;  // "chain"
  int64_t magic, isa_and_dtype, numbers, bytes;
  uint64_t program;
  int64_t unused[3];
};

PackedHeader packed_header(const std::vector<int64_t>& numbers, DType dtype, const KernelTable& table,
                           const ChainProgram& program) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a over the program's numbers
  for (const int64_t number : numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3;
  return {PackedHeader::kMagic,
          table.id * 16 + static_cast<int64_t>(dtype),
          static_cast<int64_t>(numbers.size()),
          static_cast<int64_t>(table.chain(dtype).packed_bytes(program)),
          hash,
          {0, 0, 0}};
}

}  // namespace

bool rows_of(const Tensor& t, int64_t* rows, int64_t* distance) {
  const int64_t last = t.dim() - 1;
  *rows = 1;
  *distance = t.size(last);
  if (t.size(last) > 1 && t.stride(last) != 1) return false;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (*rows == 1) *distance = t.stride(d);
    else if (t.stride(d) != *rows * *distance) return false;
    *rows *= t.size(d);
  }
  return *distance >= 0;
}

std::vector<const void*> checked_matrices(const char* name, const ChainProgram& program,
                                          const std::vector<Tensor>& matrices, std::vector<Tensor>* held) {
  STD_TORCH_CHECK(static_cast<int>(matrices.size()) == program.count, name, ": matrices must be one for each of ",
                  program.count, " steps, got ", matrices.size());
  std::vector<const void*> at;
  for (int i = 0; i < program.count; ++i) {
    const Tensor& m = matrices[static_cast<size_t>(i)];
    const ChainStep& s = program.steps[i];
    STD_TORCH_CHECK(m.dim() == 2 && m.size(0) == s.n_size && m.size(1) == s.k_size, name, ": matrices[", i,
                    "] must be [new, contracted] = [", s.n_size, ", ", s.k_size, "], got ", sizes_of(m));
    STD_TORCH_CHECK(m.is_cpu() && m.scalar_type() == matrices[0].scalar_type(), name,
                    ": matrices must have one dtype and lie on the CPU");
    held->push_back(dense(m));
    at.push_back(held->back().const_data_ptr());
  }
  return at;
}

Tensor pack_chain(const char* name, const ChainProgram& program, const std::vector<int64_t>& numbers,
                  const std::vector<Tensor>& matrices) {
  STD_TORCH_CHECK(!matrices.empty() && has_native_dtype(matrices[0]), name, ": matrices must be float32 or bfloat16");
  std::vector<Tensor> held;
  const std::vector<const void*> from = checked_matrices(name, program, matrices, &held);
  const DType dtype = kernel_dtype(matrices[0]);
  const KernelTable& table = kernel_table();
  const PackedHeader header = packed_header(numbers, dtype, table, program);
  return packed_behind(header, static_cast<size_t>(header.bytes),
                       [&](void* to) { table.chain(dtype).pack(program, from.data(), to); });
}

const void* checked_packed(const char* name, const ChainProgram& program, const std::vector<int64_t>& numbers,
                           DType dtype, const Tensor& packed) {
  const PackedHeader expected = packed_header(numbers, dtype, kernel_table(), program);
  return behind_header(name, packed, expected, static_cast<size_t>(expected.bytes), "the op that packs",
                       "the matrices were packed for another program, dtype or instruction set");
}

Tensor run_chain(const ChainCall& call, const ChainProgram& program, const Tensor& x, const void* packed,
                 const void* const* matrices) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == program.in_features, call.name,
                  ": x must be [..., in_features] with in_features = ", program.in_features, ", got ", sizes_of(x));
  ChainParams p;
  p.dtype = kernel_dtype(x);
  p.program = &program;
  p.relu = call.relu;
  Tensor rows = x;
  if (!rows_of(rows, &p.rows, &p.x_row)) {
    rows = torch::stable::contiguous(x);
    rows_of(rows, &p.rows, &p.x_row);
  }
  const auto fits = [&](const Tensor& t) { return t.is_cpu() && t.scalar_type() == x.scalar_type(); };
  Tensor bias = x, residual = x;
  if (call.bias) {
    STD_TORCH_CHECK(call.bias->dim() == 1 && call.bias->size(0) == program.out_features && fits(*call.bias), call.name,
                    ": bias must be [out_features] of x's dtype and device with out_features = ", program.out_features,
                    ", got ", sizes_of(*call.bias));
    bias = dense(*call.bias);
    p.bias = bias.const_data_ptr();
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = program.out_features;
  if (call.residual) {
    residual = dense(*call.residual);
    STD_TORCH_CHECK(
        fits(residual) && residual.dim() == x.dim() && std::equal(sizes.begin(), sizes.end(), residual.sizes().begin()),
        call.name, ": residual must have the result's shape, dtype and device, got ", sizes_of(residual));
    p.residual = residual.const_data_ptr();
  }
  Tensor y = empty_contiguous(sizes, p.dtype);
  if (y.numel() == 0) return y;
  p.x = rows.const_data_ptr();
  p.y = y.mutable_data_ptr();
  const ChainKernels& kernels = kernel_table().chain(p.dtype);
  const ChainPlan plan = kernels.plan(p, useful_threads(p.rows, program.macs));
  const size_t packed_bytes = packed ? 0 : (kernels.packed_bytes(program) + 63) / 64 * 64;
  Tensor scratch = empty_bytes(plan.scratch_bytes + packed_bytes);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  if (!packed) kernels.pack(program, matrices, memory);
  p.packed = packed ? packed : memory;
  p.scratch = memory + packed_bytes;
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.run(p, plan, phase, part); });
  return y;
}

namespace {

// What the kernels cannot take goes to the oracle that Python registers; a plain C++ process has none.
Tensor call_reference(const Tensor& x, const std::vector<Tensor>& matrices, const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& program, bool allow_tf32) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(x), from(matrices), from(bias), from(program), from(allow_tf32)};
  STD_TORCH_CHECK(torch_call_dispatcher("tensorcomp::chain_reference", "", stack.data(), TORCH_ABI_VERSION) == 0,
                  "chain", no_such_program(program));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor chain(const Tensor& x, std::vector<Tensor> matrices, std::optional<Tensor> bias, std::vector<int64_t> numbers,
             bool allow_tf32) {
  ChainProgram program;
  if (!has_native_dtype(x) || !decode_chain(numbers, &program)) {
    return call_reference(x, matrices, bias, numbers, allow_tf32);
  }
  std::vector<Tensor> held;
  const std::vector<const void*> at = checked_matrices("chain", program, matrices, &held);
  STD_TORCH_CHECK(x.is_cpu() && matrices[0].scalar_type() == x.scalar_type(),
                  "chain: x must lie on the CPU and have the dtype of the matrices");
  return run_chain({"chain", bias}, program, x, nullptr, at.data());
}

ChainProgram decoded(const char* name, const std::vector<int64_t>& numbers) {
  ChainProgram program;
  STD_TORCH_CHECK(decode_chain(numbers, &program), name, ": no program, or one of more than ", kMaxChainSteps,
                  " steps or ", kMaxChainDims, " dims, or of rows or matrices of more than 2**40 elements");
  return program;
}

Tensor chain_pack(std::vector<Tensor> matrices, std::vector<int64_t> numbers) {
  return pack_chain("chain_pack", decoded("chain_pack", numbers), numbers, matrices);
}

Tensor chain_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::vector<int64_t> numbers,
                    std::optional<Tensor> residual, bool relu, bool /*allow_tf32*/) {
  constexpr const char* kName = "chain_packed";
  STD_TORCH_CHECK(x.is_cpu() && has_native_dtype(x), "chain_packed: x must be float32 or bfloat16 on the CPU");
  const ChainProgram program = decoded(kName, numbers);
  const void* matrices = checked_packed(kName, program, numbers, kernel_dtype(x), packed);
  return run_chain({kName, bias, residual, relu}, program, x, matrices, nullptr);
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/chain.py too, for installations without native code.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def("chain(Tensor x, Tensor[] matrices, Tensor? bias, int[] program, bool allow_tf32=False) -> Tensor");
  m.def("chain_pack(Tensor[] matrices, int[] program) -> Tensor");
  m.def(
      "chain_packed(Tensor x, Tensor packed, Tensor? bias, int[] program, Tensor? residual=None, bool relu=False, "
      "bool allow_tf32=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("chain", TORCH_BOX(&tensorcomp::ops::chain));
  m.impl("chain_pack", TORCH_BOX(&tensorcomp::ops::chain_pack));
  m.impl("chain_packed", TORCH_BOX(&tensorcomp::ops::chain_packed));
}
