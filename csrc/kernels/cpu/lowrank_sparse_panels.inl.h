// x times a sparse matrix in panels, for some rows of x at a time.

#if defined(TC_AVX512)

// Two vectors side by side, out of which places pick.
struct Window {
  __m512 low, high;
};
inline Window load_window(const float* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + kWindowStep)}; }

struct Lanes16 {
  __m512 v;
};
inline Lanes16 lanes_zero() { return {_mm512_setzero_ps()}; }
inline Lanes16 load_step(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes16 load_step(const uint16_t* p) {
  const __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
}
using Places = __m512i;
inline Places load_places(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void multiply_add(Lanes16& sum, Lanes16 values, const Window& x, Places places) {
  sum.v = _mm512_fmadd_ps(values.v, _mm512_permutex2var_ps(x.low, places, x.high), sum.v);
}
// Columns beyond the last are taken for the last.
inline void multiply_add_loose(Lanes16& sum, Lanes16 values, const float* x, const int32_t* columns, int64_t last) {
  const __m512i at = _mm512_min_epu32(_mm512_loadu_si512(columns), _mm512_set1_epi32(static_cast<int>(last)));
  sum.v = _mm512_fmadd_ps(values.v, _mm512_i32gather_ps(at, x, 4), sum.v);
}
// Into the elements of y that `order` names, where it names one of `m`.
inline void store_sums(const Lanes16& sum, float* y, const int32_t* order, int64_t m) {
  const __m512i at = _mm512_loadu_si512(order);
  const __mmask16 there = _mm512_cmplt_epu32_mask(at, _mm512_set1_epi32(static_cast<int>(m)));
  _mm512_mask_i32scatter_ps(y, there, at, sum.v, 4);
}
inline const float* floats_of(const Lanes16& sum, float* to) {
  _mm512_storeu_ps(to, sum.v);
  return to;
}

#else

struct Window {
  const float* x;
};
inline Window load_window(const float* x) { return {x}; }

struct Lanes16 {
  float v[kPanelLanes];
};
inline Lanes16 lanes_zero() { return {}; }
template <class E>
inline Lanes16 load_step(const E* p) {
  Lanes16 r;
  for (int l = 0; l < kPanelLanes; ++l) r.v[l] = to_float(p[l]);
  return r;
}
using Places = const uint8_t*;
inline Places load_places(const uint8_t* p) { return p; }
inline void multiply_add(Lanes16& sum, const Lanes16& values, const Window& x, Places places) {
  for (int l = 0; l < kPanelLanes; ++l) sum.v[l] += values.v[l] * x.x[places[l] & (2 * kWindowStep - 1)];
}
inline void multiply_add_loose(Lanes16& sum, const Lanes16& values, const float* x, const int32_t* columns,
                               int64_t last) {
  for (int l = 0; l < kPanelLanes; ++l) {
    const int64_t column = static_cast<uint32_t>(columns[l]);
    sum.v[l] += values.v[l] * x[column < last ? column : last];
  }
}
inline void store_sums(const Lanes16& sum, float* y, const int32_t* order, int64_t m) {
  for (int l = 0; l < kPanelLanes; ++l) {
    if (static_cast<uint32_t>(order[l]) < m) y[order[l]] = sum.v[l];
  }
}
inline const float* floats_of(const Lanes16& sum, float*) { return sum.v; }

#endif

inline void store_sums(const Lanes16& sum, uint16_t* y, const int32_t* order, int64_t m) {
  float memory[kPanelLanes];
  const float* floats = floats_of(sum, memory);
  uint16_t rounded[kPanelLanes];
  for (int l = 0; l < kPanelLanes; l += Wide::kLanes) store_lanes(Wide::load(floats + l), rounded + l, Wide::kLanes);
  for (int l = 0; l < kPanelLanes; ++l) {
    if (static_cast<uint32_t>(order[l]) < m) y[order[l]] = rounded[l];
  }
}

// Words of a row of x as the panels read it: whole windows.
inline int64_t panel_row_words(int64_t n) { return round_up(n, kWindowStep) + 2 * kWindowStep; }

inline size_t panels_scratch_bytes(const SparsePanelsParams& p, int64_t parts) {
  return static_cast<size_t>(parts * kPanelRows * panel_row_words(p.panels.n)) * 4;
}

template <class E>
class PanelProduct {
 public:
  PanelProduct(const SparsePanelsParams& p, int64_t parts, int64_t part) : p_(p), s_(p.panels) {
    begin_ = first_bundle(part, parts);
    end_ = first_bundle(part + 1, parts);
    row_words_ = panel_row_words(s_.n);
    x_ = static_cast<float*>(p.scratch) + part * kPanelRows * row_words_;
  }

  void run() {
    if (begin_ == end_) return;
    for (int64_t first = 0; first < p_.rows;) {
      const int64_t left = p_.rows - first;
      const int rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      read(first, rows);
      if (rows == 4) multiply<4>(first);
      else if (rows == 2) multiply<2>(first);
      else multiply<1>(first);
      first += rows;
    }
  }

 private:
  // Parts are cut by the steps in them.
  int64_t first_bundle(int64_t part, int64_t parts) const {
    constexpr int64_t kLoose = 4;  // steps in the time of a loose one
    const auto steps = [&](int64_t bundle) { return p_.slot_starts[bundle] + kLoose * p_.loose_starts[bundle]; };
    const int64_t bundles = s_.bundles(), all = steps(bundles);
    if (part == parts) return bundles;
    int64_t bundle = 0;
    while (bundle < bundles && steps(bundle) < all / parts * part) ++bundle;
    return bundle;
  }

  void read(int64_t first, int rows) {
    for (int r = 0; r < rows; ++r) {
      const E* from = static_cast<const E*>(p_.x) + (first + r) * p_.x_row;
      float* to = x_ + r * row_words_;
      int64_t i = 0;
      for (; i + Wide::kLanes <= s_.n; i += Wide::kLanes) load_lanes(from + i, Wide::kLanes).store(to + i);
      for (; i < s_.n; ++i) to[i] = to_float(from[i]);
      clear(to + s_.n, row_words_ - s_.n);
    }
  }

  template <int kRows>
  void multiply(int64_t first) {
    const int64_t chunks = s_.chunks(), windows = s_.windows(), last = s_.n - 1;
    const E* values = static_cast<const E*>(s_.values) + p_.slot_starts[begin_] * kPanelLanes;
    const uint8_t* places = s_.places + p_.slot_starts[begin_] * kPanelLanes;
    const E* loose = static_cast<const E*>(s_.loose_values) + p_.loose_starts[begin_] * kPanelLanes;
    const int32_t* columns = s_.loose_columns + p_.loose_starts[begin_] * kPanelLanes;
    for (int64_t b = begin_; b < end_; ++b) {
      Lanes16 sum[kPanelGroups][kRows];
      for (auto& group : sum) {
        for (Lanes16& one : group) one = lanes_zero();
      }
      for (int64_t c = 0; c < chunks; ++c) {
        const int half_steps = s_.half_steps[b * chunks + c];
        if (half_steps == 0) continue;
        const int64_t end = (c + 1) * kChunk < windows ? (c + 1) * kChunk : windows;
        for (int64_t w = c * kChunk; w < end; ++w) {
          Window x[kRows];
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) x[r] = load_window(x_ + r * row_words_ + w * kWindowStep);
          for (int s = window_steps(half_steps, w); s > 0; --s) {
#pragma GCC unroll 4
            for (int g = 0; g < kPanelGroups; ++g) {
              const Lanes16 value = load_step(values + g * kPanelLanes);
              const Places place = load_places(places + g * kPanelLanes);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) multiply_add(sum[g][r], value, x[r], place);
            }
            values += kBundle;
            places += kBundle;
          }
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kPanelGroups; ++g) {
        for (int64_t s = s_.loose_steps[b * kPanelGroups + g]; s > 0; --s) {
          const Lanes16 value = load_step(loose);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) multiply_add_loose(sum[g][r], value, x_ + r * row_words_, columns, last);
          loose += kPanelLanes;
          columns += kPanelLanes;
        }
        const int32_t* order = s_.order + b * kBundle + g * kPanelLanes;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) store_sums(sum[g][r], static_cast<E*>(p_.y) + (first + r) * s_.m, order, s_.m);
      }
    }
  }

  const SparsePanelsParams& p_;
  const SparsePanels& s_;
  int64_t begin_, end_, row_words_;
  float* x_;
};
