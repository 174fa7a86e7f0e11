// The kernels of packed sparse matrices in the emulator against plain loops in double: both forms of places, rows of
// one group and of several, layouts, segments, numbers that are not sound, threads in several orders.
#include <cstring>
#include <iterator>

#include "cuda/lowrank_sparse_problem.h"
#include "kernels/cuda/sparse_rows_launch.h"

using namespace tensorcomp::cuda;
using namespace tensorcomp::test;
using emulation::Order;

namespace {

struct Case {
  int64_t m, n, rows;
  int32_t rank;
  double kept;
  Lie lie;
};

const Case kCases[] = {
    {1, 1, 1, 1, 1.0, Lie::kDense},      {9, 13, 3, 3, 0.3, Lie::kDense},    {40, 33, 8, 16, 0.1, Lie::kSlice},
    {35, 1100, 5, 17, 0.2, Lie::kDense}, {20, 64, 13, 5, 0.0, Lie::kTurned}, {20, 257, 32, 40, 1.0, Lie::kPadded},
    {50, 90, 17, 1, 0.5, Lie::kDense},
};

// Values begin `offset` entries behind an aligned address.
struct Problem {
  Problem(const Case& the_case, Element of, bool as_bits, int64_t offset, unsigned seed)
      : c(the_case),
        element(of),
        generator(seed),
        x(of, c.lie, c.rows, c.n),
        low(of, Lie::kDense, c.rows, c.rank),
        a(of, c.lie == Lie::kTurned ? Lie::kSlice : c.lie, c.m, c.rank),
        grad(of, c.lie, c.rows, c.m),
        bias(of, Lie::kDense, 1, c.m) {
    for (Matrix* matrix : {&x, &low, &a, &grad, &bias}) matrix->fill(generator, 1.0);
    const int64_t segments = c.n > tensorcomp::kSegment ? (c.n + tensorcomp::kSegment - 1) / tensorcomp::kSegment : 1;
    bits.assign(as_bits ? static_cast<size_t>(c.m * ((c.n + 7) / 8)) : 0, 0);
    offsets.push_back(0);
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t j = 0; j < c.n; ++j) {
        // An empty row and a full one, where there are rows enough.
        const bool one = (generator() >> 8) % 1024 < c.kept * 1024;
        if (c.m > 8 && i == 3 ? false : c.m > 8 && i == 4 && c.n < 2000 ? true : one) {
          rows.push_back(i);
          columns.push_back(j);
          narrow.push_back(static_cast<uint16_t>(j % tensorcomp::kSegment));
          if (as_bits) bits[static_cast<size_t>(i * ((c.n + 7) / 8) + j / 8)] |= static_cast<uint8_t>(1u << j % 8);
        }
        if (j % tensorcomp::kSegment == tensorcomp::kSegment - 1 && j + 1 < c.n) {
          offsets.push_back(static_cast<int32_t>(columns.size()));
        }
      }
      offsets.push_back(static_cast<int32_t>(columns.size()));
    }
    CHECK(static_cast<int64_t>(offsets.size()) == c.m * segments + 1);
    count = static_cast<int64_t>(columns.size());
    values = std::make_unique<Array>(of, offset + count);
    std::normal_distribution<double> normal;
    for (int64_t k = 0; k < count; ++k) values->set(offset + k, normal(generator));
    first = offset;
    p.element = of;
    p.sparse.m = c.m;
    p.sparse.n = c.n;
    p.sparse.count = count;
    p.sparse.values = static_cast<char*>(values->get()) + offset * element_bytes(of);
    p.sparse.offsets = offsets.data();
    if (as_bits) {
      p.sparse.bits = bits.data();
    } else {
      p.sparse.columns = narrow.data();
    }
    p.rows = c.rows;
    p.x = source(x);
    p.rank = c.rank;
    p.low = source(low);
    p.a = a.source().data;
    p.a_row = a.at.row;
    p.bias = bias.array.get();
    p.grad = source(grad);
  }
  static RowsSource source(const Matrix& matrix) { return {matrix.source().data, matrix.at.row, matrix.at.column}; }
  double value(int64_t k) const { return (*values)[first + k]; }

  Case c;
  Element element;
  std::mt19937 generator;
  Matrix x, low, a, grad, bias;
  std::vector<int64_t> rows, columns;
  std::vector<uint16_t> narrow;
  std::vector<uint8_t> bits;
  std::vector<int32_t> offsets;
  std::unique_ptr<Array> values;
  int64_t count = 0, first = 0;
  SparseRowsParams p;
};

