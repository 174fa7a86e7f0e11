// Weights to the order of tensor-core fragments.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/tile.h"

namespace tensorcomp::cuda {

// The element a padded index of one side stands for, or -1 in the padding.
TC_HOST_DEVICE int32_t unpadded(int32_t index, int32_t slice, int32_t ring, bool padded) {
  if (!padded) return index < slice ? index : -1;
  const int32_t pitch = rank_padded(slice), q = index / pitch, rest = index - q * pitch;
  return q < ring && rest < slice ? q * slice + rest : -1;
}

// Word `word` (of 4) of thread `lane` of a fragment: its row of k within the step, and its column within the pair.
// 16-bit elements: rows k and k + 1 share the word.
struct FragmentPlace {
  int32_t k, n;
};

TC_HOST_DEVICE FragmentPlace fragment_place(int32_t bytes, int32_t lane, int32_t word) {
  const int32_t n = lane / 4 + 8 * (word / 2);
  return bytes == 2 ? FragmentPlace{2 * (lane % 4) + 8 * (word % 2), n} : FragmentPlace{lane % 4 + 4 * (word % 2), n};
}

template <typename Storage>
TC_DEVICE Storage packed_element(const PackParams& p, int32_t k, int32_t n, int64_t tap_offset) {
  const int32_t from_k = unpadded(k, p.k, p.ring_k, p.pad_k), from_n = unpadded(n, p.n, p.ring_n, true);
  if (from_k < 0 || from_n < 0) return Storage{};
  return static_cast<const Storage*>(p.from)[tap_offset + from_k * p.stride_k + from_n * p.stride_n];
}

// Threads a matrix gives work to: one a word of a fragment, both parts of it.
TC_HOST_DEVICE int64_t pack_words(const PackParams& p) {
  return packed_shape(p).fragments / (p.bytes == 4 ? 2 : 1) * 128;
}

TC_DEVICE void pack_word(const PackParams& p, const PackedShape& shape, int64_t i) {
  const int32_t parts = p.bytes == 4 ? 2 : 1;
  const int32_t word = static_cast<int32_t>(i % 4), lane = static_cast<int32_t>(i / 4 % 32);
  const int64_t fragment = i / 128;
  const int32_t pair = static_cast<int32_t>(fragment % shape.pairs);
  const int32_t step = static_cast<int32_t>(fragment / shape.pairs % shape.steps);
  const int32_t tap = static_cast<int32_t>(fragment / shape.pairs / shape.steps);
  const FragmentPlace at = fragment_place(p.bytes, lane, word);
  const int32_t k = step * (kStepBytes / p.bytes) + at.k, n = pair * 16 + at.n;
  const int64_t tap_offset = tap / p.kernel_w * p.stride_h + tap % p.kernel_w * p.stride_w;
  uint32_t* to = static_cast<uint32_t*>(p.to) + fragment * parts * 128 + lane * 4 + word;
  if (p.bytes == 2) {
    const uint32_t first = packed_element<uint16_t>(p, k, n, tap_offset);
    to[0] = first | static_cast<uint32_t>(packed_element<uint16_t>(p, k + 1, n, tap_offset)) << 16;
  } else {
    split_tf32(float_to_bits(packed_element<float>(p, k, n, tap_offset)), to[0], to[128]);
  }
}

TC_KERNEL(256, 1) pack_kernel(const TC_GRID_CONSTANT PackBatch batch) {
  for (int item = 0; item < batch.count; ++item) {
    const PackParams& p = batch.item[item];
    const PackedShape shape = packed_shape(p);
    const int64_t words = pack_words(p);
    for (int64_t i = block_index() * block_threads() + thread_index(); i < words;
         i += grid_blocks() * block_threads()) {
      pack_word(p, shape, i);
    }
  }
}

template <typename E>
TC_KERNEL(256, 1)
pack_depthwise_kernel(const TC_GRID_CONSTANT PackDepthwiseParams p, int64_t count) {
  const int32_t ranks = rank_padded(p.rank);
  for (int64_t i = block_index() * block_threads() + thread_index(); i < count; i += grid_blocks() * block_threads()) {
    const int32_t rank = static_cast<int32_t>(i % ranks), tap = static_cast<int32_t>(i / ranks);
    const auto* from = static_cast<const typename E::Storage*>(p.from);
    static_cast<float*>(p.to)[i] =
        rank < p.rank
            ? E::to_float(from[rank * p.stride_rank + tap / p.kernel_w * p.stride_h + tap % p.kernel_w * p.stride_w])
            : 0.0f;
  }
}

}  // namespace tensorcomp::cuda
