// Weights of bottleneck convolutions packed once, and the forward pass with them.

#include "bottleneck_problem.h"
#include "packed_header.h"

namespace tensorcomp::ops {
namespace {

// In front of packed weights.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x3270636e6574;  // "tencp2"
  int64_t magic, kind, c_in, rank_in, rank_out, c_out, kernel_h, kernel_w;
};

PackedHeader packed_header(const BottleneckShape& s, int64_t isa) {
  const int64_t form = (s.ring - 1) * 2 + (s.depthwise ? 1 : 0);
  const int64_t kind = (form * 16 + isa) * 16 + static_cast<int64_t>(s.dtype);
  return {PackedHeader::kMagic, kind, s.c_in, s.rank_in, s.rank_out, s.c_out, s.kernel_h, s.kernel_w};
}

}  // namespace

Tensor pack_weights(const ConvKind& kind, const Tensor& core, const Tensor& factor_out, const Tensor& factor_in) {
  STD_TORCH_CHECK(has_native_dtype(core), kind.op, ": weights must be float32 or bfloat16");
  const BottleneckShape s = checked_shape(kind, core, factor_out, factor_in);
  const KernelTable& table = kernel_table();
  const BottleneckKernels& kernels = table.bottleneck(s.dtype);
  const Tensor c = dense(core), out = dense(factor_out), in = dense(factor_in);
  const BottleneckWeights weights{c.const_data_ptr(), out.const_data_ptr(), in.const_data_ptr()};
  return packed_behind(packed_header(s, table.id), kernels.packed_bytes(s),
                       [&](void* to) { kernels.pack(s, weights, to); });
}

Tensor run_packed(const ConvKind& kind, const Tensor& x, const Tensor& packed, const ConvTail& tail,
                  const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(has_native_dtype(x), kind.op, ": x must be float32 or bfloat16");
  BottleneckShape s;
  s.dtype = kernel_dtype(x);
  s.rank_out = geometry[0];
  s.rank_in = kind.depthwise ? geometry[0] : geometry[1];
  s.kernel_h = geometry[2];
  s.kernel_w = geometry[3];
  s.c_in = geometry[4];
  s.c_out = geometry[5];
  s.ring = kind.ring;
  s.depthwise = kind.depthwise;
  ConvGeometry g;
  g.stride = {geometry[6], geometry[7]};
  g.padding = {geometry[8], geometry[9], geometry[10], geometry[11]};
  g.dilation = {geometry[12], geometry[13]};
  const KernelTable& table = kernel_table();
  const std::string op = kind.op;
  const void* weights = behind_header(
      kind.op, packed, packed_header(s, table.id), table.bottleneck(s.dtype).packed_bytes(s),
      op.substr(0, op.size() - 2), "the weights were packed for other sizes, another dtype or another instruction set");
  BottleneckConvParams p = checked_problem(kind, s, x, g);
  p.packed = weights;
  p.packed_whole = true;
  return run_forward(kind, p, x, tail, nullptr);
}

}  // namespace tensorcomp::ops
