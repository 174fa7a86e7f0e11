// The embedding kernels in the emulator against plain loops in double: rows, gradients of the cores, rings, padding,
// repeated and skewed indices, small devices, and threads running in several orders.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "check.h"
#include "cuda/cuda_problem.h"
#include "kernels/cuda/embedding_launch.h"
#include "kernels/cuda/embedding_plan.h"

using namespace tensorcomp::cuda;
using namespace tensorcomp::test;
using emulation::Order;

namespace {

using Doubles = std::vector<double>;

struct Case {
  std::vector<int32_t> vocab, dim, rank;  // rank: of the ring, then behind each core but the last
  int64_t count;
  int64_t rows;     // of the table; at most the product of vocab
  int64_t padding;  // or -1
  int64_t choice;   // indices are drawn from so many; 1: all the same
};

const Case kCases[] = {
    {{7}, {5}, {1}, 9, 7, -1, 7},
    {{6}, {3}, {4}, 11, 6, 2, 6},
    {{4, 5}, {3, 2}, {1, 6}, 40, 18, 0, 18},
    {{5, 3, 4}, {4, 4, 4}, {1, 16, 16}, 70, 60, 7, 60},
    {{5, 3, 4}, {2, 3, 5}, {3, 4, 2}, 50, 57, -1, 57},
    {{10, 10, 10}, {4, 8, 2}, {1, 7, 9}, 300, 1000, 3, 4},
    {{3, 2, 2, 3}, {2, 2, 3, 2}, {2, 3, 4, 3}, 100, 36, -1, 36},
    {{2, 3}, {16, 9}, {1, 1}, 65, 6, -1, 1},
    {{3, 2, 2}, {4, 4, 4}, {17, 8, 8}, 20, 12, -1, 12},  // a ring too large for one pass on a small device
    {{2, 2, 2, 2, 2, 2, 2, 2}, {1, 2, 1, 2, 1, 2, 1, 2}, {1, 2, 3, 2, 1, 4, 2, 3}, 33, 256, 255, 256},
};

struct EmbeddingProblem {
  EmbeddingProblem(const Case& the_case, Element element, bool is_wide, unsigned seed) : c(the_case), wide(is_wide) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    const size_t cores = c.vocab.size();
    for (size_t k = 0; k < cores; ++k) {
      const int64_t in = c.rank[k], out = c.rank[(k + 1) % cores];
      core.emplace_back(element, in * c.vocab[k] * c.dim[k] * out);
      gradient.emplace_back(element, core.back().size());
      dim *= c.dim[k];
      for (int64_t i = 0; i < core[k].size(); ++i)
        core[k].set(i, normal(generator) / std::sqrt(static_cast<double>(in)));
    }
    for (int64_t n = 0; n < c.count; ++n) {
      indices.push_back(static_cast<int64_t>(generator() % static_cast<uint64_t>(c.choice)) * (c.rows / c.choice));
      narrow.push_back(static_cast<int32_t>(indices.back()));
    }
    grad.emplace_back(element, c.count * dim);
    y.emplace_back(element, c.count * dim);
    for (int64_t i = 0; i < c.count * dim; ++i) grad[0].set(i, normal(generator));
    p.element = element;
    p.count = c.count;
    p.wide = wide;
    p.indices = wide ? static_cast<const void*>(indices.data()) : narrow.data();
    p.rows = c.rows;
    p.padding = c.padding;
    p.cores = static_cast<int32_t>(cores);
    p.y = y[0].get();
    p.grad = grad[0].get();
    for (size_t k = 0; k < cores; ++k) {
      p.core[k].rank_in = c.rank[k];
      p.core[k].vocab = c.vocab[k];
      p.core[k].dim = c.dim[k];
      p.core[k].rank_out = c.rank[(k + 1) % cores];
      p.core[k].data = core[k].get();
    }
  }

