// Bottleneck-convolution problems with an answer: weights, input in any layout, and a plain loop in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"

namespace tensorcomp::test {

// Exactly as many bytes as asked for, 64-byte aligned, so that a sanitizer sees any access beyond.
class Bytes {
 public:
  explicit Bytes(size_t size) : data_(::operator new(size, std::align_val_t{64})) { std::memset(data_, 0xff, size); }
  ~Bytes() { ::operator delete(data_, std::align_val_t{64}); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Values in the storage type of a problem.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype_(dtype), bytes_(static_cast<size_t>(count) * size()) {}
  size_t size() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  double operator[](int64_t i) const {
    return dtype_ == DType::kFloat32 ? static_cast<const float*>(get())[i]
                                     : from_bfloat16(static_cast<const uint16_t*>(get())[i]);
  }
  void set(int64_t i, float value) {
    if (dtype_ == DType::kFloat32) {
      static_cast<float*>(get())[i] = value;
    } else {
      static_cast<uint16_t*>(get())[i] = to_bfloat16(value);
    }
  }
  void* get() const { return bytes_.get(); }

 private:
  DType dtype_;
  Bytes bytes_;
};

enum class Layout { kContiguous, kChannelsLast, kSlice };

struct Case {
  int64_t batch, c_in, height, width, rank_in, rank_out, c_out, kernel_h, kernel_w;
  int64_t stride_h = 1, stride_w = 1, pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t ring = 1;
  bool depthwise = false;  // rank_in == rank_out then

  int64_t core_elements() const { return rank_out * (depthwise ? 1 : rank_in) * kernel_h * kernel_w; }
};

struct Problem {
  Problem(const Case& c, DType dtype, Layout layout, bool with_bias, unsigned seed = 1)
      : core(dtype, c.core_elements()),
        factor_out(dtype, c.c_out * c.ring * c.rank_out),
        factor_in(dtype, c.c_in * c.ring * c.rank_in),
        bias(dtype, c.c_out),
        x(dtype, input_elements(c, layout)) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](Array& array, int64_t count) {
      for (int64_t i = 0; i < count; ++i) array.set(i, normal(generator));
    };
    fill(core, c.core_elements());
    fill(factor_out, c.c_out * c.ring * c.rank_out);
    fill(factor_in, c.c_in * c.ring * c.rank_in);
    fill(bias, c.c_out);
    fill(x, input_elements(c, layout));
    params.shape = {dtype, c.c_in, c.rank_in, c.rank_out, c.c_out, c.kernel_h, c.kernel_w, c.ring, c.depthwise};
    params.batch = c.batch;
    params.height = c.height;
    params.width = c.width;
    params.stride_h = c.stride_h;
    params.stride_w = c.stride_w;
    params.pad_top = c.pad_top;
    params.pad_left = c.pad_left;
    params.dilation_h = c.dilation_h;
    params.dilation_w = c.dilation_w;
    params.out_height = (c.height + c.pad_top + c.pad_bottom - c.dilation_h * (c.kernel_h - 1) - 1) / c.stride_h + 1;
    params.out_width = (c.width + c.pad_left + c.pad_right - c.dilation_w * (c.kernel_w - 1) - 1) / c.stride_w + 1;
    params.x = x.get();
    params.x_strides = strides(c.c_in, c.height, c.width, layout);
    params.y_strides = strides(c.c_out, params.out_height, params.out_width,
                               layout == Layout::kContiguous ? Layout::kContiguous : Layout::kChannelsLast);
    params.bias = with_bias ? bias.get() : nullptr;
  }

  int64_t output_elements() const { return params.batch * params.shape.c_out * params.out_height * params.out_width; }
  BottleneckWeights weights() const { return {core.get(), factor_out.get(), factor_in.get()}; }

  // Element (n, t, row, column) of y in double, at its place in y.
  std::vector<double> expected() const;

  Array core, factor_out, factor_in, bias, x;
  BottleneckConvParams params;

 private:
  // A slice leaves every second channel, a row of margin and three columns of margin out.
  static Strides4 strides(int64_t channels, int64_t height, int64_t width, Layout layout) {
    switch (layout) {
      case Layout::kContiguous: return {channels * height * width, height * width, width, 1};
      case Layout::kChannelsLast: return {channels * height * width, 1, width * channels, channels};
      case Layout::kSlice: break;
    }
    const int64_t row = width + 3, plane = (height + 1) * row;
    return {2 * channels * plane, 2 * plane, row, 1};
  }
  static int64_t input_elements(const Case& c, Layout layout) {
    const Strides4 s = strides(c.c_in, c.height, c.width, layout);
    return (c.batch - 1) * s.n + (c.c_in - 1) * s.c + (c.height - 1) * s.h + (c.width - 1) * s.w + 1;
  }
};

inline std::vector<double> Problem::expected() const {
  const BottleneckConvParams& p = params;
  const BottleneckShape& s = p.shape;
  // u [N, H, W, ring R_in]
  const int64_t mid = s.mid(), out = s.out(), inner = s.depthwise ? 1 : s.rank_in;
  std::vector<double> u(p.batch * p.height * p.width * mid);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t h = 0; h < p.height; ++h)
      for (int64_t w = 0; w < p.width; ++w)
        for (int64_t a = 0; a < mid; ++a) {
          double sum = 0;
          for (int64_t c = 0; c < s.c_in; ++c) {
            sum += x[n * p.x_strides.n + c * p.x_strides.c + h * p.x_strides.h + w * p.x_strides.w] *
                   factor_in[c * mid + a];
          }
          u[((n * p.height + h) * p.width + w) * mid + a] = sum;
        }
  std::vector<double> y(output_elements());
  std::vector<double> v(out);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t oh = 0; oh < p.out_height; ++oh)
      for (int64_t ow = 0; ow < p.out_width; ++ow) {
        for (int64_t b = 0; b < out; ++b) {
          // Ranks of one ring index, or the rank itself.
          const int64_t first = s.depthwise ? b : b / s.rank_out * s.rank_in, row = b % s.rank_out;
          v[b] = 0;
          for (int64_t kh = 0; kh < s.kernel_h; ++kh)
            for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
              const int64_t h = oh * p.stride_h - p.pad_top + kh * p.dilation_h;
              const int64_t w = ow * p.stride_w - p.pad_left + kw * p.dilation_w;
              if (h < 0 || h >= p.height || w < 0 || w >= p.width) continue;
              for (int64_t a = 0; a < inner; ++a) {
                v[b] += u[((n * p.height + h) * p.width + w) * mid + first + a] *
                        core[((row * inner + a) * s.kernel_h + kh) * s.kernel_w + kw];
              }
            }
        }
        for (int64_t t = 0; t < s.c_out; ++t) {
          double sum = p.bias ? bias[t] : 0.0;
          for (int64_t b = 0; b < out; ++b) sum += v[b] * factor_out[t * out + b];
          y[n * p.y_strides.n + t * p.y_strides.c + oh * p.y_strides.h + ow * p.y_strides.w] = sum;
        }
      }
  return y;
}

inline double relative_error(const Array& y, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = y[static_cast<int64_t>(i)] - expected[i];
    difference += d * d;
    norm += expected[i] * expected[i];
  }
  const double error = norm > 0 ? std::sqrt(difference / norm) : difference;
  // A NaN must fail, and does not compare.
  return error == error ? error : 1e30;
}

// The instruction sets of this machine, best first.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{""};
  for (const char* c = tensorcomp_isa_available(); *c; ++c) {
    if (*c == ',') {
      names.emplace_back();
    } else {
      names.back() += *c;
    }
  }
  return names;
}

}  // namespace tensorcomp::test
