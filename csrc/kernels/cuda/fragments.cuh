// Fragments of tensor-core products from chunks of shared memory that were not packed before: along the summed
// dimension in rows, or across it.
#pragma once

#include "kernels/cuda/stages.cuh"

namespace tensorcomp::cuda {

// Two 8-column blocks of a right matrix as it was stored, made ready: 32-bit elements rounded, or split in two.
template <typename E>
TC_DEVICE void prepare_right(uint32_t (&high)[4], uint32_t (&low)[4]) {
  if constexpr (sizeof(typename E::Storage) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (E::kParts == 2) {
        split_tf32(high[i], high[i], low[i]);
      } else {
        high[i] = round_to_tf32(bits_to_float(high[i]));
      }
    }
  }
}

// Of chunks that lie [summed dimension][row or column], rows kPitch bytes apart: 16-bit elements are transposed on
// their way to registers, 32-bit ones come one by one.
template <typename E, int kPitch, int kBytes = sizeof(typename E::Storage)>
struct TurnedFragments {
  // 16 rows of a left matrix from `row` on.
  static TC_DEVICE void left(Left<E>& to, const char* chunk, int32_t step, int32_t row, int lane) {
    const int32_t summed = step * 16 + lane / 16 * 8 + lane % 8, at = row + lane / 8 % 2 * 8;
    load_matrices_transposed(to.a, chunk + summed * kPitch + at * 2);
    to.prepare();
  }
  // Two 8-column blocks of a right one.
  static TC_DEVICE void right(uint32_t (&high)[4], uint32_t (&)[4], const char* chunk, int32_t step, int32_t column,
                              int lane) {
    const int32_t summed = step * 16 + lane / 8 % 2 * 8 + lane % 8, at = column + lane / 16 * 8;
    load_matrices_transposed(high, chunk + summed * kPitch + at * 2);
  }
};

template <typename E, int kPitch>
struct TurnedFragments<E, kPitch, 4> {
  static TC_DEVICE uint32_t at(const char* chunk, int32_t summed, int32_t column) {
    return *reinterpret_cast<const uint32_t*>(chunk + summed * kPitch + column * 4);
  }
  static TC_DEVICE void left(Left<E>& to, const char* chunk, int32_t step, int32_t row, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.a[i] = at(chunk, step * 8 + lane % 4 + i / 2 * 4, row + lane / 4 + i % 2 * 8);
    }
    to.prepare();
  }
  static TC_DEVICE void right(uint32_t (&high)[4], uint32_t (&low)[4], const char* chunk, int32_t step, int32_t column,
                              int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = at(chunk, step * 8 + lane % 4 + i % 2 * 4, column + lane / 4 + i / 2 * 8);
    }
    prepare_right<E>(high, low);
  }
};

// Of chunks that lie [row or column][summed dimension].
template <typename E, int kPitch>
struct RowFragments {
  static TC_DEVICE void left(Left<E>& to, const char* chunk, int32_t step, int32_t row, int lane) {
    load_matrices(to.a, chunk + (row + lane % 16) * kPitch + step * kStepBytes + lane / 16 * 16);
    to.prepare();
  }
  static TC_DEVICE void right(uint32_t (&high)[4], uint32_t (&low)[4], const char* chunk, int32_t step, int32_t column,
                              int lane) {
    load_matrices(high, chunk + (column + lane / 16 * 8 + lane % 8) * kPitch + step * kStepBytes + lane / 8 % 2 * 16);
    prepare_right<E>(high, low);
  }
};

// acc += left right over kSteps steps of a chunk: a warp's blocks of rows from `row` on and columns from `column` on.
template <typename E, typename LeftFragments, typename RightFragments, int kSteps, int kM, int kN>
TC_DEVICE void multiply_chunk(Accumulators<kM, kN>& acc, const char* left_chunk, const char* right_chunk, int32_t row,
                              int32_t column, int lane) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Left<E> left[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) LeftFragments::left(left[i], left_chunk, step, row + 16 * i, lane);
#pragma unroll
    for (int pair = 0; pair < kN / 2; ++pair) {
      uint32_t high[4], low[4] = {0, 0, 0, 0};
      RightFragments::right(high, low, right_chunk, step, column + 16 * pair, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t b_high[2] = {high[2 * half], high[2 * half + 1]};
        const uint32_t b_low[2] = {low[2 * half], low[2 * half + 1]};
#pragma unroll
        for (int i = 0; i < kM; ++i) left[i].multiply(acc.value[i][2 * pair + half], b_high, b_low);
      }
    }
  }
}

}  // namespace tensorcomp::cuda
