// Gradients of the bottleneck convolution. y is linear in each argument, so for any direction d of one argument
// <gradient, d> equals <grad_y, y with d in that argument's place>, which plain loops in double give.
#include <cmath>
#include <cstdio>
#include <thread>

#include "check.h"
#include "problem.h"

using namespace tensorcomp;
using namespace tensorcomp::test;

namespace {

const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1},
    {1, 3, 5, 7, 2, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1},
    {2, 17, 8, 9, 17, 19, 33, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 8, 11, 13, 5, 7, 9, 3, 3, 2, 2, 1, 1, 1, 1},
    {2, 7, 10, 6, 4, 3, 5, 1, 1, 3, 2},
    {1, 6, 15, 15, 7, 5, 8, 3, 3, 1, 1, 2, 2, 3, 3, 2, 3},
    {1, 5, 6, 20, 3, 12, 7, 2, 4, 1, 1, 0, 1, 1, 2},
    {3, 33, 7, 7, 31, 39, 65, 3, 3, 1, 1, 1, 1, 1, 1},
    // Rings.
    {2, 7, 9, 32, 10, 10, 9, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 10},
    {2, 17, 8, 9, 3, 5, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 3},
    {1, 8, 11, 13, 17, 19, 9, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 2},
    {1, 6, 15, 15, 7, 5, 8, 3, 3, 1, 1, 2, 2, 3, 3, 2, 3, 2},
    {2, 7, 10, 6, 1, 1, 5, 1, 1, 3, 2, 0, 0, 0, 0, 1, 1, 3},
    // Depthwise cores.
    {2, 17, 8, 9, 17, 17, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, true},
    {1, 8, 11, 13, 33, 33, 9, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, true},
    {1, 6, 15, 40, 7, 7, 8, 3, 3, 1, 1, 2, 2, 3, 3, 2, 3, 1, true},
    {3, 33, 7, 7, 64, 64, 65, 5, 2, 1, 1, 2, 2, 1, 0, 1, 1, 1, true},
};

enum Argument { kX, kCore, kFactorOut, kFactorIn, kArguments };
const char* const kNames[] = {"x", "core", "factor_out", "factor_in"};

Array& argument(Problem& problem, int which) {
  Array* const arrays[] = {&problem.x, &problem.core, &problem.factor_out, &problem.factor_in};
  return *arrays[which];
}

// Place of x's element (n, c, h, w), counted in [N, C, H, W] order, under other strides.
int64_t place(const BottleneckConvParams& p, const Strides4& s, int64_t i) {
  const int64_t w = i % p.width, h = i / p.width % p.height;
  const int64_t c = i / p.width / p.height % p.shape.c_in, n = i / p.width / p.height / p.shape.c_in;
  return n * s.n + c * s.c + h * s.h + w * s.w;
}

void check_case(const Case& c, DType dtype, Layout layout, const char* name) {
  Problem problem(c, dtype, layout, false);
  const BottleneckConvParams& p = problem.params;
  const BottleneckShape& s = p.shape;
  const int64_t counts[] = {p.batch * s.c_in * p.height * p.width, s.core_elements(), s.c_out * s.out(),
                            s.c_in * s.mid()};
  Array grad_y(dtype, problem.output_elements());
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < problem.output_elements(); ++i) grad_y.set(i, normal(generator));

  BottleneckBackwardParams q;
  q.forward = p;
  q.weights = problem.weights();
  q.grad_y = grad_y.get();
  q.grad_y_strides = p.y_strides;
  Array grad_x(dtype, counts[kX]), grad_core(dtype, counts[kCore]), grad_out(dtype, counts[kFactorOut]);
  Array grad_in(dtype, counts[kFactorIn]), grad_bias(dtype, s.c_out);
  q.grad_x = grad_x.get();
  q.grad_x_strides = layout == Layout::kContiguous
                         ? Strides4{s.c_in * p.height * p.width, p.height * p.width, p.width, 1}
                         : Strides4{s.c_in * p.height * p.width, 1, p.width * s.c_in, s.c_in};
  q.grad_core = grad_core.get();
  q.grad_factor_out = grad_out.get();
  q.grad_factor_in = grad_in.get();
  q.grad_bias = grad_bias.get();
  const Array* const gradients[] = {&grad_x, &grad_core, &grad_out, &grad_in};
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;

  for (const int64_t threads : {1, 3}) {
    const BottleneckKernels& kernels = kernel_table().bottleneck(dtype);
    const auto plan = kernels.backward_plan(q, threads);
    Bytes scratch(plan.scratch_bytes);
    q.scratch = scratch.get();
    for (int64_t phase = 0; phase < plan.phases; ++phase) {
      std::vector<std::thread> team;
      for (int64_t part = 1; part < plan.parts; ++part) {
        team.emplace_back([&, phase, part] { kernels.backward_run(q, threads, phase, part); });
      }
      kernels.backward_run(q, threads, phase, 0);
      for (std::thread& member : team) member.join();
    }
    for (int which = 0; which < kArguments; ++which) {
      Problem other(c, dtype, layout, false);
      Array& direction = argument(other, which);
      const Array& gradient = *gradients[which];
      double found = 0, gradient_norm = 0, direction_norm = 0, expected = 0;
      for (int64_t i = 0; i < counts[which]; ++i) {
        const int64_t at = which == kX ? place(p, p.x_strides, i) : i;
        direction.set(at, normal(generator));
        const double g = gradient[which == kX ? place(p, q.grad_x_strides, i) : i];
        found += g * direction[at];
        gradient_norm += g * g;
        direction_norm += direction[at] * direction[at];
      }
      const std::vector<double> y = other.expected();
      for (size_t i = 0; i < y.size(); ++i) expected += y[i] * grad_y[static_cast<int64_t>(i)];
      const double error = std::fabs(found - expected) / std::sqrt(gradient_norm * direction_norm);
      char text[160];
      std::snprintf(text, sizeof text, "gradient of %s, %s, layout %d, rank_in %d, ring %d, %d threads: %.2e",
                    kNames[which], name, static_cast<int>(layout), static_cast<int>(s.rank_in),
                    static_cast<int>(s.ring), static_cast<int>(threads), error);
      subject() = text;
      CHECK(error < tolerance);
      subject() = "";
    }
    for (int64_t t = 0; t < s.c_out; ++t) {
      double sum = 0, norm = 0;
      for (int64_t i = 0; i < p.batch * p.out_height * p.out_width; ++i) {
        const int64_t n = i / (p.out_height * p.out_width), pixel = i % (p.out_height * p.out_width);
        const double g = grad_y[n * p.y_strides.n + t * p.y_strides.c + pixel / p.out_width * p.y_strides.h +
                                pixel % p.out_width * p.y_strides.w];
        sum += g;
        norm += g * g;
      }
      CHECK(std::fabs(grad_bias[t] - sum) <= tolerance * (std::sqrt(norm) + std::fabs(sum)));
    }
  }
}

}  // namespace

int main() {
  for (const std::string& name : instruction_sets()) {
    tensorcomp_set_isa_cap(name.c_str());
    for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
      for (const Case& c : kCases) {
        for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast, Layout::kSlice}) {
          check_case(c, dtype, layout, name.c_str());
        }
      }
    }
  }
  return result("bottleneck_backward");
}