Doubles check_forward(Problem& t, const DeviceLimits& device) {
  const Case& c = t.c;
  CHECK(plan_sparse_forward(t.p, device) && t.p.shared_bytes <= device.shared_per_block);
  const Result y(t.element, c.rows * c.m);
  t.p.y = y.get();
  CHECK(launch_sparse_forward(t.p, nullptr) == cudaSuccess);
  Doubles expected(static_cast<size_t>(c.rows * c.m));
  for (int64_t r = 0; r < c.rows; ++r) {
    double* of_row = expected.data() + r * c.m;
    for (int64_t i = 0; i < c.m; ++i) {
      of_row[i] = t.p.bias != nullptr ? t.bias(0, i) : 0;
      for (int64_t j = 0; j < c.rank; ++j) of_row[i] += t.low(r, j) * t.a(i, j);
    }
    for (int64_t k = 0; k < t.count; ++k) of_row[t.rows[k]] += t.value(k) * t.x(r, t.columns[k]);
  }
  CHECK(close(y, expected, forward_limit(t.element)));
  return y.values();
}

Doubles check_backward(Problem& t, const DeviceLimits& device) {
  const Case& c = t.c;
  std::vector<uint16_t> expanded(static_cast<size_t>(t.count), 0xffff);
  SparseRowsParams p = t.p;
  if (p.sparse.bits != nullptr) {
    p.expanded = expanded.data();
    CHECK(launch_sparse_columns(p, nullptr) == cudaSuccess);
    CHECK(expanded == t.narrow);
    p.sparse.bits = nullptr;
    p.sparse.columns = expanded.data();
  }
  CHECK(plan_sparse_values(p, device) && p.shared_bytes <= device.shared_per_block);
  const Result of_values(t.element, t.count), of_x(t.element, c.rows * c.n);
  const Array sums(Element::kFloat32, p.groups() > 1 ? t.count : 0);
  p.sums = static_cast<float*>(sums.get());
  p.grad_values = of_values.get();
  CHECK(launch_sparse_values(p, nullptr) == cudaSuccess);
  CHECK(plan_sparse_input(p, device) && p.shared_bytes <= device.shared_per_block);
  const Array partial(Element::kFloat32, p.splits * p.groups() * p.group * c.n);
  p.partial = static_cast<float*>(partial.get());
  p.grad_x = of_x.get();
  // What the pair has left there.
  Array before(t.element, c.rows * c.n);
  for (int64_t i = 0; i < before.size(); ++i) before.set(i, 0.25 * static_cast<double>(i % 7));
  std::memcpy(of_x.get(), before.get(), static_cast<size_t>(before.size() * element_bytes(t.element)));
  CHECK(launch_sparse_input(p, nullptr) == cudaSuccess);
  Doubles values_expected(static_cast<size_t>(t.count)), x_expected = values(before);
  for (int64_t k = 0; k < t.count; ++k) {
    for (int64_t r = 0; r < c.rows; ++r) {
      values_expected[static_cast<size_t>(k)] += t.grad(r, t.rows[k]) * t.x(r, t.columns[k]);
      x_expected[static_cast<size_t>(r * c.n + t.columns[k])] += t.grad(r, t.rows[k]) * t.value(k);
    }
  }
  CHECK(close(of_values, values_expected, forward_limit(t.element)));
  CHECK(close(of_x, x_expected, forward_limit(t.element)));
  Doubles all = of_values.values();
  for (const double v : of_x.values()) all.push_back(v);
  return all;
}

void test_cases() {
  int turn = 0;
  char text[80];
  for (size_t i = 0; i < std::size(kCases); ++i) {
    for (const Element element : {Element::kFloat32, Element::kFloat16, Element::kBfloat16}) {
      for (const bool bits : {false, true}) {
        ++turn;
        std::snprintf(text, sizeof text, "case %zu, element %d, bits %d", i, static_cast<int>(element), bits);
        subject() = text;
        emulation::set_order(static_cast<Order>(turn % 3));
        const DeviceLimits& device = kDevices[turn / 3 % std::size(kDevices)];
        Problem problem(kCases[i], element, bits, turn % 2 == 0 ? 0 : 3, static_cast<unsigned>(turn));
        check_forward(problem, device);
        check_backward(problem, device);
        if (element == Element::kFloat16) continue;
        // So little memory that one row is a group.
        const DeviceLimits narrow{2, static_cast<int32_t>((kCases[i].n + kCases[i].rank) * 4), 64 * 1024};
        problem.p.bias = nullptr;
        check_forward(problem, narrow);
        check_backward(problem, narrow);
        CHECK(fits_sparse_rows(kCases[i].n, kCases[i].rank, narrow));
      }
    }
  }
  subject() = "";
}

