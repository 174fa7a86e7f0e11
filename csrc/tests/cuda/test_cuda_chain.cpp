// The chain kernel in the emulator against plain loops in double: programs of all shapes, every gradient, all types of
// element, strided rows, small devices, scratch memory for a few rows at a time, and threads running in several orders.
#include <cstdio>

#include "check.h"
#include "cuda/cuda_problem.h"
#include "kernels/cuda/linear_chain.h"

using namespace tensorcomp::cuda;
using namespace tensorcomp::test;
using emulation::Order;

namespace {

using Doubles = std::vector<double>;
using List = std::vector<int64_t>;

// One step of a program over rows of `dims`: what comes out, and on the way back the gradients.
struct Stage {
  List dims, next;
  ProgramStep step;
  int64_t rows, columns;

  // Calls body(element that comes out, element that goes in, element of the matrix) for every product of a row.
  template <typename Body>
  void products(Body&& body) const {
    List arranged;
    const List ascending = Program::kept_in_order(step, dims.size());
    const int64_t in = product(dims);
    for (int64_t i = 0; i < in; ++i) {
      List at(dims.size());
      int64_t rest = i;
      for (size_t d = dims.size(); d-- > 0; rest /= dims[d]) at[d] = rest % dims[d];
      int64_t k = 0;
      for (const int64_t q : step.contracted) k = k * dims[q] + at[q];
      for (int64_t n = 0; n < rows; ++n) {
        arranged.clear();
        for (const int64_t q : ascending) arranged.push_back(at[q]);
        List brought(step.brought.size());
        int64_t left = n;
        for (size_t d = brought.size(); d-- > 0; left /= step.brought[d]) brought[d] = left % step.brought[d];
        arranged.insert(arranged.end(), brought.begin(), brought.end());
        int64_t out = 0;
        for (size_t d = 0; d < step.order.size(); ++d) out = out * next[d] + arranged[step.order[d]];
        body(out, i, n * columns + k);
      }
    }
  }
};

std::vector<Stage> stages_of(const Program& program) {
  std::vector<Stage> found;
  const std::vector<List> states = program.states();
  for (size_t i = 0; i < program.steps.size(); ++i) {
    found.push_back({states[i], states[i + 1], program.steps[i], program.rows(i), program.columns(i)});
  }
  return found;
}

struct Answer {
  Doubles y, x, bias;
  std::vector<Doubles> matrices;
};

struct ChainProblem {
  ChainProblem(const Program& the_program, Element the_element, int64_t the_rows, bool strided, unsigned seed)
      : program(the_program),
        element(the_element),
        rows(the_rows),
        row(strided ? 2 * program.in() + 3 : program.in()),
        feature(strided ? 2 : 1),
        x(element, (rows - 1) * row + (program.in() - 1) * feature + 1),
        grad(element, rows * program.out()),
        bias(element, program.out()),
        residual(element, rows * program.out()) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](Array& array, double scale) {
      for (int64_t i = 0; i < array.size(); ++i) array.set(i, scale * normal(generator));
    };
    for (Array* array : {&x, &grad, &bias, &residual}) fill(*array, 1.0);
    for (size_t i = 0; i < program.steps.size(); ++i) {
      matrices.emplace_back(element, program.rows(i) * program.columns(i));
      fill(matrices.back(), 1.0 / std::sqrt(static_cast<double>(program.columns(i))));
    }
  }

  ChainRows x_rows() const { return {x.get(), rows, row, feature}; }
  ChainRows grad_rows() const { return {grad.get(), rows, program.out(), 1}; }
  std::vector<const void*> weights() const {
    std::vector<const void*> found;
    for (const Array& matrix : matrices) found.push_back(matrix.get());
    return found;
  }

  Answer answer() const {
    const std::vector<Stage> stages = stages_of(program);
    const int64_t in = program.in(), out = program.out();
    Answer a{Doubles(rows * out), Doubles(rows * in), Doubles(out), {}};
    for (const Array& matrix : matrices) a.matrices.emplace_back(matrix.size());
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<Doubles> states(1, Doubles(in));
      for (int64_t f = 0; f < in; ++f) states[0][f] = x[r * row + f * feature];
      for (size_t i = 0; i < stages.size(); ++i) {
        Doubles to(product(stages[i].next));
        stages[i].products([&](int64_t o, int64_t f, int64_t w) { to[o] += states[i][f] * matrices[i][w]; });
        states.push_back(to);
      }
      Doubles back(out);
      for (int64_t o = 0; o < out; ++o) {
        a.y[r * out + o] = states.back()[o];
        back[o] = grad[r * out + o];
        a.bias[o] += back[o];
      }
      for (size_t i = stages.size(); i-- > 0;) {
        Doubles to(states[i].size());
        stages[i].products([&](int64_t o, int64_t f, int64_t w) {
          to[f] += back[o] * matrices[i][w];
          a.matrices[i][w] += back[o] * states[i][f];
        });
        back = to;
      }
      for (int64_t f = 0; f < in; ++f) a.x[r * in + f] = back[f];
    }
    return a;
  }

  Program program;
  Element element;
  int64_t rows, row, feature;
  Array x, grad, bias, residual;
  std::vector<Array> matrices;
};

