// Forward pass of a chain of products.
//
// Rows of x go through all steps in blocks small enough for the activations to stay in a private cache; x is read and y
// written by the first and the last step themselves. Where rows are too few for the threads, or the matrices too large
// to be read by every thread, each step of a block is cut among the threads instead.

// Calls f with the element type that step's matrix is packed for.
template <class T, class F>
TC_INLINE void with_step_type(const ChainForm& form, const F& f) {
  if constexpr (T::kPairs) {
    if (form.pairs) f(T{});
    else f(Bfloat16Widened{});
  } else {
    f(T{});
  }
}

template <class T>
inline ChainPlan chain_plan(const ChainParams& p, int64_t threads) {
  const ChainProgram& program = *p.program;
  constexpr int64_t kBytes = sizeof(typename T::Element);
  ChainPlan g;
  int64_t widest = 0, between = 0, matrices = 0, taps = 1;
  bool scatters = false;
  for (int i = 0; i < program.count; ++i) {
    const ChainForm f = chain_form<T>(program, i);
    matrices += packed_words<T>(program.steps[i], f);
    const int64_t needed = chain_taps(program.steps[i], f);
    taps = needed > taps ? needed : taps;
    scatters |= f.scatter;
    if (i == 0) continue;
    const int64_t words = round_up(chain_row<T>(program, i), 16);
    widest = words > widest ? words : widest;
    between += words;
  }
  const ChainStep& end = program.steps[program.count - 1];
  const ChainForm end_form = chain_form<T>(program, program.count - 1);
  // The last step adds a bias that has one value a column.
  const bool plain = end.row_count == 0 && !end_form.scatter && !end_form.rows;
  g.enters = kBytes == 2 && !chain_form<T>(program, 0).pairs;
  g.leaves = (p.bias && !plain) || ((p.residual || p.relu || kBytes == 2) && end_form.scatter);
  constexpr int64_t kStreamBytes = int64_t{1} << 24;  // of y: it will not wait in a cache for whoever reads it
  g.streams = kBytes == 4 && plain && !g.leaves && !p.residual && program.out_features % 16 == 0 &&
              reinterpret_cast<uintptr_t>(p.y) % 64 == 0 && p.rows * program.out_features * 4 > kStreamBytes;

  const int64_t ends = (p.x_row > 0 ? program.in_features : 0) + program.out_features;
  constexpr int64_t kCacheWords = 96 * 1024, kSharedCacheWords = 1024 * 1024;
  const bool heavy = matrices > kCacheWords;  // matrices that no private cache keeps
  const int64_t row_words = 2 * widest + ends * kBytes / 4 + (g.enters ? program.in_features : 0);
  const int64_t per_thread = (p.rows + threads - 1) / threads;
  g.shared = threads > 1 &&
             (p.rows < 2 * threads || per_thread < kMaxRows || (heavy && p.rows * row_words <= kSharedCacheWords));
  int64_t most = (heavy || g.shared ? kSharedCacheWords : kCacheWords) / row_words;
  if (heavy && most < 4 * kMaxRows) most = 4 * kMaxRows;  // each block reads the matrices
  const int64_t least = program.count <= 2 && between < 4096 ? kMaxRows : 1;
  if (most < least) most = least;
  if (most > kMaxRows) most = most / kMaxRows * kMaxRows;
  const int64_t all = g.shared ? p.rows : per_thread;
  const int64_t blocks = (all + most - 1) / most;
  g.block = blocks > 0 ? (all + blocks - 1) / blocks : 1;

  int64_t at = 0;
  const auto take = [&at](int64_t n) {
    const int64_t start = at;
    at += n > 0 ? round_up(n, 16) + 32 : 0;
    return start;
  };
  g.entered = take(g.enters ? g.block * program.in_features : 0);
  g.ping = take(program.count > 1 ? g.block * widest : 0);
  g.pong = take(program.count > 2 ? g.block * widest : 0);
  g.last = take(g.leaves && kBytes == 2 ? g.block * program.out_features : 0);
  g.block_words = at;
  at = 0;
  g.taps = take(4 * taps);
  g.bias = take(p.bias ? padded_columns(program.out_features) : 0);
  int64_t largest = 0;
  for (int i = 0; i < program.count; ++i) {
    if (program.steps[i].out_size > largest) largest = program.steps[i].out_size;
  }
  g.temporary = take(scatters ? largest : 0);
  g.own_words = at;
  g.own = g.block_words * (g.shared ? 1 : threads);
  g.parts = threads;
  if (g.shared) {
    const int64_t stages = program.count + g.enters + g.leaves;
    g.phases = stages * ((p.rows + g.block - 1) / g.block);
  }
  g.scratch_bytes = static_cast<size_t>(g.own + g.own_words * threads) * 4;
  return g;
}

template <class T>
class ChainForward {
 public:
  ChainForward(const ChainParams& p, const ChainPlan& g, int64_t part)
      : p_(p), g_(g), program_(*p.program), part_(part) {
    float* memory = static_cast<float*>(p.scratch);
    block_ = memory + (g.shared ? 0 : part * g.block_words);
    own_ = memory + g.own + part * g.own_words;
    taps_ = reinterpret_cast<int64_t*>(own_ + g.taps);
  }

  void run(int64_t phase) {
    const int64_t stages = program_.count + g_.enters + g_.leaves;
    if (g_.shared) {
      const int64_t first = phase / stages * g_.block;
      stage(phase % stages, first, minimum(g_.block, p_.rows - first), part_, g_.parts);
      return;
    }
    const int64_t begin = p_.rows * part_ / g_.parts, end = p_.rows * (part_ + 1) / g_.parts;
    for (int64_t first = begin; first < end; first += g_.block) {
      for (int64_t i = 0; i < stages; ++i) stage(i, first, minimum(g_.block, end - first), 0, 1);
    }
  }

