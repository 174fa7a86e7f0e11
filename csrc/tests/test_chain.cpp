// Chains of products of every instruction set against plain loops, forward and backward, over odd shapes and threads;
// what lies around each result stays as it was.
#include <cstdio>
#include <deque>

#include "check.h"
#include "guarded.h"

using namespace tensorcomp;
using namespace tensorcomp::test;

namespace {

struct ChainCase {
  const char* name;
  std::vector<int64_t> numbers;
};

const ChainCase kCases[] = {
    {"one", {1, 1, 1, 1, 0, 1, 1, 1, 0}},
    {"pair", {1, 12, 2, 1, 0, 1, 5, 1, 0, 1, 0, 1, 9, 1, 0}},
    {"odd pair", {1, 65, 2, 1, 0, 1, 31, 1, 0, 1, 0, 1, 129, 1, 0}},
    {"wide pair", {1, 40, 2, 1, 0, 1, 136, 1, 0, 1, 0, 1, 48, 1, 0}},
    {"middle", {3, 3, 5, 7, 1, 1, 1, 1, 4, 3, 2, 0, 1}},
    {"scattered", {2, 4, 6, 2, 1, 0, 1, 5, 2, 1, 0, 1, 1, 1, 3, 2, 1, 0}},
    {"far dims", {3, 3, 4, 5, 1, 2, 2, 0, 2, 2, 3, 3, 1, 0, 2}},
    {"train",
     {3, 9, 4, 16, 3, 1, 0, 2, 5, 6, 4, 2, 3, 0, 1, 2, 1, 2, 2, 7, 3, 4, 0, 2, 3, 1, 2, 2, 3, 1, 8, 3, 0, 1, 2}},
};

// The dims of one row visited by index: calls each(in, out, row, column) for every multiply-add of a step.
template <class Each>
void visit(const ChainStep& s, const Each& each) {
  const auto size = [](const ChainDim* dims, int count) {
    int64_t n = 1;
    for (int i = 0; i < count; ++i) n *= dims[i].size;
    return n;
  };
  const auto offsets = [](const ChainDim* dims, int count, int64_t i, int64_t& in, int64_t& out) {
    in = out = 0;
    for (int d = count - 1; d >= 0; --d) {
      in += i % dims[d].size * dims[d].in;
      out += i % dims[d].size * dims[d].out;
      i /= dims[d].size;
    }
  };
  for (int64_t r = 0; r < size(s.rows, s.row_count); ++r) {
    int64_t row_in, row_out;
    offsets(s.rows, s.row_count, r, row_in, row_out);
    for (int64_t n = 0; n < s.n_size; ++n) {
      int64_t matrix_row, n_out;
      offsets(s.n, s.n_count, n, matrix_row, n_out);
      for (int64_t k = 0; k < s.k_size; ++k) {
        int64_t k_in, matrix_column;
        offsets(s.k, s.k_count, k, k_in, matrix_column);
        each(row_in + k_in, row_out + n_out, matrix_row * s.k_size + matrix_column);
      }
    }
  }
}

struct ChainProblem {
  ChainProgram program;
  DType dtype;
  int64_t rows, x_row;
  Array x, grad, bias, residual;
  std::deque<Array> matrices;  // arrays do not move

  ChainProblem(const ChainCase& c, DType type, int64_t rows_given)
      : dtype(type),
        rows(rows_given),
        x_row(decoded(c).in_features + 3),
        x(type, rows * x_row),
        grad(type, rows * program.out_features),
        bias(type, program.out_features),
        residual(type, rows * program.out_features) {
    std::mt19937 engine(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](Array& a, int64_t count, float scale) {
      for (int64_t i = 0; i < count; ++i) a.set(i, normal(engine) * scale);
    };
    fill(x, rows * x_row, 1);
    fill(grad, rows * program.out_features, 1);
    fill(bias, program.out_features, 1);
    fill(residual, rows * program.out_features, 1);
    for (int i = 0; i < program.count; ++i) {
      const ChainStep& s = program.steps[i];
      matrices.emplace_back(type, s.n_size * s.k_size);
      fill(matrices.back(), s.n_size * s.k_size, 1 / std::sqrt(static_cast<float>(s.k_size)));
    }
  }

