// How a chain is laid out in shared memory and cut into tiles; host code without CUDA.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/cuda/chain.h"
#include "kernels/cuda/chain_program.h"
#include "kernels/cuda/plan.h"

namespace tensorcomp::cuda {

namespace detail {

// No device has so much shared memory: beyond it nothing fits, and arithmetic in 32 bits could overflow.
constexpr int64_t kMostStateBytes = 1 << 20;

inline int64_t round_up(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }

// One state: bytes from each of its dims to the next, and of a row of x.
struct StateLayout {
  std::vector<int64_t> stride;
  int64_t row_bytes = 0, pitch = 0;
};

// The left matrix of `step`. An odd number of 16 bytes from row to row: eight rows read together are in different
// banks.
inline StateLayout left_matrix(const std::vector<int64_t>& dims, const ProgramStep& step, int64_t bytes) {
  StateLayout layout;
  layout.stride.resize(dims.size());
  int64_t at = bytes;
  for (size_t i = step.contracted.size(); i-- > 0;) {
    layout.stride[step.contracted[i]] = at;
    at = std::min(at * dims[step.contracted[i]], kMostStateBytes);
  }
  layout.pitch = ceil_div(at, 16) % 2 == 1 ? round_up(at, 16) : round_up(at, 16) + 16;
  at = layout.pitch;
  for (size_t i = step.kept.size(); i-- > 0;) {
    layout.stride[step.kept[i]] = at;
    at = std::min(at * dims[step.kept[i]], kMostStateBytes);
  }
  layout.row_bytes = at;
  return layout;
}

inline StateLayout dense_row(const std::vector<int64_t>& dims, int64_t bytes) {
  StateLayout layout;
  layout.stride.resize(dims.size());
  int64_t at = bytes;
  for (size_t i = dims.size(); i-- > 0;) {
    layout.stride[i] = at;
    at = std::min(at * dims[i], kMostStateBytes);
  }
  layout.pitch = layout.row_bytes = round_up(at, 16);
  return layout;
}

// Digits that follow each other become one; false where there are too many all the same.
inline bool digit_map(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, DigitMap& map) {
  map = DigitMap();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 1) continue;
    const int last = map.count - 1;
    if (last >= 0 && map.stride[last] == strides[i] * sizes[i]) {
      map.size[last] *= static_cast<int32_t>(sizes[i]);
      map.stride[last] = static_cast<int32_t>(strides[i]);
      continue;
    }
    if (map.count == kMostChainDigits) return false;
    map.size[map.count] = static_cast<int32_t>(sizes[i]);
    map.stride[map.count++] = static_cast<int32_t>(strides[i]);
  }
  return true;
}

inline bool multiples(const DigitMap& map, int32_t count, int64_t unit) {
  return std::all_of(map.stride, map.stride + count, [unit](int32_t stride) { return stride % unit == 0; });
}

// Whether elements that share `unit` bytes of the index lie side by side and aligned.
inline bool runs_of(const DigitMap& map, int64_t unit, int64_t bytes) {
  const int last = map.count - 1;
  return last >= 0 && map.stride[last] == bytes && map.size[last] * bytes % unit == 0 && multiples(map, last, unit);
}

// The dims of a row of x in two halves of about as many places.
inline bool split_input(const std::vector<int64_t>& dims, const StateLayout& state, int64_t bytes, ChainParams& p) {
  size_t cut = dims.size();
  int64_t low = 1;
  while (cut > 0 && low * dims[cut - 1] * low * dims[cut - 1] <= 4 * product(dims)) low *= dims[--cut];
  const auto middle = static_cast<int64_t>(cut);
  const auto part = [&](const std::vector<int64_t>& all, bool high) {
    return high ? std::vector<int64_t>(all.begin(), all.begin() + middle)
                : std::vector<int64_t>(all.begin() + middle, all.end());
  };
  p.low_count = static_cast<int32_t>(low);
  p.high_count = static_cast<int32_t>(product(dims) / low);
  p.low = Divider(p.low_count);
  p.features = Divider(p.in);
  DigitMap whole;
  if (!digit_map(dims, state.stride, whole) || !digit_map(part(dims, true), part(state.stride, true), p.to_high) ||
      !digit_map(part(dims, false), part(state.stride, false), p.to_low)) {
    return false;
  }
  p.in_pieces = runs_of(whole, 16, bytes);
  return true;
}

}  // namespace detail

