// How a backward call of the bottleneck convolution is laid out: bands, windows, sums and their places in the scratch.

struct BackwardGeometry {
  bool x_rows, y_rows;      // pixels lie together in x, in grad_y
  bool gather_x, gather_y;  // copied to dense float32 rows first
  bool need_z, need_v, need_dv, need_dz, merged;
  bool grad_x_columns, grad_x_rows;  // which form dx leaves in, if it is wanted
  int64_t band;                      // output rows a step
  int64_t halo;                      // input rows an output row spans
  int64_t z_width, z_used, z_row, z_rows;
  int64_t dv_left, dv_width, dv_row, dv_rows;  // window of dV: zero pixels on the left, pixels, words a row, rows
  int64_t in_band;                             // input rows finished in a step, at most
  int64_t flat_pitch;
  // Word offsets: packed weights (shared), then per part the windows and the sums.
  int64_t in_rows, core, core_back, out_rows, x_columns, x_rows_form, packed_words;
  int64_t z, v, dv, dz, flat, x_copy, y_copy, taps;
  int64_t wide_in, wide_core, wide_out;  // the weights as floats, where they are narrower
  int64_t sum_core, sum_out, sum_in, sum_bias, part_words;
  int64_t threads;
  bool streams;  // as in BottleneckGeometry
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

template <class T>
inline BackwardGeometry backward_geometry(const BottleneckBackwardParams& q, int64_t threads) {
  const BottleneckConvParams& p = q.forward;
  const BottleneckShape& s = p.shape;
  BackwardGeometry g;
  g.threads = threads;
  const int64_t bytes = p.batch * (2 * p.height * p.width * s.c_in + p.out_height * p.out_width * s.c_out) *
                        static_cast<int64_t>(sizeof(typename T::Element));
  g.streams = bytes > threads * (int64_t{1} << 21);
  const auto rows_form = [](const Strides4& st, int64_t width) { return st.c != 1 && (st.w == 1 || width == 1); };
  g.x_rows = rows_form(p.x_strides, p.width);
  g.y_rows = rows_form(q.grad_y_strides, p.out_width);
  g.gather_x = T::kNarrow || !(p.x_strides.c == 1 || g.x_rows);
  g.gather_y = T::kNarrow || !(q.grad_y_strides.c == 1 || g.y_rows);
  g.need_v = q.grad_factor_out;
  g.need_z = q.grad_core || g.need_v;
  g.need_dz = q.grad_x || q.grad_factor_in;
  g.need_dv = q.grad_core || g.need_dz;
  g.halo = p.dilation_h * (s.kernel_h - 1) + 1;
  g.z_width = (p.out_width - 1) * p.stride_w + p.dilation_w * (s.kernel_w - 1) + 1;
  const int64_t room = g.z_width - p.pad_left;
  g.z_used = room < 0 ? 0 : room < p.width ? room : p.width;
  g.z_row = round_up(g.z_width * s.rank_in, 16);
  // Output pixels that touch an input pixel, from the first column's to the last column's.
  const int64_t first = floor_div(p.pad_left - p.dilation_w * (s.kernel_w - 1), p.stride_w);
  const int64_t last = floor_div(p.width - 1 + p.pad_left, p.stride_w);
  g.dv_left = first < 0 ? -first : 0;
  const int64_t reach = last + 1 > p.out_width ? last + 1 : p.out_width;
  g.dv_width = g.dv_left + reach;
  g.dv_row = round_up(g.dv_width * s.rank_out, 16);
  g.merged = p.stride_w == 1 && p.dilation_w == 1;

  constexpr int64_t kBandWords = 96 * 1024;  // a band's data: most of half a megabyte of private cache
  const int64_t row_words = p.width * p.stride_h * (s.c_in + 2 * s.rank_in) + p.out_width * (s.c_out + 2 * s.rank_out);
  g.band = kBandWords / (row_words > 0 ? row_words : 1);
  if (g.band < 1) g.band = 1;
  if (g.band > p.out_height) g.band = p.out_height;
  g.z_rows = (g.band - 1) * p.stride_h + g.halo;
  // Output rows kept for input rows not finished yet, and the new ones.
  const int64_t kept = ceil_div(g.halo, p.stride_h) + 1;
  g.dv_rows = g.band + kept;
  // A step finishes the input rows above its last output row; the first and last step also those at the borders.
  g.in_band = g.band * p.stride_h + p.pad_top + g.halo + p.stride_h;
  if (g.in_band > p.height) g.in_band = p.height;
  const int64_t pixels = p.width > p.out_width ? p.width : p.out_width;
  const int64_t rank = s.rank_in > s.rank_out ? s.rank_in : s.rank_out;
  g.flat_pitch = round_up(pixels, 16) + 32;

  int64_t at = 0;
  const auto take = [&at](int64_t n) {
    const int64_t start = at;
    at += round_up(n, 16);
    return start;
  };
  const int64_t kernel = s.kernel_h * s.kernel_w;
  g.grad_x_columns = q.grad_x && q.grad_x_strides.c == 1;
  g.grad_x_rows = q.grad_x && q.grad_x_strides.c != 1;
  g.in_rows = take(g.need_z && g.x_rows ? s.rank_in * s.c_in : 0);
  g.core = take(g.need_v ? kernel * s.rank_in * padded_columns(s.rank_out) : 0);
  g.core_back = take(g.need_dz ? kernel * s.rank_out * padded_columns(s.rank_in) : 0);
  g.out_rows = take(g.need_dv && g.y_rows ? s.rank_out * s.c_out : 0);
  g.x_columns = take(g.grad_x_columns ? s.rank_in * padded_columns(s.c_in) : 0);
  g.x_rows_form = take(g.grad_x_rows ? s.c_in * s.rank_in : 0);
  g.packed_words = at;

  at = 0;
  g.taps = take(4 * kernel + 4 * (g.band + g.in_band) + 16);
  g.z = take(g.need_z ? g.z_rows * g.z_row + 64 : 0);
  g.v = take(g.need_v ? g.band * p.out_width * s.rank_out + 64 : 0);
  g.dv = take(g.need_dv ? g.dv_rows * g.dv_row + 64 : 0);
  g.dz = take(g.need_dz ? g.in_band * p.width * s.rank_in + 64 : 0);
  g.flat = take(rank * g.flat_pitch + 64);
  const int64_t x_rows = g.z_rows > g.in_band ? g.z_rows : g.in_band;
  g.x_copy = take(g.gather_x ? x_rows * p.width * s.c_in + 64 : 0);
  g.y_copy = take(g.gather_y ? g.dv_rows * p.out_width * s.c_out + 64 : 0);
  g.wide_in = take(T::kNarrow ? s.c_in * s.rank_in : 0);
  g.wide_core = take(T::kNarrow ? kernel * s.rank_in * s.rank_out : 0);
  g.wide_out = take(T::kNarrow ? s.c_out * s.rank_out : 0);
  g.sum_core = take(q.grad_core ? kernel * s.rank_in * s.rank_out : 0);
  g.sum_out = take(q.grad_factor_out ? s.c_out * s.rank_out : 0);
  g.sum_in = take(q.grad_factor_in ? s.c_in * s.rank_in : 0);
  g.sum_bias = take(q.grad_bias ? s.c_out : 0);
  g.part_words = at;
  return g;
}

// Packs this part's share of the forms that backward's products read.
inline void pack_backward(const BottleneckShape& s, const BackwardGeometry& g, const float* core, const float* out,
                          const float* in, int64_t part, float* to) {
  using F = Float32;
  const int64_t taps = s.kernel_h * s.kernel_w, a = s.rank_in, b = s.rank_out;
  int64_t turn = 0;
  const auto mine = [&](bool wanted) { return wanted && turn++ % g.threads == part; };
  if (mine(g.need_v)) pack_columns<F>(core, taps, 1, a, taps, b, a * taps, to + g.core);
  // All taps in reverse, as the transposed convolution meets them along a row of dV.
  if (mine(g.need_dz)) pack_columns<F>(core + taps - 1, taps, -1, b, a * taps, a, taps, to + g.core_back);
  if (mine(g.need_z && g.x_rows)) pack_rows<F>(in, a, 1, 1, 0, s.c_in, a, to + g.in_rows);
  if (mine(g.need_dv && g.y_rows)) pack_rows<F>(out, b, 1, 1, 0, s.c_out, b, to + g.out_rows);
  if (mine(g.grad_x_columns)) pack_columns<F>(in, 1, 0, a, 1, s.c_in, a, to + g.x_columns);
  if (mine(g.grad_x_rows)) pack_rows<F>(in, s.c_in, a, 1, 0, a, 1, to + g.x_rows_form);
}