  const ChainProgram& decoded(const ChainCase& c) {
    CHECK(decode_chain(c.numbers.data(), static_cast<int64_t>(c.numbers.size()), &program));
    return program;
  }

  // All activations of one row, x first.
  std::vector<Doubles> activations(int64_t row) const {
    std::vector<Doubles> all(1);
    for (int64_t i = 0; i < program.in_features; ++i) all[0].push_back(x[row * x_row + i]);
    for (int i = 0; i < program.count; ++i) {
      Doubles next(static_cast<size_t>(program.steps[i].out_size));
      visit(program.steps[i], [&](int64_t in, int64_t out, int64_t at) {
        next[static_cast<size_t>(out)] += all.back()[static_cast<size_t>(in)] * matrices[static_cast<size_t>(i)][at];
      });
      all.push_back(next);
    }
    return all;
  }
};

void check_forward(const ChainProblem& problem, int64_t threads, bool epilogue, double tolerance) {
  const ChainProgram& program = problem.program;
  const ChainKernels& kernels = kernel_table().chain(problem.dtype);
  Bytes packed(kernels.packed_bytes(program));
  std::vector<const void*> matrices;
  for (const Array& m : problem.matrices) matrices.push_back(m.get());
  kernels.pack(program, matrices.data(), packed.get());
  Guarded y(problem.dtype, problem.rows * program.out_features);
  ChainParams p;
  p.dtype = problem.dtype;
  p.program = &program;
  p.rows = problem.rows;
  p.x = problem.x.get();
  p.x_row = problem.x_row;
  p.y = y.get();
  p.packed = packed.get();
  p.bias = problem.bias.get();
  p.residual = epilogue ? problem.residual.get() : nullptr;
  p.relu = epilogue;
  const ChainPlan plan = kernels.plan(p, threads);
  Bytes scratch(plan.scratch_bytes);
  p.scratch = scratch.get();
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.run(p, plan, phase, part); });
  Doubles right;
  for (int64_t row = 0; row < problem.rows; ++row) {
    const Doubles last = problem.activations(row).back();
    for (size_t i = 0; i < last.size(); ++i) {
      double v = last[i] + problem.bias[static_cast<int64_t>(i)];
      if (epilogue) v += problem.residual[row * program.out_features + static_cast<int64_t>(i)];
      right.push_back(epilogue && v < 0 ? 0 : v);
    }
  }
  CHECK(distance(y, right) < tolerance);
  CHECK(y.whole());
}

void check_backward(const ChainProblem& problem, int64_t threads, double tolerance) {
  const ChainProgram& program = problem.program;
  const ChainKernels& kernels = kernel_table().chain(problem.dtype);
  Guarded grad_x(problem.dtype, problem.rows * program.in_features), grad_bias(problem.dtype, program.out_features);
  std::deque<Guarded> grads;
  std::vector<Doubles> right_grads;
  ChainBackwardParams q;
  q.dtype = problem.dtype;
  q.program = &program;
  q.rows = problem.rows;
  q.x = problem.x.get();
  q.x_row = problem.x_row;
  q.grad = problem.grad.get();
  q.grad_row = program.out_features;
  q.grad_x = grad_x.get();
  q.grad_bias = grad_bias.get();
  for (int i = 0; i < program.count; ++i) {
    const int64_t n = program.steps[i].n_size * program.steps[i].k_size;
    grads.emplace_back(problem.dtype, n);
    right_grads.emplace_back(static_cast<size_t>(n));
    q.matrices[i] = problem.matrices[static_cast<size_t>(i)].get();
  }
  for (int i = 0; i < program.count; ++i) q.grad_matrices[i] = grads[static_cast<size_t>(i)].get();
  const ChainBackwardPlan plan = kernels.backward_plan(q, threads);
  Bytes scratch(plan.scratch_bytes);
  q.scratch = scratch.get();
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.backward_run(q, plan, phase, part); });
  Doubles right_x, right_bias(static_cast<size_t>(program.out_features));
  for (int64_t row = 0; row < problem.rows; ++row) {
    const std::vector<Doubles> z = problem.activations(row);
    Doubles grad;
    for (int64_t i = 0; i < program.out_features; ++i) {
      grad.push_back(problem.grad[row * program.out_features + i]);
      right_bias[static_cast<size_t>(i)] += grad.back();
    }
    for (size_t i = static_cast<size_t>(program.count); i-- > 0;) {
      Doubles before(static_cast<size_t>(program.steps[i].in_size));
      visit(program.steps[i], [&](int64_t in, int64_t out, int64_t at) {
        before[static_cast<size_t>(in)] += grad[static_cast<size_t>(out)] * problem.matrices[i][at];
        right_grads[i][static_cast<size_t>(at)] += grad[static_cast<size_t>(out)] * z[i][static_cast<size_t>(in)];
      });
      grad = before;
    }
    right_x.insert(right_x.end(), grad.begin(), grad.end());
  }
  CHECK(distance(grad_x, right_x) < tolerance && grad_x.whole());
  CHECK(distance(grad_bias, right_bias) < tolerance && grad_bias.whole());
  for (size_t i = 0; i < grads.size(); ++i) CHECK(distance(grads[i], right_grads[i]) < tolerance && grads[i].whole());
}