// Bytes of a step's packed matrix.
inline PackParams chain_matrix(const Program& program, size_t step, int64_t bytes) {
  PackParams p;
  p.bytes = static_cast<int32_t>(bytes);
  p.k = static_cast<int32_t>(program.columns(step));
  p.n = static_cast<int32_t>(program.rows(step));
  p.stride_k = 1;
  p.stride_n = p.k;
  return p;
}

inline int64_t chain_packed_bytes(const Program& program, size_t step, int64_t bytes) {
  return packed_shape(chain_matrix(program, step, bytes)).fragments * 512;
}

// Everything but pointers, strides of x and the tile; nothing where the kernel has no room for so many steps or dims,
// or no device the memory for so large a row.
inline std::optional<ChainParams> chain_params(const Program& program, Element element) {
  using namespace detail;
  const int64_t bytes = element_bytes(element);
  const std::vector<std::vector<int64_t>> dims = program.states();
  const size_t steps = program.steps.size();
  if (steps > kMostChainSteps) return {};
  std::vector<StateLayout> layout;
  for (size_t i = 0; i <= steps; ++i) {
    if (product(dims[i]) * bytes >= kMostStateBytes) return {};
    layout.push_back(i < steps ? left_matrix(dims[i], program.steps[i], bytes) : dense_row(dims[i], bytes));
    if (layout[i].row_bytes >= kMostStateBytes) return {};
  }
  ChainParams p;
  p.element = element;
  p.in = static_cast<int32_t>(program.in());
  p.out = static_cast<int32_t>(program.out());
  p.in_row_bytes = static_cast<int32_t>(layout[0].row_bytes);
  p.out_row_bytes = static_cast<int32_t>(layout[steps].row_bytes);
  p.steps = p.run = static_cast<int32_t>(steps);
  if (!split_input(dims[0], layout[0], bytes, p)) return {};
  int64_t table = p.high_count + p.low_count, fragments = 0;
  for (size_t i = 0; i < steps; ++i) {
    const ProgramStep& from = program.steps[i];
    const StateLayout& next = layout[i + 1];
    const std::vector<int64_t> ascending = Program::kept_in_order(from, dims[i].size());
    std::vector<int64_t> place(from.order.size()), kept_sizes, kept_strides, brought_strides;
    for (size_t to = 0; to < from.order.size(); ++to) place[from.order[to]] = static_cast<int64_t>(to);
    for (const int64_t q : from.kept) {
      const auto j = std::find(ascending.begin(), ascending.end(), q) - ascending.begin();
      kept_sizes.push_back(dims[i][q]);
      kept_strides.push_back(next.stride[place[j]]);
    }
    for (size_t j = from.kept.size(); j < place.size(); ++j) brought_strides.push_back(next.stride[place[j]]);
    ChainStep& to = p.step[i];
    to.k = static_cast<int32_t>(program.columns(i));
    to.n = static_cast<int32_t>(program.rows(i));
    to.kept = static_cast<int32_t>(product(kept_sizes));
    to.rows = Divider(to.kept);
    to.pitch = static_cast<int32_t>(layout[i].pitch);
    to.row_bytes = static_cast<int32_t>(next.row_bytes);
    to.table = static_cast<int32_t>(table);
    to.fragments = fragments;
    if (!digit_map(kept_sizes, kept_strides, to.to_m) || !digit_map(from.brought, brought_strides, to.to_n)) return {};
    to.pairs = runs_of(to.to_n, 2 * bytes, bytes) && multiples(to.to_m, to.to_m.count, 2 * bytes);
    table += to.kept + to.n;
    fragments += chain_packed_bytes(program, i, bytes);
    if (table * 4 > kMostStateBytes) return {};
  }
  return p;
}

