// The weights of a bottleneck convolution in the orders its stages read them.

// The shape as the kernels hold it. Words of pairs must not straddle ring indices: their ranks are even, with zeros
// beyond those given.
template <class T>
inline BottleneckShape kernel_shape(const BottleneckShape& given) {
  BottleneckShape s = given;
  if (T::kPairs && s.ring > 1) {
    s.rank_in += s.rank_in % 2;
    s.rank_out += s.rank_out % 2;
  }
  return s;
}

// `rows` times `groups` groups of n elements, each followed by zeros up to `wide` elements.
template <class E>
inline void widen_groups(const E* from, int64_t rows, int64_t groups, int64_t n, int64_t wide, E* to) {
  for (int64_t i = 0; i < rows * groups; ++i) {
    for (int64_t j = 0; j < wide; ++j) *to++ = j < n ? *from++ : E{0};
  }
}

// Which of a weight's two forms a call needs.
struct PackedForms {
  bool in_columns = true, in_rows = true, core_columns = true, core_rows = true, out_columns = true, out_rows = true;
};

// Where each weight lies in a packed block, in words. `columns` forms serve pixels along rows, `rows` forms pixels
// along vectors.
struct PackedLayout {
  int64_t in_columns, in_rows, core_columns, core_rows, out_columns, out_rows;
  int64_t core_even, out_even, in_even;  // the weights with even ranks, while packing
  int64_t total;
};

template <class T>
inline PackedLayout packed_layout(const BottleneckShape& given, const PackedForms& forms) {
  const BottleneckShape s = kernel_shape<T>(given);
  const int64_t taps = s.taps();
  PackedLayout l;
  int64_t at = 0;
  const auto take = [&at](bool wanted, int64_t n) {
    const int64_t start = at;
    if (wanted) at += (n + 15) / 16 * 16;
    return start;
  };
  l.in_columns = take(forms.in_columns, words<T>(s.c_in) * padded_columns(s.mid()));
  l.in_rows = take(forms.in_rows, words<T>(s.c_in) * s.mid());
  if (s.depthwise) {
    l.core_columns = take(forms.core_columns, taps * depthwise_tap_words<T>(s.rank_in));
    l.core_rows = take(forms.core_rows, taps * words<T>(s.rank_in) * (T::kPairs ? 2 : 1));
  } else {
    l.core_columns = take(forms.core_columns, words<T>(s.rank_in) * taps * padded_columns(s.rank_out));
    l.core_rows = take(forms.core_rows, words<T>(s.rank_in) * taps * s.rank_out);
  }
  l.out_columns = take(forms.out_columns, words<T>(s.out()) * padded_columns(s.c_out));
  l.out_rows = take(forms.out_rows, words<T>(s.out()) * s.c_out);
  const bool wider = s.rank_in != given.rank_in || s.rank_out != given.rank_out;
  l.core_even = take(wider, words<T>(s.core_elements()));
  l.out_even = take(wider, words<T>(s.c_out * s.out()));
  l.in_even = take(wider, words<T>(s.c_in * s.mid()));
  l.total = at;
  return l;
}

template <class T>
inline void pack_bottleneck(const BottleneckShape& given, const BottleneckWeights& w, const PackedForms& forms,
                            float* to) {
  using E = typename T::Element;
  const BottleneckShape s = kernel_shape<T>(given);
  const PackedLayout l = packed_layout<T>(given, forms);
  const int64_t taps = s.taps(), mid = s.mid(), wide = s.out();
  const E* in = static_cast<const E*>(w.factor_in);
  const E* core = static_cast<const E*>(w.core);
  const E* out = static_cast<const E*>(w.factor_out);
  if (l.total > l.core_even) {
    E* const even[] = {reinterpret_cast<E*>(to + l.core_even), reinterpret_cast<E*>(to + l.out_even),
                       reinterpret_cast<E*>(to + l.in_even)};
    __builtin_memset(even[0], 0, static_cast<size_t>(s.core_elements()) * sizeof(E));
    widen_groups(core, given.rank_out, 1, given.rank_in * taps, s.rank_in * taps, even[0]);
    widen_groups(out, s.c_out, s.ring, given.rank_out, s.rank_out, even[1]);
    widen_groups(in, s.c_in, s.ring, given.rank_in, s.rank_in, even[2]);
    core = even[0];
    out = even[1];
    in = even[2];
  }
  if (forms.in_columns) pack_columns<T>(in, 1, 0, s.c_in, mid, mid, 1, to + l.in_columns);
  if (forms.in_rows) pack_rows<T>(in, mid, 1, 1, 0, s.c_in, mid, to + l.in_rows);
  if (s.depthwise) {
    if (forms.core_columns) pack_depthwise_columns<T>(core, s.rank_in, taps, to + l.core_columns);
    if (forms.core_rows) pack_depthwise_rows<T>(core, s.rank_in, taps, to + l.core_rows);
  } else {
    if (forms.core_columns)
      pack_columns<T>(core, taps, 1, s.rank_in, taps, s.rank_out, s.rank_in * taps, to + l.core_columns);
    if (forms.core_rows) pack_rows<T>(core, s.rank_out, s.rank_in * taps, taps, 1, s.rank_in, taps, to + l.core_rows);
  }
  if (forms.out_columns) pack_columns<T>(out, 1, 0, wide, 1, s.c_out, wide, to + l.out_columns);
  if (forms.out_rows) pack_rows<T>(out, s.c_out, wide, 1, 0, wide, 1, to + l.out_rows);
}
