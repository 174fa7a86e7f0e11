// torch.ops.tensorcomp.chain and its packed form on the CPU: check, allocate, run the kernel's pieces on torch's thread
// pool. allow_tf32 is for other devices: no product is rounded here.

#include "chain.h"

#include <cstring>
#include <memory>

#include "packed_header.h"
#include "phases.h"

namespace tensorcomp::ops {
namespace {

// In front of packed matrices; behind them stand the program's numbers.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x6e69616863;  // "chain"
  int64_t magic, isa_and_dtype, numbers, bytes, unused[4];
};

constexpr size_t kSmallScratch = 16 * 1024;  // a call's own stack serves; an allocation costs half a microsecond

constexpr const char* kMaker = "the op that packs";
constexpr const char* kMadeForOthers = "the matrices were packed for another program, dtype or instruction set";
// Of any program: sizes, and for each step what it contracts and brings and the order.
constexpr int64_t kMostNumbers = 2 + kMaxChainDims + kMaxChainSteps * (3 + 4 * kMaxChainDims);

size_t numbers_bytes(int64_t count) { return (static_cast<size_t>(count) * sizeof(int64_t) + 63) / 64 * 64; }

}  // namespace

// Programs that this thread read: reading one takes longer than a row's products.
const KnownChain& known_chain(const char* name, const int64_t* numbers, int64_t count) {
  constexpr size_t kPlaces = 64;
  thread_local std::array<std::unique_ptr<KnownChain>, kPlaces> known;
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a over the numbers
  for (int64_t i = 0; i < count; ++i) hash = (hash ^ static_cast<uint64_t>(numbers[i])) * 0x100000001b3;
  std::unique_ptr<KnownChain>& place = known[(hash ^ hash >> 32) % kPlaces];
  const KernelTable& table = kernel_table();  // tests change it
  if (place && place->table == table.id &&
      std::equal(numbers, numbers + count, place->numbers.begin(), place->numbers.end()))
    return *place;
  auto read = std::make_unique<KnownChain>();
  STD_TORCH_CHECK(tensorcomp::decode_chain(numbers, count, &read->program), name, ": no program, or one of more than ",
                  kMaxChainSteps, " steps or ", kMaxChainDims,
                  " dims, or of rows or matrices of more than 2**40 elements");
  read->table = table.id;
  read->numbers.assign(numbers, numbers + count);
  for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
    read->bytes[static_cast<size_t>(dtype)] = table.chain(dtype).packed_bytes(read->program);
  }
  place = std::move(read);
  return *place;
}

namespace {

PackedHeader packed_header(const KnownChain& chain, DType dtype) {
  return {PackedHeader::kMagic,
          kernel_table().id * 16 + static_cast<int64_t>(dtype),
          static_cast<int64_t>(chain.numbers.size()),
          static_cast<int64_t>(chain.bytes[static_cast<size_t>(dtype)]),
          {}};
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

Tensor pack_chain(const char* name, const std::vector<int64_t>& numbers, const std::vector<Tensor>& matrices) {
  STD_TORCH_CHECK(!matrices.empty() && has_native_dtype(matrices[0]), name, ": matrices must be float32 or bfloat16");
  const KnownChain& chain = known_chain(name, numbers.data(), static_cast<int64_t>(numbers.size()));
  std::vector<Tensor> held;
  const std::vector<const void*> from = checked_matrices(name, chain.program, matrices, &held);
  const DType dtype = kernel_dtype(matrices[0]);
  const PackedHeader header = packed_header(chain, dtype);
  const size_t front = numbers_bytes(header.numbers);
  return packed_behind(header, front + static_cast<size_t>(header.bytes), [&](void* to) {
    std::memset(to, 0, front + static_cast<size_t>(header.bytes));  // what lies between is not somebody's memory
    std::memcpy(to, numbers.data(), numbers.size() * sizeof(int64_t));
    kernel_table().chain(dtype).pack(chain.program, from.data(), static_cast<char*>(to) + front);
  });
}

PackedChain checked_packed(const char* name, const std::vector<int64_t>& numbers, DType dtype, const Tensor& packed) {
  const char* from = static_cast<const char*>(front_of(name, packed, sizeof(PackedHeader), kMaker));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(from) % alignof(PackedHeader) == 0, name, ": packed must come from ",
                  kMaker);
  // What the header tells is believed only as far as it leads nowhere out of the tensor.
  const PackedHeader& header = *reinterpret_cast<const PackedHeader*>(from);
  const size_t room = static_cast<size_t>(packed.numel()) - sizeof(PackedHeader);
  const bool sound = header.magic == PackedHeader::kMagic && header.numbers > 0 && header.numbers <= kMostNumbers;
  STD_TORCH_CHECK(sound, name, ": ", kMadeForOthers);
  const size_t front = numbers_bytes(header.numbers);
  STD_TORCH_CHECK(front <= room, name, ": packed is truncated");
  const int64_t* stored = reinterpret_cast<const int64_t*>(from + sizeof(PackedHeader));
  STD_TORCH_CHECK(numbers.empty() || std::equal(numbers.begin(), numbers.end(), stored, stored + header.numbers), name,
                  ": ", kMadeForOthers);
  const KnownChain& chain = known_chain(name, stored, header.numbers);
  const void* matrices = behind_header(name, packed, packed_header(chain, dtype),
                                       front + chain.bytes[static_cast<size_t>(dtype)], kMaker, kMadeForOthers);
  return {&chain, static_cast<const char*>(matrices) + front};
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
  if (call.before) p.residual = p.y;
  const ChainKernels& kernels = kernel_table().chain(p.dtype);
  const int64_t macs = program.macs + (call.before ? call.before->macs() : 0);
  const ChainPlan plan = kernels.plan(p, useful_threads(p.rows, macs));
  const size_t packed_bytes = packed ? 0 : (kernels.packed_bytes(program) + 63) / 64 * 64;
  alignas(64) char small[kSmallScratch];
  std::optional<Tensor> scratch;
  if (plan.scratch_bytes + packed_bytes > kSmallScratch) scratch = empty_bytes(plan.scratch_bytes + packed_bytes);
  char* memory = scratch ? static_cast<char*>(scratch->mutable_data_ptr()) : small;
  if (!packed) kernels.pack(program, matrices, memory);
  p.packed = packed ? packed : memory;
  p.scratch = memory + packed_bytes;
  const int64_t before = call.before ? call.before->begin(p, plan.parts) : 0;
  run_phases(before + plan.phases, plan.parts, [&](int64_t phase, int64_t part) {
    if (phase < before) call.before->run(phase, part);
    else kernels.run(p, plan, phase - before, part);
  });
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

Tensor chain_pack(std::vector<Tensor> matrices, std::vector<int64_t> numbers) {
  return pack_chain("chain_pack", numbers, matrices);
}

Tensor chain_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::vector<int64_t> numbers,
                    std::optional<Tensor> residual, bool relu, bool /*allow_tf32*/) {
  constexpr const char* kName = "chain_packed";
  STD_TORCH_CHECK(x.is_cpu() && has_native_dtype(x), "chain_packed: x must be float32 or bfloat16 on the CPU");
  const PackedChain made = checked_packed(kName, numbers, kernel_dtype(x), packed);
  return run_chain({kName, bias, residual, relu}, made.chain->program, x, made.matrices, nullptr);
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
