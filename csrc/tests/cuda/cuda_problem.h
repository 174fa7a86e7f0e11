// Bottleneck problems for the CUDA kernels, and their answers by plain loops in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "kernels/cuda/convolution.h"
#include "kernels/cuda/elements.cuh"

namespace tensorcomp::test {

using cuda::Element;

// Values in the storage type of a problem, in exactly as many bytes as they take; they start as NaN.
class Array {
 public:
  Array(Element element, int64_t count)
      : element_(element),
        count_(count),
        data_(static_cast<char*>(::operator new(static_cast<size_t>(count * bytes()), std::align_val_t{256}))) {
    std::memset(data_.get(), 0xff, static_cast<size_t>(count * bytes()));
  }
  int64_t size() const { return count_; }
  void* get() const { return data_.get(); }
  double operator[](int64_t i) const {
    if (bytes() == 4) return reinterpret_cast<const float*>(data_.get())[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(data_.get())[i];
    return element_ == Element::kFloat16 ? cuda::float16_to_float(bits) : cuda::bfloat16_to_float(bits);
  }
  void set(int64_t i, double value) {
    const float narrow = static_cast<float>(value);
    if (bytes() == 4) {
      reinterpret_cast<float*>(data_.get())[i] = narrow;
    } else {
      reinterpret_cast<uint16_t*>(data_.get())[i] =
          element_ == Element::kFloat16 ? cuda::float_to_float16(narrow) : cuda::float_to_bfloat16(narrow);
    }
  }

 private:
  struct Delete {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t{256}); }
  };
  int bytes() const { return cuda::element_bytes(element_); }
  Element element_;
  int64_t count_;
  std::unique_ptr<char, Delete> data_;
};

enum class Layout { kContiguous, kChannelsLast, kSlice };

// A slice leaves every second channel and margins out, and starts where nothing is aligned.
inline Strides4 strides_of(Layout layout, int64_t channels, int64_t height, int64_t width) {
  switch (layout) {
    case Layout::kContiguous: return {channels * height * width, height * width, width, 1};
    case Layout::kChannelsLast: return {channels * height * width, 1, width * channels, channels};
    case Layout::kSlice: break;
  }
  const int64_t row = width + 3, plane = (height + 1) * row;
  return {2 * channels * plane, 2 * plane, row, 1};
}

// An image of doubles [n, c, h, w] and its copy in a storage type and layout.
struct ImageData {
  ImageData(Element element, Layout layout, int64_t n, int64_t c, int64_t h, int64_t w)
      : batch(n),
        channels(c),
        height(h),
        width(w),
        strides(strides_of(layout, c, h, w)),
        offset(layout == Layout::kSlice ? 1 : 0),
        array(element,
              offset + (n - 1) * strides.n + (c - 1) * strides.c + (h - 1) * strides.h + (w - 1) * strides.w + 1) {}
  int64_t at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return offset + n * strides.n + c * strides.c + h * strides.h + w * strides.w;
  }
  double get(int64_t n, int64_t c, int64_t h, int64_t w) const { return array[at(n, c, h, w)]; }
  void* data() const { return static_cast<char*>(array.get()) + offset * bytes; }
  cuda::Image image() const { return {data(), strides}; }
  // All values in the order [n, c, h, w].
  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t h = 0; h < height; ++h)
          for (int64_t w = 0; w < width; ++w) all.push_back(get(n, c, h, w));
    return all;
  }
  void fill(std::mt19937& generator) {
    std::normal_distribution<double> normal;
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t h = 0; h < height; ++h)
          for (int64_t w = 0; w < width; ++w) array.set(at(n, c, h, w), normal(generator));
  }

  int64_t batch, channels, height, width;
  Strides4 strides;
  int64_t offset;
  Array array;
  int64_t bytes = 2;
};

struct Answer {
  std::vector<double> y, x, core, factor_out, factor_in, bias;
};

// Forward and all gradients of sum(y * grad), in double.
struct Problem {
  Problem(const cuda::Convolution& c, Layout layout, unsigned seed)
      : conv(c),
        x(c.element, layout, c.batch, c.c_in, c.height, c.width),
        grad(c.element, layout, c.batch, c.c_out, c.out_height, c.out_width),
        core(c.element, core_size()),
        factor_out(c.element, static_cast<int64_t>(c.c_out) * c.ring * c.rank_out),
        factor_in(c.element, static_cast<int64_t>(c.c_in) * c.ring * c.rank_in),
        bias(c.element, c.c_out) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    x.bytes = grad.bytes = cuda::element_bytes(c.element);
    x.fill(generator);
    grad.fill(generator);
    for (Array* array : {&core, &factor_out, &factor_in, &bias}) {
      for (int64_t i = 0; i < array->size(); ++i) array->set(i, normal(generator));
    }
  }

  int64_t core_size() const {
    if (conv.core == cuda::Core::kNone) return 0;
    const int64_t taps = static_cast<int64_t>(conv.kernel_h) * conv.kernel_w;
    return taps * conv.rank_out * (conv.core == cuda::Core::kFull ? conv.rank_in : 1);
  }
  cuda::Weights weights() const { return {core.get(), factor_out.get(), factor_in.get()}; }

  Answer answer() const;

  cuda::Convolution conv;
  ImageData x, grad;
  Array core, factor_out, factor_in, bias;
};

