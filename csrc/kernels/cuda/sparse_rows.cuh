// Few rows times the transpose of a packed sparse matrix and a low-rank one, in one pass over the result: a warp a row
// of the matrix. Its values and columns come four a lane, what they multiply is one load from shared memory for all
// rows of a group, and the rows of A go the same way, as if x had the columns of x Bᵀ too. Sums are taken in float32
// and in an order that sizes alone decide. Source: Hawkins et al. 2021.
//
// Traffic: values and columns (4 bytes an entry in 16 bits, or 2 and a bit a place), A, and for each block the group of
// x, from the L2 cache: 4096 x 4096 of bfloat16 at 90 % sparsity and rank 204 read 8.3 MB, where the dense matrix has
// 33.5. Shared memory: (n + rank) 16 bytes, 69 KB there, and two blocks a multiprocessor; 8 rows of x in 16
// bits or 4 in 32 are a group. All of this is predicted; none was measured.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/sparse_rows.h"

namespace tensorcomp::cuda {

// So many entries that lie next to each other, aligned.
template <typename Element, int kCount>
struct alignas(sizeof(Element) * kCount) Several {
  Element entry[kCount];
};

// A warp's walk over the entries of a row.
template <typename E>
class SparseWalk {
 public:
  using Storage = typename E::Storage;
  static constexpr int kAtOnce = 4;

  TC_DEVICE explicit SparseWalk(const PackedMatrix& matrix)
      : s(matrix),
        lane(thread_index() % 32),
        wide(reinterpret_cast<uintptr_t>(matrix.values) % sizeof(Several<Storage, kAtOnce>) == 0 &&
             reinterpret_cast<uintptr_t>(matrix.columns) % sizeof(Several<uint16_t, kAtOnce>) == 0) {}

  // Calls body(index, column, value) for every entry of row i, each by one lane; all lanes of the warp come here.
  // Numbers that lead out of the arrays stop the device.
  template <typename Body>
  TC_DEVICE void each(int64_t i, const Body& body) const {
    for (int64_t segment = 0; segment < s.segments(); ++segment) {
      const int32_t* at = s.offsets + i * s.segments() + segment;
      const int32_t begin = at[0], end = at[1];
      const bool first = i == 0 && segment == 0, last = i + 1 == s.m && segment + 1 == s.segments();
      const bool sound =
          begin >= 0 && begin <= end && end <= s.count && (!first || begin == 0) && (!last || end == s.count);
      device_assert(sound, "lowrank_sparse_linear: packed.offsets must ascend from 0 to nnz");
      if (!sound) continue;
      if (s.bits != nullptr) {
        bits(i, segment, begin, end, body);
      } else {
        columns(segment, begin, end, body);
      }
    }
  }

 private:
  template <typename Body>
  TC_DEVICE void columns(int64_t segment, int32_t begin, int32_t end, const Body& body) const {
    const auto* values = static_cast<const Storage*>(s.values);
    const int64_t width = s.segment_width(segment);
    for (int64_t k = begin / kAtOnce * kAtOnce + kAtOnce * lane; k < end; k += 32 * kAtOnce) {
      Several<Storage, kAtOnce> value{};
      Several<uint16_t, kAtOnce> column{};
      if (wide && k + kAtOnce <= s.count) {
        value = *reinterpret_cast<const Several<Storage, kAtOnce>*>(values + k);
        column = *reinterpret_cast<const Several<uint16_t, kAtOnce>*>(s.columns + k);
      } else {
        for (int e = 0; e < kAtOnce; ++e) {
          if (k + e < begin || k + e >= end) continue;
          value.entry[e] = values[k + e];
          column.entry[e] = s.columns[k + e];
        }
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (k + e < begin || k + e >= end) continue;
        const bool inside = column.entry[e] < width;
        device_assert(inside, "lowrank_sparse_linear: packed.positions must be columns of the matrix");
        if (inside) {
          body(static_cast<int32_t>(k + e), static_cast<int32_t>(segment * kSegment) + column.entry[e], value.entry[e]);
        }
      }
    }
  }

