// The kernels of the low-rank + sparse weight in the emulator against plain loops in double: ranks, sizes around tiles,
// masks of both kinds, layouts that no wide copy fits, gradients over several splits, threads in several orders.
#include <iterator>

#include "cuda/lowrank_sparse_problem.h"

using namespace tensorcomp::cuda;
using namespace tensorcomp::test;
using emulation::Order;

namespace {

struct Case {
  int64_t m, n;
  int32_t rank;
  Lie lie;
  double kept;
};

const Case kCases[] = {
    {1, 1, 1, Lie::kDense, 1.0},    {9, 13, 3, Lie::kDense, 0.3},     {33, 64, 16, Lie::kDense, 0.1},
    {128, 128, 32, Lie::kDense, 0}, {130, 136, 40, Lie::kDense, 0.5}, {70, 300, 0, Lie::kDense, 0.2},
    {40, 72, 17, Lie::kSlice, 0.3}, {61, 66, 129, Lie::kTurned, 0.3}, {131, 137, 20, Lie::kPadded, 0.1},
    {5, 530, 70, Lie::kDense, 0.1}, {300, 6, 35, Lie::kPadded, 0.9},
};

struct Problem {
  Problem(const Case& c, Element element, bool bits, unsigned seed)
      : generator(seed),
        a(element, factors_of(c), c.m, c.rank),
        b(element, factors_of(c), c.rank, c.n),
        values(element, c.lie, c.m, c.n),
        grad(element, c.lie, c.m, c.n),
        mask(bits, c.lie, c.m, c.n, c.kept, generator) {
    for (Matrix* matrix : {&a, &b, &values, &grad}) matrix->fill(generator, matrix == &a ? 0.3 : 1.0);
    // What the mask hides is not looked at.
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = 0; j < c.n; ++j)
        if (!mask(i, j)) values.array.set(values.place(i, j), std::nan(""));
  }
  static Lie factors_of(const Case& c) { return c.lie == Lie::kTurned ? Lie::kSlice : c.lie; }

  std::mt19937 generator;
  Matrix a, b, values, grad;
  Mask mask;
};

Doubles check_forward(const Case& c, const Problem& t, Element element, bool masking, const DeviceLimits& device) {
  WeightParams p;
  p.element = element;
  p.m = c.m;
  p.n = c.n;
  p.rank = c.rank;
  p.masking = masking;
  p.bits = t.mask.bits;
  p.a = t.a.source();
  p.b = t.b.source();
  p.values = t.values.source();
  p.mask = t.mask.source(weight_columns(element_bytes(element)));
  CHECK(plan_weight(p, device) && p.shared_bytes <= device.shared_per_block);
  const Result w(element, c.m * c.n);
  p.w = w.get();
  CHECK(launch_weight(p, nullptr) == cudaSuccess);
  Doubles expected;
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < c.rank; ++r) sum += t.a(i, r) * t.b(r, j);
      if (t.mask(i, j)) sum = (masking ? 0 : sum) + t.values(i, j);
      expected.push_back(sum);
    }
  }
  CHECK(close(w, expected, forward_limit(element)));
  return w.values();
}

void check_values_gradient(const Case& c, const Problem& t, Element element) {
  MaskedParams p;
  p.element = element;
  p.m = c.m;
  p.n = c.n;
  p.bits = t.mask.bits;
  p.grad = t.grad.source();
  p.mask = t.mask.source(weight_columns(element_bytes(element)));
  const Result out(element, c.m * c.n);
  p.out = out.get();
  CHECK(launch_masked(p, nullptr) == cudaSuccess);
  Doubles expected;
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) expected.push_back(t.mask(i, j) ? t.grad(i, j) : 0);
  CHECK(close(out, expected, 0));
}

Doubles check_product(const Case& c, const Problem& t, Element element, bool of_a, const DeviceLimits& device) {
  MaskedProductParams p;
  p.element = element;
  p.of_a = of_a;
  p.bits = t.mask.bits;
  p.m = of_a ? c.m : c.rank;
  p.n = of_a ? c.rank : c.n;
  p.summed = of_a ? c.n : c.m;
  p.grad = t.grad.source();
  const int32_t bytes = element_bytes(element);
  p.mask = t.mask.source(of_a ? kChunkBytes / bytes : weight_columns(bytes));
  p.other = of_a ? t.b.source() : t.a.source();
  CHECK(plan_masked_product(p, device) && p.shared_bytes <= device.shared_per_block);
  const Array partial(Element::kFloat32, p.splits * p.m * p.n);
  p.partial = static_cast<float*>(partial.get());
  const Result out(element, p.m * p.n);
  CHECK(launch_masked_product(p, out.get(), nullptr) == cudaSuccess);
  Doubles expected(static_cast<size_t>(p.m * p.n));
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      if (t.mask(i, j)) continue;
      for (int64_t r = 0; r < c.rank; ++r) {
        const int64_t to = of_a ? i * c.rank + r : r * c.n + j;
        expected[static_cast<size_t>(to)] += t.grad(i, j) * (of_a ? t.b(r, j) : t.a(i, r));
      }
    }
  }
  // A sum of rounded products, where rounding to TF32 weighs as in the forward.
  CHECK(close(out, expected, forward_limit(element)));
  return out.values();
}

