// The low-rank + sparse weight and its gradients of every instruction set against plain loops, over odd shapes, both
// masks and threads; what lies around each result stays as it was.
#include <cstdio>
#include <memory>

#include "check.h"
#include "guarded.h"
#include "problem.h"

using namespace tensorcomp;
using namespace tensorcomp::test;

namespace {

struct WeightCase {
  int64_t m, n, rank;
};

const WeightCase kCases[] = {{1, 1, 1},    {1, 33, 3},  {33, 1, 2},    {14, 32, 8},   {29, 65, 5},
                             {60, 600, 7}, {5, 130, 9}, {130, 15, 17}, {100, 24, 40}, {7, 43, 0}};

struct WeightProblem {
  int64_t m, n, rank, mask_row;
  DType dtype;
  bool bits, masking;
  Array a, b, values, grad;
  Bytes mask;
  std::vector<bool> kept;

  WeightProblem(const WeightCase& c, DType type, bool packed, bool replaces)
      : m(c.m),
        n(c.n),
        rank(c.rank),
        mask_row(packed ? (c.n + 7) / 8 : c.n),
        dtype(type),
        bits(packed),
        masking(replaces),
        a(type, c.m * c.rank),
        b(type, c.rank * c.n),
        values(type, c.m * c.n),
        grad(type, c.m * c.n),
        mask(static_cast<size_t>(c.m * mask_row)) {
    std::mt19937 engine(3);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < m * rank; ++i) a.set(i, normal(engine));
    for (int64_t i = 0; i < rank * n; ++i) b.set(i, normal(engine));
    auto* bytes = static_cast<uint8_t*>(mask.get());
    for (int64_t i = 0; i < m * mask_row; ++i) bytes[i] = packed ? static_cast<uint8_t>(engine()) : engine() % 3 == 0;
    for (int64_t i = 0; i < m * n; ++i) {
      const uint8_t* row = bytes + i / n * mask_row;
      const int64_t j = i % n;
      kept.push_back(packed ? (row[j / 8] >> (j % 8) & 1) != 0 : row[j] != 0);
      // What is not kept may be anything.
      values.set(i, kept.back() ? normal(engine) : NAN);
      grad.set(i, normal(engine));
    }
  }

  SparseWeightShape shape() const {
    return {dtype,    m,       n,       rank, masking, bits, static_cast<const uint8_t*>(mask.get()),
            mask_row, a.get(), b.get(), rank, n};
  }
};

void check_forward(const WeightProblem& w, int64_t threads, double tolerance) {
  const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(w.dtype);
  Guarded found(w.dtype, w.m * w.n);
  SparseWeightParams p;
  p.shape = w.shape();
  p.values = w.values.get();
  p.values_row = w.n;
  p.w = found.get();
  const SparseWeightPlan plan = kernels.weight_plan(p, threads);
  Bytes scratch(plan.scratch_bytes);
  p.scratch = scratch.get();
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.weight_run(p, plan, phase, part); });
  Doubles right;
  for (int64_t i = 0; i < w.m * w.n; ++i) {
    const bool kept = w.kept[static_cast<size_t>(i)];
    double v = kept ? w.values[i] : 0;
    for (int64_t r = 0; r < w.rank && !(kept && w.masking); ++r)
      v += w.a[i / w.n * w.rank + r] * w.b[r * w.n + i % w.n];
    right.push_back(v);
  }
  CHECK(distance(found, right) < tolerance);
  CHECK(found.whole());
}

void check_backward(const WeightProblem& w, int64_t threads, double tolerance) {
  const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(w.dtype);
  Guarded grad_a(w.dtype, w.m * w.rank), grad_b(w.dtype, w.rank * w.n), grad_values(w.dtype, w.m * w.n);
  SparseWeightBackwardParams q;
  q.shape = w.shape();
  q.grad = w.grad.get();
  q.grad_row = w.n;
  q.grad_a = w.rank ? grad_a.get() : nullptr;
  q.grad_b = w.rank ? grad_b.get() : nullptr;
  q.grad_values = grad_values.get();
  const SparseWeightBackwardPlan plan = kernels.weight_backward_plan(q, threads);
  Bytes scratch(plan.scratch_bytes);
  q.scratch = scratch.get();
  run_phases(plan.phases, plan.parts,
             [&](int64_t phase, int64_t part) { kernels.weight_backward_run(q, plan, phase, part); });
  Doubles right_a(static_cast<size_t>(w.m * w.rank)), right_b(static_cast<size_t>(w.rank * w.n)), right_values;
  for (int64_t i = 0; i < w.m * w.n; ++i) {
    const bool kept = w.kept[static_cast<size_t>(i)];
    right_values.push_back(kept ? w.grad[i] : 0);
    if (kept && w.masking) continue;
    for (int64_t r = 0; r < w.rank; ++r) {
      const int64_t at_a = i / w.n * w.rank + r, at_b = r * w.n + i % w.n;
      right_a[static_cast<size_t>(at_a)] += w.grad[i] * w.b[at_b];
      right_b[static_cast<size_t>(at_b)] += w.grad[i] * w.a[at_a];
    }
  }
  CHECK(distance(grad_a, right_a) < tolerance && grad_a.whole());
  CHECK(distance(grad_b, right_b) < tolerance && grad_b.whole());
  CHECK(distance(grad_values, right_values) < tolerance && grad_values.whole());
  // The values' gradient alone.
  Guarded alone(w.dtype, w.m * w.n);
  q.grad_a = q.grad_b = nullptr;
  q.grad_values = alone.get();
  const SparseWeightBackwardPlan one = kernels.weight_backward_plan(q, threads);
  Bytes memory(one.scratch_bytes);
  q.scratch = memory.get();
  run_phases(one.phases, one.parts,
             [&](int64_t phase, int64_t part) { kernels.weight_backward_run(q, one, phase, part); });
  CHECK(distance(alone, right_values) == 0 && alone.whole());
}

}  // namespace

int main() {
  for (const std::string& isa : instruction_sets()) {
    tensorcomp_set_isa_cap(isa.c_str());
    for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
      const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
      for (const WeightCase& c : kCases) {
        for (int form = 0; form < 4; ++form) {
          const WeightProblem problem(c, dtype, form % 2 != 0, form / 2 != 0);
          for (const int64_t threads : {1, 2, 3}) {
            char text[120];
            std::snprintf(text, sizeof text, "[%d, %d] of rank %d, %s, %s, form %d, %d threads", static_cast<int>(c.m),
                          static_cast<int>(c.n), static_cast<int>(c.rank), isa.c_str(),
                          dtype == DType::kFloat32 ? "float32" : "bfloat16", form, static_cast<int>(threads));
            subject() = text;
            check_forward(problem, threads, tolerance);
            check_backward(problem, threads, tolerance);
            subject() = "";
          }
        }
      }
    }
  }
  tensorcomp_set_isa_cap("");
  return result("sparse_weight");
}