 private:
  using E = typename T::Element;
  static constexpr int64_t kBytes = sizeof(E);

  static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

  void stage(int64_t at, int64_t first, int64_t rows, int64_t part, int64_t parts) {
    const int64_t step = at - g_.enters;
    if (step < 0) enter(first, rows, part, parts);
    else if (step < program_.count) multiply_step_of(static_cast<int>(step), first, rows, part, parts);
    else leave(first, rows, part, parts);
  }

  ChainRows activations(int at, int64_t first) const {
    ChainRows r;
    if (at == 0 && !g_.enters) {
      r.at = const_cast<char*>(static_cast<const char*>(p_.x)) + first * p_.x_row * kBytes;
      r.row = p_.x_row * kBytes;
      r.element = kBytes;
      return r;
    }
    if (at == program_.count && !(g_.leaves && kBytes == 2)) {
      r.element = kBytes;
      r.row = program_.out_features * kBytes;
      r.at = static_cast<char*>(p_.y) + first * r.row;
      if (g_.streams) r.store = Store::kStream;
      if (!g_.leaves) {
        if (p_.residual) r.residual = static_cast<const char*>(p_.residual) + first * r.row;
        r.relu = p_.relu;
      }
    } else {
      r.element = at < program_.count && chain_form<T>(program_, at).pairs ? 2 : 4;
      r.row = chain_row<T>(program_, at) * r.element;
      const int64_t place = at == 0 ? g_.entered : at == program_.count ? g_.last : at % 2 ? g_.ping : g_.pong;
      r.at = reinterpret_cast<char*>(block_ + place);
    }
    if (r.element == 2) r.store = Store::kBfloat16;
    return r;
  }

  void multiply_step_of(int at, int64_t first, int64_t rows, int64_t part, int64_t parts) {
    const ChainStep& s = program_.steps[at];
    const ChainForm f = chain_form<T>(program_, at);
    const float* matrix = static_cast<const float*>(p_.packed);
    for (int i = 0; i < at; ++i) matrix += packed_words<T>(program_.steps[i], chain_form<T>(program_, i));
    const bool last = at + 1 == program_.count;
    const float* init = last && p_.bias && !g_.leaves ? widened_bias() : nullptr;
    const int64_t columns = !last && chain_form<T>(program_, at + 1).odd_pair ? s.n_size + 1 : 0;
    const ChainRows in = activations(at, first), out = activations(at + 1, first);
    with_step_type<T>(f, [&](auto type) TC_LAMBDA {
      multiply_chain_step<decltype(type)>(s, f, matrix, columns, init, taps_, own_ + g_.temporary, in, out, rows, part,
                                          parts);
    });
#if defined(TC_X86)
    if (out.store == Store::kStream) __builtin_ia32_sfence();
#endif
  }

  const float* widened_bias() {
    // Whole vectors are read.
    if (kBytes == 4 && program_.out_features % kUnit == 0) return static_cast<const float*>(p_.bias);
    float* bias = own_ + g_.bias;
    if (!bias_is_wide_) {
      const E* from = static_cast<const E*>(p_.bias);
      for (int64_t i = 0; i < program_.out_features; ++i) bias[i] = to_float(from[i]);
      const int64_t padded = padded_columns(program_.out_features);
      for (int64_t i = program_.out_features; i < padded; ++i) bias[i] = 0;
      bias_is_wide_ = true;
    }
    return bias;
  }

  void enter(int64_t first, int64_t rows, int64_t part, int64_t parts) {
    const int64_t n = program_.in_features;
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    for (int64_t r = 0; r < rows; ++r) {
      const E* from = static_cast<const E*>(p_.x) + (first + r) * p_.x_row;
      float* to = block_ + g_.entered + r * n;
      for (int64_t i = begin; i < end; ++i) to[i] = to_float(from[i]);
    }
  }

  // Bias, residual and ReLU on the results of a block.
  void leave(int64_t first, int64_t rows, int64_t part, int64_t parts) {
    const int64_t n = program_.out_features;
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    const float* bias = p_.bias ? widened_bias() : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      E* y = static_cast<E*>(p_.y) + (first + r) * n;
      const float* from = kBytes == 2 ? block_ + g_.last + r * n : reinterpret_cast<const float*>(y);
      const E* residual = p_.residual ? static_cast<const E*>(p_.residual) + (first + r) * n : nullptr;
      for (int64_t i = begin; i < end; i += Wide::kLanes) {
        const int lanes = static_cast<int>(minimum(Wide::kLanes, end - i));
        Wide v = lanes == Wide::kLanes ? Wide::load(from + i) : Wide::load_first(from + i, lanes);
        if (bias) v = add(v, Wide::load_first(bias + i, lanes));
        if (residual) v = add(v, widened(residual + i, lanes));
        if (p_.relu) v = relu(v);
        if constexpr (kBytes == 2) store_bf16(v, y + i, lanes);
        else v.store_first(y + i, lanes);
      }
    }
  }

  static Wide widened(const float* from, int lanes) { return Wide::load_first(from, lanes); }
  static Wide widened(const uint16_t* from, int lanes) {
    float wide[Wide::kLanes] = {};
    for (int i = 0; i < lanes; ++i) wide[i] = to_float(from[i]);
    return Wide::load(wide);
  }

  const ChainParams& p_;
  const ChainPlan& g_;
  const ChainProgram& program_;
  int64_t part_;
  float *block_, *own_;
  int64_t* taps_;
  bool bias_is_wide_ = false;
};
