// Gradients of x and of the values of a packed sparse matrix, with rows of x and of the gradient side by side. Every
// part has values of its own for their gradient, and the first `row_parts` have rows of x for that of x.

inline SparseLinearBackwardPlan sparse_linear_backward_plan(const SparseLinearBackwardParams& q, int64_t threads) {
  const SparseMatrix& s = q.sparse;
  SparseLinearBackwardPlan g;
  const int64_t most = (q.rows + Wide::kLanes - 1) / Wide::kLanes;
  g.parts = threads;
  g.row_parts = threads < most ? threads : most;
  g.lanes = turned_lanes((q.rows + g.row_parts - 1) / g.row_parts, s.n > s.m ? s.n : s.m);
  g.rounds = (q.rows + g.row_parts * g.lanes - 1) / (g.row_parts * g.lanes);
  g.phases = 2 + 2 * g.rounds;
  int64_t at = round_up(s.bits ? (s.count + 1) / 2 : 0, 16);
  g.sums = at;
  at += q.grad_values && q.dtype != DType::kFloat32 ? round_up(s.count, 16) : 0;
  g.own = at;
  at = 0;
  const auto take = [&at](int64_t words) {
    const int64_t from = at;
    at += round_up(words, 16);
    return from;
  };
  g.grad = take(s.m * g.lanes);
  g.x = take(q.grad_values ? s.n * g.lanes : 0);
  g.grad_x = take(q.grad_x ? s.n * g.lanes : 0);
  g.own_words = at;
  g.scratch_bytes = static_cast<size_t>(g.own + g.own_words * g.row_parts) * 4;
  return g;
}

#if defined(TC_AVX512)
inline float sum_lanes(Wide v) { return _mm512_reduce_add_ps(v.v); }
#else
inline float sum_lanes(Wide v) {
  float each[Wide::kLanes], sum = 0;
  v.store(each);
  for (const float one : each) sum += one;
  return sum;
}
#endif

template <class E>
class SparseLinearBackward {
 public:
  SparseLinearBackward(const SparseLinearBackwardParams& q, const SparseLinearBackwardPlan& g, int64_t part)
      : q_(q), s_(q.sparse), g_(g), part_(part), memory_(static_cast<float*>(q.scratch)) {
    columns_ = s_.bits ? reinterpret_cast<const uint16_t*>(memory_) : s_.columns;
    begin_ = sparse_share(s_, part, g.parts);
    end_ = sparse_share(s_, part + 1, g.parts);
    if constexpr (sizeof(E) == 4) sums_ = static_cast<float*>(q.grad_values);
    else sums_ = memory_ + g.sums;
  }

  void run(int64_t phase) {
    if (phase == 0) {
      if (s_.bits) decode_rows(s_, begin_, end_, reinterpret_cast<uint16_t*>(memory_));
    } else if (phase + 1 == g_.phases) {
      if (sizeof(E) != 4 && q_.grad_values) store_values();
    } else if (phase % 2 != 0) {
      turn((phase - 1) / 2);
    } else if (q_.grad_values) {
      if (g_.lanes == Wide::kLanes) add_to_values<1>(phase / 2 - 1);
      else if (g_.lanes == 2 * Wide::kLanes) add_to_values<2>(phase / 2 - 1);
      else add_to_values<4>(phase / 2 - 1);
    }
  }

 private:
  float* own(int64_t part, int64_t at) const { return memory_ + g_.own + part * g_.own_words + at; }
  int64_t first_row(int64_t round, int64_t part) const { return (round * g_.row_parts + part) * g_.lanes; }
  int64_t rows_from(int64_t first) const {
    const int64_t left = q_.rows - first;
    return left < 0 ? 0 : left < g_.lanes ? left : g_.lanes;
  }