Program program_of(const List& dims, const std::vector<ProgramStep>& steps) {
  List numbers{static_cast<int64_t>(dims.size())};
  numbers.insert(numbers.end(), dims.begin(), dims.end());
  numbers.push_back(static_cast<int64_t>(steps.size()));
  for (const ProgramStep& step : steps) {
    for (const List* list : {&step.contracted, &step.brought, &step.order}) {
      numbers.push_back(static_cast<int64_t>(list->size()));
      numbers.insert(numbers.end(), list->begin(), list->end());
    }
  }
  return *decode_program(numbers);
}

// Sizes below, at and above those of fragments, and no multiple of them; contracted dims in front, behind and apart;
// rings as a last step that sums over two ranks; permutations at the end; one to eight steps.
std::vector<Program> programs() {
  std::vector<Program> found;
  found.push_back(program_of({1}, {{{0}, {1}, {0}, {}}}));
  found.push_back(program_of({7}, {{{0}, {5}, {0}, {}}}));
  found.push_back(program_of({40}, {{{0}, {9}, {0}, {}}, {{0}, {33}, {0}, {}}}));
  found.push_back(program_of(
      {4, 6, 5}, {{{2}, {3, 2}, {0, 1, 2, 3}, {}}, {{1, 3}, {7, 3}, {0, 2, 1, 3}, {}}, {{0, 3}, {4}, {2, 1, 0}, {}}}));
  found.push_back(program_of({16, 16}, {{{1}, {16, 8}, {0, 1, 2}, {}}, {{0, 2}, {16}, {1, 0}, {}}}));
  found.push_back(program_of({3, 8, 4}, {{{0}, {5, 2}, {2, 0, 1, 3}, {}}, {{3, 2}, {17}, {2, 0, 1}, {}}}));
  // A tensor ring: the rank that closes it is brought by the first step and summed over in the last.
  found.push_back(program_of(
      {5, 8, 3},
      {{{2}, {3, 4, 3}, {0, 1, 2, 3, 4}, {}}, {{1, 3}, {2, 5}, {0, 1, 2, 3, 4}, {}}, {{0, 4, 2}, {6}, {2, 1, 0}, {}}}));
  found.push_back(program_of({2, 3, 2}, {{{0}, {2}, {2, 0, 1}, {}},
                                         {{1}, {3}, {0, 2, 1}, {}},
                                         {{2, 0}, {5}, {1, 0}, {}},
                                         {{1}, {3, 2}, {0, 1, 2}, {}},
                                         {{0, 1}, {4}, {1, 0}, {}},
                                         {{0}, {8}, {1, 0}, {}},
                                         {{1, 0}, {11}, {0}, {}},
                                         {{0}, {3}, {0}, {}}}));
  found.push_back(program_of({130, 2}, {{{0}, {70}, {0, 1}, {}}, {{1, 0}, {129}, {0}, {}}}));
  return found;
}

double tolerance(Element element, bool gradient) {
  switch (element) {
    case Element::kFloat32: return 1e-5;
    case Element::kTf32:
    case Element::kFloat16: return gradient ? 4e-3 : 2e-3;
    case Element::kBfloat16: break;
  }
  return gradient ? 2e-2 : 1e-2;
}

char description[160];

