#include "kernels/cuda/convolution.h"

#include "kernels/cuda/convolution_parts.h"

namespace tensorcomp::cuda {
namespace {

using namespace detail;

struct Packed {
  void* enter;
  void* core;
  void* leave;
};

Packed packed_parts(const Convolution& c, Arena& arena) {
  Packed parts{};
  parts.enter = arena.take(fragment_bytes(entering(c, c.c_in, c.rank_in, nullptr)));
  parts.core = arena.take(core_bytes(c));
  parts.leave = arena.take(fragment_bytes(leaving(c, c.c_out, c.rank_out, nullptr)));
  return parts;
}

}  // namespace

size_t packed_bytes(const Convolution& c) {
  Arena arena(nullptr);
  packed_parts(c, arena);
  return arena.used();
}

cudaError_t pack(const Convolution& c, const Weights& weights, void* packed, cudaStream_t stream) {
  Arena arena(packed);
  const Packed parts = packed_parts(c, arena);
  PackBatch batch;
  batch.item[0] = entering_factor_in(c, weights);
  batch.item[0].to = parts.enter;
  batch.item[1] = leaving(c, c.c_out, c.rank_out, weights.factor_out);
  batch.item[1].to = parts.leave;
  batch.count = 2;
  const cudaError_t error = pack_core(c, weights.core, false, parts.core, batch, stream);
  return error != cudaSuccess ? error : launch_pack(batch, stream);
}

cudaError_t forward(const Convolution& c, const DeviceLimits& device, const Image& x, const void* packed,
                    const void* bias, bool from_rank, void* y, const Strides4& y_strides, cudaStream_t stream) {
  Arena arena(const_cast<void*>(packed));
  const Packed parts = packed_parts(c, arena);
  BottleneckParams p = problem(c);
  p.enter = !from_rank;
  if (from_rank) p.c_in = c.ring * c.rank_in;
  p.x = x.data;
  p.x_strides = x.strides;
  p.y = y;
  p.y_strides = y_strides;
  p.enter_fragments = parts.enter;
  p.core_fragments = parts.core;
  p.leave_fragments = parts.leave;
  p.bias = bias;
  return run(p, device, stream);
}

}  // namespace tensorcomp::cuda
