// Vectors of 32-bit words, one set of types per instruction set.
//
// Included once by each isa_*.cpp, inside that file's target pragma and namespace, so that every function here has
// internal linkage and is compiled for one instruction set only.
//
// A "wide" vector is the full register, a "half" vector (AVX-512 only) half of it: on machines whose fused
// multiply-adds are 256 bits wide two halves cost as much as one wide vector, so a tail of eight columns need not pay
// for sixteen.

#if defined(TC_AVX512)

// A pair of bfloat16 values may begin at any of them, where no float may.
inline float word_at(const void* p) {
  float word;
  __builtin_memcpy(&word, p, sizeof(word));
  return word;
}

constexpr int kUnit = 8;      // columns are handled in units of this many words
constexpr int kMaxUnits = 4;  // widest tile, in units
constexpr int kMaxRows = 14;  // tallest tile: 14 rows x 2 wide accumulators + operands fit 32 registers
constexpr int kWideUnits = 2;
constexpr bool kHasHalf = true;

struct Wide {
  static constexpr int kLanes = 16;
  __m512 v;
  static Wide zero() { return {_mm512_setzero_ps()}; }
  static Wide load(const void* p) { return {_mm512_loadu_ps(p)}; }
  static Wide load_first(const void* p, int lanes) { return {_mm512_maskz_loadu_ps(mask(lanes), p)}; }
  static Wide broadcast(const void* p) { return {_mm512_set1_ps(word_at(p))}; }
  void store(void* p) const { _mm512_storeu_ps(p, v); }
  void stream(void* p) const { _mm512_stream_ps(static_cast<float*>(p), v); }  // past the caches; p is aligned
  void store_first(void* p, int lanes) const { _mm512_mask_storeu_ps(p, mask(lanes), v); }
  static __mmask16 mask(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1u); }
};

struct Half {
  static constexpr int kLanes = 8;
  __m256 v;
  static Half zero() { return {_mm256_setzero_ps()}; }
  static Half load(const void* p) { return {_mm256_loadu_ps(static_cast<const float*>(p))}; }
  static Half load_first(const void* p, int lanes) { return {_mm256_maskz_loadu_ps(mask(lanes), p)}; }
  static Half broadcast(const void* p) { return {_mm256_set1_ps(word_at(p))}; }
  void store(void* p) const { _mm256_storeu_ps(static_cast<float*>(p), v); }
  void stream(void* p) const { _mm256_stream_ps(static_cast<float*>(p), v); }
  void store_first(void* p, int lanes) const { _mm256_mask_storeu_ps(p, mask(lanes), v); }
  static __mmask8 mask(int lanes) { return static_cast<__mmask8>((1u << lanes) - 1u); }
};