  // This part's rows of a round, and their gradient.
  void turn(int64_t round) const {
    if (part_ >= g_.row_parts) return;
    const int64_t first = first_row(round, part_), rows = rows_from(first);
    if (rows == 0) return;
    turn_rows(static_cast<const E*>(q_.grad) + first * q_.grad_row, q_.grad_row, rows, 0, s_.m, own(part_, g_.grad),
              g_.lanes);
    if (q_.grad_values) {
      turn_rows(static_cast<const E*>(q_.x) + first * q_.x_row, q_.x_row, rows, 0, s_.n, own(part_, g_.x), g_.lanes);
    }
    if (!q_.grad_x) return;
    clear(own(part_, g_.grad_x), s_.n * g_.lanes);
    if (g_.lanes == Wide::kLanes) spread<1>();
    else if (g_.lanes == 2 * Wide::kLanes) spread<2>();
    else spread<4>();
    add_to_x(first, rows);
  }

  // Calls each(i, k, column) for the values of rows [begin, end) of the matrix.
  template <class Each>
  TC_INLINE void for_values(int64_t begin, int64_t end, const Each& each) const {
    const int64_t segments = s_.segments();
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t g = 0; g < segments; ++g) {
        const int64_t last = s_.offsets[i * segments + g + 1];
        for (int64_t k = s_.offsets[i * segments + g]; k < last; ++k) each(i, k, g * kSegment + columns_[k]);
      }
    }
  }

  template <int kVectors>
  void spread() const {
    constexpr int64_t kLanes = kVectors * Wide::kLanes;
    const float* grad = own(part_, g_.grad);
    float* grad_x = own(part_, g_.grad_x);
    const E* values = static_cast<const E*>(s_.values);
    for_values(0, s_.m, [&](int64_t i, int64_t k, int64_t column) TC_LAMBDA {
      const float value = to_float(values[k]);
      const Wide a = Wide::broadcast(&value);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = grad_x + column * kLanes + v * Wide::kLanes;
        fma(a, Wide::load(grad + i * kLanes + v * Wide::kLanes), Wide::load(to)).store(to);
      }
    });
  }

  void add_to_x(int64_t first, int64_t rows) const {
    constexpr int64_t kBlock = 64;
    float back[4 * Wide::kLanes * kBlock];
    const float* from = own(part_, g_.grad_x);
    for (int64_t c = 0; c < s_.n; c += kBlock) {
      const int64_t some = s_.n - c < kBlock ? s_.n - c : kBlock;
      transpose_words(from + c * g_.lanes, g_.lanes, some, rows, back, kBlock);
      for (int64_t r = 0; r < rows; ++r) {
        E* to = static_cast<E*>(q_.grad_x) + (first + r) * s_.n + c;
        for (int64_t i = 0; i < some; i += Wide::kLanes) {
          const int lanes = static_cast<int>(some - i < Wide::kLanes ? some - i : Wide::kLanes);
          store_lanes(add(load_lanes(back + r * kBlock + i, lanes), load_lanes(to + i, lanes)), to + i, lanes);
        }
      }
    }
  }

  template <int kVectors>
  void add_to_values(int64_t round) const {
    constexpr int64_t kLanes = kVectors * Wide::kLanes;
    for (int64_t part = 0; part < g_.row_parts; ++part) {
      if (rows_from(first_row(round, part)) == 0) continue;
      const float *grad = own(part, g_.grad), *x = own(part, g_.x);
      const bool adds = round > 0 || part > 0;
      for_values(begin_, end_, [&](int64_t i, int64_t k, int64_t column) TC_LAMBDA {
        Wide sum = Wide::zero();
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = v * Wide::kLanes;
          sum = fma(Wide::load(grad + i * kLanes + at), Wide::load(x + column * kLanes + at), sum);
        }
        sums_[k] = sum_lanes(sum) + (adds ? sums_[k] : 0.0f);
      });
    }
  }

  void store_values() const {
    const int64_t segments = s_.segments(), end = s_.offsets[end_ * segments];
    for (int64_t k = s_.offsets[begin_ * segments]; k < end; k += Wide::kLanes) {
      const int lanes = static_cast<int>(end - k < Wide::kLanes ? end - k : Wide::kLanes);
      store_lanes(load_lanes(sums_ + k, lanes), static_cast<E*>(q_.grad_values) + k, lanes);
    }
  }

  const SparseLinearBackwardParams& q_;
  const SparseMatrix& s_;
  const SparseLinearBackwardPlan& g_;
  int64_t part_;
  float* memory_;
  const uint16_t* columns_;
  int64_t begin_, end_;
  float* sums_;
};
