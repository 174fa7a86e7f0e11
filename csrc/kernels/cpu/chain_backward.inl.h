// Backward pass of a chain of products.
//
// A thread takes its rows of x in blocks: it makes the activations between the steps again, then goes back through the
// steps, adding to its own sums for the matrices. What the threads have summed is added in their order at the end.

// All threads' work: pack the matrices both ways, the rows, the sums.
enum class ChainBackwardPhase { kPack, kRows, kSums, kCount };

inline ChainProgram reversed(const ChainProgram& p) {
  ChainProgram back;
  back.count = p.count;
  for (int i = 0; i < p.count; ++i) back.steps[i] = transposed(p.steps[p.count - 1 - i]);
  back.in_features = p.out_features;
  back.out_features = p.in_features;
  return back;
}

// Words side by side per row of the sums of a matrix, and whether they are of its transpose: then the vectors lie along
// its rows, where fewer of their lanes stay empty.
inline bool sums_transposed(const ChainStep& s) {
  return lane_cost(s.n_size) * static_cast<double>(s.k_size) * 1.1 <
         lane_cost(s.k_size) * static_cast<double>(s.n_size);
}

template <class T>
inline ChainBackwardPlan chain_backward_plan(const ChainBackwardParams& q, int64_t threads) {
  const ChainProgram& p = *q.program;
  const ChainProgram back = reversed(p);
  constexpr bool kNarrow = sizeof(typename T::Element) == 2;
  ChainBackwardPlan g;
  g.parts = threads;
  int64_t at = 0;
  const auto take = [&at](int64_t n) {
    const int64_t start = at;
    at += n > 0 ? round_up(n, 16) + 32 : 0;
    return start;
  };
  int64_t widest = 0, taps = 1, dense = 0, scattered = 0;
  for (int i = 0; i < p.count; ++i) {
    const ChainStep& s = p.steps[i];
    const ChainForm f = chain_form<T>(p, i), b = chain_form<T>(back, p.count - 1 - i);
    g.forward[i] = take(packed_words<T>(s, f));
    g.backward[i] = take(packed_words<T>(back.steps[p.count - 1 - i], b));
    const int64_t f_taps = chain_taps(s, f), b_taps = chain_taps(back.steps[p.count - 1 - i], b);
    taps = f_taps > taps ? f_taps : taps;
    taps = b_taps > taps ? b_taps : taps;
    if (s.in_size > widest) widest = s.in_size;
    if (s.out_size > widest) widest = s.out_size;
    if (inner_k(s) != s.k_size || !has_unit_k(s) || inner_n(s) != s.n_size ||
        (s.n_count && s.n[s.n_count - 1].out != 1)) {
      if (s.in_size + s.out_size > dense) dense = s.in_size + s.out_size;
    }
    if (f.scatter && s.out_size > scattered) scattered = s.out_size;
    if (b.scatter && s.in_size > scattered) scattered = s.in_size;
  }
  g.own = at;

  int64_t between = 0;
  for (int i = 1; i < p.count; ++i) between += round_up(p.steps[i].in_size, 16);
  const int64_t ends = kNarrow ? p.in_features + p.out_features : 0;
  const int64_t row_words = between + 2 * widest + ends + dense;
  constexpr int64_t kCacheWords = 192 * 1024;
  const int64_t per_thread = (q.rows + threads - 1) / threads;
  int64_t most = kCacheWords / row_words;
  // The sums of a pair are read and written for every block.
  const int64_t least = p.count <= 2 && between < 4096 ? 4 * kMaxRows : 1;
  if (most < least) most = least;
  const int64_t blocks = (per_thread + most - 1) / most;
  g.block = blocks > 0 ? (per_thread + blocks - 1) / blocks : 1;

  at = 0;
  for (int i = 0; i < p.count; ++i) {
    g.sums[i] = take(q.grad_matrices[i] ? p.steps[i].n_size * p.steps[i].k_size : 0);
    if (i > 0) g.between[i] = take(g.block * p.steps[i].in_size);
  }
  g.bias_sums = take(q.grad_bias ? p.out_features : 0);
  g.summed_words = at;
  g.entered = take(kNarrow ? g.block * p.in_features : 0);
  g.grad_entered = take(kNarrow ? g.block * p.out_features : 0);
  g.ping = take(g.block * widest);
  g.pong = take(g.block * widest);
  g.dense = take(g.block * dense + 32);
  g.taps = take(4 * taps);
  g.temporary = take(scattered);
  g.own_words = at;
  g.phases = static_cast<int64_t>(ChainBackwardPhase::kCount);
  g.scratch_bytes = static_cast<size_t>(g.own + g.own_words * threads) * 4;
  return g;
}