namespace detail {

// Bytes of shared memory for so many rows, the places in it filled in. Where a step reads its left matrix in whole
// steps of 32 bytes it reads up to 16 bytes too far.
inline int64_t chain_shared(ChainParams& p, int32_t rows) {
  int64_t even = 0, odd = 0, table = p.high_count + p.low_count;
  for (int32_t i = 0; i <= p.steps; ++i) {
    const int64_t row = i == 0 ? p.in_row_bytes : p.step[i - 1].row_bytes;
    (i % 2 == 0 ? even : odd) = std::max(i % 2 == 0 ? even : odd, rows * row + 16);
    if (i < p.steps) table += p.step[i].kept + p.step[i].n;
  }
  p.tile.rows = rows;
  p.tile.odd = static_cast<int32_t>(std::min(even, kMostStateBytes));
  p.tile.tables = static_cast<int32_t>(std::min(even + odd, kMostStateBytes));
  return p.tile.tables + 4 * table;
}

inline int32_t chain_resident(const ChainTile& tile, const DeviceLimits& device) {
  constexpr int32_t kReserved = 1024, kWarps = 16;  // of 128 registers a thread
  return std::max(1, std::min(device.shared_per_multiprocessor / (tile.shared_bytes + kReserved), kWarps / tile.warps));
}

// Predicted clocks of a launch, as predicted_clocks of the bottleneck: rough figures that only rank tiles.
inline double chain_clocks(const ChainParams& p, const DeviceLimits& device) {
  constexpr double kClocksPerProduct = 2.0, kClocksPerStore = 8.0, kBytesPerClock = 20.0;
  constexpr double kLatency = 1500.0, kLatencyOfStep = 600.0;
  const int32_t bytes = element_bytes(p.element), rows = p.tile.rows, warps = p.tile.warps;
  const double products = p.element == Element::kFloat32 ? 6.0 : p.element == Element::kTf32 ? 2.0 : 1.0;
  double matrix = 0;
  for (int32_t i = 0; i < p.run; ++i) {
    const ChainStep& s = p.step[i];
    const int64_t blocks = ceil_div(static_cast<int64_t>(rows) * s.kept, 16) * ceil_div(s.n, 8 * p.tile.blocks_n);
    const double columns = std::min<double>(8.0 * p.tile.blocks_n, round_up(s.n, 16)) / 8;
    const double each = columns * (kClocksPerProduct * products * ((s.k + 15) / 16) + kClocksPerStore);
    // What is not shared out evenly leaves warps waiting.
    matrix += static_cast<double>(round_up(blocks, warps)) * each;
  }
  const double memory = static_cast<double>(rows) * (p.in + p.out) * bytes / kBytesPerClock;
  const int64_t tiles = ceil_div(std::max<int64_t>(p.rows, 1), rows);
  const int64_t together = std::min<int64_t>(chain_resident(p.tile, device), ceil_div(tiles, device.multiprocessors));
  const double alone = kLatency + kLatencyOfStep * p.run + matrix + memory;
  const double round =
      std::max({static_cast<double>(together) * matrix, static_cast<double>(together) * memory, alone});
  return static_cast<double>(ceil_div(tiles, device.multiprocessors * together)) * round;
}

}  // namespace detail

// Chooses rows and warps of a tile; false where the states of one row do not fit the device's shared memory.
inline bool plan_chain(ChainParams& p, const DeviceLimits& device) {
  int32_t widest = 0;
  for (int32_t i = 0; i < p.steps; ++i) widest = std::max(widest, p.step[i].n);
  p.tile = ChainTile();
  p.tile.blocks_n = widest <= 32 || p.element == Element::kFloat32 ? 4 : 8;
  ChainTile best;
  double least = -1;
  for (int32_t rows = 1; rows <= 128; rows *= 2) {
    // More rows than there are would only cost memory.
    if (rows > 1 && rows / 2 >= std::max<int64_t>(p.rows, 1)) break;
    const int64_t shared = detail::chain_shared(p, rows);
    if (shared > device.shared_per_block) break;
    p.tile.shared_bytes = static_cast<int32_t>(shared);
    for (const int32_t warps : {8, 4}) {
      p.tile.warps = warps;
      const double clocks = detail::chain_clocks(p, device);
      if (least < 0 || clocks < least) {
        least = clocks;
        best = p.tile;
      }
    }
  }
  p.tile = best;
  return least >= 0;
}

inline int64_t chain_blocks(const ChainParams& p, const DeviceLimits& device) {
  return std::min<int64_t>(detail::ceil_div(p.rows, p.tile.rows),
                           static_cast<int64_t>(device.multiprocessors) * detail::chain_resident(p.tile, device));
}

// Whether the kernel takes a program, forward and backward.
inline bool chain_fits(const Program& program, Element element, const DeviceLimits& device) {
  std::optional<ChainParams> forward = chain_params(program, element);
  std::optional<ChainParams> back = chain_params(transposed_program(program), element);
  return forward.has_value() && back.has_value() && plan_chain(*forward, device) && plan_chain(*back, device);
}

}  // namespace tensorcomp::cuda
