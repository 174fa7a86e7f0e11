// Problems of the low-rank + sparse kernels, plain structs, and how they are cut; nothing of torch, host code without
// CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/plan.h"

namespace tensorcomp::cuda {

// A matrix that is read where it lies.
struct MatrixSource {
  const void* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row = 0, column = 1;  // strides, in elements
  int32_t width = 0;            // bytes that can be copied at a time: 16, 8 or 4; 0: element by element
};

inline MatrixSource matrix_source(const void* data, int64_t rows, int64_t columns, int64_t row, int64_t column,
                                  int32_t bytes, int32_t widest = 16) {
  MatrixSource s{data, rows, columns, row, column, 0};
  if (columns > 1 && column != 1) return s;
  for (const int32_t width : {16, 8, 4}) {
    if (width > widest || reinterpret_cast<uintptr_t>(data) % width != 0) continue;
    if (rows > 1 && row * bytes % width != 0) continue;
    s.width = width;
    break;
  }
  return s;
}

// A block's tile of a matrix: so many rows, and 256 bytes of columns. Eight warps, four down and two across.
constexpr int kWeightRows = 128;
constexpr int kWeightRowBytes = 256;
constexpr int kWeightThreads = 256;

TC_HOST_DEVICE constexpr int32_t weight_columns(int32_t bytes) { return kWeightRowBytes / bytes; }

// Rows of a tile, or of a chunk that wide: eight rows of 16-bit elements read together, or four of 32-bit ones that
// eight columns are read of, lie in different banks.
TC_HOST_DEVICE constexpr int32_t wide_pitch(int32_t bytes, int32_t columns) {
  return columns * bytes + (bytes == 2 ? 16 : 32);
}

// Bytes of a row of the mask's part under so many columns.
TC_HOST_DEVICE constexpr int32_t mask_bytes(bool bits, int32_t columns) { return bits ? columns / 8 : columns; }

// The mask of a matrix of so many columns, as a source of bytes; `columns` is that of the tile or chunk it goes with.
inline MatrixSource mask_source(const void* data, bool bits, int64_t rows, int64_t columns, int64_t row, int64_t column,
                                int32_t tile_columns) {
  return matrix_source(data, rows, bits ? (columns + 7) / 8 : columns, row, column, 1, mask_bytes(bits, tile_columns));
}

// W = A B + M * S, or (1 - M) * (A B) + M * S.
struct WeightParams {
  Element element = Element::kFloat32;
  int64_t m = 0, n = 0;
  int32_t rank = 0;  // may be none
  bool masking = false, bits = false;
  MatrixSource a, b, values, mask;
  void* w = nullptr;  // [m, n], dense, 16-byte aligned
  int32_t stages = 3, shared_bytes = 0;
};

struct WeightLayout {
  int32_t a_chunk, b_chunk, values, mask, total;
};

TC_HOST_DEVICE WeightLayout weight_layout(const WeightParams& p) {
  const int32_t bytes = element_bytes(p.element), pitch = wide_pitch(bytes, weight_columns(bytes));
  WeightLayout s{};
  s.a_chunk = kWeightRows * kChunkPitch;
  s.b_chunk = kChunkBytes / bytes * pitch;
  s.values = p.stages * (s.a_chunk + s.b_chunk);
  s.mask = s.values + kWeightRows * pitch;
  s.total = s.mask + kWeightRows * mask_bytes(p.bits, weight_columns(bytes));
  return s;
}

inline int64_t weight_blocks(const WeightParams& p) {
  return detail::ceil_div(p.m, kWeightRows) * detail::ceil_div(p.n, weight_columns(element_bytes(p.element)));
}

// False where not even two stages fit the device's shared memory, or there are more tiles than a launch has blocks.
inline bool plan_weight(WeightParams& p, const DeviceLimits& device) {
  for (const int32_t stages : {3, 2}) {
    p.stages = stages;
    p.shared_bytes = weight_layout(p).total;
    if (p.shared_bytes <= device.shared_per_block) return weight_blocks(p) < (int64_t{1} << 31);
  }
  return false;
}

// The gradient of the values: M * G.
struct MaskedParams {
  Element element = Element::kFloat32;
  int64_t m = 0, n = 0;
  bool bits = false;
  MatrixSource grad, mask;
  void* out = nullptr;  // [m, n], dense, 16-byte aligned
};

// Products with G' = (1 - M) * G, masked chunk by chunk: G' Bᵀ, the gradient of A, or Aᵀ G', that of B.
struct MaskedProductParams {
  Element element = Element::kFloat32;
  bool of_a = true, bits = false;
  int64_t m = 0, n = 0;            // of the product: [m, rank] or [rank, n]
  int64_t summed = 0;              // n or m of the weight
  MatrixSource grad, mask, other;  // G, M as they lie; B or A
  float* partial = nullptr;        // [splits][m][n]
  int64_t splits = 1;
  int32_t stages = 3, shared_bytes = 0;
};

struct MaskedProductLayout {
  int32_t grad, other, mask, chunk;  // a stage holds a chunk of each
};

// Chunks of the product's left matrix are [rows][64 bytes] or turned, [summed][rows]; of the right one likewise.
TC_HOST_DEVICE MaskedProductLayout masked_product_layout(const MaskedProductParams& p) {
  const int32_t bytes = element_bytes(p.element), columns = weight_columns(bytes), summed = kChunkBytes / bytes;
  MaskedProductLayout s{};
  s.grad = 0;
  s.other = p.of_a ? kWeightRows * kChunkPitch : summed * wide_pitch(bytes, columns);
  s.mask = s.other + (p.of_a ? columns * kChunkPitch : summed * wide_pitch(bytes, kWeightRows));
  const int32_t mask = p.of_a ? kWeightRows * mask_bytes(p.bits, summed) : summed * mask_bytes(p.bits, columns);
  s.chunk = s.mask + mask;
  return s;
}

inline int64_t masked_product_tiles(const MaskedProductParams& p) {
  return detail::ceil_div(p.m, kWeightRows) * detail::ceil_div(p.n, weight_columns(element_bytes(p.element)));
}

inline bool plan_masked_product(MaskedProductParams& p, const DeviceLimits& device) {
  const int64_t tiles = masked_product_tiles(p);
  const int64_t chunks = detail::ceil_div(p.summed * element_bytes(p.element), kChunkBytes);
  // Splits that fill the device, each of at least eight chunks; their results together no more than half as large as
  // the weight.
  const int64_t weight_bytes = (p.of_a ? p.m : p.n) * p.summed * element_bytes(p.element);
  const int64_t room = weight_bytes / 2 / std::max<int64_t>(4 * p.m * p.n, 1);
  p.splits = std::max<int64_t>(1, std::min({detail::ceil_div(2 * device.multiprocessors, tiles), chunks / 8, room}));
  for (const int32_t stages : {3, 2}) {
    p.stages = stages;
    p.shared_bytes = stages * masked_product_layout(p).chunk;
    if (p.shared_bytes <= device.shared_per_block) return tiles * p.splits < (int64_t{1} << 31);
  }
  return false;
}

}  // namespace tensorcomp::cuda
