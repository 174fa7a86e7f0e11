// What the multiply-add units can do at best, for the roofline of a benchmark.

inline double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

template <class Dot>
inline double measure_peak(double seconds) {
  constexpr int kChains = 12;  // more independent chains than latency x units anywhere
  constexpr int64_t kSteps = 4096;
  Wide acc[kChains];
  float seed[Wide::kLanes] = {};
  asm volatile("" : : "r"(seed) : "memory");  // the compiler must not know what is multiplied
  for (int i = 0; i < kChains; ++i) acc[i] = Wide::zero();
  const Wide a = Wide::load(seed), b = Wide::load(seed);
  double best = 0.0;
  const double end = seconds_now() + seconds;
  do {
    const double start = seconds_now();
    for (int64_t s = 0; s < kSteps; ++s) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = Dot::apply(a, b, acc[i]);
    }
    asm volatile("" : : "r"(acc) : "memory");  // nor that nobody reads the sums
    const double rate = 2.0 * Dot::kElementsPerWord * Wide::kLanes * kChains * kSteps / (seconds_now() - start);
    if (rate > best) best = rate;
  } while (seconds_now() < end);
  return best;
}
