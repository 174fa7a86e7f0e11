// The kernel table's functions for the bottleneck convolution.

// The forward entry points of one element type.
template <class T>
struct BottleneckForwardEntry {
  static size_t packed_bytes(const BottleneckShape& s) {
    return static_cast<size_t>(packed_layout<T>(s, PackedForms{}).total) * 4;
  }

  static void pack(const BottleneckShape& s, const BottleneckWeights& w, void* to) {
    pack_bottleneck<T>(s, w, PackedForms{}, static_cast<float*>(to));
  }

  static size_t packed_bytes_for(const BottleneckConvParams& p, int64_t threads) {
    const PackedForms forms = bottleneck_geometry<T>(p, threads).forms();
    return static_cast<size_t>(packed_layout<T>(p.shape, forms).total) * 4;
  }

  // Only the forms that this problem reads.
  static void pack_for(const BottleneckConvParams& p, int64_t threads, const BottleneckWeights& w, void* to) {
    pack_bottleneck<T>(p.shape, w, bottleneck_geometry<T>(p, threads).forms(), static_cast<float*>(to));
  }

  static BottleneckPlan plan(const BottleneckConvParams& p, int64_t threads) {
    const BottleneckGeometry g = bottleneck_geometry<T>(p, threads);
    BottleneckPlan plan;
    plan.parts = threads;
    plan.phases = g.phased ? 3 : 1;
    plan.scratch_bytes = static_cast<size_t>(g.part_words * threads) * 4;
    return plan;
  }

  static void run(const BottleneckConvParams& p, int64_t threads, int64_t phase, int64_t part) {
    const BottleneckGeometry g = bottleneck_geometry<T>(p, threads);
    float* shared = static_cast<float*>(p.scratch);
    float* own = shared + part * g.part_words;
    BottleneckForward<T> forward(p, g, own, g.phased ? shared : own);
    if (g.phased) {
      forward.run_phase(phase, part, threads);
    } else {
      const int64_t rows = p.batch * p.out_height;
      forward.run_rows(rows * part / threads, rows * (part + 1) / threads);
    }
  }
};

// All entry points of one element type. Phases of backward: in bands, (widen,) pack, the rows, the sums; with whole
// images the steps of each group. bfloat16 adds one: weights to widen before, or sums to round after.
template <class T, class TBackward = T>
struct Bottleneck : BottleneckForwardEntry<T> {
  using Forward = BottleneckForwardEntry<T>;
  using Whole = BackwardWhole<TBackward>;

  // The steps of whole images begin with widening only where something is to be widened.
  static int64_t first_step(const BackwardGeometry& g) { return g.gathers() ? Whole::kWiden : Whole::kEnter; }

  static BottleneckPlan backward_plan(const BottleneckBackwardParams& q, int64_t threads) {
    const BackwardGeometry g = backward_geometry<TBackward>(q, threads);
    BottleneckPlan plan;
    plan.phases = g.whole ? g.groups * (Whole::kLeave + 1 - first_step(g)) + g.narrow : 3 + g.narrow;
    plan.parts = threads;
    plan.scratch_bytes = static_cast<size_t>(g.shared_words + g.part_words * threads) * 4;
    return plan;
  }

  static void backward_run(const BottleneckBackwardParams& q, int64_t threads, int64_t phase, int64_t part) {
    const BackwardGeometry g = backward_geometry<TBackward>(q, threads);
    if (g.whole) {
      Whole whole(q, g, part);
      const int64_t first = first_step(g), steps = Whole::kLeave + 1 - first;
      if (phase == g.groups * steps) whole.finish();
      else whole.run(phase / steps, static_cast<typename Whole::Step>(first + phase % steps));
      return;
    }
    if (g.core_rows) run_bands<BackwardBands<RowBands<TBackward>>>(q, g, phase, part);
    else run_bands<BackwardBands<ColumnBands<TBackward>>>(q, g, phase, part);
  }

  template <class Bands>
  static void run_bands(const BottleneckBackwardParams& q, const BackwardGeometry& g, int64_t phase, int64_t part) {
    Bands bands(q, g, part);
    const int64_t rows = q.forward.batch * q.forward.out_height;
    switch (g.narrow ? phase : phase + 1) {
      case 0: bands.widen_weights(); break;
      case 1: bands.pack(); break;
      case 2: bands.run_rows(rows * part / g.threads, rows * (part + 1) / g.threads); break;
      default: bands.reduce();
    }
  }

  static constexpr BottleneckKernels table() {
    return {Forward::packed_bytes, Forward::pack, Forward::packed_bytes_for,
            Forward::pack_for,     Forward::plan, Forward::run,
            backward_plan,         backward_run};
  }
};