// Columns past what 16 bits count.
void test_segments() {
  for (const bool bits : {false, true}) {
    Problem problem({3, 70000, 2, 4, 0.01, Lie::kDense}, Element::kBfloat16, bits, 0, 3);
    CHECK(problem.p.sparse.segments() == 2);
    check_forward(problem, kDevices[0]);
    CHECK(problem.p.group == 1);
  }
}

// The same bits whatever order threads run in.
void test_reproducible() {
  std::vector<Doubles> forward, backward;
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulation::set_order(order);
    Problem problem(kCases[3], Element::kFloat32, true, 0, 5);
    forward.push_back(check_forward(problem, kDevices[0]));
    backward.push_back(check_backward(problem, kDevices[0]));
  }
  CHECK(forward[0] == forward[1] && forward[0] == forward[2]);
  CHECK(backward[0] == backward[1] && backward[0] == backward[2]);
}

// Numbers that lead out of the arrays stop the launch, and nothing beyond them is read or written.
void test_unsound() {
  const auto fails = [](Problem& t) {
    const Result y(t.element, t.c.rows * t.c.m);
    CHECK(plan_sparse_forward(t.p, kDevices[0]));
    t.p.y = y.get();
    CHECK(launch_sparse_forward(t.p, nullptr) == cudaErrorAssert);
    CHECK(y.whole());
  };
  for (const bool bits : {false, true}) {
    const auto make = [&] { return Problem(kCases[1], Element::kFloat32, bits, 0, 9); };
    Problem high = make(), low = make(), crossed = make();
    high.offsets[5] = static_cast<int32_t>(high.count) + 1;
    fails(high);
    low.offsets[5] = -1;
    fails(low);
    crossed.offsets[2] = crossed.offsets[9];
    fails(crossed);
    Problem late = make(), early = make();
    late.offsets[0] = 1;
    fails(late);
    --early.offsets[9];
    fails(early);
  }
  Problem column(kCases[1], Element::kFloat32, false, 0, 9);
  column.narrow[7] = 13;
  fails(column);
  SparseRowsParams p = column.p;
  CHECK(plan_sparse_input(p, kDevices[0]));
  const Array partial(Element::kFloat32, p.splits * p.groups() * p.group * p.sparse.n);
  const Result of_x(Element::kFloat32, p.rows * p.sparse.n);
  p.partial = static_cast<float*>(partial.get());
  p.grad_x = of_x.get();
  CHECK(launch_sparse_input(p, nullptr) == cudaErrorAssert);
  Problem more(kCases[1], Element::kFloat32, true, 0, 9), fewer(kCases[1], Element::kFloat32, true, 0, 9);
  more.bits[2 * 3] = 0xff;
  fails(more);
  fewer.bits[2 * 4] = 0;
  fails(fewer);
}

void test_plans() {
  Problem problem({64, 4096, 32, 204, 0.01, Lie::kDense}, Element::kBfloat16, false, 0, 1);
  SparseRowsParams& p = problem.p;
  CHECK(plan_sparse_forward(p, kDevices[0]) && p.group == 8 && p.groups() == 4);
  p.rows = 1;
  CHECK(plan_sparse_forward(p, kDevices[0]) && p.group == 1 && p.groups() == 1);
  p.rows = 3;
  CHECK(plan_sparse_forward(p, kDevices[0]) && p.group == 4);
  p.sparse.n = 30000;
  CHECK(plan_sparse_forward(p, kDevices[0]) && p.group == 2);
  CHECK(fits_sparse_rows(58000, 100, kDevices[0]) && !fits_sparse_rows(58000, 200, kDevices[0]));
  CHECK(!fits_sparse_rows(int64_t{1} << 62, 1, kDevices[0]) && !fits_sparse_rows(1, int64_t{1} << 62, kDevices[0]));
}

}  // namespace

int main() {
  test_cases();
  test_segments();
  test_reproducible();
  test_unsound();
  test_plans();
  return result("cuda_sparse_linear");
}