bool close(const Doubles& found, const Doubles& expected, double limit) {
  const double error = relative_error(found, expected);
  if (!(error < limit)) std::fprintf(stderr, "relative error %.2e, limit %.2e: ", error, limit);
  return error < limit;
}

void check_forward(const ChainProblem& problem, const Answer& answer, const DeviceLimits& device, bool epilogue) {
  Array packed(Element::kFloat32, static_cast<int64_t>(chain_packed_bytes(problem.program, problem.element)) / 4);
  CHECK(pack_chain(problem.program, problem.element, problem.weights(), false, packed.get(), nullptr) == cudaSuccess);
  Array y(problem.element, problem.rows * problem.program.out());
  ChainCall call;
  Doubles expected = answer.y;
  if (epilogue) {
    call = {problem.bias.get(), problem.residual.get(), true};
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] += problem.bias[i % problem.program.out()] + problem.residual[i];
      if (expected[i] < 0) expected[i] = 0;
    }
  }
  CHECK(forward_chain(*chain_params(problem.program, problem.element), device, problem.x_rows(), packed.get(), call,
                      y.get(), nullptr) == cudaSuccess);
  CHECK(close(values(y), expected, tolerance(problem.element, false)));
}

Doubles check_backward(const ChainProblem& problem, const Answer& answer, const DeviceLimits& device, int mask,
                       int64_t rows_at_once) {
  Array x(problem.element, problem.rows * problem.program.in()), bias(problem.element, problem.program.out());
  std::vector<Array> matrices;
  for (const Array& matrix : problem.matrices) matrices.emplace_back(problem.element, matrix.size());
  ChainGradients wanted;
  if (mask & 1) wanted.x = x.get();
  if (mask & 2) wanted.bias = bias.get();
  for (size_t i = 0; i < matrices.size(); ++i)
    wanted.matrices.push_back(mask >> (2 + i) & 1 ? matrices[i].get() : nullptr);
  const size_t bytes =
      chain_backward_scratch(problem.program, problem.element, device, problem.rows, rows_at_once, wanted);
  Array scratch(Element::kFloat32, static_cast<int64_t>(bytes) / 4);
  CHECK(backward_chain(problem.program, problem.element, device, problem.grad_rows(), problem.x_rows(), rows_at_once,
                       problem.weights(), wanted, scratch.get(), nullptr) == cudaSuccess);
  const double limit = tolerance(problem.element, true);
  Doubles all;
  const auto compare = [&](const void* asked, const Array& found, const Doubles& expected) {
    if (asked == nullptr) return;
    CHECK(close(values(found), expected, limit));
    for (int64_t i = 0; i < found.size(); ++i) all.push_back(found[i]);
  };
  compare(wanted.x, x, answer.x);
  compare(wanted.bias, bias, answer.bias);
  for (size_t i = 0; i < matrices.size(); ++i) compare(wanted.matrices[i], matrices[i], answer.matrices[i]);
  return all;
}

const DeviceLimits kDevices[] = {{2, 227 * 1024, 228 * 1024}, {132, 163 * 1024, 164 * 1024}, {1, 30 * 1024, 64 * 1024}};

void test_programs() {
  int turn = 0;
  for (size_t i = 0; i < programs().size(); ++i) {
    const Program program = programs()[i];
    for (const Element element : {Element::kBfloat16, Element::kFloat16, Element::kTf32, Element::kFloat32}) {
      for (const int64_t rows : {1, 19}) {
        ++turn;
        const DeviceLimits& device = kDevices[turn / 3 % 3];
        emulation::set_order(static_cast<Order>(turn % 3));
        std::snprintf(description, sizeof description, "program %zu, element %d, %d rows", i, static_cast<int>(element),
                      static_cast<int>(rows));
        subject() = description;
        CHECK(chain_fits(program, element, device));
        const ChainProblem problem(program, element, rows, turn % 2 == 0, static_cast<unsigned>(turn));
        const Answer answer = problem.answer();
        check_forward(problem, answer, device, turn % 4 < 2);
        check_backward(problem, answer, device, 0xfff, rows);
        check_backward(problem, answer, device, 0xfff, 4);
      }
    }
  }
}

