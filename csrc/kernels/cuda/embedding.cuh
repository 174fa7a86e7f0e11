// The embedding kernels: a warp a row. Source: Hrinchuk et al. 2020; Yin et al. 2021.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/embedding.h"

namespace tensorcomp::cuda {

// The digits of one index, and products of the slices they choose.
template <typename E>
class EmbeddingRow {
 public:
  using Storage = typename E::Storage;

  TC_DEVICE explicit EmbeddingRow(const EmbeddingParams& params) : p(params), lane(thread_index() % 32) {}

  // False for the padding row. An index out of range stops the device, as torch's own embedding does.
  TC_DEVICE bool look_up(int64_t n) {
    int64_t index = p.wide ? static_cast<const int64_t*>(p.indices)[n] : static_cast<const int32_t*>(p.indices)[n];
    const bool inside = index >= 0 && index < p.rows;
    device_assert(inside, "ttm_embedding: index out of range");
    if (!inside || index == p.padding) return false;
#pragma unroll
    for (int k = kMostEmbeddingCores - 1; k >= 0; --k) {
      if (k >= p.cores) continue;
      // Most tables have rows that 32 bits count, and division of 64 takes four times as long.
      const uint32_t vocab = static_cast<uint32_t>(p.core[k].vocab);
      const int64_t rest = index >> 32 == 0 ? static_cast<uint32_t>(index) / vocab : index / vocab;
      digit[k] = static_cast<int32_t>(index - rest * vocab);
      index = rest;
    }
    return true;
  }

  // Element e of the slice's row r: columns are [dim, rank_out].
  TC_DEVICE float entry(int k, int32_t r, int32_t e) const {
    const EmbeddingCore& core = p.core[k];
    const int64_t row = static_cast<int64_t>(r) * core.vocab + digit[k];
    return E::to_float(static_cast<const Storage*>(core.data)[row * core.columns() + e]);
  }

  // Calls body(row, column) for every element of a matrix, lane by lane.
  template <typename Body>
  TC_DEVICE void each(int32_t rows, int32_t columns, const Body& body) const {
    for (int32_t i = lane; i < rows * columns; i += 32) body(i / columns, i % columns);
    sync_warp();
  }

  // The first slice's rows for the ring's indices [first, first + part).
  TC_DEVICE void begin_left(float* to, int32_t first, int32_t part) const {
    const int32_t columns = p.core[0].columns();
    each(part, columns, [&](int32_t a, int32_t e) { to[a * columns + e] = entry(0, first + a, e); });
  }

  // The last slice's columns for them.
  TC_DEVICE void begin_right(float* to, int32_t first, int32_t part) const {
    const int k = p.cores - 1;
    const EmbeddingCore& core = p.core[k];
    each(core.rank_in * core.dim, part, [&](int32_t rj, int32_t a) {
      const int32_t r = rj / core.dim, j = rj - r * core.dim;
      to[rj * part + a] = entry(k, r, j * core.rank_out + first + a);
    });
  }

  // to[d][e] = sum over r of from[d][r] * slice[r][e]: the product from the left takes in core k. Four rows share what
  // is read of the slice, where there are enough for all lanes.
  TC_DEVICE void take_right(int k, const float* from, float* to, int32_t rows) const {
    if (rows / 4 * p.core[k].columns() >= 32) {
      take_right_by<4>(k, from, to, rows);
    } else {
      take_right_by<1>(k, from, to, rows);
    }
  }

  // to[r][j, d] = sum over b of slice[r][j, b] * from[b][d]: the product from the right takes in core k.
  TC_DEVICE void take_left(int k, const float* from, float* to, int32_t columns) const {
    const EmbeddingCore& core = p.core[k];
    each(core.rank_in * core.dim, columns, [&](int32_t rj, int32_t d) {
      const int32_t r = rj / core.dim, j = rj - r * core.dim;
      float sum = 0.0f;
      for (int32_t b = 0; b < core.rank_out; ++b) sum += entry(k, r, j * core.rank_out + b) * from[b * columns + d];
      to[rj * columns + d] = sum;
    });
  }

  const EmbeddingParams& p;
  const int lane;
  int32_t digit[kMostEmbeddingCores] = {};

 private:
  template <int kRows>
  TC_DEVICE void take_right_by(int k, const float* from, float* to, int32_t rows) const {
    const EmbeddingCore& core = p.core[k];
    const int32_t columns = core.columns();
    each((rows + kRows - 1) / kRows, columns, [&](int32_t group, int32_t e) {
      float sum[kRows] = {};
      const float* at[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int32_t row = kRows * group + i;
        at[i] = from + (row < rows ? row : 0) * core.rank_in;
      }
      for (int32_t r = 0; r < core.rank_in; ++r) {
        const float value = entry(k, r, e);
#pragma unroll
        for (int i = 0; i < kRows; ++i) sum[i] += at[i][r] * value;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (kRows * group + i < rows) to[(kRows * group + i) * columns + e] = sum[i];
      }
    });
  }
};

template <typename E>
class EmbeddingForward {
 public:
  using Storage = typename E::Storage;

  TC_DEVICE explicit EmbeddingForward(const EmbeddingParams& params)
      : p(params),
        row(params),
        sums(reinterpret_cast<float*>(shared_memory()) + warp_index() * (p.dim + 2 * p.left)),
        state(sums + p.dim) {}

  TC_DEVICE void run() {
    const int32_t ring = p.core[0].rank_in;
    for (int64_t n = block_index() * p.warps + warp_index(); n < p.count; n += grid_blocks() * p.warps) {
      Storage* y = static_cast<Storage*>(p.y) + n * p.dim;
      const bool there = row.look_up(n);
      row.each(1, p.dim, [&](int32_t, int32_t d) { sums[d] = 0.0f; });
      for (int32_t first = 0; there && first < ring; first += p.part) {
        add(first, ring - first < p.part ? ring - first : p.part);
      }
      row.each(1, p.dim, [&](int32_t, int32_t d) { y[d] = E::from_float(sums[d]); });
    }
  }

 private:
  // What the ring's indices [first, first + part) add to the row.
  TC_DEVICE void add(int32_t first, int32_t part) const {
    const int last = p.cores - 1;
    int32_t before = 1;
    const float* left = state;
    if (last > 0) {
      row.begin_left(state, first, part);
      before = p.core[0].dim;
    }
    for (int32_t k = 1; k < last; ++k) {
      float* next = state + k % 2 * p.left;
      row.take_right(k, left, next, part * before);
      left = next;
      before *= p.core[k].dim;
    }
    const EmbeddingCore& core = p.core[last];
    const int32_t ring = core.rank_out;
    row.each(before, core.dim, [&](int32_t d, int32_t j) {
      float sum = 0.0f;
      for (int32_t a = 0; a < part; ++a) {
        const int32_t e = j * ring + first + a;
        if (last == 0) {
          sum += row.entry(0, first + a, e);
          continue;
        }
        const float* from = left + (a * before + d) * core.rank_in;
        for (int32_t r = 0; r < core.rank_in; ++r) sum += from[r] * row.entry(last, r, e);
      }
      sums[d * core.dim + j] += sum;
    });
  }

  const EmbeddingParams& p;
  EmbeddingRow<E> row;
  float *const sums, *const state;
};

template <typename E>
TC_KERNEL(256, 2)
embedding_kernel(const TC_GRID_CONSTANT EmbeddingParams p) {
  EmbeddingForward<E>(p).run();
}

}  // namespace tensorcomp::cuda
