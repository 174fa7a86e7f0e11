// Weights in the orders the tiles read them.

// Element types of tensors, and how the kernels hold them in words.
struct Float32 {
  using Element = float;
  using Dot = FloatDot;
  static constexpr bool kPairs = false;
  static constexpr bool kNarrow = false;  // elements are narrower than words and must be widened before use
};

// bfloat16 on a processor without a dot product for pairs: widened to float on the way in.
struct Bfloat16Widened {
  using Element = uint16_t;
  using Dot = FloatDot;
  static constexpr bool kPairs = false;
  static constexpr bool kNarrow = true;
};

#if defined(TC_BF16_DOT)
struct Bfloat16Pairs {
  using Element = uint16_t;
  using Dot = PairDot;
  static constexpr bool kPairs = true;
  static constexpr bool kNarrow = false;
};
#endif

template <class T>
constexpr int64_t words(int64_t elements) {
  return T::kPairs ? (elements + 1) / 2 : elements;
}

inline float to_float(float v) { return v; }
inline float to_float(uint16_t v) {
  const uint32_t u = static_cast<uint32_t>(v) << 16;
  float f;
  __builtin_memcpy(&f, &u, sizeof(f));
  return f;
}

// The word of elements `at` and `at + step` (the second only for pairs; absent when `single`).
template <class T>
inline uint32_t make_word(const typename T::Element* from, int64_t at, int64_t step, bool single) {
  uint32_t w;
  if constexpr (T::kPairs) {
    w = from[at];
    if (!single) w |= static_cast<uint32_t>(from[at + step]) << 16;
  } else {
    (void)step;
    (void)single;
    const float f = to_float(from[at]);
    __builtin_memcpy(&w, &f, sizeof(w));
  }
  return w;
}

// Steps [begin, end) of every group in one panel of floats. Whichever of columns, taps and steps is contiguous in the
// weight, both sides move in whole vectors: by copying, or by transposing blocks.
inline void pack_panel(const float* from, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride,
                       int64_t columns, int64_t column_stride, float* to, int64_t width, int64_t begin, int64_t end) {
  if (outer > 1 && (outer_stride == 1 || outer_stride == -1)) {
    const bool reverse = outer_stride < 0;
    const float* source = reverse ? from - (outer - 1) : from;
    float* target = reverse ? to + (outer - 1) * inner * width : to;
    const int64_t step = reverse ? -inner * width : inner * width;
    for (int64_t i = begin; i < end; ++i)
      transpose_words(source + i * inner_stride, column_stride, columns, outer, target + i * width, step);
    return;
  }
  for (int64_t o = 0; o < outer; ++o, from += outer_stride, to += inner * width) {
    if (column_stride == 1) {
      for (int64_t i = begin; i < end; ++i)
        __builtin_memcpy(to + i * width, from + i * inner_stride, static_cast<size_t>(columns) * 4);
    } else if (inner_stride == 1) {
      transpose_words(from + begin, column_stride, columns, end - begin, to + begin * width, width);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t n = 0; n < columns; ++n) to[i * width + n] = from[i * inner_stride + n * column_stride];
      }
    }
  }
}

// B panels: to = panels of [steps][panel width] words, zero beyond the last column. The steps run over `outer`
// groups of `inner` elements; element (group o, i, column n) is from[offset(o) + i * inner_stride + n * column_stride].
// Of `parts` callers each writes its share of every group.
template <class T>
inline void pack_columns(const typename T::Element* from, int64_t outer, int64_t outer_stride, int64_t inner,
                         int64_t inner_stride, int64_t columns, int64_t column_stride, float* to, int64_t part = 0,
                         int64_t parts = 1) {
  const int64_t inner_words = words<T>(inner);
  const int64_t begin = inner_words * part / parts, end = inner_words * (part + 1) / parts;
  const int64_t units = unit_count(columns);
  for (int64_t unit = 0; unit < units;) {
    const int wide = panel_units(units - unit);
    const int64_t width = wide * kUnit, first = unit * kUnit;
    const int64_t valid = columns - first < width ? columns - first : width;
    float* panel = to + first * outer * inner_words;
    if constexpr (!T::kPairs && !T::kNarrow) {
      for (int64_t o = 0; o < outer && valid < width; ++o)
        clear(panel + (o * inner + begin) * width, (end - begin) * width);
      pack_panel(from + first * column_stride, outer, outer_stride, inner, inner_stride, valid, column_stride, panel,
                 width, begin, end);
      unit += wide;
      continue;
    }
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t w = begin; w < end; ++w) {
        const int64_t i = T::kPairs ? 2 * w : w;
        const bool single = T::kPairs && i + 1 >= inner;
        uint32_t* dst = reinterpret_cast<uint32_t*>(panel) + (o * inner_words + w) * width;
        const typename T::Element* src = from + o * outer_stride + i * inner_stride + first * column_stride;
        int64_t n = 0;
        for (; n < valid; ++n) dst[n] = make_word<T>(src, n * column_stride, inner_stride, single);
        for (; n < width; ++n) dst[n] = 0;
      }
    }
    unit += wide;
  }
}

// A rows: to[row][group][word], contiguous.
template <class T>
inline void pack_rows(const typename T::Element* from, int64_t rows, int64_t row_stride, int64_t outer,
                      int64_t outer_stride, int64_t inner, int64_t inner_stride, float* to) {
  if constexpr (!T::kPairs && !T::kNarrow) {
    if (outer == 1 && row_stride == 1) {
      transpose_words(from, inner_stride, inner, rows, to, inner);
      return;
    }
    if (inner_stride == 1 && outer == 1 && row_stride == inner) {
      __builtin_memcpy(to, from, static_cast<size_t>(rows * inner) * 4);
      return;
    }
    if (outer_stride == 1 || outer == 1) {
      for (int64_t r = 0; r < rows; ++r)
        transpose_words(from + r * row_stride, inner_stride, inner, outer, to + r * outer * inner, inner);
      return;
    }
  }
  const int64_t inner_words = words<T>(inner);
  uint32_t* dst = reinterpret_cast<uint32_t*>(to);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outer; ++o) {
      const typename T::Element* src = from + r * row_stride + o * outer_stride;
      for (int64_t w = 0; w < inner_words; ++w) {
        const int64_t i = T::kPairs ? 2 * w : w;
        *dst++ = make_word<T>(src, i * inner_stride, inner_stride, T::kPairs && i + 1 >= inner);
      }
    }
  }
}