inline Answer Problem::answer() const {
  const cuda::Convolution& c = conv;
  const int64_t in = static_cast<int64_t>(c.ring) * c.rank_in, out = static_cast<int64_t>(c.ring) * c.rank_out;
  const auto u_at = [&](int64_t n, int64_t h, int64_t w) { return ((n * c.height + h) * c.width + w) * in; };
  const auto v_at = [&](int64_t n, int64_t h, int64_t w) { return ((n * c.out_height + h) * c.out_width + w) * out; };
  std::vector<double> u(c.batch * c.height * c.width * in), du(u.size());
  std::vector<double> v(c.batch * c.out_height * c.out_width * out), dv(v.size());
  Answer a;
  a.y.resize(c.batch * c.c_out * c.out_height * c.out_width);
  a.x.resize(c.batch * c.c_in * c.height * c.width);
  a.core.resize(core_size());
  a.factor_out.resize(c.c_out * out);
  a.factor_in.resize(c.c_in * in);
  a.bias.resize(c.c_out);
  const auto pixels = [&](int64_t height, int64_t width, auto body) {
    for (int64_t n = 0; n < c.batch; ++n)
      for (int64_t h = 0; h < height; ++h)
        for (int64_t w = 0; w < width; ++w) body(n, h, w);
  };
  // Every product of the core: (element of V, element of U, element of the core).
  const auto core_products = [&](auto body) {
    pixels(c.out_height, c.out_width, [&](int64_t n, int64_t oh, int64_t ow) {
      if (c.core == cuda::Core::kNone) {
        for (int64_t r = 0; r < out; ++r) body(v_at(n, oh, ow) + r, u_at(n, oh, ow) + r, -1);
        return;
      }
      for (int64_t kh = 0; kh < c.kernel_h; ++kh)
        for (int64_t kw = 0; kw < c.kernel_w; ++kw) {
          const int64_t h = oh * c.stride_h - c.pad_top + kh * c.dilation_h;
          const int64_t w = ow * c.stride_w - c.pad_left + kw * c.dilation_w;
          if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
          const int64_t tap = kh * c.kernel_w + kw, taps = static_cast<int64_t>(c.kernel_h) * c.kernel_w;
          const int64_t to = v_at(n, oh, ow), from = u_at(n, h, w);
          if (c.core == cuda::Core::kDepthwise) {
            for (int64_t r = 0; r < out; ++r) body(to + r, from + r, r * taps + tap);
            continue;
          }
          for (int64_t q = 0; q < c.ring; ++q)
            for (int64_t b = 0; b < c.rank_out; ++b)
              for (int64_t i = 0; i < c.rank_in; ++i) {
                body(to + q * c.rank_out + b, from + q * c.rank_in + i, (b * c.rank_in + i) * taps + tap);
              }
        }
    });
  };
  pixels(c.height, c.width, [&](int64_t n, int64_t h, int64_t w) {
    for (int64_t s = 0; s < c.c_in; ++s)
      for (int64_t r = 0; r < in; ++r) u[u_at(n, h, w) + r] += x.get(n, s, h, w) * factor_in[s * in + r];
  });
  const auto weight = [&](int64_t i) { return i < 0 ? 1.0 : core[i]; };
  core_products([&](int64_t to, int64_t from, int64_t i) { v[to] += u[from] * weight(i); });
  pixels(c.out_height, c.out_width, [&](int64_t n, int64_t h, int64_t w) {
    for (int64_t t = 0; t < c.c_out; ++t) {
      const double g = grad.get(n, t, h, w);
      double sum = bias[t];
      for (int64_t r = 0; r < out; ++r) {
        sum += v[v_at(n, h, w) + r] * factor_out[t * out + r];
        a.factor_out[t * out + r] += g * v[v_at(n, h, w) + r];
        dv[v_at(n, h, w) + r] += g * factor_out[t * out + r];
      }
      a.y[((n * c.c_out + t) * c.out_height + h) * c.out_width + w] = sum;
      a.bias[t] += g;
    }
  });
  core_products([&](int64_t to, int64_t from, int64_t i) {
    du[from] += dv[to] * weight(i);
    if (i >= 0) a.core[i] += dv[to] * u[from];
  });
  pixels(c.height, c.width, [&](int64_t n, int64_t h, int64_t w) {
    for (int64_t s = 0; s < c.c_in; ++s) {
      double sum = 0;
      for (int64_t r = 0; r < in; ++r) {
        sum += du[u_at(n, h, w) + r] * factor_in[s * in + r];
        a.factor_in[s * in + r] += x.get(n, s, h, w) * du[u_at(n, h, w) + r];
      }
      a.x[((n * c.c_in + s) * c.height + h) * c.width + w] = sum;
    }
  });
  return a;
}

inline double relative_error(const std::vector<double>& found, const std::vector<double>& expected) {
  if (found.size() != expected.size()) return 1e30;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  // Gradients may be zero altogether: borders alone were multiplied.
  const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  // A NaN must fail, and does not compare.
  return error == error ? error : 1e30;
}

inline std::vector<double> values(const Array& array) {
  std::vector<double> all(array.size());
  for (int64_t i = 0; i < array.size(); ++i) all[i] = array[i];
  return all;
}

}  // namespace tensorcomp::test
