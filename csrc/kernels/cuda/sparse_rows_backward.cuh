// Gradients of few rows times a packed sparse matrix. That of the values: a warp a row of the matrix, as forward. That
// of x: a block takes rows of the matrix one after the other and adds them to sums of all columns in shared memory;
// what blocks share is added in their order. No atomics, so results are reproducible. Both want columns; bits are
// expanded before.
#pragma once

#include "kernels/cuda/sparse_rows.cuh"

namespace tensorcomp::cuda {

// The columns of a matrix whose places are bits.
template <typename E>
TC_KERNEL(kSparseThreads, 2)
sparse_columns_kernel(const TC_GRID_CONSTANT SparseRowsParams p) {
  const SparseWalk<E> walk(p.sparse);
  for (int64_t i = block_index() * kSparseWarps + warp_index(); i < p.sparse.m; i += grid_blocks() * kSparseWarps) {
    walk.each(i, [&](int32_t k, int32_t column, typename E::Storage) {
      p.expanded[k] = static_cast<uint16_t>(column % kSegment);
    });
  }
}

template <typename E, int kGroup>
TC_KERNEL(kSparseThreads, 2)
sparse_values_kernel(const TC_GRID_CONSTANT SparseRowsParams p) {
  using Storage = typename E::Storage;
  char* const group = shared_memory();
  const SparseWalk<E> walk(p.sparse);
  auto* out = static_cast<Storage*>(p.grad_values);
  const auto* grad = static_cast<const Storage*>(p.grad.data);
  for (int64_t first = 0; first < p.rows; first += kGroup) {
    if (first > 0) sync_block();  // nobody reads the group before any more
    load_group<Storage, kGroup>(group, p.x, first, p.rows, p.sparse.n);
    sync_block();
    for (int64_t i = block_index() * kSparseWarps + warp_index(); i < p.sparse.m; i += p.blocks * kSparseWarps) {
      float of_row[kGroup];
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        of_row[r] = first + r < p.rows ? E::to_float(grad[(first + r) * p.grad.row + i * p.grad.feature]) : 0.0f;
      }
      // An entry is the same thread's in every group.
      walk.each(i, [&](int32_t k, int32_t column, Storage) {
        const auto of_x = reinterpret_cast<const Several<Storage, kGroup>*>(group)[column];
        float sum = first > 0 ? p.sums[k] : 0.0f;
#pragma unroll
        for (int r = 0; r < kGroup; ++r) sum += of_row[r] * E::to_float(of_x.entry[r]);
        if (first + kGroup < p.rows) {
          p.sums[k] = sum;
        } else {
          out[k] = E::from_float(sum);
        }
      });
    }
  }
}

// Entries of a row of the matrix that a thread adds first: loaded before those of the row above it are added.
template <typename Storage, int kGroup>
struct SparseAhead {
  int32_t begin = 0, end = 0;
  uint16_t column = 0;
  Storage value{};
  float grad[kGroup] = {};
};

template <typename E, int kGroup>
TC_KERNEL(kSparseThreads, 1)
sparse_input_kernel(const TC_GRID_CONSTANT SparseRowsParams p) {
  using Storage = typename E::Storage;
  const PackedMatrix& s = p.sparse;
  auto* sums = reinterpret_cast<Several<float, kGroup>*>(shared_memory());
  const int64_t group = block_index() / p.splits, split = block_index() % p.splits, first = group * kGroup;
  const int64_t share = (s.m + p.splits - 1) / p.splits, begin = split * share;
  const int64_t end = begin + share < s.m ? begin + share : s.m;
  for (int64_t c = thread_index(); c < s.n; c += block_threads()) sums[c] = {};
  const auto* values = static_cast<const Storage*>(s.values);
  const auto* grad = static_cast<const Storage*>(p.grad.data);
  const auto load = [&](int64_t i) {
    SparseAhead<Storage, kGroup> to;
    if (i >= end) return to;
    to.begin = s.offsets[i];
    to.end = s.offsets[i + 1];
    const bool sound = to.begin >= 0 && to.begin <= to.end && to.end <= s.count;
    device_assert(sound, "lowrank_sparse_linear_backward: packed.offsets lead out of the values");
    if (!sound) to.end = to.begin;
    const int64_t k = static_cast<int64_t>(to.begin) + thread_index();
    if (k < to.end) {
      to.column = s.columns[k];
      to.value = values[k];
    }
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      to.grad[r] = first + r < p.rows ? E::to_float(grad[(first + r) * p.grad.row + i * p.grad.feature]) : 0.0f;
    }
    return to;
  };
  SparseAhead<Storage, kGroup> next = load(begin);
  for (int64_t i = begin; i < end; ++i) {
    const SparseAhead<Storage, kGroup> now = next;
    next = load(i + 1);
    sync_block();  // the row above is added
    // Columns of a row differ: nobody else adds there.
    for (int64_t k = static_cast<int64_t>(now.begin) + thread_index(); k < now.end; k += block_threads()) {
      const bool ahead = k == now.begin + thread_index();
      const int32_t column = ahead ? now.column : s.columns[k];
      const float value = E::to_float(ahead ? now.value : values[k]);
      device_assert(column < s.n, "lowrank_sparse_linear_backward: packed.positions must be columns of the matrix");
      if (column >= s.n) continue;
      Several<float, kGroup> sum = sums[column];
#pragma unroll
      for (int r = 0; r < kGroup; ++r) sum.entry[r] += value * now.grad[r];
      sums[column] = sum;
    }
  }
  sync_block();
  auto* to = reinterpret_cast<Several<float, kGroup>*>(p.partial) + (split * p.groups() + group) * s.n;
  for (int64_t c = thread_index(); c < s.n; c += block_threads()) to[c] = sums[c];
}

// A thread an element of the gradient.
template <typename E>
TC_KERNEL(256, 2)
sparse_input_finish_kernel(const TC_GRID_CONSTANT SparseRowsParams p) {
  using Storage = typename E::Storage;
  const int64_t n = p.sparse.n, all = p.groups() * n * p.group;
  for (int64_t i = block_index() * block_threads() + thread_index(); i < all; i += grid_blocks() * block_threads()) {
    const int64_t row = i / (n * p.group) * p.group + i % p.group, column = i / p.group % n;
    if (row >= p.rows) continue;
    Storage& out = static_cast<Storage*>(p.grad_x)[row * n + column];
    float sum = E::to_float(out);
#pragma unroll 8
    for (int64_t split = 0; split < p.splits; ++split) sum += p.partial[split * all + i];
    out = E::from_float(sum);
  }
}

}  // namespace tensorcomp::cuda
