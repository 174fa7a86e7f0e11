// What forward and backward of a convolution on a device are both made of: scratch memory in parts, weights to pack,
// problems of the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/axes.h"
#include "kernels/cuda/convolution.h"

namespace tensorcomp::cuda::detail {

constexpr size_t kAlignment = 256;

inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Hands out parts of one allocation; with no memory behind it, counts only.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  void* take(size_t bytes) {
    char* part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += aligned(bytes);
    return part;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// --- packed weights ---

inline size_t fragment_bytes(const PackParams& p) { return static_cast<size_t>(packed_shape(p).fragments) * 512; }

// A factor as the matrix that enters the rank space, [channels, ring * rank].
inline PackParams entering(const Convolution& c, int32_t channels, int32_t rank, const void* factor) {
  PackParams p;
  p.bytes = element_bytes(c.element);
  p.k = channels;
  p.n = rank;
  p.ring_n = c.ring;
  p.stride_k = static_cast<int64_t>(c.ring) * rank;
  p.stride_n = 1;
  p.from = factor;
  return p;
}

inline PackParams entering_factor_in(const Convolution& c, const Weights& weights) {
  PackParams p = entering(c, c.c_in, c.rank_in, weights.factor_in);
  if (weights.factor_in_rank_first) {
    p.stride_k = 1;
    p.stride_n = c.c_in;
  }
  return p;
}

// A factor as the matrix that leaves it, [ring * rank, channels].
inline PackParams leaving(const Convolution& c, int32_t channels, int32_t rank, const void* factor) {
  PackParams p;
  p.bytes = element_bytes(c.element);
  p.k = rank;
  p.n = channels;
  p.ring_k = c.ring;
  p.pad_k = true;
  p.stride_k = 1;
  p.stride_n = static_cast<int64_t>(c.ring) * rank;
  p.from = factor;
  return p;
}

// The core of a full kind, a matrix a tap: [rank_in, rank_out], or transposed for the gradient.
inline PackParams between(const Convolution& c, const void* core, bool transposed) {
  PackParams p;
  p.bytes = element_bytes(c.element);
  p.kernel_h = c.kernel_h;
  p.kernel_w = c.kernel_w;
  p.pad_k = true;
  const int64_t taps = static_cast<int64_t>(c.kernel_h) * c.kernel_w;
  p.k = transposed ? c.rank_out : c.rank_in;
  p.n = transposed ? c.rank_in : c.rank_out;
  p.stride_k = transposed ? taps * c.rank_in : taps;
  p.stride_n = transposed ? taps : taps * c.rank_in;
  p.stride_h = c.kernel_w;
  p.stride_w = 1;
  p.from = core;
  return p;
}

inline size_t depthwise_bytes(const Convolution& c) {
  return sizeof(float) * static_cast<size_t>(c.kernel_h) * static_cast<size_t>(c.kernel_w) *
         static_cast<size_t>(rank_padded(c.rank_in));
}

inline size_t core_bytes(const Convolution& c) {
  if (c.core == Core::kNone) return 0;
  return c.core == Core::kFull ? fragment_bytes(between(c, nullptr, false)) : depthwise_bytes(c);
}

// The core, among what one launch packs (full) or by a launch of its own (depthwise, the same in both directions).
inline cudaError_t pack_core(const Convolution& c, const void* core, bool transposed, void* to, PackBatch& batch,
                             cudaStream_t stream) {
  if (c.core == Core::kFull) {
    PackParams& p = batch.item[batch.count++];
    p = between(c, core, transposed);
    p.to = to;
  } else if (c.core == Core::kDepthwise) {
    PackDepthwiseParams p;
    p.element = c.element;
    p.rank = c.rank_in;
    p.kernel_h = c.kernel_h;
    p.kernel_w = c.kernel_w;
    p.stride_rank = static_cast<int64_t>(c.kernel_h) * c.kernel_w;
    p.stride_h = c.kernel_w;
    p.stride_w = 1;
    p.from = core;
    p.to = to;
    return launch_pack_depthwise(p, stream);
  }
  return cudaSuccess;
}

// --- rank-space images ---

inline int32_t padded_in(const Convolution& c) { return c.ring * rank_padded(c.rank_in); }
inline int32_t padded_out(const Convolution& c) { return c.ring * rank_padded(c.rank_out); }

inline Strides4 dense_strides(int64_t height, int64_t width, int64_t channels) {
  return {height * width * channels, 1, width * channels, channels};
}

// --- problems of the kernel ---

// One step of a problem only: pixels enter the rank space one by one.
inline BottleneckParams pointwise(const Convolution& c, int64_t height, int64_t width, int32_t channels, int32_t rank,
                                  const Image& image) {
  BottleneckParams p;
  p.element = c.element;
  p.core = Core::kNone;
  p.batch = c.batch;
  p.ring = c.ring;
  p.c_in = channels;
  p.rank_in = p.rank_out = rank;
  p.h = pixel_axis(height);
  p.w = pixel_axis(width);
  p.x = image.data;
  p.x_strides = image.strides;
  p.out_height = height;
  p.out_width = width;
  p.leave = false;
  return p;
}

// Pixels that follow each other in memory, in what comes in and in what goes out, are one long row: tiles need not
// end where image rows do.
inline void flatten(BottleneckParams& p) {
  const Strides4& x = p.x_strides;
  const Strides4& y = p.y_strides;
  const int64_t rows = p.h.grid, columns = p.w.grid;
  const auto follows = [&](const Strides4& s) { return s.h == columns * s.w && s.n == rows * s.h; };
  if (p.core != Core::kNone || !follows(x) || (p.leave && !follows(y))) return;
  p.h = pixel_axis(1);
  p.w = pixel_axis(p.batch * rows * columns);
  p.out_height = 1;
  p.out_width = p.w.grid;
  p.batch = 1;
}

inline cudaError_t run(BottleneckParams p, const DeviceLimits& device, cudaStream_t stream) {
  flatten(p);
  if (!plan_tile(p, device)) return cudaErrorInvalidValue;
  return launch_bottleneck(p, launch_blocks(p, device), stream);
}

}  // namespace tensorcomp::cuda::detail
