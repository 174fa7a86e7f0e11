// Products between image rows in either memory format and rank-space rows [pixel][rank], all float32.

// Rows of an image: element strides in bytes, floats.
struct ImageRows {
  const char* data = nullptr;
  int64_t row = 0, pixel = 0, channel = 0;
  int64_t image = 0;       // distance of images
  bool rows_form = false;  // pixels lie together

  // Whether rows of `width` pixels follow each other without a gap, as the products step through them: pixels of the
  // rows form are neighbours whatever stride an image one pixel wide has.
  bool plane(int64_t width) const { return row == width * (rows_form ? 4 : pixel); }

  ImageRows at_image(int64_t n) const {
    ImageRows one = *this;
    one.data += n * image;
    return one;
  }
};

// `outer` times `inner` elements with the given strides (in bytes and in elements) as floats, one after the other.
template <class E>
inline float* widen_run(const char* from, int64_t outer, int64_t outer_bytes, int64_t inner, int64_t inner_step,
                        float* to) {
  for (int64_t o = 0; o < outer; ++o, to += inner) {
    const E* e = reinterpret_cast<const E*>(from + o * outer_bytes);
    if (inner_step == 1) {
      for (int64_t i = 0; i < inner; ++i) to[i] = to_float(e[i]);
    } else {
      for (int64_t i = 0; i < inner; ++i) to[i] = to_float(e[i * inner_step]);
    }
  }
  return to;
}

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
  for (int64_t r = first; r < last; ++r)
    copy = widen_run<E>(from.data + r * from.row, outer, outer_step, inner, inner_step, copy);
  return to;
}

// Images as they are once widened whole: [image][channel][row][pixel] or [image][row][pixel][channel].
inline ImageRows widened_images(bool rows_form, int64_t height, int64_t width, int64_t channels, const float* copy) {
  ImageRows to;
  to.data = reinterpret_cast<const char*>(copy);
  to.rows_form = rows_form;
  to.image = height * width * channels * 4;
  to.row = width * 4 * (rows_form ? 1 : channels);
  to.pixel = rows_form ? 4 : channels * 4;
  to.channel = rows_form ? height * width * 4 : 4;
  return to;
}

// Widens this part's share of `images` images into `copy`.
template <class E>
inline void widen_images(const ImageRows& from, int64_t images, int64_t height, int64_t width, int64_t channels,
                         float* copy, int64_t part, int64_t parts) {
  constexpr int64_t kBytes = sizeof(E);
  const int64_t lines = from.rows_form ? channels : height;  // planes or rows
  const int64_t words = height * width * channels / (lines > 0 ? lines : 1);
  for (int64_t line = images * lines * part / parts; line < images * lines * (part + 1) / parts; ++line) {
    const char* at = from.data + line / lines * from.image + line % lines * (from.rows_form ? from.channel : from.row);
    if (from.rows_form) widen_run<E>(at, height, from.row, width, from.pixel / kBytes, copy + line * words);
    else widen_run<E>(at, width, from.pixel, channels, from.channel / kBytes, copy + line * words);
  }
}

// Pointwise product of image rows with a factor [channel][rank] into rank-space rows [pixel][rank], cut among parts: by
// tiles, or by ranks where pixels lie together. There `block` rows that follow each other count as one, so that narrow
// images fill the vectors too. Of each row the first `used` pixels are wanted.
inline void enter(const ImageRows& x, int64_t rows, int64_t width, int64_t used, int64_t channels, const float* factor,
                  int64_t rank, float* to, int64_t to_row, float* flat, int64_t flat_pitch, int64_t block,
                  int64_t part = 0, int64_t parts = 1) {
  Product m;
  m.k = channels;
  m.b_packed = false;
  if (!x.rows_form) {
    m.segments = rows;
    m.rows = used;
    m.a = x.data;
    m.a_row = x.pixel;
    m.a_segment = x.row;
    m.b = reinterpret_cast<const char*>(factor);
    m.b_k = rank * 4;
    m.columns = rank;
    m.c = reinterpret_cast<char*>(to);
    m.c_row = rank * 4;
    m.c_segment = to_row * 4;
    multiply<AOrder::kAlongK, true, FloatDot>(m, part, parts);
    return;
  }
  if (!x.plane(width)) block = 1;
  const int64_t first = rank * part / parts;
  m.rows = rank * (part + 1) / parts - first;
  m.a = reinterpret_cast<const char*>(factor + first);
  m.a_k = rank * 4;
  m.b_k = x.channel;
  m.c = reinterpret_cast<char*>(flat);
  m.c_row = flat_pitch * 4;
  for (int64_t r = 0; r < rows; r += block) {
    const int64_t count = r + block < rows ? block : rows - r;
    m.b = x.data + r * x.row;
    m.columns = count == 1 ? used : count * width;
    multiply<AOrder::kAlongM, true, FloatDot>(m);
    for (int64_t i = 0; i < count; ++i)
      transpose_words(flat + i * width, flat_pitch, m.rows, used, to + (r + i) * to_row + first, rank);
  }
}

// sum[channel][rank] = (sum if `add`) + image^T * rank-space rows, over `rows` rows of `width` pixels of each image.
// Rows that follow each other on both sides count as one.
inline void accumulate(const ImageRows& x, int64_t images, int64_t rows, int64_t width, int64_t channels,
                       const float* from, int64_t from_row, int64_t from_image, int64_t rank, float* sum, bool add,
                       int64_t* row_a, int64_t* row_b, int64_t part = 0, int64_t parts = 1) {
  if (x.plane(width) && from_row == width * rank) {
    width *= rows;
    rows = 1;
  }
  Product m;
  m.rows = channels;
  m.k = width;
  m.taps = images * rows;
  m.a_tap = row_a;
  m.b_tap = row_b;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t r = 0; r < rows; ++r) {
      row_a[n * rows + r] = n * x.image + r * x.row;
      row_b[n * rows + r] = (n * from_image + r * from_row) * 4;
    }
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
    multiply<AOrder::kAlongK, false, FloatDot>(m, part, parts);
  } else {
    m.a_k = x.pixel;
    multiply<AOrder::kAlongM, false, FloatDot>(m, part, parts);
  }
}

// sum[channel] += the image's pixels, for channels [first, last).
inline void accumulate_bias(const ImageRows& y, int64_t rows, int64_t width, int64_t first, int64_t last, float* sum) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = y.data + r * y.row;
    if (!y.rows_form) {
      // A block of channels stays in registers over all pixels; two chains hide the additions' latency.
      for (int64_t t = first; t < last; t += Wide::kLanes) {
        const int lanes = static_cast<int>(last - t < Wide::kLanes ? last - t : Wide::kLanes);
        const float one = 1.0f;
        Wide even = Wide::load_first(sum + t, lanes), odd = Wide::zero();
        const char* pixel = row + t * 4;
        int64_t i = 0;
        for (; i + 2 <= width; i += 2, pixel += 2 * y.pixel) {
          even = fma(Wide::load_first(pixel, lanes), Wide::broadcast(&one), even);
          odd = fma(Wide::load_first(pixel + y.pixel, lanes), Wide::broadcast(&one), odd);
        }
        if (i < width) even = fma(Wide::load_first(pixel, lanes), Wide::broadcast(&one), even);
        fma(odd, Wide::broadcast(&one), even).store_first(sum + t, lanes);
      }
      continue;
    }
    for (int64_t t = first; t < last; ++t) {
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
