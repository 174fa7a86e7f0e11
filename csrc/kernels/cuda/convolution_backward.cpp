// Backward of the bottleneck convolution: the gradient of the output is brought into rank space, through the transposed
// core and out again; the gradients of the weights are sums over pixels of products of what lies on the way.
#include <algorithm>

#include "kernels/cuda/convolution.h"
#include "kernels/cuda/convolution_parts.h"

namespace tensorcomp::cuda {
namespace {

using namespace detail;

// What backward keeps in scratch memory; parts that nobody needs are null.
struct Backward {
  bool need_u, need_v, need_dv, need_du;
  void *enter_in, *core, *enter_out, *core_transposed, *leave_in;  // packed weights
  void *u, *v, *dv, *du;                                           // rank-space images
  float* partial;
  float* partial_bias;
};

PixelSumParams sum_problem(const Convolution& c, int64_t height, int64_t width, int32_t m, int32_t n) {
  PixelSumParams p;
  p.element = c.element;
  p.batch = c.batch;
  p.h = pixel_axis(height);
  p.w = pixel_axis(width);
  p.m = m;
  p.m_pitch = sum_row_pitch(m, false);
  p.n = n;
  return p;
}

PixelSumParams sum_factor_out(const Convolution& c, const Gradients& wanted) {
  // The bias alone is summed beside one column of anything.
  return sum_problem(c, c.out_height, c.out_width, c.c_out, wanted.factor_out == nullptr ? 1 : padded_out(c));
}

PixelSumParams sum_factor_in(const Convolution& c) { return sum_problem(c, c.height, c.width, c.c_in, padded_in(c)); }

PixelSumParams sum_core(const Convolution& c) {
  PixelSumParams p = sum_problem(c, 1, 1, c.rank_in, c.rank_out);
  p.h = convolution_axis(c.height, c.out_height, c.kernel_h, c.stride_h, c.pad_top, c.dilation_h);
  p.w = convolution_axis(c.width, c.out_width, c.kernel_w, c.stride_w, c.pad_left, c.dilation_w);
  p.ring = c.ring;
  p.a_slice = rank_padded(c.rank_in);
  p.b_slice = rank_padded(c.rank_out);
  p.a_strides = dense_strides(c.height, c.width, padded_in(c));
  p.b_strides = dense_strides(c.out_height, c.out_width, padded_out(c));
  p.diagonal = c.core == Core::kDepthwise;
  p.m_pitch = sum_row_pitch(p.m, p.diagonal);
  return p;
}

size_t partial_floats(const PixelSumParams& p, const DeviceLimits& device) {
  return static_cast<size_t>(plan_splits(p, device)) * static_cast<size_t>(sum_rows(p)) *
         static_cast<size_t>(sum_columns(p));
}

Backward backward_parts(const Convolution& c, const DeviceLimits& device, const Gradients& wanted, Arena& arena) {
  Backward b{};
  const bool core = c.core != Core::kNone;
  b.need_du = wanted.x != nullptr || wanted.factor_in != nullptr;
  b.need_dv = b.need_du || wanted.core != nullptr;
  b.need_v = wanted.factor_out != nullptr;
  b.need_u = b.need_v || wanted.core != nullptr;
  const size_t bytes = static_cast<size_t>(element_bytes(c.element));
  const size_t in = static_cast<size_t>(c.batch * c.height * c.width) * static_cast<size_t>(padded_in(c)) * bytes;
  const size_t out =
      static_cast<size_t>(c.batch * c.out_height * c.out_width) * static_cast<size_t>(padded_out(c)) * bytes;
  const auto part = [&](bool needed, size_t size) { return needed ? arena.take(size) : nullptr; };
  b.enter_in = part(b.need_u, fragment_bytes(entering(c, c.c_in, c.rank_in, nullptr)));
  b.core = part(b.need_v && core, core_bytes(c));
  b.enter_out = part(b.need_dv, fragment_bytes(entering(c, c.c_out, c.rank_out, nullptr)));
  b.core_transposed =
      part(b.need_du && core, c.core == Core::kFull ? fragment_bytes(between(c, nullptr, true)) : core_bytes(c));
  b.leave_in = part(wanted.x != nullptr, fragment_bytes(leaving(c, c.c_in, c.rank_in, nullptr)));
  b.u = part(b.need_u, in);
  b.v = core ? part(b.need_v, out) : b.u;
  b.dv = part(b.need_dv, out);
  b.du = core ? part(wanted.factor_in != nullptr, in) : b.dv;
  size_t most = 0;
  if (wanted.factor_out != nullptr || wanted.bias != nullptr) {
    most = std::max(most, partial_floats(sum_factor_out(c, wanted), device));
  }
  if (wanted.factor_in != nullptr) most = std::max(most, partial_floats(sum_factor_in(c), device));
  if (wanted.core != nullptr) most = std::max(most, partial_floats(sum_core(c), device));
  b.partial = static_cast<float*>(part(most > 0, most * sizeof(float)));
  if (wanted.bias != nullptr) {
    const int64_t splits = plan_splits(sum_factor_out(c, wanted), device);
    b.partial_bias =
        static_cast<float*>(arena.take(static_cast<size_t>(splits) * static_cast<size_t>(c.c_out) * sizeof(float)));
  }
  return b;
}

cudaError_t pack_backward(const Convolution& c, const Weights& weights, const Backward& b, cudaStream_t stream) {
  PackBatch batch;
  const auto add = [&](PackParams p, void* to) {
    if (to == nullptr) return;
    p.to = to;
    batch.item[batch.count++] = p;
  };
  add(entering_factor_in(c, weights), b.enter_in);
  add(entering(c, c.c_out, c.rank_out, weights.factor_out), b.enter_out);
  PackParams leave_in = leaving(c, c.c_in, c.rank_in, weights.factor_in);
  if (weights.factor_in_rank_first) {
    leave_in.stride_k = c.c_in;
    leave_in.stride_n = 1;
  }
  add(leave_in, b.leave_in);
  for (const bool transposed : {false, true}) {
    void* to = transposed ? b.core_transposed : b.core;
    if (to == nullptr) continue;
    const cudaError_t error = pack_core(c, weights.core, transposed, to, batch, stream);
    if (error != cudaSuccess) return error;
  }
  return batch.count == 0 ? cudaSuccess : launch_pack(batch, stream);
}

// dU, and dX from it, phase by phase of the stride: in each, output positions `stride` apart gather the same taps.
cudaError_t input_gradient(const Convolution& c, const DeviceLimits& device, const Backward& b, const Gradients& wanted,
                           cudaStream_t stream) {
  for (int32_t y = 0; y < std::min<int64_t>(c.stride_h, c.height); ++y) {
    for (int32_t x = 0; x < std::min<int64_t>(c.stride_w, c.width); ++x) {
      BottleneckParams p;
      p.element = c.element;
      p.core = c.core;
      p.batch = c.batch;
      p.ring = c.ring;
      p.kernel_h = c.kernel_h;
      p.kernel_w = c.kernel_w;
      p.h = transposed_axis(c.out_height, c.height, c.kernel_h, c.stride_h, c.pad_top, c.dilation_h, y);
      p.w = transposed_axis(c.out_width, c.width, c.kernel_w, c.stride_w, c.pad_left, c.dilation_w, x);
      p.rank_in = c.rank_out;
      p.rank_out = c.rank_in;
      p.enter = false;
      p.c_in = padded_out(c);
      p.c_out = c.c_in;
      p.x = b.dv;
      p.x_strides = dense_strides(c.out_height, c.out_width, padded_out(c));
      p.core_fragments = b.core_transposed;
      p.leave_fragments = b.leave_in;
      p.leave = wanted.x != nullptr;
      p.y = wanted.x;
      p.y_strides = wanted.x_strides;
      p.rank_image = wanted.factor_in != nullptr ? b.du : nullptr;
      p.out_height = c.height;
      p.out_width = c.width;
      const cudaError_t error = run(p, device, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t sum(PixelSumParams p, PixelSumFinishParams f, const DeviceLimits& device, const Backward& b, void* out,
                void* out_bias, cudaStream_t stream) {
  p.splits = plan_splits(p, device);
  p.partial = b.partial;
  p.partial_bias = out_bias == nullptr ? nullptr : b.partial_bias;
  const cudaError_t error = launch_pixel_sum(p, stream);
  if (error != cudaSuccess) return error;
  f.element = p.element;
  f.splits = p.splits;
  f.taps_h = p.h.taps;
  f.taps_w = p.w.taps;
  f.m = p.m;
  f.n = p.n;
  f.m_pitch = p.m_pitch;
  f.diagonal = p.diagonal;
  f.partial = p.partial;
  f.partial_bias = p.partial_bias;
  f.out = out;
  f.out_bias = out_bias;
  return launch_pixel_sum_finish(f, stream);
}

cudaError_t weight_gradients(const Convolution& c, const DeviceLimits& device, const Image& grad, const Image& x,
                             const Gradients& wanted, const Backward& b, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (wanted.factor_out != nullptr || wanted.bias != nullptr) {
    PixelSumParams p = sum_factor_out(c, wanted);
    p.a = grad.data;
    p.a_strides = grad.strides;
    const bool factor = wanted.factor_out != nullptr;
    p.b = factor ? b.v : grad.data;
    p.b_strides = factor ? dense_strides(c.out_height, c.out_width, padded_out(c)) : grad.strides;
    PixelSumFinishParams f;
    f.slice = factor ? c.rank_out : 1;
    f.slice_padded = factor ? rank_padded(c.rank_out) : 1;
    f.stride_m = static_cast<int64_t>(c.ring) * c.rank_out;
    f.stride_n = 1;
    error = sum(p, f, device, b, wanted.factor_out, wanted.bias, stream);
  }
  if (error == cudaSuccess && wanted.factor_in != nullptr) {
    PixelSumParams p = sum_factor_in(c);
    p.a = x.data;
    p.a_strides = x.strides;
    p.b = b.du;
    p.b_strides = dense_strides(c.height, c.width, padded_in(c));
    PixelSumFinishParams f;
    f.slice = c.rank_in;
    f.slice_padded = rank_padded(c.rank_in);
    f.stride_m = wanted.factor_in_rank_first ? 1 : static_cast<int64_t>(c.ring) * c.rank_in;
    f.stride_n = wanted.factor_in_rank_first ? c.c_in : 1;
    error = sum(p, f, device, b, wanted.factor_in, nullptr, stream);
  }
  if (error == cudaSuccess && wanted.core != nullptr) {
    PixelSumParams p = sum_core(c);
    p.a = b.u;
    p.b = b.dv;
    const int64_t taps = static_cast<int64_t>(c.kernel_h) * c.kernel_w;
    PixelSumFinishParams f;
    f.slice = f.slice_padded = c.rank_out;
    f.stride_m = taps;
    f.stride_n = taps * c.rank_in;
    f.stride_h = c.kernel_w;
    f.stride_w = 1;
    error = sum(p, f, device, b, wanted.core, nullptr, stream);
  }
  return error;
}

}  // namespace

size_t backward_scratch(const Convolution& c, const DeviceLimits& device, const Gradients& wanted) {
  Arena arena(nullptr);
  backward_parts(c, device, wanted, arena);
  return arena.used();
}

cudaError_t backward(const Convolution& c, const DeviceLimits& device, const Image& grad, const Image& x,
                     const Weights& weights, const Gradients& wanted, void* scratch, cudaStream_t stream) {
  Arena arena(scratch);
  const Backward b = backward_parts(c, device, wanted, arena);
  cudaError_t error = pack_backward(c, weights, b, stream);
  if (error == cudaSuccess && b.need_u) {
    BottleneckParams p = pointwise(c, c.height, c.width, c.c_in, c.rank_in, x);
    p.enter_fragments = b.enter_in;
    p.rank_image = b.u;
    error = run(p, device, stream);
  }
  if (error == cudaSuccess && b.need_v && c.core != Core::kNone) {
    BottleneckParams p = problem(c);
    p.enter = p.leave = false;
    p.c_in = padded_in(c);
    p.x = b.u;
    p.x_strides = dense_strides(c.height, c.width, padded_in(c));
    p.core_fragments = b.core;
    p.rank_image = b.v;
    error = run(p, device, stream);
  }
  if (error == cudaSuccess && b.need_dv) {
    BottleneckParams p = pointwise(c, c.out_height, c.out_width, c.c_out, c.rank_out, grad);
    p.enter_fragments = b.enter_out;
    p.rank_image = b.dv;
    if (c.core == Core::kNone && wanted.x != nullptr) {  // dX in the same pass
      p.leave = true;
      p.leave_fragments = b.leave_in;
      p.c_out = c.c_in;
      p.y = wanted.x;
      p.y_strides = wanted.x_strides;
    }
    error = run(p, device, stream);
  }
  if (error == cudaSuccess && b.need_du && c.core != Core::kNone) {
    error = input_gradient(c, device, b, wanted, stream);
  }
  if (error == cudaSuccess) error = weight_gradients(c, device, grad, x, wanted, b, stream);
  return error;
}

}  // namespace tensorcomp::cuda
