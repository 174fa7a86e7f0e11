// A sparse matrix laid out for products with few rows: steps of 16 values, one for each of 16 neighbouring rows of the
// matrix, that all multiply columns of one window, which two vector registers hold. So one instruction picks what each
// value multiplies, where a gather would take longer than the memory takes to deliver the values.
//
// 64 rows of the matrix are a bundle: it goes through all windows, and in each through so many steps of each of its
// four groups of 16. Rows with much in them go together, as the longest of a bundle counts: pruning leaves some rows
// many times as many values as others. Windows overlap: a value may wait for the next one. What finds no place goes
// into "loose" steps, whose values multiply any columns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "params.h"
#include "sparse_matrix.h"

namespace tensorcomp {

constexpr int kPanelLanes = 16;
constexpr int kPanelGroups = 4;
constexpr int64_t kBundle = kPanelLanes * kPanelGroups;
constexpr int64_t kWindowStep = 16;  // columns from one window to the next; a window has twice as many
constexpr int64_t kChunk = 16;       // windows with the same number of steps

struct SparsePanels {
  DType dtype = DType::kFloat32;
  int64_t m = 0, n = 0;
  int64_t slots = 0, loose = 0;            // in steps
  const uint8_t* half_steps = nullptr;     // [bundles][chunks]: twice the steps of each group in each window
  const int32_t* loose_steps = nullptr;    // [bundles][groups]
  const int32_t* order = nullptr;          // [bundles][groups][lanes]: which row of the matrix this is; m for none
  const void* values = nullptr;            // [slots][lanes]; zero where there is nothing to multiply
  const uint8_t* places = nullptr;         // [slots][lanes]: columns from the window's first, below 32
  const void* loose_values = nullptr;      // [loose][lanes]
  const int32_t* loose_columns = nullptr;  // [loose][lanes]

  int64_t bundles() const { return (m + kBundle - 1) / kBundle; }
  int64_t windows() const { return (n + kWindowStep - 1) / kWindowStep; }
  int64_t chunks() const { return (windows() + kChunk - 1) / kChunk; }
};

// Half steps become a whole one in every second window.
constexpr int window_steps(int half_steps, int64_t window) { return (half_steps + static_cast<int>(window & 1)) / 2; }

constexpr int kPanelRows = 4;  // rows of x that go through a bundle together

// y = x times the transposed matrix.
struct SparsePanelsParams {
  SparsePanels panels;
  const int64_t* slot_starts = nullptr;  // of panel_starts()
  const int64_t* loose_starts = nullptr;
  int64_t rows = 0;
  const void* x = nullptr;  // each row contiguous, rows x_row elements apart
  int64_t x_row = 0;
  void* y = nullptr;        // [rows, m], contiguous
  void* scratch = nullptr;  // scratch_bytes of the table, 64-byte aligned
};

// Where each bundle's steps begin: [bundles + 1] of each; false where the counts do not add up to the totals.
bool panel_starts(const SparsePanels& p, std::vector<int64_t>* slots, std::vector<int64_t>* loose);

// What a matrix that passed sparse_fault() looks like in panels; the pointers are into `memory`.
struct MadePanels {
  std::vector<uint8_t> half_steps, places;
  std::vector<int32_t> loose_steps, loose_columns, order;
  std::vector<uint32_t> values, loose_values;  // index in the matrix's values plus one, or zero
};
MadePanels make_panels(const SparseMatrix& s);

}  // namespace tensorcomp
