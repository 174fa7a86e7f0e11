// Problems of the kernels that multiply few rows with a packed sparse matrix and a low-rank one, plain structs, and how
// they are cut; host code without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/plan.h"
#include "kernels/sparse_matrix.h"

namespace tensorcomp::cuda {

// With more rows the dense weight, read once for all of them, takes less time.
constexpr int64_t kMostSparseRows = 32;
constexpr int kSparseThreads = 512;
constexpr int kSparseWarps = kSparseThreads / 32;

// A packed matrix, as SparseMatrix is for the CPU.
struct PackedMatrix {
  int64_t m = 0, n = 0, count = 0;
  const void* values = nullptr;
  const int32_t* offsets = nullptr;
  const uint8_t* bits = nullptr;
  const uint16_t* columns = nullptr;

  TC_HOST_DEVICE int64_t segments() const { return n > kSegment ? (n + kSegment - 1) / kSegment : 1; }
  TC_HOST_DEVICE int64_t bit_row() const { return (n + 7) / 8; }
  TC_HOST_DEVICE int64_t segment_width(int64_t segment) const {
    return n - segment * kSegment < kSegment ? n - segment * kSegment : kSegment;
  }
};

// A matrix of rows that is read where it lies.
struct RowsSource {
  const void* data = nullptr;
  int64_t row = 0, feature = 1;  // strides, in elements
};

// y = x Sᵀ + low Aᵀ + bias, or gradients of it. Rows of x go through in groups, which lie in shared memory turned:
// whoever needs a column of x has it for the whole group in one load.
struct SparseRowsParams {
  Element element = Element::kFloat32;
  PackedMatrix sparse;
  int64_t rows = 0;
  RowsSource x;  // [rows, n]

  int32_t rank = 0;
  RowsSource low;           // x Bᵀ, [rows, rank]
  const void* a = nullptr;  // [m, rank], rows contiguous
  int64_t a_row = 0;
  const void* bias = nullptr;  // [m] or null
  void* y = nullptr;           // [rows, m], dense

  RowsSource grad;              // of y, [rows, m]
  void* grad_values = nullptr;  // [count]
  float* sums = nullptr;        // [count], where there are several groups
  void* grad_x = nullptr;       // [rows, n], dense: is added to what is there
  float* partial = nullptr;     // [splits][groups][n][group]
  int64_t splits = 1;
  uint16_t* expanded = nullptr;  // [count]: columns of the bits

  int32_t group = 1, shared_bytes = 0;
  int64_t blocks = 1;  // of a group, or of all where they follow each other
  TC_HOST_DEVICE int64_t groups() const { return (rows + group - 1) / group; }
};

namespace detail {

// The most rows, up to 16 bytes of them and not twice as many as there are, of whose entries so many fit a block.
inline bool plan_group(SparseRowsParams& p, int64_t entries, int32_t bytes, int32_t most, const DeviceLimits& device) {
  for (p.group = most; p.group >= 1; p.group /= 2) {
    if (p.group > 1 && p.group >= 2 * p.rows) continue;
    const int64_t shared = entries * p.group * bytes;
    if (shared > device.shared_per_block) continue;
    p.shared_bytes = static_cast<int32_t>(shared);
    return true;
  }
  return false;
}

inline int64_t resident_sparse_blocks(const SparseRowsParams& p, const DeviceLimits& device) {
  const int64_t resident = std::clamp(device.shared_per_multiprocessor / (p.shared_bytes + 1024), 1, 2);
  return device.multiprocessors * resident;
}

}  // namespace detail

// Whether all of the kernels take a layer of these sizes; fewer rows than 2^31 of the matrix are for the caller to see.
inline bool fits_sparse_rows(int64_t n, int64_t rank, const DeviceLimits& device) {
  return n <= device.shared_per_block / 4 && rank <= device.shared_per_block / 4 &&
         (n + rank) * 4 <= device.shared_per_block;
}

inline bool plan_sparse_forward(SparseRowsParams& p, const DeviceLimits& device) {
  const int32_t bytes = element_bytes(p.element);
  if (!detail::plan_group(p, p.sparse.n + p.rank, bytes, 16 / bytes, device)) return false;
  p.blocks = std::min(detail::ceil_div(p.sparse.m, kSparseWarps), detail::resident_sparse_blocks(p, device));
  return true;
}

// For the gradient of the values: groups follow each other.
inline bool plan_sparse_values(SparseRowsParams& p, const DeviceLimits& device) {
  const int32_t bytes = element_bytes(p.element);
  if (!detail::plan_group(p, p.sparse.n, bytes, 16 / bytes, device)) return false;
  p.blocks = std::min(detail::ceil_div(p.sparse.m, kSparseWarps), detail::resident_sparse_blocks(p, device));
  return true;
}

// For that of x: float32 sums of all columns; so many splits that all groups together fill the device.
inline bool plan_sparse_input(SparseRowsParams& p, const DeviceLimits& device) {
  if (!detail::plan_group(p, p.sparse.n, 4, 8, device)) return false;
  p.splits = std::clamp<int64_t>(device.multiprocessors / p.groups(), 1, detail::ceil_div(p.sparse.m, 32));
  p.blocks = p.splits;
  return true;
}

}  // namespace tensorcomp::cuda
