// A chain of products as the ops take it, and the way back that gradients go. Host code, standard library only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace tensorcomp::cuda {

// Sums over the dims `contracted`, which row-major index the columns of the matrix, and brings the dims `brought`, its
// rows, behind the kept ones; `order` then permutes them. `kept` names the others in the order in which they are rows
// of the left matrix.
struct ProgramStep {
  std::vector<int64_t> contracted, brought, order, kept;
};

// Elements of a row between any two steps, and of a matrix, as on the CPU.
constexpr int64_t kMostChainElements = int64_t{1} << 40;

// Of sizes >= 1; one more than kMostChainElements where it would be more than those.
inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) {
    if (size > kMostChainElements / result) return kMostChainElements + 1;
    result *= size;
  }
  return result;
}

struct Program {
  std::vector<int64_t> dims;
  std::vector<ProgramStep> steps;

  int64_t in() const { return product(dims); }
  int64_t out() const { return product(states().back()); }

  // Dims before each step, and at the end.
  std::vector<std::vector<int64_t>> states() const {
    std::vector<std::vector<int64_t>> found{dims};
    for (const ProgramStep& step : steps) {
      std::vector<int64_t> arranged, next;
      for (const int64_t place : kept_in_order(step, found.back().size())) arranged.push_back(found.back()[place]);
      arranged.insert(arranged.end(), step.brought.begin(), step.brought.end());
      for (const int64_t place : step.order) next.push_back(arranged[place]);
      found.push_back(next);
    }
    return found;
  }

  int64_t columns(size_t i) const {
    int64_t k = 1;
    const std::vector<int64_t> sizes = states()[i];
    for (const int64_t place : steps[i].contracted) k *= sizes[place];
    return k;
  }
  int64_t rows(size_t i) const { return product(steps[i].brought); }

  static std::vector<int64_t> kept_in_order(const ProgramStep& step, size_t dims) {
    std::vector<int64_t> kept;
    for (int64_t place = 0; place < static_cast<int64_t>(dims); ++place) {
      if (std::find(step.contracted.begin(), step.contracted.end(), place) == step.contracted.end()) {
        kept.push_back(place);
      }
    }
    return kept;
  }
};

// Reads what tensorcomp_ext/ops/_chain_program.py writes; nothing where it is no program, or one too large.
inline std::optional<Program> decode_program(const std::vector<int64_t>& numbers) {
  size_t at = 0;
  const auto list = [&](std::vector<int64_t>& to) {
    if (at >= numbers.size()) return false;
    const int64_t count = numbers[at++];
    if (count < 0 || count > static_cast<int64_t>(numbers.size() - at)) return false;
    to.assign(numbers.begin() + static_cast<int64_t>(at), numbers.begin() + static_cast<int64_t>(at) + count);
    at += static_cast<size_t>(count);
    return true;
  };
  const auto positive = [](const std::vector<int64_t>& sizes) {
    return std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 1; });
  };
  // Each of `places` once and below `count`.
  const auto distinct = [](std::vector<int64_t> places, size_t count) {
    std::sort(places.begin(), places.end());
    return std::adjacent_find(places.begin(), places.end()) == places.end() &&
           (places.empty() || (places.front() >= 0 && places.back() < static_cast<int64_t>(count)));
  };
  Program program;
  if (!list(program.dims) || program.dims.empty() || !positive(program.dims) || at >= numbers.size()) return {};
  const int64_t steps = numbers[at++];
  size_t dims = program.dims.size();
  for (int64_t i = 0; i < steps; ++i) {
    ProgramStep step;
    if (!list(step.contracted) || !list(step.brought) || !list(step.order)) return {};
    if (step.contracted.empty() || !distinct(step.contracted, dims) || !positive(step.brought)) return {};
    step.kept = Program::kept_in_order(step, dims);
    dims = step.kept.size() + step.brought.size();
    if (step.order.size() != dims || !distinct(step.order, dims)) return {};
    program.steps.push_back(step);
  }
  if (program.steps.empty() || at != numbers.size()) return {};
  const auto countable = [](int64_t elements) { return elements <= kMostChainElements; };
  for (const std::vector<int64_t>& sizes : program.states()) {
    if (!countable(product(sizes))) return {};
  }
  for (size_t i = 0; i < program.steps.size(); ++i) {
    if (!countable(product({program.rows(i), program.columns(i)}))) return {};
  }
  return program;
}

// The program that takes the gradient of the result to that of x, each matrix transposed, the last first. Rows of its
// left matrices are in the order of the step's own ones.
inline Program transposed_program(const Program& forward) {
  const std::vector<std::vector<int64_t>> states = forward.states();
  Program back;
  back.dims = states.back();
  for (size_t i = forward.steps.size(); i-- > 0;) {
    const ProgramStep& step = forward.steps[i];
    const size_t kept = step.kept.size();
    const std::vector<int64_t> ascending = Program::kept_in_order(step, states[i].size());
    // Where the dims that were arranged, kept and then brought, have come to lie.
    std::vector<int64_t> place(step.order.size());
    for (size_t to = 0; to < step.order.size(); ++to) place[step.order[to]] = static_cast<int64_t>(to);
    ProgramStep turned;
    turned.contracted.assign(place.begin() + static_cast<int64_t>(kept), place.end());
    for (const int64_t q : step.contracted) turned.brought.push_back(states[i][q]);
    for (const int64_t q : step.kept) {
      turned.kept.push_back(place[std::find(ascending.begin(), ascending.end(), q) - ascending.begin()]);
    }
    std::vector<int64_t> sorted(place.begin(), place.begin() + static_cast<int64_t>(kept));
    std::sort(sorted.begin(), sorted.end());
    for (int64_t q = 0; q < static_cast<int64_t>(states[i].size()); ++q) {
      const auto found = std::find(step.contracted.begin(), step.contracted.end(), q);
      if (found != step.contracted.end()) {
        turned.order.push_back(static_cast<int64_t>(kept) + (found - step.contracted.begin()));
      } else {
        const int64_t now = place[std::find(ascending.begin(), ascending.end(), q) - ascending.begin()];
        turned.order.push_back(std::find(sorted.begin(), sorted.end(), now) - sorted.begin());
      }
    }
    back.steps.push_back(turned);
  }
  return back;
}

}  // namespace tensorcomp::cuda