template <class T>
class ChainBackward {
 public:
  ChainBackward(const ChainBackwardParams& q, const ChainBackwardPlan& g, int64_t part)
      : q_(q), g_(g), program_(*q.program), back_(reversed(program_)), part_(part) {
    shared_ = static_cast<float*>(q.scratch);
    own_ = shared_ + g.own + part * g.own_words;
    taps_ = reinterpret_cast<int64_t*>(own_ + g.taps);
    for (int i = 0; i < program_.count; ++i) {
      if (!q.grad_matrices[i]) continue;
      if (first_ > i) first_ = i;
      last_ = i;
    }
    if (q.grad_x) first_ = 0;
  }

  void run(int64_t phase) {
    switch (static_cast<ChainBackwardPhase>(phase)) {
      case ChainBackwardPhase::kPack: pack(); break;
      case ChainBackwardPhase::kRows: run_rows(); break;
      default: sum(); break;
    }
  }

 private:
  using E = typename T::Element;
  static constexpr int64_t kBytes = sizeof(E);

  void pack() {
    for (int i = 0; i < program_.count; ++i) {
      const ChainStep& s = program_.steps[i];
      const E* from = static_cast<const E*>(q_.matrices[i]);
      const int at = program_.count - 1 - i;
      if (i < last_ && i % g_.parts == part_)
        pack_step<T>(s, chain_form<T>(program_, i), from, s.k_size, 1, shared_ + g_.forward[i]);
      if ((i > first_ || q_.grad_x) && (i + 1) % g_.parts == part_)
        pack_step<T>(back_.steps[at], chain_form<T>(back_, at), from, 1, s.k_size, shared_ + g_.backward[i]);
    }
  }

  void run_rows() {
    clear(own_, g_.summed_words);
    const int64_t begin = q_.rows * part_ / g_.parts, end = q_.rows * (part_ + 1) / g_.parts;
    for (int64_t first = begin; first < end; first += g_.block)
      run_block(first, g_.block < end - first ? g_.block : end - first);
  }

  ChainRows floats(int64_t place, int64_t words) const {
    ChainRows r;
    r.at = reinterpret_cast<char*>(own_ + place);
    r.row = words * 4;
    return r;
  }

  // Rows of x or of the gradient, as floats.
  ChainRows widened(const void* from, int64_t distance, int64_t first, int64_t rows, int64_t n, int64_t place) const {
    if constexpr (kBytes == 4) {
      ChainRows r;
      r.at = const_cast<char*>(static_cast<const char*>(from)) + first * distance * 4;
      r.row = distance * 4;
      return r;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const E* source = static_cast<const E*>(from) + (first + i) * distance;
      float* to = own_ + place + i * n;
      for (int64_t j = 0; j < n; ++j) to[j] = to_float(source[j]);
    }
    return floats(place, n);
  }

  void run_block(int64_t first, int64_t rows) {
    const int count = program_.count;
    ChainRows before[kMaxChainSteps];
    if (last_ >= 0) before[0] = widened(q_.x, q_.x_row, first, rows, program_.in_features, g_.entered);
    for (int i = 0; i < last_; ++i) {
      before[i + 1] = floats(g_.between[i + 1], program_.steps[i].out_size);
      multiply_chain_step<T>(program_.steps[i], chain_form<T>(program_, i), shared_ + g_.forward[i], 0, nullptr, taps_,
                             own_ + g_.temporary, before[i], before[i + 1], rows, 0, 1);
    }
    ChainRows grad = widened(q_.grad, q_.grad_row, first, rows, program_.out_features, g_.grad_entered);
    if (q_.grad_bias) add_bias(grad, rows);
    for (int i = count - 1; i >= first_ && i >= 0; --i) {
      if (q_.grad_matrices[i]) add_matrix(i, before[i], grad, rows);
      if (i == first_ && !q_.grad_x) break;
      const int at = count - 1 - i;
      ChainRows next = floats(i % 2 ? g_.ping : g_.pong, program_.steps[i].in_size);
      if (i == 0 && kBytes == 4) {
        next.row = program_.in_features * 4;
        next.at = static_cast<char*>(q_.grad_x) + first * next.row;
      }
      multiply_chain_step<T>(back_.steps[at], chain_form<T>(back_, at), shared_ + g_.backward[i], 0, nullptr, taps_,
                             own_ + g_.temporary, grad, next, rows, 0, 1);
      grad = next;
    }
    if (kBytes == 2 && q_.grad_x)
      round_to(reinterpret_cast<const float*>(grad.at), static_cast<E*>(q_.grad_x) + first * program_.in_features,
               rows * program_.in_features);
  }

