// Problem of the chain kernel, plain structs; nothing of torch and nothing of the device.
//
// Every row of x is a small tensor that goes through a few products, each contracting some of its dims with a matrix. A
// block takes a tile of rows through all of them; what lies between stays in shared memory. There each state is laid
// out as the left matrix of the product that reads it, so that permutations cost nothing but addresses.
#pragma once

#include <cstdint>

#include "kernels/cuda/bottleneck.h"

namespace tensorcomp::cuda {

constexpr int kMostChainSteps = 8;
constexpr int kMostChainDigits = 8;

// Divides 0 <= n < 2^31 by a number known before the launch (Granlund and Montgomery 1994).
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;
  Divider() = default;
  explicit Divider(int32_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
  TC_HOST_DEVICE int32_t quotient(int32_t n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

// Where the elements of a row-major index lie: the sum over its digits, the last running fastest, of digit times
// stride.
struct DigitMap {
  int32_t count = 0;
  int32_t size[kMostChainDigits] = {}, stride[kMostChainDigits] = {};
  TC_HOST_DEVICE int32_t value(int32_t index) const {
    int32_t sum = 0;
    for (int32_t d = count - 1; d >= 0; --d) {
      const int32_t rest = index / size[d];
      sum += (index - rest * size[d]) * stride[d];
      index = rest;
    }
    return sum;
  }
};

// out[row, to_m(m) + to_n(n)] = sum over k of in[row, m, k] * matrix[n, k]. All places are in bytes.
struct ChainStep {
  int32_t k = 0, n = 0, kept = 0;  // columns and rows of the matrix; rows that a row of x is in this product
  int32_t pitch = 0;               // from row to row of the left matrix
  int32_t row_bytes = 0;           // from row to row of x in the state that comes out
  bool pairs = false;              // elements n and n + 1 of that state, n even, lie side by side and aligned
  Divider rows;                    // by `kept`
  DigitMap to_m, to_n;
  int32_t table = 0;      // both maps as int32 in shared memory: its first number
  int64_t fragments = 0;  // of the packed matrices, in bytes
  void* state = nullptr;  // where not null, takes the left matrix: [rows of x, kept, pitch]
};

struct ChainTile {
  int32_t rows = 1, warps = 8;
  int32_t blocks_n = 4;  // 8-column blocks of accumulators a warp holds
  int32_t odd = 0;       // states 1, 3, ... in shared memory
  int32_t tables = 0;
  int32_t shared_bytes = 0;
};

// y = the chain (+ bias) (+ residual) (then ReLU). Only the first `run` steps are taken; with fewer than `steps` there
// is no y.
struct ChainParams {
  Element element = Element::kFloat32;
  int64_t rows = 0;
  int32_t in = 0, out = 0;
  const void* x = nullptr;  // [rows, in] of any strides, in elements
  int64_t x_row = 0, x_feature = 0;
  const void* packed = nullptr;
  const void* bias = nullptr;      // [out]
  const void* residual = nullptr;  // [rows, out], dense
  bool relu = false;
  void* y = nullptr;  // [rows, out], dense

  // Features of x in the first state: to_in(f) = to_high(f / low) + to_low(f % low).
  int32_t low_count = 1, high_count = 1;
  Divider features, low;
  DigitMap to_high, to_low;
  bool in_pieces = false;  // 16 bytes of features that lie together there do so in the state too, aligned
  int32_t in_row_bytes = 0, out_row_bytes = 0;

  int32_t steps = 0, run = 0;
  ChainStep step[kMostChainSteps];
  ChainTile tile;
};

}  // namespace tensorcomp::cuda