  // Calls body(n, d, elements of the cores) for every product whose sum is element d of row n.
  template <typename Body>
  void products(Body&& body) const {
    const size_t cores = core.size();
    for (int64_t n = 0; n < c.count; ++n) {
      if (indices[n] == c.padding) continue;
      std::vector<int64_t> digit(cores), place(cores), rank(cores + 1);
      int64_t rest = indices[n];
      for (size_t k = cores; k-- > 0; rest /= c.vocab[k]) digit[k] = rest % c.vocab[k];
      int64_t ranks = 1;
      for (const int32_t r : c.rank) ranks *= r;
      for (int64_t d = 0; d < dim; ++d) {
        for (int64_t r = 0; r < ranks; ++r) {
          int64_t left = r, of_dim = d;
          for (size_t k = cores; k-- > 0; left /= c.rank[k]) rank[k] = left % c.rank[k];
          rank[cores] = rank[0];
          for (size_t k = cores; k-- > 0; of_dim /= c.dim[k]) {
            place[k] = ((rank[k] * c.vocab[k] + digit[k]) * c.dim[k] + of_dim % c.dim[k]) * c.rank[(k + 1) % cores] +
                       rank[k + 1];
          }
          body(n, d, place);
        }
      }
    }
  }

  Case c;
  bool wide;
  int64_t dim = 1;
  std::vector<Array> core, gradient, grad, y;
  std::vector<int64_t> indices;
  std::vector<int32_t> narrow;
  EmbeddingParams p;
};

bool close(const Doubles& found, const Doubles& expected, double limit) {
  const double error = relative_error(found, expected);
  if (!(error < limit)) std::fprintf(stderr, "relative error %.2e, limit %.2e: ", error, limit);
  return error < limit;
}

double tolerance(Element element) {
  return element == Element::kFloat32 ? 1e-5 : element == Element::kFloat16 ? 2e-3 : 1e-2;
}

void check_forward(EmbeddingProblem& problem, const DeviceLimits& device) {
  CHECK(plan_embedding(problem.p, device, false));
  CHECK(launch_embedding(problem.p, nullptr) == cudaSuccess);
  Doubles expected(problem.c.count * problem.dim);
  problem.products([&](int64_t n, int64_t d, const std::vector<int64_t>& place) {
    double product = 1;
    for (size_t k = 0; k < place.size(); ++k) product *= problem.core[k][place[k]];
    expected[n * problem.dim + d] += product;
  });
  CHECK(close(values(problem.y[0]), expected, tolerance(problem.p.element)));
}

Doubles check_backward(EmbeddingProblem& problem, const DeviceLimits& device, int mask, int64_t chunk) {
  EmbeddingParams& p = problem.p;
  const size_t cores = problem.core.size();
  const int64_t count = problem.c.count;
  CHECK(plan_embedding(p, device, true));
  p.chunk = chunk;
  const int64_t chunks = (count + chunk - 1) / chunk;
  std::vector<int32_t> digits(cores * count), sorted(cores * count);
  std::vector<int64_t> order(cores * count);
  std::vector<Array> partial;
  for (size_t k = 0; k < cores; ++k) {
    p.core[k].gradient = mask >> k & 1 ? problem.gradient[k].get() : nullptr;
    partial.emplace_back(Element::kFloat32, 2 * chunks * p.core[k].slice());
    p.core[k].partial = static_cast<float*>(partial[k].get());
  }
  p.digits = digits.data();
  CHECK(launch_embedding_digits(p, nullptr) == cudaSuccess);
  size_t slot = 0;
  for (size_t k = 0; k < cores; ++k) {
    if (p.core[k].gradient == nullptr) continue;
    const int32_t* from = digits.data() + slot * count;
    int64_t* to = order.data() + slot * count;
    std::iota(to, to + count, int64_t{0});
    std::stable_sort(to, to + count, [&](int64_t a, int64_t b) { return from[a] < from[b]; });
    for (int64_t n = 0; n < count; ++n) sorted[slot * count + n] = from[to[n]];
    p.core[k].order = to;
    p.core[k].sorted = sorted.data() + slot++ * count;
  }
  CHECK(launch_embedding_backward(p, nullptr) == cudaSuccess);
  std::vector<Doubles> expected;
  for (const Array& core : problem.core) expected.emplace_back(core.size());
  problem.products([&](int64_t n, int64_t d, const std::vector<int64_t>& place) {
    for (size_t k = 0; k < cores; ++k) {
      double product = problem.grad[0][n * problem.dim + d];
      for (size_t other = 0; other < cores; ++other) product *= other == k ? 1 : problem.core[other][place[other]];
      expected[k][place[k]] += product;
    }
  });
  Doubles all;
  for (size_t k = 0; k < cores; ++k) {
    if (p.core[k].gradient == nullptr) continue;
    const Doubles found = values(problem.gradient[k]);
    CHECK(close(found, expected[k], tolerance(p.element)));
    all.insert(all.end(), found.begin(), found.end());
  }
  return all;
}

