// The kernel table's functions for low-rank + sparse weights.

// The entry points of one element type; backward multiplies floats.
template <class T, class TBackward = T>
struct LowrankSparse {
  static SparseWeightPlan weight_plan(const SparseWeightParams& p, int64_t threads) {
    return sparse_weight_plan<T>(p, threads);
  }

  static void weight_run(const SparseWeightParams& p, const SparseWeightPlan& g, int64_t phase, int64_t part) {
    SparseWeight<T>(p, g, part).run(phase);
  }

  static SparseWeightBackwardPlan weight_backward_plan(const SparseWeightBackwardParams& q, int64_t threads) {
    return sparse_weight_backward_plan<TBackward>(q, threads);
  }

  static void weight_backward_run(const SparseWeightBackwardParams& q, const SparseWeightBackwardPlan& g, int64_t phase,
                                  int64_t part) {
    SparseWeightBackward<TBackward>(q, g, part).run(phase);
  }

  using E = typename T::Element;

  static void linear_run(const SparseLinearParams& p, const SparseLinearPlan& g, int64_t phase, int64_t part) {
    SparseLinear<E>(p, g, part).run(phase);
  }

  static void linear_backward_run(const SparseLinearBackwardParams& q, const SparseLinearBackwardPlan& g, int64_t phase,
                                  int64_t part) {
    SparseLinearBackward<E>(q, g, part).run(phase);
  }

  static void panels_run(const SparsePanelsParams& p, int64_t parts, int64_t part) {
    PanelProduct<E>(p, parts, part).run();
  }

  static constexpr LowrankSparseKernels table() {
    return {weight_plan,        weight_run, weight_backward_plan,        weight_backward_run, sparse_fault,
            sparse_linear_plan, linear_run, sparse_linear_backward_plan, linear_backward_run, panels_scratch_bytes,
            panels_run};
  }
};