void test_cases() {
  int turn = 0;
  char text[80];
  for (size_t i = 0; i < std::size(kCases); ++i) {
    const Case& c = kCases[i];
    for (const Element element : kElements) {
      // Both kinds of mask and both modes meet every element and every case, in turn.
      ++turn;
      const bool bits = (turn + static_cast<int>(i)) % 2 == 0, masking = (turn / 2 + static_cast<int>(i)) % 2 == 0;
      std::snprintf(text, sizeof text, "case %zu, element %d, bits %d", i, static_cast<int>(element), bits);
      subject() = text;
      emulation::set_order(static_cast<Order>(turn % 3));
      const DeviceLimits& device = kDevices[turn / 3 % std::size(kDevices)];
      const Problem problem(c, element, bits, static_cast<unsigned>(turn));
      check_forward(c, problem, element, masking, device);
      check_values_gradient(c, problem, element);
      if (c.rank == 0) continue;
      for (const bool of_a : {false, true}) check_product(c, problem, element, of_a, device);
    }
  }
  subject() = "";
}

// The same bits whatever order threads run in.
void test_reproducible() {
  const Case c{35, 600, 20, Lie::kDense, 0.3};
  const Problem problem(c, Element::kFloat32, true, 5);
  std::vector<Doubles> found[3];
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulation::set_order(order);
    found[0].push_back(check_forward(c, problem, Element::kFloat32, true, kDevices[0]));
    for (const bool of_a : {false, true}) {
      found[1 + of_a].push_back(check_product(c, problem, Element::kFloat32, of_a, kDevices[0]));
    }
  }
  for (const auto& runs : found) CHECK(runs[0] == runs[1] && runs[0] == runs[2]);
}

// As wide copies as there can be, and none wider.
void test_widths() {
  alignas(16) static const char memory[64] = {};
  CHECK(matrix_source(memory, 3, 16, 16, 1, 2).width == 16);
  CHECK(matrix_source(memory, 3, 16, 20, 1, 2).width == 8);
  CHECK(matrix_source(memory + 2, 3, 16, 16, 1, 2).width == 0);
  CHECK(matrix_source(memory + 4, 1, 16, 3, 1, 4).width == 4);
  CHECK(matrix_source(memory, 3, 2, 1, 3, 4).width == 0);
  CHECK(mask_source(memory, true, 3, 256, 32, 1, 128).width == 16);
  CHECK(mask_source(memory, true, 3, 256, 32, 1, 64).width == 8);
  CHECK(mask_source(memory, true, 3, 256, 32, 1, 16).width == 0);
}

void test_refusals() {
  WeightParams p;
  p.m = p.n = 64;
  p.rank = 8;
  CHECK(!plan_weight(p, {132, 48 * 1024, 64 * 1024}));
  CHECK(plan_weight(p, kDevices[2]) && p.stages == 3);
  p.element = Element::kBfloat16;
  CHECK(plan_weight(p, kDevices[2]) && p.stages == 2);
  CHECK(plan_weight(p, kDevices[0]) && p.stages == 3);
  // Two blocks share a multiprocessor of Hopper.
  CHECK(2 * (p.shared_bytes + 1024) <= kDevices[0].shared_per_multiprocessor);
  MaskedProductParams large;
  large.element = Element::kBfloat16;
  large.m = large.summed = 4096;
  large.n = 204;
  CHECK(plan_masked_product(large, kDevices[0]) && large.splits == 5);
  large.n = 1000;
  CHECK(plan_masked_product(large, kDevices[0]) && large.splits == 1);
  MaskedProductParams q;
  q.m = q.n = q.summed = 64;
  CHECK(!plan_masked_product(q, {132, 16 * 1024, 64 * 1024}));
}

}  // namespace

int main() {
  test_cases();
  test_reproducible();
  test_widths();
  test_refusals();
  return result("cuda_sparse_weight");
}
