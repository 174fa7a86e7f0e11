// The bottleneck convolution of every instruction set against plain loops, over odd shapes, layouts and
// threads.
#include <cstdio>
#include <thread>

#include "check.h"
#include "problem.h"

using namespace tensorcomp;
using namespace tensorcomp::test;

namespace {

enum class Packing { kOnce, kForProblem };

// Runs a problem as the op does; every part on a thread of its own, phase after phase.
double error_of(Problem& problem, int64_t threads, Packing packing, const std::vector<double>& expected) {
  BottleneckConvParams& p = problem.params;
  const BottleneckKernels& kernels = kernel_table().bottleneck(p.shape.dtype);
  p.packed_whole = packing == Packing::kOnce;
  Bytes packed(p.packed_whole ? kernels.packed_bytes(p.shape) : kernels.packed_bytes_for(p, threads));
  if (p.packed_whole) {
    kernels.pack(p.shape, problem.weights(), packed.get());
  } else {
    kernels.pack_for(p, threads, problem.weights(), packed.get());
  }
  Array y(p.shape.dtype, problem.output_elements());
  const auto plan = kernels.plan(p, threads);
  Bytes scratch(plan.scratch_bytes);
  p.y = y.get();
  p.packed = packed.get();
  p.scratch = scratch.get();
  for (int64_t phase = 0; phase < plan.phases; ++phase) {
    std::vector<std::thread> team;
    for (int64_t part = 1; part < plan.parts; ++part) {
      team.emplace_back([&, phase, part] { kernels.run(p, threads, phase, part); });
    }
    kernels.run(p, threads, phase, 0);
    for (std::thread& member : team) member.join();
  }
  return relative_error(y, expected);
}

// Ranks, channels and widths below, at and above vector widths, and no multiple of them.
const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1},
    {1, 3, 5, 7, 2, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1},
    {2, 16, 9, 9, 6, 6, 16, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 17, 8, 15, 17, 19, 33, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 64, 12, 12, 13, 21, 64, 3, 3, 1, 1, 1, 1, 1, 1},
    {3, 33, 7, 7, 31, 39, 65, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 8, 11, 13, 5, 7, 9, 3, 3, 2, 2, 1, 1, 1, 1},
    {2, 7, 10, 6, 4, 3, 5, 1, 1},
    {1, 7, 10, 6, 4, 3, 5, 1, 1, 3, 2},
    {1, 9, 12, 14, 8, 16, 10, 5, 3, 1, 2, 2, 2, 1, 1},
    {1, 5, 6, 40, 3, 12, 7, 2, 4, 1, 1, 0, 1, 1, 2},
    {1, 6, 15, 15, 7, 5, 8, 3, 3, 1, 1, 2, 2, 3, 3, 2, 3},
    {1, 4, 3, 3, 3, 2, 5, 3, 3, 1, 1, 4, 0, 0, 5},
    {1, 3, 9, 2, 2, 2, 3, 7, 1, 2, 1, 3, 3, 0, 0},
    {5, 10, 4, 4, 40, 36, 12, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 129, 4, 5, 48, 64, 131, 3, 3, 1, 1, 1, 1, 1, 1},
    // Rings.
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2},
    {1, 16, 9, 32, 10, 10, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 10},
    {2, 17, 8, 9, 3, 5, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 3},
    {1, 8, 11, 13, 5, 7, 9, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 2},
    {2, 6, 15, 15, 15, 14, 8, 3, 3, 1, 1, 2, 2, 3, 3, 2, 3, 3},
    {1, 5, 6, 20, 1, 1, 7, 2, 4, 1, 3, 0, 1, 1, 2, 1, 1, 3},
    // Depthwise cores.
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, true},
    {2, 17, 8, 9, 17, 17, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, true},
    {1, 8, 11, 13, 33, 33, 9, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, true},
    {1, 6, 15, 40, 7, 7, 8, 3, 3, 1, 1, 2, 2, 3, 3, 2, 3, 1, true},
    {3, 33, 7, 7, 64, 64, 65, 5, 2, 1, 1, 2, 2, 1, 0, 1, 1, 1, true},
    {1, 3, 9, 2, 129, 129, 3, 7, 1, 2, 1, 3, 3, 0, 0, 1, 1, 1, true},
};

void test_matches_loops() {
  const std::vector<std::string> names = instruction_sets();
  for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
    // bfloat16 has 8 bits; sums are kept in float32, stage results may be rounded once.
    const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
    int index = 0;
    for (const Case& c : kCases) {
      for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast, Layout::kSlice}) {
        Problem problem(c, dtype, layout, index % 2 == 0);
        std::vector<double> expected = problem.expected();
        Array residual(dtype, problem.output_elements());
        std::mt19937 generator(5);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < problem.output_elements(); ++i) residual.set(i, normal(generator));
        problem.params.residual = index % 3 == 0 ? residual.get() : nullptr;
        problem.params.relu = index % 4 < 2;
        for (size_t i = 0; i < expected.size(); ++i) {
          if (problem.params.residual) expected[i] += residual[static_cast<int64_t>(i)];
          if (problem.params.relu && expected[i] < 0) expected[i] = 0;
        }
        for (const std::string& name : names) {
          tensorcomp_set_isa_cap(name.c_str());
          for (const int64_t threads : {1, 2, 3}) {
            const Packing packing = threads == 2 ? Packing::kOnce : Packing::kForProblem;
            const double error = error_of(problem, threads, packing, expected);
            char text[160];
            std::snprintf(text, sizeof text, "case %d, layout %d, %s, %s, %d threads: relative error %.2e", index,
                          static_cast<int>(layout), dtype == DType::kFloat32 ? "float32" : "bfloat16", name.c_str(),
                          static_cast<int>(threads), error);
            subject() = text;
            CHECK(error < tolerance);
            subject() = "";
          }
        }
      }
      ++index;
    }
  }
  tensorcomp_set_isa_cap("");
}

// Several callers at once, as in a server: the kernels share nothing but their read-only tables.
void test_concurrent_callers() {
  const Case c{2, 16, 9, 9, 6, 7, 12, 3, 3, 1, 1, 1, 1, 1, 1};
  double errors[3] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&, i] {
      Problem problem(c, DType::kFloat32, Layout::kChannelsLast, true, static_cast<unsigned>(i + 1));
      const std::vector<double> expected = problem.expected();
      for (int repeat = 0; repeat < 5; ++repeat) {
        errors[i] = std::fmax(errors[i], error_of(problem, 2, Packing::kForProblem, expected));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const double error : errors) CHECK(error < 1e-5);
}

}  // namespace

int main() {
  test_matches_loops();
  test_concurrent_callers();
  return result("bottleneck_conv");
}
