// Gradients of the embedding's cores: rows sorted by digit, a chunk of them a warp; a second kernel adds what chunks
// share of a slice, in order, and fills in the slices that no row chose.
#pragma once

#include "kernels/cuda/embedding.cuh"

namespace tensorcomp::cuda {

// Row n's digits of the cores with a gradient; the padding row counts as behind the last one.
template <typename E>
TC_KERNEL(256, 2)
embedding_digits_kernel(const TC_GRID_CONSTANT EmbeddingParams p) {
  EmbeddingRow<E> row(p);
  for (int64_t n = block_index() * block_threads() + thread_index(); n < p.count;
       n += grid_blocks() * block_threads()) {
    const bool there = row.look_up(n);
    int32_t* to = p.digits + n;
#pragma unroll
    for (int k = 0; k < kMostEmbeddingCores; ++k) {
      if (k >= p.cores || p.core[k].gradient == nullptr) continue;
      *to = there ? row.digit[k] : p.core[k].vocab;
      to += p.count;
    }
  }
}

template <typename E>
class EmbeddingBackward {
 public:
  using Storage = typename E::Storage;

  TC_DEVICE EmbeddingBackward(const EmbeddingParams& params, int32_t k)
      : p(params),
        k(k),
        core(params.core[k]),
        row(params),
        left(reinterpret_cast<float*>(shared_memory()) +
             warp_index() * (2 * (p.left + p.right) + p.middle + p.slice + p.dim)),
        right(left + 2 * p.left),
        middle(right + 2 * p.right),
        sum(middle + p.middle),
        grad(sum + p.slice) {}

  // The chunk's rows, run by run of equal digits.
  TC_DEVICE void run(int64_t chunk) {
    const int64_t begin = chunk * p.chunk, end = begin + p.chunk < p.count ? begin + p.chunk : p.count;
    int64_t first = begin;
    while (first < end && core.sorted[first] < core.vocab) {
      const int32_t digit = core.sorted[first];
      row.each(1, core.slice(), [&](int32_t, int32_t e) { sum[e] = 0.0f; });
      int64_t at = first;
      for (; at < end && core.sorted[at] == digit; ++at) add(core.order[at]);
      if (first == begin || at == end) {
        float* to = core.partial + (2 * chunk + (first == begin ? 0 : 1)) * core.slice();
        row.each(1, core.slice(), [&](int32_t, int32_t e) { to[e] = sum[e]; });
      } else {
        store<E>(core, digit, row, [&](int32_t e) { return sum[e]; });
      }
      first = at;
    }
  }

  template <typename F, typename Row, typename Value>
  static TC_DEVICE void store(const EmbeddingCore& core, int64_t digit, const Row& row, const Value& value) {
    Storage* to = static_cast<Storage*>(core.gradient);
    row.each(core.rank_in, core.columns(), [&](int32_t r, int32_t e) {
      to[(static_cast<int64_t>(r) * core.vocab + digit) * core.columns() + e] =
          F::from_float(value(r * core.columns() + e));
    });
  }

 private:
  TC_DEVICE void add(int64_t n) {
    row.look_up(n);
    const Storage* from = static_cast<const Storage*>(p.grad) + n * p.dim;
    row.each(1, p.dim, [&](int32_t, int32_t d) { grad[d] = E::to_float(from[d]); });
    const int32_t ring = p.core[0].rank_in;
    for (int32_t first = 0; first < ring; first += p.part) {
      const int32_t part = ring - first < p.part ? ring - first : p.part;
      if (k + 1 == p.cores) {
        add_last(first, part);
      } else {
        add_inner(first, part);
      }
    }
  }

  // What the ring's indices [first, first + part) add: sum[r][j, b] += sum over a, d and f of
  // left[a, d][r] * grad[d, j, f] * right[b][f, a].
  TC_DEVICE void add_inner(int32_t first, int32_t part) const {
    int32_t before = 1, behind = 1;
    const float* r = right_of(first, part, behind);
    const float* l = k == 0 ? nullptr : left_of(first, part, before);
    const int32_t out = core.rank_out, dim = core.dim, columns = core.columns();
    // middle[a, d][j, b] = sum over f
    row.each(part * before, columns, [&](int32_t ad, int32_t jb) {
      const int32_t a = ad / before, d = ad - a * before, j = jb / out, b = jb - j * out;
      const float* g = grad + (d * dim + j) * behind;
      const float* of = r + b * behind * part + a;
      float total = 0.0f;
      for (int32_t f = 0; f < behind; ++f) total += g[f] * of[f * part];
      middle[ad * columns + jb] = total;
    });
    if (k == 0) {  // nothing stands on the left: r is the ring's index itself
      row.each(part, columns, [&](int32_t a, int32_t e) { sum[(first + a) * columns + e] += middle[a * columns + e]; });
      return;
    }
    row.each(core.rank_in, columns, [&](int32_t q, int32_t e) {
      float total = 0.0f;
      for (int32_t ad = 0; ad < part * before; ++ad) total += l[ad * core.rank_in + q] * middle[ad * columns + e];
      sum[q * columns + e] += total;
    });
  }

