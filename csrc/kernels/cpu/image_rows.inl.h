// Products between image rows in either memory format and rank-space rows [pixel][rank], all float32.

// Rows of an image: element strides in bytes, floats.
struct ImageRows {
  const char* data = nullptr;
  int64_t row = 0, pixel = 0, channel = 0;
  bool rows_form = false;  // pixels lie together
};

// Rows [first, last) of an image with elements E as the products read them: in place, or widened into `copy`. The
// result's row 0 is `first`.
template <class E>
inline ImageRows readable(const ImageRows& from, bool gather, int64_t first, int64_t last, int64_t width,
                          int64_t channels, float* copy) {
  constexpr int64_t kBytes = sizeof(E);
  ImageRows at = from;
  at.data = from.data + first * from.row;
  if (!gather) return at;
  ImageRows to;
  to.data = reinterpret_cast<const char*>(copy);
  to.rows_form = from.rows_form;
  to.row = width * channels * 4;
  to.pixel = from.rows_form ? 4 : channels * 4;
  to.channel = from.rows_form ? width * 4 : 4;
  const int64_t outer = from.rows_form ? channels : width, inner = from.rows_form ? width : channels;
  const int64_t outer_step = from.rows_form ? from.channel : from.pixel;
  const int64_t inner_step = (from.rows_form ? from.pixel : from.channel) / kBytes;
  for (int64_t r = first; r < last; ++r) {
    for (int64_t o = 0; o < outer; ++o) {
      const E* e = reinterpret_cast<const E*>(from.data + r * from.row + o * outer_step);
      if (inner_step == 1) {
        for (int64_t i = 0; i < inner; ++i) copy[i] = to_float(e[i]);
      } else {
        for (int64_t i = 0; i < inner; ++i) copy[i] = to_float(e[i * inner_step]);
      }
      copy += inner;
    }
  }
  return to;
}

// Pointwise product of image rows with a factor [channel][rank] into rank-space rows [pixel][rank]. Where pixels lie
// together it reads the factor transposed.
inline void enter(const ImageRows& x, int64_t rows, int64_t width, int64_t channels, const float* factor,
                  const float* transposed, int64_t rank, float* to, int64_t to_row, float* flat, int64_t flat_pitch) {
  Product m;
  m.k = channels;
  if (!x.rows_form) {
    m.segments = rows;
    m.rows = width;
    m.a = x.data;
    m.a_row = x.pixel;
    m.a_segment = x.row;
    m.b = reinterpret_cast<const char*>(factor);
    m.b_packed = false;
    m.b_k = rank * 4;
    m.columns = rank;
    m.c = reinterpret_cast<char*>(to);
    m.c_row = rank * 4;
    m.c_segment = to_row * 4;
    multiply<AOrder::kAlongK, true, FloatDot>(m);
    return;
  }
  m.rows = rank;
  m.a = reinterpret_cast<const char*>(transposed);
  m.a_row = channels * 4;
  m.b_packed = false;
  m.b_k = x.channel;
  m.columns = width;
  m.c = reinterpret_cast<char*>(flat);
  m.c_row = flat_pitch * 4;
  for (int64_t r = 0; r < rows; ++r) {
    m.b = x.data + r * x.row;
    multiply<AOrder::kAlongK, true, FloatDot>(m);
    transpose_words(flat, flat_pitch, rank, width, to + r * to_row, rank);
  }
}

// sum[channel][rank] = (sum if `add`) + image^T * rank-space rows, over `rows` rows of `width` pixels.
inline void accumulate(const ImageRows& x, int64_t rows, int64_t width, int64_t channels, const float* from,
                       int64_t from_row, int64_t rank, float* sum, bool add, int64_t* row_a, int64_t* row_b) {
  Product m;
  m.rows = channels;
  m.k = width;
  m.taps = rows;
  m.a_tap = row_a;
  m.b_tap = row_b;
  for (int64_t r = 0; r < rows; ++r) {
    row_a[r] = r * x.row;
    row_b[r] = r * from_row * 4;
  }
  m.a = x.data;
  m.b = reinterpret_cast<const char*>(from);
  m.b_packed = false;
  m.b_k = rank * 4;
  m.columns = rank;
  m.c = reinterpret_cast<char*>(sum);
  m.c_row = rank * 4;
  m.init_mode = add ? Init::kAccumulate : Init::kZero;
  if (x.rows_form) {
    m.a_row = x.channel;
    multiply<AOrder::kAlongK, false, FloatDot>(m);
  } else {
    m.a_k = x.pixel;
    multiply<AOrder::kAlongM, false, FloatDot>(m);
  }
}

// sum[channel] += the image's pixels.
inline void accumulate_bias(const ImageRows& y, int64_t rows, int64_t width, int64_t channels, float* sum) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = y.data + r * y.row;
    if (!y.rows_form) {
      for (int64_t i = 0; i < width; ++i) {
        const float* pixel = reinterpret_cast<const float*>(row + i * y.pixel);
        for (int64_t t = 0; t < channels; ++t) sum[t] += pixel[t];
      }
      continue;
    }
    for (int64_t t = 0; t < channels; ++t) {
      const float* pixels = reinterpret_cast<const float*>(row + t * y.channel);
      Wide wide = Wide::zero();
      const float one = 1.0f;
      int64_t i = 0;
      for (; i + Wide::kLanes <= width; i += Wide::kLanes)
        wide = fma(Wide::load(pixels + i), Wide::broadcast(&one), wide);
      if (i < width) wide = fma(Wide::load_first(pixels + i, static_cast<int>(width - i)), Wide::broadcast(&one), wide);
      float lanes[Wide::kLanes];
      wide.store(lanes);
      float row_sum = 0.0f;
      for (int l = 0; l < Wide::kLanes; ++l) row_sum += lanes[l];
      sum[t] += row_sum;
    }
  }
}