  void add_bias(const ChainRows& grad, int64_t rows) {
    float* sums = own_ + g_.bias_sums;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = reinterpret_cast<const float*>(grad.at + r * grad.row);
      for (int64_t i = 0; i < program_.out_features; ++i) sums[i] += from[i];
    }
  }

  // sums[n, k] += sum over all rows of grad[row, n] * z[row, k], or its transpose.
  void add_matrix(int at, const ChainRows& z, const ChainRows& grad, int64_t rows) {
    const ChainStep& s = program_.steps[at];
    const auto before = [](const ChainDim& d) { return d.in; };
    const auto after = [](const ChainDim& d) { return d.out; };
    float* dense = own_ + g_.dense;
    DenseRows zs = dense_rows(z, s, s.k, s.k_count, s.k_size, before, before, rows, dense);
    if (zs.at == reinterpret_cast<const char*>(dense)) dense += g_.block * s.in_size;
    DenseRows gs = dense_rows(grad, s, s.n, s.n_count, s.n_size, after, after, rows, dense);
    const bool turned = sums_transposed(s);
    const DenseRows& broadcast = turned ? zs : gs;
    const DenseRows& vectors = turned ? gs : zs;
    ChainLoops loops;
    for (int i = 0; i < zs.rows.count; ++i)
      loops.add({zs.rows.loop[i].size, broadcast.rows.loop[i].in, vectors.rows.loop[i].in, 0});
    const ChainLoop inner = loops.take_largest();
    Product p;
    p.rows = turned ? s.k_size : s.n_size;
    p.columns = turned ? s.n_size : s.k_size;
    p.a_k = inner.in;
    p.k = inner.size;
    p.b_packed = false;
    p.b_k = inner.out;
    p.c = reinterpret_cast<char*>(own_ + g_.sums[at]);
    p.c_row = p.columns * 4;
    p.init_mode = Init::kAccumulate;
    const int64_t times = loops.iterations();
    for (int64_t i = 0; i < times; ++i) {
      int64_t rest = i;
      p.a = broadcast.at;
      p.b = vectors.at;
      for (int d = loops.count - 1; d >= 0; --d) {
        const ChainLoop& l = loops.loop[d];
        p.a += rest % l.size * l.in;
        p.b += rest % l.size * l.out;
        rest /= l.size;
      }
      if (p.columns % kUnit) multiply<AOrder::kAlongM, true, FloatDot>(p);
      else multiply<AOrder::kAlongM, false, FloatDot>(p);
    }
  }

  static void round_to(const float* from, E* to, int64_t n) {
    for (int64_t i = 0; i < n; i += Wide::kLanes) {
      const int lanes = static_cast<int>(n - i < Wide::kLanes ? n - i : Wide::kLanes);
      if constexpr (kBytes == 2) store_bf16(Wide::load_first(from + i, lanes), to + i, lanes);
      else Wide::load_first(from + i, lanes).store_first(to + i, lanes);
    }
  }

  // This part's share of the gradients: the threads' sums, in their order.
  void sum() {
    if (q_.grad_bias) add_parts(g_.bias_sums, static_cast<E*>(q_.grad_bias), 1, program_.out_features, nullptr);
    for (int i = 0; i < program_.count; ++i) {
      const ChainStep& s = program_.steps[i];
      if (!q_.grad_matrices[i]) continue;
      const bool turned = sums_transposed(s);
      add_parts(g_.sums[i], static_cast<E*>(q_.grad_matrices[i]), turned ? s.k_size : s.n_size,
                turned ? s.n_size : s.k_size, &s);
    }
  }

  void add_parts(int64_t place, E* to, int64_t rows, int64_t columns, const ChainStep* s) {
    const bool turned = s && sums_transposed(*s);
    const bool in_order = !s || (!turned && uniform_stride(s->n, s->n_count, row_of) == 1 &&
                                 uniform_stride(s->k, s->k_count, column_of) == 1);
    const int64_t total = rows * columns, begin = total * part_ / g_.parts, end = total * (part_ + 1) / g_.parts;
    constexpr int64_t kPiece = 256;
    float sums[kPiece];
    for (int64_t first = begin; first < end; first += kPiece) {
      const int64_t n = end - first < kPiece ? end - first : kPiece;
      clear(sums, n);
      for (int64_t part = 0; part < g_.parts; ++part) {
        const float* from = shared_ + g_.own + part * g_.own_words + place + first;
        for (int64_t i = 0; i < n; ++i) sums[i] += from[i];
      }
      if (in_order) {
        round_to(sums, to + first, n);
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = (first + i) / columns, column = (first + i) % columns;
        const int64_t new_at = matrix_offset(s->n, s->n_count, row_of, turned ? column : row);
        const int64_t sum_at = matrix_offset(s->k, s->k_count, column_of, turned ? row : column);
        round_to(sums + i, to + new_at * s->k_size + sum_at, 1);
      }
    }
  }

  const ChainBackwardParams& q_;
  const ChainBackwardPlan& g_;
  const ChainProgram& program_;
  const ChainProgram back_;
  int64_t part_;
  float *shared_, *own_;
  int64_t* taps_;
  int first_ = kMaxChainSteps,
      last_ = -1;  // matrices whose gradients are wanted
};