const DeviceLimits kDevices[] = {{2, 227 * 1024, 228 * 1024}, {132, 163 * 1024, 164 * 1024}, {1, 24 * 1024, 64 * 1024}};

void test_cases() {
  int turn = 0;
  char text[80];
  for (size_t i = 0; i < std::size(kCases); ++i) {
    for (const Element element : {Element::kFloat32, Element::kFloat16, Element::kBfloat16}) {
      ++turn;
      std::snprintf(text, sizeof text, "case %zu, element %d", i, static_cast<int>(element));
      subject() = text;
      emulation::set_order(static_cast<Order>(turn % 3));
      EmbeddingProblem problem(kCases[i], element, turn % 2 == 0, static_cast<unsigned>(turn));
      const DeviceLimits& device = kDevices[turn / 3 % 3];
      check_forward(problem, device);
      if (problem.c.rank[0] == 17) {
        CHECK(plan_embedding(problem.p, kDevices[2], false) && problem.p.part < 17);
        check_forward(problem, kDevices[2]);
        check_backward(problem, kDevices[2], 0xff, 8);
      }
      for (const int64_t chunk : {8, 1, 64}) check_backward(problem, device, 0xff, chunk);
      check_backward(problem, device, 1 << (turn % static_cast<int>(kCases[i].vocab.size())), 5);
    }
  }
  subject() = "";
}

// The same bits whatever order threads run in.
void test_reproducible() {
  std::vector<Doubles> found;
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulation::set_order(order);
    EmbeddingProblem problem(kCases[5], Element::kFloat32, true, 5);
    found.push_back(check_backward(problem, kDevices[0], 0xff, 8));
  }
  CHECK(found[0] == found[1]);
  CHECK(found[0] == found[2]);
}

// An index out of range stops the launch, in both directions; the last one in range does not.
void test_out_of_range() {
  for (const int64_t wrong : {int64_t{-1}, int64_t{18}, int64_t{1} << 40}) {
    EmbeddingProblem problem(kCases[2], Element::kFloat32, true, 5);
    CHECK(plan_embedding(problem.p, kDevices[0], false));
    problem.indices[3] = 17;
    CHECK(launch_embedding(problem.p, nullptr) == cudaSuccess);
    problem.indices[3] = wrong;
    CHECK(launch_embedding(problem.p, nullptr) == cudaErrorAssert);
    std::vector<int32_t> digits(problem.c.count);
    problem.p.core[0].gradient = problem.gradient[0].get();
    problem.p.digits = digits.data();
    CHECK(launch_embedding_digits(problem.p, nullptr) == cudaErrorAssert);
  }
}

void test_refusals() {
  EmbeddingProblem problem(kCases[3], Element::kFloat32, true, 5);
  CHECK(!plan_embedding(problem.p, {132, 2048, 4096}, true));
  problem.p.core[0].dim = 1 << 20;
  CHECK(!plan_embedding(problem.p, kDevices[0], false));
}

}  // namespace

int main() {
  test_cases();
  test_reproducible();
  test_out_of_range();
  test_refusals();
  return result("cuda_embedding");
}