void test_masks() {
  emulation::set_order(Order::kShuffled);
  const ChainProblem problem(programs()[3], Element::kFloat32, 6, false, 3);
  const Answer answer = problem.answer();
  for (int mask = 1; mask < 32; ++mask) {
    std::snprintf(description, sizeof description, "mask %d", mask);
    subject() = description;
    check_backward(problem, answer, kDevices[0], mask, mask % 2 == 0 ? 6 : 4);
  }
}

// The same bits whatever order threads run in.
void test_reproducible() {
  const ChainProblem problem(programs()[6], Element::kFloat32, 40, false, 5);
  const Answer answer = problem.answer();
  std::vector<Doubles> found;
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulation::set_order(order);
    found.push_back(check_backward(problem, answer, kDevices[1], 0xfff, 16));
  }
  CHECK(found[0] == found[1]);
  CHECK(found[0] == found[2]);
}

// An infinity in a row reaches no other row, neither through rows that are padding nor through memory used again.
void test_rows_apart() {
  emulation::set_order(Order::kAscending);
  for (const Element element : {Element::kBfloat16, Element::kFloat32}) {
    ChainProblem problem(programs()[3], element, 19, false, 7);
    const Answer answer = problem.answer();
    problem.x.set(4 * problem.row + 1, INFINITY);
    Array packed(Element::kFloat32, static_cast<int64_t>(chain_packed_bytes(problem.program, element)) / 4);
    CHECK(pack_chain(problem.program, element, problem.weights(), false, packed.get(), nullptr) == cudaSuccess);
    const int64_t out = problem.program.out();
    Array y(element, problem.rows * out);
    CHECK(forward_chain(*chain_params(problem.program, element), kDevices[2], problem.x_rows(), packed.get(), {},
                        y.get(), nullptr) == cudaSuccess);
    Doubles found, expected;
    for (int64_t i = 0; i < y.size(); ++i) {
      if (i / out == 4) continue;
      found.push_back(y[i]);
      expected.push_back(answer.y[i]);
    }
    CHECK(close(found, expected, tolerance(element, false)));
  }
}

void test_refusals() {
  const DeviceLimits device;
  // A row of 64 KiB each way fits in 16 bits and not in 32.
  const Program wide = program_of({2, 16384}, {{{0}, {2}, {1, 0}, {}}});
  CHECK(chain_fits(wide, Element::kBfloat16, {132, 227 * 1024, 228 * 1024}) == false);
  CHECK(!chain_fits(program_of({1 << 24}, {{{0}, {3}, {0}, {}}}), Element::kBfloat16, device));
  CHECK(!decode_program({}).has_value());
  CHECK(!decode_program({1, 4, 1, 1, 0, 1, 3, 1, 1}).has_value());     // orders no dim
  CHECK(!decode_program({1, 4, 1, 1, 1, 1, 3, 1, 0}).has_value());     // contracts a dim that is not there
  CHECK(!decode_program({1, 4, 1, 1, 0, 1, 3, 1, 0, 9}).has_value());  // a number too many
  CHECK(!decode_program({1, 4, 1, 1, 0, 1, 3, 1}).has_value());        // one too few
  CHECK(decode_program({1, 4, 1, 1, 0, 1, 3, 1, 0}).has_value());
  const int64_t large = int64_t{1} << 32;  // products past 64 bits
  CHECK(!decode_program({2, large, large, 1, 1, 0, 1, 3, 2, 0, 1}).has_value());
  CHECK(!decode_program({1, 1, 1, 1, 0, 2, large, large, 2, 0, 1}).has_value());
}

void test_dividers() {
  for (const int32_t d : {1, 2, 3, 5, 7, 12, 127, 128, 4096, 65537, 2147483647}) {
    const Divider divider(d);
    for (const int64_t n : {0, 1, 2, 6, 127, 4095, 65536, 99999999, 2147483646, 2147483647}) {
      for (const int64_t near : {n - 1, n, n / d * d, n / d * d - 1}) {
        if (near < 0) continue;
        CHECK(divider.quotient(static_cast<int32_t>(near)) == near / d);
      }
    }
  }
}

}  // namespace

int main() {
  test_dividers();
  test_refusals();
  test_programs();
  test_masks();
  test_reproducible();
  test_rows_apart();
  return result("cuda_chain");
}
