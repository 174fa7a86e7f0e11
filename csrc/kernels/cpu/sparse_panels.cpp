// Lays a sparse matrix out in panels, once for all its products.

#include "../sparse_panels.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

namespace tensorcomp {

namespace {

struct Entry {
  int32_t column;
  uint32_t value;  // index plus one
};

// Columns of every row, ascending.
class Rows {
 public:
  explicit Rows(const SparseMatrix& s) : s_(s) {}

  // All rows, those with the most values first, and then m up to whole bundles.
  std::vector<int32_t> order(int64_t size) const {
    std::vector<int32_t> rows(static_cast<size_t>(size), static_cast<int32_t>(s_.m));
    const auto end = rows.begin() + s_.m;
    std::iota(rows.begin(), end, 0);
    std::stable_sort(rows.begin(), end, [&](int32_t a, int32_t b) { return count(a) > count(b); });
    return rows;
  }

  void read(int64_t row, std::vector<Entry>* to) const {
    to->clear();
    if (row >= s_.m) return;
    const int64_t segments = s_.segments();
    for (int64_t g = 0; g < segments; ++g) {
      const int32_t begin = s_.offsets[row * segments + g], end = s_.offsets[row * segments + g + 1];
      if (!s_.bits) {
        for (int32_t k = begin; k < end; ++k) add(g * kSegment + s_.columns[k], k, to);
        continue;
      }
      const uint8_t* bits = s_.bits + row * s_.bit_row() + g * (kSegment / 8);
      int32_t k = begin;
      for (int64_t byte = 0; k < end; ++byte) {
        for (unsigned left = bits[byte]; left != 0; left &= left - 1)
          add(g * kSegment + byte * 8 + __builtin_ctz(left), k++, to);
      }
    }
  }

 private:
  int32_t count(int64_t row) const { return s_.offsets[(row + 1) * s_.segments()] - s_.offsets[row * s_.segments()]; }
  static void add(int64_t column, int64_t k, std::vector<Entry>* to) {
    to->push_back({static_cast<int32_t>(column), static_cast<uint32_t>(k + 1)});
  }
  const SparseMatrix& s_;
};

using Progress = std::array<size_t, kBundle>;  // the next entry of every row

// The rows of a bundle on their way through the windows.
class Bundle {
 public:
  std::array<std::vector<Entry>, kBundle> rows, loose;

  // Goes through the windows of a chunk with so many half steps in each, and returns how many entries had no place.
  // Where they go is noted if `made` is given.
  int64_t go(Progress& next, int64_t chunk, int64_t windows, int half_steps, MadePanels* made) {
    int64_t left = 0;
    const int64_t last = std::min((chunk + 1) * kChunk, windows);
    for (int64_t w = chunk * kChunk; w < last; ++w) {
      const int64_t begin = w * kWindowStep;
      for (int s = window_steps(half_steps, w); s > 0; --s) {
        for (size_t r = 0; r < rows.size(); ++r) {
          const bool fits = next[r] < rows[r].size() && rows[r][next[r]].column < begin + 2 * kWindowStep;
          if (made) {
            made->values.push_back(fits ? rows[r][next[r]].value : 0);
            made->places.push_back(fits ? static_cast<uint8_t>(rows[r][next[r]].column - begin) : 0);
          }
          next[r] += fits;
        }
      }
      // What lies before the next window has had its last chance.
      for (size_t r = 0; r < rows.size(); ++r) {
        for (; next[r] < rows[r].size() && rows[r][next[r]].column < begin + kWindowStep; ++next[r], ++left) {
          if (made) loose[r].push_back(rows[r][next[r]]);
        }
      }
    }
    return left;
  }

  // Half steps in each window of a chunk that make its products cheapest.
  int best_steps(const Progress& from, int64_t chunk, int64_t windows) {
    constexpr int kMost = 4 * kWindowStep;
    constexpr double kLoose = 1.0;  // what a loose value costs, where a step of a group is one
    const int64_t last = std::min((chunk + 1) * kChunk, windows);
    int best = 0;
    double least = std::numeric_limits<double>::max();
    for (int tried = 0; tried <= kMost; ++tried) {
      int64_t steps = 0;
      for (int64_t w = chunk * kChunk; w < last; ++w) steps += kPanelGroups * window_steps(tried, w);
      if (static_cast<double>(steps) >= least) break;
      Progress next = from;
      const double cost =
          static_cast<double>(steps) + kLoose * static_cast<double>(go(next, chunk, windows, tried, nullptr));
      if (cost < least) {
        least = cost;
        best = tried;
      }
    }
    return best;
  }
};

}  // namespace

bool panel_starts(const SparsePanels& p, std::vector<int64_t>* slots, std::vector<int64_t>* loose) {
  const int64_t bundles = p.bundles(), chunks = p.chunks(), windows = p.windows();
  slots->assign(1, 0);
  loose->assign(1, 0);
  for (int64_t b = 0; b < bundles; ++b) {
    int64_t placed = 0, free = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t some = std::min(kChunk, windows - c * kChunk);
      const int half_steps = p.half_steps[b * chunks + c];
      placed += kPanelGroups * ((some + 1) / 2 * window_steps(half_steps, 0) + some / 2 * window_steps(half_steps, 1));
    }
    for (int g = 0; g < kPanelGroups; ++g) {
      if (p.loose_steps[b * kPanelGroups + g] < 0) return false;
      free += p.loose_steps[b * kPanelGroups + g];
    }
    slots->push_back(slots->back() + placed);
    loose->push_back(loose->back() + free);
  }
  return slots->back() == p.slots && loose->back() == p.loose;
}

MadePanels make_panels(const SparseMatrix& s) {
  SparsePanels sizes;
  sizes.m = s.m;
  sizes.n = s.n;
  MadePanels made;
  const Rows rows(s);
  made.order = rows.order(sizes.bundles() * kBundle);
  for (int64_t b = 0; b < sizes.bundles(); ++b) {
    Bundle bundle;
    Progress next{};
    for (size_t r = 0; r < next.size(); ++r)
      rows.read(made.order[static_cast<size_t>(b * kBundle) + r], &bundle.rows[r]);
    for (int64_t c = 0; c < sizes.chunks(); ++c) {
      const int half_steps = bundle.best_steps(next, c, sizes.windows());
      made.half_steps.push_back(static_cast<uint8_t>(half_steps));
      bundle.go(next, c, sizes.windows(), half_steps, &made);
    }
    for (size_t g = 0; g < kPanelGroups; ++g) {
      size_t longest = 0;
      for (size_t l = 0; l < kPanelLanes; ++l) longest = std::max(longest, bundle.loose[g * kPanelLanes + l].size());
      made.loose_steps.push_back(static_cast<int32_t>(longest));
      for (size_t step = 0; step < longest; ++step) {
        for (size_t l = 0; l < kPanelLanes; ++l) {
          const std::vector<Entry>& row = bundle.loose[g * kPanelLanes + l];
          made.loose_values.push_back(step < row.size() ? row[step].value : 0);
          made.loose_columns.push_back(step < row.size() ? row[step].column : 0);
        }
      }
    }
  }
  return made;
}

}  // namespace tensorcomp
