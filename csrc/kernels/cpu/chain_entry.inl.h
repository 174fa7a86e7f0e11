// The kernel table's functions for chains of products.

// The entry points of one element type; backward multiplies floats.
template <class T, class TBackward = T>
struct Chain {
  static size_t packed_bytes(const ChainProgram& p) {
    int64_t total = 0;
    for (int i = 0; i < p.count; ++i) total += packed_words<T>(p.steps[i], chain_form<T>(p, i));
    return static_cast<size_t>(total) * 4;
  }

  static void pack(const ChainProgram& p, const void* const* matrices, void* to) {
    float* target = static_cast<float*>(to);
    for (int i = 0; i < p.count; ++i) {
      const ChainStep& s = p.steps[i];
      const ChainForm f = chain_form<T>(p, i);
      const auto* from = static_cast<const typename T::Element*>(matrices[i]);
      with_step_type<T>(f, [&](auto type) TC_LAMBDA { pack_step<decltype(type)>(s, f, from, s.k_size, 1, target); });
      target += packed_words<T>(s, f);
    }
  }

  static ChainPlan plan(const ChainParams& p, int64_t threads) { return chain_plan<T>(p, threads); }

  static void run(const ChainParams& p, const ChainPlan& g, int64_t phase, int64_t part) {
    ChainForward<T>(p, g, part).run(phase);
  }

  static ChainBackwardPlan backward_plan(const ChainBackwardParams& q, int64_t threads) {
    return chain_backward_plan<TBackward>(q, threads);
  }

  static void backward_run(const ChainBackwardParams& q, const ChainBackwardPlan& g, int64_t phase, int64_t part) {
    ChainBackward<TBackward>(q, g, part).run(phase);
  }

  static constexpr ChainKernels table() { return {packed_bytes, pack, plan, run, backward_plan, backward_run}; }
};
