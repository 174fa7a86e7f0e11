// A sparse matrix [m, n] as layers store it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"

namespace tensorcomp {

constexpr int64_t kSegment = 65536;  // columns that 16 bits can tell apart; wider rows are cut into segments of so many

inline int64_t segments_of(int64_t columns) { return columns > kSegment ? (columns + kSegment - 1) / kSegment : 1; }

struct SparseMatrix {
  int64_t m = 0, n = 0, count = 0;
  const void* values = nullptr;       // [count], row by row and by ascending column
  const int32_t* offsets = nullptr;   // [m * segments() + 1]: where each segment of each row begins, and count
  const uint8_t* bits = nullptr;      // [m, ceil(n / 8)]: bit j % 8 of byte j / 8 is column j; or null, and then
  const uint16_t* columns = nullptr;  // [count], counted from the beginning of the segment

  int64_t segments() const { return segments_of(n); }
  int64_t bit_row() const { return (n + 7) / 8; }
  int64_t segment_width(int64_t segment) const {
    return n - segment * kSegment < kSegment ? n - segment * kSegment : kSegment;
  }
};

// What can be wrong with the numbers of a sparse matrix.
enum class SparseFault {
  kNone,
  kEnds,       // offsets do not go from 0 to count
  kDescends,   // offsets descend
  kBitBehind,  // a bit behind the last column
  kBitCount,   // a segment has other bits than offsets count
  kColumn,     // a column behind the last
  kOrder,      // columns do not ascend
};

constexpr int64_t kTurnedRows = 16;  // of the matrix, whose results go together to where they belong

// y = x times the transposed matrix, which has passed the table's check.
struct SparseLinearParams {
  DType dtype = DType::kFloat32;
  SparseMatrix sparse;
  int64_t rows = 0;
  const void* x = nullptr;  // each row contiguous, rows x_row elements apart
  int64_t x_row = 0;
  void* y = nullptr;        // [rows, m], contiguous
  void* scratch = nullptr;  // scratch_bytes of the plan, 64-byte aligned
};

// As BottleneckPlan, with offsets in words.
struct SparseLinearPlan {
  int64_t phases = 1, parts = 1;
  size_t scratch_bytes = 0;
  int64_t lanes = 0, blocks = 0;  // rows of x that go together, and how often
  int64_t columns = 0, own = 0, own_words = 0;
};

// Gradients of a sparse product; null pointers are not computed.
struct SparseLinearBackwardParams {
  DType dtype = DType::kFloat32;
  SparseMatrix sparse;
  int64_t rows = 0;
  const void* x = nullptr;  // as above, as is grad [rows, m]
  int64_t x_row = 0;
  const void* grad = nullptr;
  int64_t grad_row = 0;
  void* grad_x = nullptr;       // [rows, n], contiguous: is added to what is there
  void* grad_values = nullptr;  // [count]
  void* scratch = nullptr;
};

struct SparseLinearBackwardPlan {
  int64_t phases = 1, parts = 1;
  int64_t row_parts = 1;  // parts that have rows of x: of few rows not all
  size_t scratch_bytes = 0;
  int64_t lanes = 0, rounds = 0;
  int64_t sums = 0, own = 0, own_words = 0;
  int64_t grad = 0, x = 0, grad_x = 0;  // in a part's own memory
};

}  // namespace tensorcomp
