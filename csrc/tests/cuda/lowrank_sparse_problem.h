// Matrices and masks in several layouts for the tests of the low-rank + sparse CUDA kernels.
#pragma once

#include <cstdio>

#include "check.h"
#include "cuda/cuda_problem.h"
#include "kernels/cuda/lowrank_sparse_launch.h"

namespace tensorcomp::test {

using Doubles = std::vector<double>;

// Rows one after the other; cut out of a wider matrix, where nothing is aligned; columns one after the other; rows that
// begin at multiples of 8 bytes.
enum class Lie { kDense, kSlice, kTurned, kPadded };

struct Strides {
  int64_t first, row, column, elements;
};

inline Strides lie_of(Lie lie, int64_t rows, int64_t columns, int64_t unit) {
  if (lie == Lie::kTurned) return {0, 1, rows, rows * columns};
  if (lie == Lie::kSlice) return {1, columns + 3, 1, 1 + rows * (columns + 3)};
  const int64_t row = lie == Lie::kPadded ? (columns + unit - 1) / unit * unit : columns;
  return {0, row, 1, rows * row};
}

// Elements [rows, columns]; what lies between them is NaN.
struct Matrix {
  Matrix(Element of, Lie lie, int64_t m, int64_t n)
      : element(of), rows(m), columns(n), at(lie_of(lie, m, n, 8 / bytes())), array(of, at.elements) {}
  int bytes() const { return cuda::element_bytes(element); }
  void fill(std::mt19937& generator, double scale) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) array.set(place(i, j), scale * normal(generator));
  }
  int64_t place(int64_t i, int64_t j) const { return at.first + i * at.row + j * at.column; }
  double operator()(int64_t i, int64_t j) const { return array[place(i, j)]; }
  cuda::MatrixSource source() const {
    return cuda::matrix_source(static_cast<char*>(array.get()) + at.first * bytes(), rows, columns, at.row, at.column,
                               bytes());
  }

  Element element;
  int64_t rows, columns;
  Strides at;
  Array array;
};

// A mask as bools or as bits; bits behind the last column are set, and mean nothing.
struct Mask {
  Mask(bool as_bits, Lie lie, int64_t m, int64_t n, double share, std::mt19937& generator)
      : bits(as_bits), rows(m), columns(n), kept(static_cast<size_t>(m * n)) {
    const int64_t width = bits ? (n + 7) / 8 : n;
    at = lie_of(lie, m, width, 8);
    bytes.assign(static_cast<size_t>(at.elements), 0xff);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const bool one = (generator() >> 8) % 1024 < share * 1024;
        kept[static_cast<size_t>(i * n + j)] = one;
        uint8_t& byte = bytes[static_cast<size_t>(at.first + i * at.row + (bits ? j / 8 : j) * at.column)];
        const uint8_t bit = static_cast<uint8_t>(1u << j % 8);
        if (bits) {
          byte = static_cast<uint8_t>(one ? byte | bit : byte & ~bit);
        } else {
          byte = one;
        }
      }
    }
  }
  bool operator()(int64_t i, int64_t j) const { return kept[static_cast<size_t>(i * columns + j)]; }
  cuda::MatrixSource source(int32_t tile_columns) const {
    return cuda::mask_source(bytes.data() + at.first, bits, rows, columns, at.row, at.column, tile_columns);
  }

  bool bits;
  int64_t rows, columns;
  Strides at{};
  std::vector<uint8_t> bytes;
  std::vector<bool> kept;
};

// A dense result between zones that nobody may write.
class Result {
 public:
  Result(Element element, int64_t count) : bytes_(cuda::element_bytes(element)), count_(count) {
    all_ = std::make_unique<Array>(element, count + 2 * kZone);
  }
  void* get() const { return static_cast<char*>(all_->get()) + kZone * bytes_; }
  Doubles values() const {
    Doubles found(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; ++i) found[static_cast<size_t>(i)] = (*all_)[kZone + i];
    return found;
  }
  // Memory starts as NaN.
  bool whole() const {
    for (int64_t i = 0; i < kZone; ++i) {
      const double before = (*all_)[i], behind = (*all_)[kZone + count_ + i];
      if (before == before || behind == behind) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kZone = 64;
  int bytes_;
  int64_t count_;
  std::unique_ptr<Array> all_;
};

inline bool close(const Result& found, const Doubles& expected, double limit) {
  const double error = relative_error(found.values(), expected);
  if (!(error <= limit)) std::fprintf(stderr, "relative error %.2e, limit %.2e: ", error, limit);
  return error <= limit && found.whole();
}

inline double forward_limit(Element element) {
  return element == Element::kFloat32 ? 1e-5 : element == Element::kBfloat16 ? 1e-2 : 2e-3;
}

constexpr Element kElements[] = {Element::kFloat32, Element::kTf32, Element::kFloat16, Element::kBfloat16};
// The last has room for two stages only.
inline const cuda::DeviceLimits kDevices[] = {
    {132, 227 * 1024, 228 * 1024}, {3, 163 * 1024, 164 * 1024}, {8, 99 * 1024, 100 * 1024}};

}  // namespace tensorcomp::test