void test_matches_loops() {
  for (const std::string& isa : instruction_sets()) {
    tensorcomp_set_isa_cap(isa.c_str());
    for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
      const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 2e-2;
      for (const ChainCase& c : kCases) {
        for (const int64_t rows : {1, 5, 40}) {
          const ChainProblem problem(c, dtype, rows);
          for (const int64_t threads : {1, 2, 3}) {
            char text[120];
            std::snprintf(text, sizeof text, "%s, %s, %s, %d rows, %d threads", c.name, isa.c_str(),
                          dtype == DType::kFloat32 ? "float32" : "bfloat16", static_cast<int>(rows),
                          static_cast<int>(threads));
            subject() = text;
            check_forward(problem, threads, threads == 2, tolerance);
            check_backward(problem, threads, tolerance);
            subject() = "";
          }
        }
      }
    }
  }
  tensorcomp_set_isa_cap("");
}

void test_refuses_what_is_no_program() {
  ChainProgram program;
  const auto decodes = [&](const std::vector<int64_t>& numbers) {
    return decode_chain(numbers.data(), static_cast<int64_t>(numbers.size()), &program);
  };
  const std::vector<int64_t>& good = kCases[1].numbers;
  CHECK(decodes(good));
  for (size_t length = 0; length < good.size(); ++length) CHECK(!decodes({good.begin(), good.begin() + length}));
  std::vector<int64_t> more = good;
  more.push_back(0);
  CHECK(!decodes(more));
  for (size_t at = 0; at < good.size(); ++at) {
    std::vector<int64_t> bad = good;
    bad[at] = -1;
    CHECK(!decodes(bad));
  }
  CHECK(!decodes({1, 4, 1, 1, 1, 1, 3, 1, 0}));        // no dim 1
  CHECK(!decodes({2, 4, 2, 1, 2, 0, 0, 1, 3, 1, 0}));  // a dim twice
  CHECK(!decodes({2, 4, 2, 1, 1, 0, 1, 3, 2, 0, 0}));  // no permutation
  const int64_t large = int64_t{1} << 32, half = int64_t{1} << 20;
  CHECK(!decodes({2, large, large, 1, 1, 0, 1, 3, 2, 0, 1}));                            // 0 where it wraps
  CHECK(!decodes({1, 1, 1, 1, 0, 2, large, large, 2, 0, 1}));                            // brought
  CHECK(!decodes({1, half + 1, 1, 1, 0, 1, half, 1, 0}));                                // a matrix
  CHECK(!decodes({2, half, 1, 2, 1, 1, 1, half, 2, 0, 1, 1, 1, 1, 2 * half, 2, 0, 1}));  // a row in between
  CHECK(decodes({2, half, 1, 2, 1, 1, 1, half, 2, 0, 1, 1, 1, 1, half / 2, 2, 0, 1}));
  CHECK(!decodes({1, 4, 13, 1, 0, 1, 3, 1, 0}));  // more steps than there are numbers, and than the kernels take
}

}  // namespace

int main() {
  test_matches_loops();
  test_refuses_what_is_no_program();
  return result("chain");
}