  // Nothing stands on the right: b is the ring's index itself.
  TC_DEVICE void add_last(int32_t first, int32_t part) const {
    int32_t before = 1;
    const float* l = k == 0 ? nullptr : left_of(first, part, before);
    const int32_t dim = core.dim, columns = core.columns();
    row.each(core.rank_in * dim, part, [&](int32_t rj, int32_t a) {
      const int32_t r = rj / dim, j = rj - r * dim;
      float total = 0.0f;
      if (k == 0) {
        total = r == first + a ? grad[j] : 0.0f;
      } else {
        for (int32_t d = 0; d < before; ++d) total += l[(a * before + d) * core.rank_in + r] * grad[d * dim + j];
      }
      sum[r * columns + j * core.rank_out + first + a] += total;
    });
  }

  // The product of the slices before core k, [part, before][rank].
  TC_DEVICE const float* left_of(int32_t first, int32_t part, int32_t& before) const {
    row.begin_left(left, first, part);
    before = p.core[0].dim;
    float* at = left;
    for (int32_t i = 1; i < k; ++i) {
      float* next = left + i % 2 * p.left;
      row.take_right(i, at, next, part * before);
      at = next;
      before *= p.core[i].dim;
    }
    return at;
  }

  // Of those behind it, [rank][behind, part].
  TC_DEVICE const float* right_of(int32_t first, int32_t part, int32_t& behind) const {
    const int32_t last = p.cores - 1;
    row.begin_right(right, first, part);
    behind = p.core[last].dim;
    float* at = right;
    for (int32_t i = last - 1; i > k; --i) {
      float* next = at == right ? right + p.right : right;
      row.take_left(i, at, next, behind * part);
      at = next;
      behind *= p.core[i].dim;
    }
    return at;
  }

  const EmbeddingParams& p;
  const int32_t k;
  const EmbeddingCore& core;
  EmbeddingRow<E> row;
  float *const left, *const right, *const middle, *const sum, *const grad;
};

// Chunks of one core after those of another.
template <typename E>
TC_KERNEL(256, 2)
embedding_backward_kernel(const TC_GRID_CONSTANT EmbeddingParams p) {
  const int64_t chunks = (p.count + p.chunk - 1) / p.chunk;
  int64_t work = block_index() * p.warps + warp_index();
  for (int32_t k = 0; k < p.cores; ++k) {
    if (p.core[k].gradient == nullptr) continue;
    if (work < chunks) {
      EmbeddingBackward<E>(p, k).run(work);
      return;
    }
    work -= chunks;
  }
}

// The first of `count` sorted numbers that is not below `value`.
TC_DEVICE int64_t lower_bound(const int32_t* sorted, int64_t count, int32_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// A warp a slice.
template <typename E>
TC_KERNEL(256, 2)
embedding_finish_kernel(const TC_GRID_CONSTANT EmbeddingParams p) {
  const EmbeddingRow<E> row(p);
  int64_t digit = block_index() * (block_threads() / 32) + warp_index();
  for (int32_t k = 0; k < p.cores; ++k) {
    const EmbeddingCore& core = p.core[k];
    if (core.gradient == nullptr) continue;
    if (digit >= core.vocab) {
      digit -= core.vocab;
      continue;
    }
    const int64_t begin = lower_bound(core.sorted, p.count, static_cast<int32_t>(digit));
    const int64_t end = lower_bound(core.sorted, p.count, static_cast<int32_t>(digit) + 1);
    const int64_t first = begin / p.chunk, last = (end - 1) / p.chunk;
    const int64_t chunk_end = first * p.chunk + p.chunk < p.count ? first * p.chunk + p.chunk : p.count;
    // A run inside one chunk is where it belongs already.
    if (begin < end && begin != first * p.chunk && end < chunk_end) return;
    EmbeddingBackward<E>::template store<E>(core, digit, row, [&](int32_t e) {
      float total = 0.0f;
      for (int64_t c = first; begin < end && c <= last; ++c) {
        total += core.partial[(2 * c + (begin <= c * p.chunk ? 0 : 1)) * core.slice() + e];
      }
      return total;
    });
    return;
  }
}

}  // namespace tensorcomp::cuda
