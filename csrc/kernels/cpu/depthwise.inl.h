// Depthwise convolution of rank-space rows: every rank by itself, a few taps each. Rows are [pixel][rank] ("pixels") or
// [rank][pixel] ("lines"). Rows may be read up to a vector beyond their last word, never written.

// What a vector of words accumulates, and the weights of one tap it takes.
struct FloatSums {
  static constexpr int kWeights = 1;
  Wide sum = Wide::zero();
  TC_INLINE void add(Wide z, const Wide (&w)[kWeights]) { sum = fma(z, w[0], sum); }
  TC_INLINE Wide word() const { return sum; }
};

#if defined(TC_BF16_DOT)
// Both halves of pairs in float32.
struct PairSums {
  static constexpr int kWeights = 2;
  Wide low = Wide::zero(), high = Wide::zero();
  TC_INLINE void add(Wide z, const Wide (&w)[kWeights]) {
    const __m512i u = _mm512_castps_si512(z.v);
    low = fma({_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))}, w[0], low);
    high = fma({_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(-65536)))}, w[1], high);
  }
  TC_INLINE Wide word() const { return pair_bf16(low, high); }
};
#endif

template <class T>
struct DepthwiseSums {
  using Type = FloatSums;
};
#if defined(TC_BF16_DOT)
template <>
struct DepthwiseSums<Bfloat16Pairs> {
  using Type = PairSums;
};
#endif

inline int64_t whole_vectors(int64_t words) { return (words + Wide::kLanes - 1) / Wide::kLanes * Wide::kLanes; }

// Words of the packed weights of one tap, for rows [pixel][rank].
template <class T>
inline int64_t depthwise_tap_words(int64_t rank) {
  return DepthwiseSums<T>::Type::kWeights * whole_vectors(words<T>(rank));
}

// core [rank][tap] as floats [tap][half of the word][word], zero beyond the last.
template <class T>
inline void pack_depthwise_columns(const typename T::Element* core, int64_t rank, int64_t taps, float* to) {
  constexpr int kHalves = DepthwiseSums<T>::Type::kWeights;
  const int64_t wide = whole_vectors(words<T>(rank));
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t half = 0; half < kHalves; ++half) {
      for (int64_t w = 0; w < wide; ++w) {
        const int64_t r = kHalves * w + half;
        *to++ = r < rank ? to_float(core[r * taps + t]) : 0.0f;
      }
    }
  }
}

// core [rank][tap] as floats [word][tap][half of the word].
template <class T>
inline void pack_depthwise_rows(const typename T::Element* core, int64_t rank, int64_t taps, float* to) {
  constexpr int kHalves = DepthwiseSums<T>::Type::kWeights;
  for (int64_t w = 0; w < words<T>(rank); ++w) {
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t r = kHalves * w; r < kHalves * (w + 1); ++r) *to++ = r < rank ? to_float(core[r * taps + t]) : 0.0f;
    }
  }
}

// One row of pixels.
struct Depthwise {
  const float* z = nullptr;
  int64_t z_pitch = 0;  // words between pixels; of lines, between words
  const float* weights = nullptr;
  int64_t words = 0, pixels = 0, taps = 0;
  const int64_t* z_tap = nullptr;  // bytes from a pixel to what its tap reads
  const int64_t* w_tap = nullptr;  // which of the weights' taps it is
  float* to = nullptr;
  int64_t to_pitch = 0;
};

template <class Sums, int kPixels>
inline void depthwise_pixel_block(const Depthwise& d, int64_t pixel, int64_t word, int lanes) {
  const int64_t wide = whole_vectors(d.words);
  const char* z = reinterpret_cast<const char*>(d.z + pixel * d.z_pitch + word);
  float* to = d.to + pixel * d.to_pitch + word;
  Sums sums[kPixels];
  for (int64_t tap = 0; tap < d.taps; ++tap) {
    const float* weights = d.weights + d.w_tap[tap] * wide * Sums::kWeights + word;
    Wide w[Sums::kWeights];
#pragma GCC unroll 2
    for (int i = 0; i < Sums::kWeights; ++i) w[i] = Wide::load(weights + i * wide);
    const char* p = z + d.z_tap[tap];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) sums[i].add(Wide::load(p + i * d.z_pitch * 4), w);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) sums[i].word().store_first(to + i * d.to_pitch, lanes);
}

// to[pixel][word] = sum over taps of z * weights.
template <class T>
inline void depthwise_pixels(const Depthwise& d) {
  using Sums = typename DepthwiseSums<T>::Type;
  for (int64_t word = 0; word < d.words; word += Wide::kLanes) {
    const int lanes = static_cast<int>(d.words - word < Wide::kLanes ? d.words - word : Wide::kLanes);
    int64_t i = 0;
    for (; i + 8 <= d.pixels; i += 8) depthwise_pixel_block<Sums, 8>(d, i, word, lanes);
    if (i + 4 <= d.pixels) {
      depthwise_pixel_block<Sums, 4>(d, i, word, lanes);
      i += 4;
    }
    if (i + 2 <= d.pixels) {
      depthwise_pixel_block<Sums, 2>(d, i, word, lanes);
      i += 2;
    }
    if (i < d.pixels) depthwise_pixel_block<Sums, 1>(d, i, word, lanes);
  }
}

