// torch.ops.tensorcomp.lowrank_sparse_linear_packed on the CPU, for inference: the pair packed as a chain's matrices,
// the sparse part in panels.

#include <cstring>

#include "../kernels/sparse_panels.h"
#include "arguments.h"
#include "lowrank_sparse_linear.h"
#include "packed_header.h"

namespace tensorcomp::ops {
namespace {

constexpr const char* kMaker = "lowrank_sparse_linear_pack";

struct Header {
  static constexpr int64_t kMagic = 0x657372617073;  // "sparse"
  int64_t magic, isa_and_dtype, m, rank, n, slots, loose, unused;
};

// Where the parts lie behind the header, in bytes; each begins at a cache line.
struct Layout {
  size_t half_steps, loose_steps, order, values, places, loose_values, loose_columns, pair, bytes;

  Layout(const SparsePanels& p, size_t pair_bytes) {
    const size_t element = p.dtype == DType::kFloat32 ? 4 : 2, lanes = kPanelLanes;
    const auto placed = static_cast<size_t>(p.slots) * lanes, free = static_cast<size_t>(p.loose) * lanes;
    bytes = 0;
    half_steps = take(static_cast<size_t>(p.bundles() * p.chunks()));
    loose_steps = take(static_cast<size_t>(p.bundles()) * kPanelGroups * 4);
    order = take(static_cast<size_t>(p.bundles() * kBundle) * 4);
    values = take(placed * element);
    places = take(placed);
    loose_values = take(free * element);
    loose_columns = take(free * 4);
    pair = take(pair_bytes);
  }

 private:
  size_t take(size_t size) {
    const size_t at = bytes;
    bytes += (size + 63) / 64 * 64;
    return at;
  }
};

const KnownChain& pair_of(const char* name, int64_t m, int64_t rank, int64_t n) {
  const std::vector<int64_t> numbers = pair_numbers(n, rank, m);
  return known_chain(name, numbers.data(), static_cast<int64_t>(numbers.size()));
}

int64_t isa_and_dtype(DType dtype) { return kernel_table().id * 16 + static_cast<int64_t>(dtype); }

template <class E>
void take_values(const std::vector<uint32_t>& which, const void* from, void* to) {
  const E* values = static_cast<const E*>(from);
  E* put = static_cast<E*>(to);
  for (const uint32_t at : which) *put++ = at == 0 ? E{0} : values[at - 1];
}

void take_values(DType dtype, const std::vector<uint32_t>& which, const void* from, void* to) {
  if (dtype == DType::kFloat32) take_values<uint32_t>(which, from, to);
  else take_values<uint16_t>(which, from, to);
}

template <class T>
void put(const std::vector<T>& from, void* to) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

Tensor lowrank_sparse_linear_pack(const Tensor& a, const Tensor& b, const Tensor& values, const Tensor& offsets,
                                  const Tensor& positions) {
  const SparseParts parts = checked_sparse(kMaker, a, b, values, offsets, positions);
  STD_TORCH_CHECK(sparse_linear_fits(a, b), kMaker, ": a and b must be float32 or bfloat16 and not empty, got ",
                  dtype_of_tensor(a), " with ", sizes_of(a), " and ", sizes_of(b));
  const MadePanels made = make_panels(parts.matrix);
  SparsePanels p;
  p.dtype = kernel_dtype(a);
  p.m = a.size(0);
  p.n = b.size(1);
  p.slots = static_cast<int64_t>(made.values.size()) / kPanelLanes;
  p.loose = static_cast<int64_t>(made.loose_values.size()) / kPanelLanes;
  const KnownChain& pair = pair_of(kMaker, p.m, a.size(1), p.n);
  std::vector<Tensor> held;
  const std::vector<const void*> matrices = checked_matrices(kMaker, pair.program, {b, a}, &held);
  const Layout layout(p, pair.bytes[static_cast<size_t>(p.dtype)]);
  const Header header{Header::kMagic, isa_and_dtype(p.dtype), p.m, a.size(1), p.n, p.slots, p.loose, 0};
  return packed_behind(header, layout.bytes, [&](void* memory) {
    char* to = static_cast<char*>(memory);
    std::memset(to, 0, layout.bytes);
    put(made.half_steps, to + layout.half_steps);
    put(made.loose_steps, to + layout.loose_steps);
    put(made.order, to + layout.order);
    take_values(p.dtype, made.values, parts.matrix.values, to + layout.values);
    put(made.places, to + layout.places);
    take_values(p.dtype, made.loose_values, parts.matrix.values, to + layout.loose_values);
    put(made.loose_columns, to + layout.loose_columns);
    kernel_table().chain(p.dtype).pack(pair.program, matrices.data(), to + layout.pair);
  });
}

class PanelsBefore final : public ChainBefore {
 public:
  // False where the panels' counts do not add up.
  bool open(const SparsePanels& panels) {
    p_.panels = panels;
    if (!panel_starts(panels, &slot_starts_, &loose_starts_)) return false;
    p_.slot_starts = slot_starts_.data();
    p_.loose_starts = loose_starts_.data();
    return true;
  }
  int64_t macs() const override { return (p_.panels.slots + p_.panels.loose) * kPanelLanes; }
  int64_t begin(const ChainParams& call, int64_t parts) override {
    p_.rows = call.rows;
    p_.x = call.x;
    p_.x_row = call.x_row;
    p_.y = call.y;
    parts_ = parts;
    scratch_ = empty_bytes(kernels().panels_scratch_bytes(p_, parts));
    p_.scratch = scratch_->mutable_data_ptr();
    return 1;
  }
  void run(int64_t, int64_t part) override { kernels().panels_run(p_, parts_, part); }