  // 32 columns a lane.
  template <typename Body>
  TC_DEVICE void bits(int64_t i, int64_t segment, int32_t begin, int32_t end, const Body& body) const {
    const auto* values = static_cast<const Storage*>(s.values);
    const uint8_t* row = s.bits + i * s.bit_row() + segment * (kSegment / 8);
    const auto width = static_cast<int32_t>(s.segment_width(segment)), bytes = (width + 7) / 8;
    const bool words = reinterpret_cast<uintptr_t>(row) % 4 == 0;
    int32_t before = begin;
    for (int32_t first = 0; first < width; first += 32 * 32) {
      const int32_t byte = first / 8 + 4 * lane, column = 8 * byte;
      uint32_t word = 0;
      if (words && byte + 4 <= bytes) {
        word = *reinterpret_cast<const uint32_t*>(row + byte);
      } else {
        for (int b = 0; b < 4; ++b) word |= byte + b < bytes ? static_cast<uint32_t>(row[byte + b]) << 8 * b : 0u;
      }
      if (column + 32 > width) word &= column < width ? (1u << (width - column)) - 1 : 0u;
      const int32_t mine = count_bits(word), upto = warp_prefix(mine);
      int32_t k = before + upto - mine;
      before += warp_last(upto);
      device_assert(k + mine <= end, "lowrank_sparse_linear: packed.positions must have as many bits as offsets count");
      const int32_t of_row = static_cast<int32_t>(segment * kSegment) + column;
      for (; word != 0 && k < end; ++k, word &= word - 1) body(k, of_row + lowest_bit(word), values[k]);
    }
    // As many as are counted; fewer would leave values without a place.
    device_assert(before == end, "lowrank_sparse_linear: packed.positions must have as many bits as offsets count");
  }

  const PackedMatrix& s;
  const int lane;
  const bool wide;
};

// Rows [first, first + kGroup) of a matrix to shared memory, column by column; zeros behind the last row.
template <typename Storage, int kGroup>
TC_DEVICE void load_group(char* to, const RowsSource& from, int64_t first, int64_t rows, int64_t columns) {
  const auto* data = static_cast<const Storage*>(from.data);
  for (int64_t c = thread_index(); c < columns; c += block_threads()) {
    Several<Storage, kGroup> column;
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      column.entry[r] = first + r < rows ? data[(first + r) * from.row + c * from.feature] : Storage{};
    }
    reinterpret_cast<Several<Storage, kGroup>*>(to)[c] = column;
  }
}

// What comes of the group at column `column`, times `value`.
template <typename E, int kGroup>
TC_DEVICE void add_column(float (&sum)[kGroup], const char* group, int64_t column, typename E::Storage value) {
  using Storage = typename E::Storage;
  const auto of_x = reinterpret_cast<const Several<Storage, kGroup>*>(group)[column];
  const float factor = E::to_float(value);
#pragma unroll
  for (int r = 0; r < kGroup; ++r) sum[r] += factor * E::to_float(of_x.entry[r]);
}

template <typename E, int kGroup>
TC_KERNEL(kSparseThreads, 2)
sparse_forward_kernel(const TC_GRID_CONSTANT SparseRowsParams p) {
  using Storage = typename E::Storage;
  char* const group = shared_memory();
  const int lane = thread_index() % 32;
  const int64_t n = p.sparse.n, first = block_index() / p.blocks * kGroup;
  load_group<Storage, kGroup>(group, p.x, first, p.rows, n);
  load_group<Storage, kGroup>(group + n * kGroup * static_cast<int64_t>(sizeof(Storage)), p.low, first, p.rows, p.rank);
  sync_block();
  const SparseWalk<E> walk(p.sparse);
  for (int64_t i = block_index() % p.blocks * kSparseWarps + warp_index(); i < p.sparse.m;
       i += p.blocks * kSparseWarps) {
    float sum[kGroup] = {};
    walk.each(i, [&](int32_t, int32_t column, Storage value) { add_column<E>(sum, group, column, value); });
    const auto* a = static_cast<const Storage*>(p.a) + i * p.a_row;
    for (int32_t j = lane; j < p.rank; j += 32) add_column<E>(sum, group, n + j, a[j]);
    const float bias = p.bias != nullptr ? E::to_float(static_cast<const Storage*>(p.bias)[i]) : 0.0f;
    sync_warp();
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      const float whole = warp_sum(sum[r]);
      if (lane == r && first + r < p.rows) {
        static_cast<Storage*>(p.y)[(first + r) * p.sparse.m + i] = E::from_float(whole + bias);
      }
    }
  }
}

}  // namespace tensorcomp::cuda
