// How a forward call of the bottleneck convolution is laid out: which form each stage works in, how many rows are kept,
// and where everything lies in the scratch memory. See bottleneck_conv.inl.h for the forms.

struct BottleneckGeometry {
  BottleneckShape shape;                   // as the kernels hold it
  bool x_rows, y_rows, core_rows;          // which form each stage works in
  bool gather_x;                           // x is copied to `gathered` row by row first (odd strides, narrow elements)
  int64_t words_in, words_mid, words_out;  // words of C_in, R_in, R_out
  int64_t z_width;                         // pixels of a Z row, borders included
  int64_t z_used;                          // pixels of a Z row that come from x
  int64_t z_pitch;                         // "rows" form: words between ranks
  int64_t z_row;                           // words between Z rows
  int64_t halo;                            // input rows an output row spans
  int64_t block;                           // output rows a step
  int64_t window_out;                      // output rows whose input rows fit the window
  int64_t window_rows;                     // rows of the window
  int64_t v_pitch;                         // "rows" form of V: words between ranks
  int64_t in_block;                        // input rows of one "rows" form product
  int64_t flat_pitch;                      // its pixels, padded
  // Word offsets in the scratch of one part.
  int64_t z, v, v_other, flat, gathered, bias, taps, part_words;
  bool phased;
  PackedForms forms() const { return {!x_rows, x_rows, !core_rows, core_rows, !y_rows, y_rows}; }
  bool streams;  // x and y would fill a private cache: their lines are asked for ahead
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Cost in vector lanes of a piece of n columns. A panel of one unit is bound by its loads.
inline double lane_cost(int64_t n) {
  return static_cast<double>(padded_columns(n)) * (unit_count(n) == 1 && kHasHalf ? 1.25 : 1.0);
}

template <class T>
inline BottleneckGeometry bottleneck_geometry(const BottleneckConvParams& p, int64_t threads) {
  BottleneckGeometry g;
  g.shape = kernel_shape<T>(p.shape);
  const BottleneckShape& s = g.shape;
  g.words_in = words<T>(s.c_in);
  g.words_mid = words<T>(s.mid());
  g.words_out = words<T>(s.out());
  const bool columns_readable = p.x_strides.c == 1 && !(T::kPairs && s.c_in % 2) && !T::kNarrow;
  const bool rows_readable = p.x_strides.w == 1 || p.width == 1;
  g.x_rows = !(p.x_strides.c == 1) && rows_readable;
  g.gather_x = g.x_rows ? (T::kPairs || T::kNarrow) : !columns_readable;
  g.y_rows = p.y_strides.c != 1;

  g.z_width = (p.out_width - 1) * p.stride_w + p.dilation_w * (s.kernel_w - 1) + 1;
  const int64_t room = g.z_width - p.pad_left;
  g.z_used = room < 0 ? 0 : room < p.width ? room : p.width;
  g.halo = p.dilation_h * (s.kernel_h - 1) + 1;

  // The core in columns form pads R_out to a vector, in rows form it pads the image row; transposing a rank-space
  // word costs about six lanes of multiplication.
  const double taps = static_cast<double>(s.kernel_h * s.kernel_w);
  // Per ring index: all have the same.
  const double mid = static_cast<double>(s.rank_in), out = static_cast<double>(s.rank_out);
  const double width = static_cast<double>(p.out_width);
  const double transpose = 6.0;
  double columns_cost = taps * mid * lane_cost(s.rank_out);
  double rows_cost = taps * mid * out * lane_cost(p.out_width) / width;
  if (s.depthwise) {
    // One pass over Z, bound by its loads; those along pixels mostly straddle two cache lines.
    columns_cost = taps * lane_cost(s.rank_in);
    rows_cost = 1.5 * taps * mid * lane_cost(p.out_width) / width;
  }
  if (g.x_rows) columns_cost += transpose * mid;
  else rows_cost += transpose * mid;
  if (g.y_rows) columns_cost += transpose * out;
  g.core_rows = p.stride_w == 1 && rows_cost < columns_cost;

  constexpr int64_t kBlockPixels = 28;  // two full tiles
  g.block = (kBlockPixels + p.out_width - 1) / p.out_width;
  // Where y's pixels lie along the vectors, rows enough to fill them.
  for (int64_t rows = g.block; g.y_rows && rows * p.out_width <= 4 * kBlockPixels; ++rows) {
    if (rows * p.out_width % kUnit) continue;
    g.block = rows;
    break;
  }
  if (g.block > p.out_height) g.block = p.out_height;

  g.z_pitch = round_up(g.z_width, 16) + 16;
  // A ring's rows are long: no word more than the core's vectors read.
  if (s.ring > 1) g.z_pitch = round_up(g.z_width - p.out_width + round_up(p.out_width, 16), 16);
  g.z_row = g.core_rows ? g.words_mid * g.z_pitch : round_up(g.z_width * g.words_mid, 16);
  const int64_t rows_per_thread = (p.batch * p.out_height + threads - 1) / threads;
  g.phased = threads > 1 && rows_per_thread < 8;
  // Of Z: leaves most of a private L2 to the weights, which are few where a ring shares them.
  const int64_t window_words = (s.ring > 1 ? 40 : 10) * 1024;
  int64_t rows = (window_words / g.z_row - g.halo) / p.stride_h + 1;
  rows = rows / g.block * g.block;
  if (rows < g.block) rows = g.block;
  if (rows > p.out_height || g.phased) rows = p.out_height;
  g.window_out = rows;
  g.window_rows = (rows - 1) * p.stride_h + g.halo;

  const int64_t v_rows = g.phased ? p.out_height : g.block;
  g.v_pitch = round_up(v_rows * p.out_width, 16) + 32;
  const int64_t v_columns_words = v_rows * p.out_width * g.words_out;
  const int64_t v_rows_words = g.words_out * g.v_pitch;
  // In rows form x is multiplied some image rows at a time, so that narrow images fill the vectors too.
  const bool dense_rows = p.x_strides.h == p.width && g.z_used == p.width;
  g.in_block = g.x_rows && dense_rows && p.width > 0 && p.width < 32 ? (32 + p.width - 1) / p.width : 1;
  // Some rows more where they fill the vectors.
  for (int64_t rows = g.in_block + 1; g.in_block > 1 && rows < 2 * g.in_block && rows <= p.height; ++rows) {
    if (g.in_block * p.width % kUnit == 0 || rows * p.width % kUnit) continue;
    g.in_block = rows;
  }
  if (g.phased && g.in_block > 1) g.in_block = p.height;
  g.flat_pitch = round_up(g.in_block * p.width, 16) + 16;

  const int64_t bytes = p.batch * (p.height * p.width * s.c_in + p.out_height * p.out_width * s.c_out) *
                        static_cast<int64_t>(sizeof(typename T::Element));
  g.streams = !g.phased && bytes > threads * (int64_t{1} << 19);

  int64_t at = 0;
  const auto take = [&at](int64_t n) {
    const int64_t start = at;
    at += round_up(n, 16);
    return start;
  };
  const int64_t images = g.phased ? p.batch : 1;
  g.bias = take(padded_columns(s.c_out) + 16);
  g.taps = take(4 * s.kernel_h * s.kernel_w + 4);
  g.z = take(images * g.window_rows * g.z_row + 32);
  g.v = take(images * (g.core_rows ? v_rows_words : v_columns_words) + 32);
  g.v_other = g.y_rows && !g.core_rows ? take(images * v_rows_words + 32) : 0;
  const int64_t flat_rows = g.words_mid * g.flat_pitch, flat_columns = p.width * padded_columns(s.mid());
  g.flat = take((flat_rows > flat_columns ? flat_rows : flat_columns) + 32);
  const int64_t gathered = g.x_rows ? g.words_in * g.flat_pitch : p.width * g.words_in;
  g.gathered = g.gather_x ? take(gathered + 32) : 0;
  g.part_words = at;
  return g;
}
