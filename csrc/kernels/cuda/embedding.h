// Problems of the embedding kernels, plain structs; nothing of torch and nothing of the device.
//
// Row i of the table is a product of one slice [r, dim_k, r'] a core, chosen by the digits of i. One warp computes it,
// from the first core to the last, in float32. For the gradients the rows of a call are sorted by their digit, core by
// core; a warp takes a chunk of them, and what chunks share of a slice is added in order: no atomics.
#pragma once

#include <cstdint>

#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/host_device.h"

namespace tensorcomp::cuda {

constexpr int kMostEmbeddingCores = 8;

struct EmbeddingCore {
  int32_t rank_in = 1, vocab = 1, dim = 1, rank_out = 1;
  const void* data = nullptr;  // [rank_in, vocab, dim, rank_out], dense
  void* gradient = nullptr;    // the same, or null
  // Of backward: the digits of all rows in order, and the rows they belong to.
  const int32_t* sorted = nullptr;
  const int64_t* order = nullptr;
  float* partial = nullptr;  // [chunks][2][slice]: what a chunk has of the first and of the last digit in it
  TC_HOST_DEVICE int32_t columns() const { return dim * rank_out; }
  TC_HOST_DEVICE int32_t slice() const { return rank_in * columns(); }
};

struct EmbeddingParams {
  Element element = Element::kFloat32;
  int64_t count = 0;
  const void* indices = nullptr;
  bool wide = true;  // int64 indices, else int32
  int64_t rows = 0, padding = -1;
  int32_t cores = 0, dim = 0;
  EmbeddingCore core[kMostEmbeddingCores];
  void* y = nullptr;           // [count, dim], dense
  const void* grad = nullptr;  // the same
  int32_t* digits = nullptr;   // [cores with a gradient][count]
  int64_t chunk = 0;           // rows of a warp in backward

  // Indices of the ring that go through at once: their products do not meet before the sum that closes it.
  int32_t part = 1;
  // Float32 numbers of a warp in shared memory: two states of the product from the left, two of that from the right,
  // and what backward needs besides.
  int32_t left = 0, right = 0, middle = 0, slice = 0;
  int32_t warps = 1, shared_bytes = 0;
};

}  // namespace tensorcomp::cuda
