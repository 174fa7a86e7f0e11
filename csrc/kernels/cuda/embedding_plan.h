// How much shared memory the embedding kernels take; host code without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "kernels/cuda/embedding.h"
#include "kernels/cuda/plan.h"

namespace tensorcomp::cuda {

namespace detail {

// Float32 numbers a warp needs for so many indices of the ring; none where no device has so many.
inline std::optional<int64_t> embedding_floats(EmbeddingParams& p, int64_t part, bool backward) {
  constexpr int64_t kMost = 1 << 20;
  int64_t left = 1, right = 1, middle = 1, slice = 1, dim = 1;
  for (int32_t k = 0; k < p.cores; ++k) {
    dim *= p.core[k].dim;
    if (dim >= kMost || std::max(p.core[k].rank_in, p.core[k].rank_out) >= kMost) return {};
  }
  int64_t before = 1;
  for (int32_t k = 0; k < p.cores; ++k) {
    const EmbeddingCore& core = p.core[k];
    const int64_t through = before * core.dim;
    // From the left before core k; behind it from the right, and both but for core k's own ranks.
    if (k > 0) left = std::max(left, part * before * core.rank_in);
    if (k + 1 < p.cores) {
      right = std::max(right, part * core.rank_out * (dim / through));
      middle = std::max(middle, part * through * core.rank_out);
    }
    slice = std::max(slice, static_cast<int64_t>(core.rank_in) * core.dim * core.rank_out);
    if (std::max({left, right, middle, backward ? slice : 0}) >= kMost) return {};
    before = through;
  }
  p.dim = static_cast<int32_t>(dim);
  p.part = static_cast<int32_t>(part);
  p.left = static_cast<int32_t>(left);
  p.right = static_cast<int32_t>(right);
  p.middle = static_cast<int32_t>(middle);
  p.slice = static_cast<int32_t>(std::min(slice, kMost));
  return 2 * left + dim + (backward ? 2 * right + middle + slice : 0);
}

}  // namespace detail

// Fills in what a warp needs from the cores' sizes; false where it does not fit the device's shared memory. Of
// backward: for the gradients of all cores, wanted or not.
inline bool plan_embedding(EmbeddingParams& p, const DeviceLimits& device, bool backward) {
  constexpr int32_t kMostWarps = 8, kEnoughWarps = 4;
  for (int64_t part = p.core[0].rank_in;; part = (part + 1) / 2) {
    const std::optional<int64_t> floats = detail::embedding_floats(p, part, backward);
    // As many warps a block as leave room for two blocks; with few of them rather less of the ring at once.
    const int64_t room = std::min(device.shared_per_block, device.shared_per_multiprocessor / 2 - 1024);
    const int64_t fit = floats.has_value() ? room / (4 * *floats) : 0;
    if (fit < kEnoughWarps && part > 1) continue;
    if (!floats.has_value() || 4 * *floats > device.shared_per_block) return false;
    p.warps = static_cast<int32_t>(std::clamp<int64_t>(fit, 1, kMostWarps));
    p.shared_bytes = static_cast<int32_t>(4 * *floats * p.warps);
    return true;
  }
}

// Rows of a warp in backward: enough warps for the device, and not so few rows that sharing slices costs more.
inline int64_t embedding_chunk(int64_t count, int32_t cores, const DeviceLimits& device) {
  constexpr int64_t kWarps = 16;  // of a multiprocessor
  return std::clamp<int64_t>(detail::ceil_div(count * cores, device.multiprocessors * kWarps), 8, 64);
}

}  // namespace tensorcomp::cuda
