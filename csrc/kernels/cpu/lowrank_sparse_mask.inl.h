// Mask entries as vector masks.

#if defined(TC_AVX512)

struct Kept {
  __mmask16 lanes;
};

// `lanes` entries from column `column` on, which is a multiple of the vector; others count as not kept.
template <bool kBits>
inline Kept kept_of(const uint8_t* row, int64_t column, int lanes) {
  if constexpr (kBits) {
    const uint8_t* at = row + column / 8;
    const unsigned bits = at[0] | (lanes > 8 ? at[1] << 8 : 0);
    return {static_cast<__mmask16>(bits & Wide::mask(lanes))};
  } else {
    const __m128i bytes = _mm_maskz_loadu_epi8(Wide::mask(lanes), row + column);
    return {_mm_test_epi8_mask(bytes, bytes)};
  }
}

// What is not kept is not read and comes as zero.
inline Wide load_kept(const float* p, Kept kept, int) { return {_mm512_maskz_loadu_ps(kept.lanes, p)}; }
inline Wide load_kept(const uint16_t* p, Kept kept, int) {
  const __m512i u = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept.lanes, p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
}
inline Wide where(Kept kept, Wide yes, Wide no) { return {_mm512_mask_mov_ps(no.v, kept.lanes, yes.v)}; }

#elif defined(TC_AVX2)

struct Kept {
  __m256i lanes;
};

template <bool kBits>
inline Kept kept_of(const uint8_t* row, int64_t column, int lanes) {
  __m256i words;
  if constexpr (kBits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    words = _mm256_and_si256(_mm256_set1_epi32(row[column / 8]), each);
  } else {
    int64_t bytes = 0;
    if (lanes == Wide::kLanes) __builtin_memcpy(&bytes, row + column, 8);
    else __builtin_memcpy(&bytes, row + column, static_cast<size_t>(lanes));
    words = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
  }
  return {_mm256_and_si256(_mm256_cmpgt_epi32(words, _mm256_setzero_si256()), Wide::mask(lanes))};
}

inline Wide load_kept(const float* p, Kept kept, int) { return {_mm256_maskload_ps(p, kept.lanes)}; }
inline Wide load_kept(const uint16_t* p, Kept kept, int lanes) {
  Wide v;
  load_bf16(v, p, lanes);
  return {_mm256_and_ps(v.v, _mm256_castsi256_ps(kept.lanes))};
}
inline Wide where(Kept kept, Wide yes, Wide no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(kept.lanes))};
}

#else

struct Kept {
  bool lanes[Wide::kLanes];
};

template <bool kBits>
inline Kept kept_of(const uint8_t* row, int64_t column, int lanes) {
  Kept kept{};
  for (int i = 0; i < lanes; ++i) {
    const int64_t j = column + i;
    kept.lanes[i] = kBits ? (row[j / 8] >> (j % 8) & 1) != 0 : row[j] != 0;
  }
  return kept;
}

template <class E>
inline Wide load_kept(const E* p, const Kept& kept, int lanes) {
  float f[Wide::kLanes] = {};
  for (int i = 0; i < lanes; ++i) {
    if (kept.lanes[i]) f[i] = to_float(p[i]);
  }
  return Wide::load(f);
}
inline Wide where(const Kept& kept, Wide yes, Wide no) {
  for (int i = 0; i < Wide::kLanes; ++i) {
    if (kept.lanes[i]) no.v[i] = yes.v[i];
  }
  return no;
}

#endif

inline Wide load_lanes(const float* p, int lanes) {
  return lanes == Wide::kLanes ? Wide::load(p) : Wide::load_first(p, lanes);
}
inline Wide load_lanes(const uint16_t* p, int lanes) {
  Wide v;
  load_bf16(v, p, lanes);
  return v;
}
inline void store_lanes(Wide v, float* p, int lanes) {
  if (lanes == Wide::kLanes) v.store(p);
  else v.store_first(p, lanes);
}
inline void store_lanes(Wide v, uint16_t* p, int lanes) { store_bf16(v, p, lanes); }