template <class Sums, int kVectors>
inline void depthwise_line_block(const Depthwise& d, int64_t pixel, int64_t word) {
  const char* z = reinterpret_cast<const char*>(d.z + word * d.z_pitch + pixel);
  const float* weights = d.weights + word * d.taps * Sums::kWeights;
  float* to = d.to + word * d.to_pitch + pixel;
  Sums sums[kVectors];
  for (int64_t tap = 0; tap < d.taps; ++tap) {
    Wide w[Sums::kWeights];
#pragma GCC unroll 2
    for (int i = 0; i < Sums::kWeights; ++i) w[i] = Wide::broadcast(weights + tap * Sums::kWeights + i);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sums[i].add(Wide::load(z + d.z_tap[tap] + i * Wide::kLanes * 4), w);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const int64_t left = d.pixels - pixel - i * Wide::kLanes;
    if (i + 1 < kVectors || left >= Wide::kLanes) sums[i].word().store(to + i * Wide::kLanes);
    else sums[i].word().store_first(to + i * Wide::kLanes, static_cast<int>(left));
  }
}

// to[word][pixel] = sum over taps of z * weights, all taps in their order.
template <class T>
inline void depthwise_lines(const Depthwise& d) {
  using Sums = typename DepthwiseSums<T>::Type;
  for (int64_t word = 0; word < d.words; ++word) {
    for (int64_t i = 0; i < d.pixels;) {
      const int64_t vectors = (d.pixels - i + Wide::kLanes - 1) / Wide::kLanes;
      if (vectors >= 4) depthwise_line_block<Sums, 4>(d, i, word);
      else if (vectors == 3) depthwise_line_block<Sums, 3>(d, i, word);
      else if (vectors == 2) depthwise_line_block<Sums, 2>(d, i, word);
      else depthwise_line_block<Sums, 1>(d, i, word);
      i += (vectors < 4 ? vectors : 4) * Wide::kLanes;
    }
  }
}

// Two arrays of rows [pixel][rank] whose product, summed over all pixels, is the gradient of a depthwise core.
struct DepthwiseGradient {
  const float *z = nullptr, *dv = nullptr;
  int64_t z_image = 0, z_row = 0, z_pixel = 0;  // words
  int64_t dv_image = 0, dv_row = 0, dv_pixel = 0;
  int64_t images = 0, rows = 0, pixels = 0;
  int64_t rank = 0, taps = 0;
  const int64_t* z_tap = nullptr;  // bytes
  float* sum = nullptr;            // [tap][rank]
  bool add = false;                // to what the sums hold
};

template <int kTaps>
inline void depthwise_gradient_block(const DepthwiseGradient& g, int64_t first, int64_t rank, int lanes) {
  Wide sums[kTaps];
#pragma GCC unroll 9
  for (int t = 0; t < kTaps; ++t)
    sums[t] = g.add ? Wide::load_first(g.sum + (first + t) * g.rank + rank, lanes) : Wide::zero();
  for (int64_t n = 0; n < g.images; ++n) {
    for (int64_t r = 0; r < g.rows; ++r) {
      const char* z = reinterpret_cast<const char*>(g.z + n * g.z_image + r * g.z_row + rank);
      const float* dv = g.dv + n * g.dv_image + r * g.dv_row + rank;
      for (int64_t i = 0; i < g.pixels; ++i, z += g.z_pixel * 4, dv += g.dv_pixel) {
        const Wide d = Wide::load(dv);
#pragma GCC unroll 9
        for (int t = 0; t < kTaps; ++t) sums[t] = fma(Wide::load(z + g.z_tap[first + t]), d, sums[t]);
      }
    }
  }
#pragma GCC unroll 9
  for (int t = 0; t < kTaps; ++t) sums[t].store_first(g.sum + (first + t) * g.rank + rank, lanes);
}

// Every part has an even share of the ranks' vectors.
inline void depthwise_gradient(const DepthwiseGradient& g, int64_t part, int64_t parts) {
  const int64_t vectors = whole_vectors(g.rank) / Wide::kLanes;
  for (int64_t v = vectors * part / parts; v < vectors * (part + 1) / parts; ++v) {
    const int64_t rank = v * Wide::kLanes;
    const int lanes = static_cast<int>(g.rank - rank < Wide::kLanes ? g.rank - rank : Wide::kLanes);
    int64_t t = 0;
    for (; t + 9 <= g.taps; t += 9) depthwise_gradient_block<9>(g, t, rank, lanes);
    for (; t + 3 <= g.taps; t += 3) depthwise_gradient_block<3>(g, t, rank, lanes);
    for (; t < g.taps; ++t) depthwise_gradient_block<1>(g, t, rank, lanes);
  }
}
