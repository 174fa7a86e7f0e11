// Problems with low-rank + sparse weights: plain sizes, strides and pointers, nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"

namespace tensorcomp {

// The dense weight of a low-rank matrix a b and a sparse one: a b + mask * values or, where `masking`,
// (1 - mask) * a b + mask * values. Rows of every matrix are contiguous and `_row` elements apart.
struct SparseWeightShape {
  DType dtype = DType::kFloat32;
  int64_t m = 0, n = 0, rank = 0;  // but for the rank, which leaves the sparse part alone, none is zero
  bool masking = false;
  bool bits = false;  // the mask has a bit an entry, bit j % 8 of byte j / 8; else a byte
  const uint8_t* mask = nullptr;
  int64_t mask_row = 0;     // bytes
  const void* a = nullptr;  // [m, rank]
  const void* b = nullptr;  // [rank, n]
  int64_t a_row = 0, b_row = 0;
};

struct SparseWeightParams {
  SparseWeightShape shape;
  const void* values = nullptr;  // [m, n]; only what the mask keeps is read
  int64_t values_row = 0;
  void* w = nullptr;        // [m, n], contiguous
  void* scratch = nullptr;  // scratch_bytes of the plan, 64-byte aligned
};

// How a call is cut, as BottleneckPlan, and where things lie in its scratch memory, in words.
struct SparseWeightPlan {
  int64_t phases = 2, parts = 1;
  size_t scratch_bytes = 0;
  int64_t rows = 0;  // of a, where it cannot be read in place: words a row, else 0
  int64_t own = 0, own_words = 0;
  bool cut_columns = false;  // the parts share the columns, not the rows
  bool streams = false;      // w is written past the caches
  bool fetches = false;      // a tile's lines are asked for while another one is computed
};

// Gradients, in the dtype of the problem, contiguous; null pointers are not computed.
struct SparseWeightBackwardParams {
  SparseWeightShape shape;
  const void* grad = nullptr;  // [m, n]
  int64_t grad_row = 0;
  void* grad_a = nullptr;
  void* grad_b = nullptr;
  void* grad_values = nullptr;
  void* scratch = nullptr;
};

struct SparseWeightBackwardPlan {
  int64_t phases = 3, parts = 1;
  size_t scratch_bytes = 0;
  int64_t height = 0, width = 0;  // of the blocks of grad that are made at a time
  // Offsets in words: sums of grad_b for every part, and in a part's own memory.
  int64_t sums = 0, sums_row = 0, sums_words = 0, own = 0, own_words = 0;
  int64_t panel = 0, a_rows = 0, a_sums = 0, taps = 0;
};

}  // namespace tensorcomp