inline Half low(Wide a) { return {_mm512_castps512_ps256(a.v)}; }
inline Wide fma(Wide a, Wide b, Wide c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Half fma(Half a, Half b, Half c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Wide add(Wide a, Wide b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Half add(Half a, Half b) { return {_mm256_add_ps(a.v, b.v)}; }
// NaN stays NaN: the second operand is what the instruction returns then.
inline Wide relu(Wide a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
inline Half relu(Half a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
inline void load_bf16(Wide& a, const void* p, int lanes) {
  const __m512i u = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(Wide::mask(lanes), p));
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}
inline void load_bf16(Half& a, const void* p, int lanes) {
  const __m256i u = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(Half::mask(lanes), p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}

#if defined(TC_BF16_DOT)
inline Wide dot_pairs(Wide a, Wide b, Wide c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
inline Half dot_pairs(Half a, Half b, Half c) { return {_mm256_dpbf16_ps(c.v, (__m256bh)a.v, (__m256bh)b.v)}; }
#endif

#if defined(TC_BF16_DOT)
inline __m256i to_bf16(Wide a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
inline __m128i to_bf16(Half a) { return (__m128i)_mm256_cvtneps_pbh(a.v); }
// Word i: bfloat16 of lo[i] in the lower half, of hi[i] in the upper half.
inline Wide pair_bf16(Wide lo, Wide hi) {
  const __m512i l = _mm512_cvtepu16_epi32(to_bf16(lo)), h = _mm512_cvtepu16_epi32(to_bf16(hi));
  return {_mm512_castsi512_ps(_mm512_or_si512(l, _mm512_slli_epi32(h, 16)))};
}
inline Half pair_bf16(Half lo, Half hi) {
  const __m256i l = _mm256_cvtepu16_epi32(to_bf16(lo)), h = _mm256_cvtepu16_epi32(to_bf16(hi));
  return {_mm256_castsi256_ps(_mm256_or_si256(l, _mm256_slli_epi32(h, 16)))};
}
#else
// Rounded to nearest even; NaN stays NaN.
inline __m256i to_bf16(Wide a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
inline __m128i to_bf16(Half a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __mmask8 nan = _mm256_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  return _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_mask_mov_epi32(rounded, nan, quiet), 16));
}
#endif

inline void store_bf16(Wide a, void* p, int lanes) { _mm256_mask_storeu_epi16(p, Wide::mask(lanes), to_bf16(a)); }
inline void store_bf16(Half a, void* p, int lanes) { _mm_mask_storeu_epi16(p, Half::mask(lanes), to_bf16(a)); }

#elif defined(TC_AVX2)

constexpr int kUnit = 8;
constexpr int kMaxUnits = 2;
constexpr int kMaxRows = 6;
constexpr int kWideUnits = 1;
constexpr bool kHasHalf = false;

struct Wide {
  static constexpr int kLanes = 8;
  __m256 v;
  static Wide zero() { return {_mm256_setzero_ps()}; }
  static Wide load(const void* p) { return {_mm256_loadu_ps(static_cast<const float*>(p))}; }
  static Wide load_first(const void* p, int lanes) {
    return {_mm256_maskload_ps(static_cast<const float*>(p), mask(lanes))};
  }
  static Wide broadcast(const void* p) { return {_mm256_broadcast_ss(static_cast<const float*>(p))}; }
  void store(void* p) const { _mm256_storeu_ps(static_cast<float*>(p), v); }
  void stream(void* p) const { _mm256_stream_ps(static_cast<float*>(p), v); }  // past the caches; p is aligned
  void store_first(void* p, int lanes) const { _mm256_maskstore_ps(static_cast<float*>(p), mask(lanes), v); }
  static __m256i mask(int lanes) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};
using Half = Wide;
inline Wide low(Wide a) { return a; }
inline Wide fma(Wide a, Wide b, Wide c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Wide add(Wide a, Wide b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Wide relu(Wide a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
inline Wide round_bf16(Wide a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(u, _mm256_set1_epi32(0x400000)));
  return {_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}

#else  // portable: the compiler's own vector types

constexpr int kUnit = 4;
constexpr int kMaxUnits = 2;
constexpr int kMaxRows = 6;
constexpr int kWideUnits = 1;
constexpr bool kHasHalf = false;

struct Wide {
  static constexpr int kLanes = 4;
  typedef float Raw __attribute__((vector_size(16)));
  Raw v;
  static Wide zero() { return {Raw{0, 0, 0, 0}}; }
  static Wide load(const void* p) {
    Wide r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static Wide load_first(const void* p, int lanes) {
    Wide r = zero();
    __builtin_memcpy(&r.v, p, sizeof(float) * static_cast<size_t>(lanes));
    return r;
  }
  static Wide broadcast(const void* p) {
    float f;
    __builtin_memcpy(&f, p, sizeof(f));
    return {Raw{f, f, f, f}};
  }
  void store(void* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  void stream(void* p) const { store(p); }
  void store_first(void* p, int lanes) const { __builtin_memcpy(p, &v, sizeof(float) * static_cast<size_t>(lanes)); }
};
using Half = Wide;
inline Wide low(Wide a) { return a; }
inline Wide fma(Wide a, Wide b, Wide c) { return {a.v * b.v + c.v}; }
inline Wide add(Wide a, Wide b) { return {a.v + b.v}; }
inline Wide relu(Wide a) {
  for (int i = 0; i < Wide::kLanes; ++i) a.v[i] = a.v[i] < 0.0f ? 0.0f : a.v[i];
  return a;
}
inline Wide round_bf16(Wide a) {
  uint32_t u[4];
  __builtin_memcpy(u, &a.v, sizeof(u));
  for (uint32_t& w : u) {
    const bool nan = (w & 0x7fffffffu) > 0x7f800000u;
    w = nan ? (w | 0x400000u) : w + 0x7fffu + ((w >> 16) & 1u);
  }
  Wide r;
  __builtin_memcpy(&r.v, u, sizeof(u));
  return r;
}

#endif

#if !defined(TC_AVX512)
inline void load_bf16(Wide& a, const void* p, int lanes) {
  uint32_t u[Wide::kLanes] = {};
  for (int i = 0; i < lanes; ++i) {
    uint16_t h;
    __builtin_memcpy(&h, static_cast<const char*>(p) + 2 * i, sizeof(h));
    u[i] = static_cast<uint32_t>(h) << 16;
  }
  a = Wide::load(u);
}
inline void store_bf16(Wide a, void* p, int lanes) {
  uint32_t u[Wide::kLanes];
  round_bf16(a).store(u);
  for (int i = 0; i < lanes; ++i) {
    const uint16_t h = static_cast<uint16_t>(u[i] >> 16);
    __builtin_memcpy(static_cast<char*>(p) + 2 * i, &h, sizeof(h));
  }
}
#endif