 private:
  const LowrankSparseKernels& kernels() const { return kernel_table().lowrank_sparse(p_.panels.dtype); }
  SparsePanelsParams p_;
  std::vector<int64_t> slot_starts_, loose_starts_;
  int64_t parts_ = 1;
  std::optional<Tensor> scratch_;
};

// sizes: m, r and n
Tensor lowrank_sparse_linear_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias,
                                    std::vector<int64_t> sizes) {
  constexpr const char* kName = "lowrank_sparse_linear_packed";
  constexpr const char* kMadeForOthers = "the weight was packed for other sizes, another dtype or instruction set";
  STD_TORCH_CHECK(sizes.size() == 3 && sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0, kName,
                  ": sizes must hold m, r and n");
  STD_TORCH_CHECK(x.is_cpu() && has_native_dtype(x), kName, ": x must be float32 or bfloat16 on the CPU, got ",
                  dtype_of_tensor(x), " on ", device_name(x));
  const DType dtype = kernel_dtype(x);
  // What the header tells is believed only as far as it leads nowhere out of the tensor.
  const auto* front = static_cast<const char*>(front_of(kName, packed, sizeof(Header), kMaker));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(front) % alignof(Header) == 0, kName, ": packed must come from ", kMaker);
  const Header& header = *reinterpret_cast<const Header*>(front);
  const bool sound =
      header.slots >= 0 && header.slots <= packed.numel() && header.loose >= 0 && header.loose <= packed.numel();
  STD_TORCH_CHECK(sound, kName, ": ", kMadeForOthers);
  const KnownChain& pair = pair_of(kName, sizes[0], sizes[1], sizes[2]);
  SparsePanels p;
  p.dtype = dtype;
  p.m = sizes[0];
  p.n = sizes[2];
  p.slots = header.slots;
  p.loose = header.loose;
  // A count for each bundle and chunk: more than the tensor has bytes would overflow what Layout adds up.
  STD_TORCH_CHECK(p.chunks() <= packed.numel() / p.bundles(), kName, ": ", kMadeForOthers);
  const Layout layout(p, pair.bytes[static_cast<size_t>(dtype)]);
  const Header expected{Header::kMagic, isa_and_dtype(dtype), sizes[0], sizes[1], sizes[2], p.slots, p.loose, 0};
  const auto* from =
      static_cast<const char*>(behind_header(kName, packed, expected, layout.bytes, kMaker, kMadeForOthers));
  p.half_steps = reinterpret_cast<const uint8_t*>(from + layout.half_steps);
  p.loose_steps = reinterpret_cast<const int32_t*>(from + layout.loose_steps);
  p.order = reinterpret_cast<const int32_t*>(from + layout.order);
  p.values = from + layout.values;
  p.places = reinterpret_cast<const uint8_t*>(from + layout.places);
  p.loose_values = from + layout.loose_values;
  p.loose_columns = reinterpret_cast<const int32_t*>(from + layout.loose_columns);
  PanelsBefore before;
  STD_TORCH_CHECK(before.open(p), kName, ": packed must come from ", kMaker);
  ChainCall call{kName, bias};
  call.before = &before;
  return run_chain(call, pair.program, x, from + layout.pair, nullptr);
}

}  // namespace
}  // namespace tensorcomp::ops

// The schemas stand in tensorcomp_ext/ops/lowrank_sparse_linear.py too, for installations without native code.
STABLE_TORCH_LIBRARY_FRAGMENT(tensorcomp, m) {
  m.def("lowrank_sparse_linear_pack(Tensor a, Tensor b, Tensor values, Tensor offsets, Tensor positions) -> Tensor");
  m.def("lowrank_sparse_linear_packed(Tensor x, Tensor packed, Tensor? bias, int[] sizes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CPU, m) {
  m.impl("lowrank_sparse_linear_pack", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_linear_pack));
  m.impl("lowrank_sparse_linear_packed", TORCH_BOX(&tensorcomp::ops::lowrank_sparse_linear_packed));
}
