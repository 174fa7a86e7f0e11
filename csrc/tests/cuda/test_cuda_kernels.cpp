// The CUDA kernels in the emulator against plain loops in double: forward, every gradient, all types of element, odd
// sizes, layouts, strides, rings and depthwise cores, small devices, and threads running in several orders.
#include <cstdio>

#include "check.h"
#include "cuda/cuda_problem.h"

using namespace tensorcomp;
using namespace tensorcomp::cuda;
using namespace tensorcomp::test;
using emulation::Order;

namespace {

struct Case {
  Core core;
  int64_t batch, height, width;
  int32_t c_in, rank_in, rank_out, c_out, ring = 1, kernel_h = 1, kernel_w = 1;
  int32_t stride_h = 1, stride_w = 1, pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int32_t dilation_h = 1, dilation_w = 1;
};

Convolution convolution(const Case& k, Element element) {
  Convolution c;
  c.element = element;
  c.core = k.core;
  c.batch = k.batch;
  c.height = k.height;
  c.width = k.width;
  c.c_in = k.c_in;
  c.rank_in = k.rank_in;
  c.rank_out = k.rank_out;
  c.c_out = k.c_out;
  c.ring = k.ring;
  c.kernel_h = k.kernel_h;
  c.kernel_w = k.kernel_w;
  c.stride_h = k.stride_h;
  c.stride_w = k.stride_w;
  c.pad_top = k.pad_top;
  c.pad_left = k.pad_left;
  c.dilation_h = k.dilation_h;
  c.dilation_w = k.dilation_w;
  c.out_height = (k.height + k.pad_top + k.pad_bottom - k.dilation_h * (k.kernel_h - 1) - 1) / k.stride_h + 1;
  c.out_width = (k.width + k.pad_left + k.pad_right - k.dilation_w * (k.kernel_w - 1) - 1) / k.stride_w + 1;
  return c;
}

constexpr Core F = Core::kFull, D = Core::kDepthwise, N = Core::kNone;

// Ranks and channels below, at and above the widths of fragments and passes, and no multiple of them.
const Case kCases[] = {
    {F, 1, 1, 1, 1, 1, 1, 1},
    {F, 1, 5, 7, 3, 2, 3, 4, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 2, 9, 9, 16, 6, 6, 16, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 1, 8, 15, 17, 17, 19, 33, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 1, 12, 12, 64, 13, 21, 64, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 3, 7, 7, 40, 31, 39, 72, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 1, 11, 13, 8, 5, 7, 9, 1, 3, 3, 2, 2, 1, 1, 1, 1},
    {F, 2, 10, 6, 7, 4, 3, 5, 1, 1, 1},
    {F, 1, 10, 6, 7, 4, 3, 5, 1, 1, 1, 3, 2},
    {F, 1, 12, 14, 9, 8, 16, 10, 1, 5, 3, 1, 2, 2, 2, 1, 1},
    {F, 1, 6, 40, 5, 3, 12, 7, 1, 2, 4, 1, 1, 0, 1, 1, 2},
    {F, 1, 15, 15, 6, 7, 5, 8, 1, 3, 3, 1, 1, 2, 2, 3, 3, 2, 3},
    {F, 1, 3, 3, 4, 3, 2, 5, 1, 3, 3, 1, 1, 4, 0, 0, 5},
    {F, 1, 9, 2, 3, 2, 2, 3, 1, 7, 1, 2, 1, 3, 3, 0, 0},
    {F, 1, 11, 10, 8, 9, 4, 8, 1, 3, 2, 3, 2, 2, 1, 0, 1, 2, 4},
    {F, 1, 6, 6, 8, 3, 3, 8, 1, 2, 2, 4, 3},
    {F, 5, 4, 4, 10, 40, 36, 12, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 1, 4, 5, 129, 48, 64, 131, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 1, 5, 4, 24, 66, 130, 24, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 1, 6, 5, 12, 5, 4, 10, 3, 3, 3, 1, 1, 1, 1, 1, 1},
    {F, 1, 7, 6, 20, 17, 10, 16, 4, 3, 3, 2, 1, 1, 1, 1, 1},
    {D, 1, 7, 8, 8, 6, 6, 16, 1, 3, 3, 1, 1, 1, 1, 1, 1},
    {D, 2, 9, 6, 24, 35, 35, 17, 1, 3, 5, 2, 1, 1, 1, 2, 2},
    {D, 1, 9, 9, 5, 70, 70, 8, 1, 3, 3, 1, 1, 2, 2, 2, 2, 2, 2},
    {N, 1, 1, 1, 7, 3, 3, 5},
    {N, 1, 1, 77, 40, 12, 12, 24},
    {N, 1, 1, 300, 64, 33, 33, 96},
    {N, 1, 1, 70, 100, 100, 100, 130},
    {N, 1, 1, 37, 48, 140, 140, 32},
};

double tolerance(Element element, bool gradient) {
  switch (element) {
    case Element::kFloat32: return 1e-5;
    case Element::kTf32: return gradient ? 4e-3 : 2e-3;
    case Element::kFloat16: return gradient ? 4e-3 : 2e-3;
    case Element::kBfloat16: break;
  }
  return gradient ? 2e-2 : 1e-2;
}

const char* name(Element element) {
  constexpr const char* kNames[] = {"float32", "tf32", "float16", "bfloat16"};
  return kNames[static_cast<int>(element)];
}

struct Subject {
  Subject(int index, Element element, Layout layout, const char* what) {
    std::snprintf(text, sizeof text, "case %d, %s, layout %d, %s", index, name(element), static_cast<int>(layout),
                  what);
    subject() = text;
  }
  ~Subject() { subject() = ""; }
  char text[160];
};

bool close(const std::vector<double>& found, const std::vector<double>& expected, double limit) {
  const double error = relative_error(found, expected);
  if (!(error < limit)) std::fprintf(stderr, "relative error %.2e, limit %.2e: ", error, limit);
  return error < limit;
}

Layout output_layout(Layout layout) { return layout == Layout::kSlice ? Layout::kChannelsLast : layout; }

void check_forward(Problem& problem, const Answer& answer, const DeviceLimits& device, Layout layout, int index) {
  const Convolution& c = problem.conv;
  const Subject what(index, c.element, layout, "forward");
  ImageData y(c.element, output_layout(layout), c.batch, c.c_out, c.out_height, c.out_width);
  y.bytes = element_bytes(c.element);
  Array packed(Element::kFloat32, static_cast<int64_t>(packed_bytes(c)) / 4);
  CHECK(pack(c, problem.weights(), packed.get(), nullptr) == cudaSuccess);
  CHECK(forward(c, device, problem.x.image(), packed.get(), problem.bias.get(), false, y.data(), y.strides, nullptr) ==
        cudaSuccess);
  CHECK(close(y.values(), answer.y, tolerance(c.element, false)));
}

void check_backward(Problem& problem, const Answer& answer, const DeviceLimits& device, Layout layout, int index,
                    int mask) {
  const Convolution& c = problem.conv;
  char text[40];
  std::snprintf(text, sizeof text, "backward, mask %d", mask);
  const Subject what(index, c.element, layout, text);
  ImageData x(c.element, output_layout(layout), c.batch, c.c_in, c.height, c.width);
  x.bytes = element_bytes(c.element);
  Array core(c.element, problem.core_size()), factor_out(c.element, problem.factor_out.size());
  Array factor_in(c.element, problem.factor_in.size()), bias(c.element, c.c_out);
  Gradients wanted;
  if (mask & 1) wanted.x = x.data();
  wanted.x_strides = x.strides;
  if (mask & 2 && c.core != Core::kNone) wanted.core = core.get();
  if (mask & 4) wanted.factor_out = factor_out.get();
  if (mask & 8) wanted.factor_in = factor_in.get();
  if (mask & 16) wanted.bias = bias.get();
  Array scratch(Element::kFloat32, static_cast<int64_t>(backward_scratch(c, device, wanted)) / 4);
  CHECK(backward(c, device, problem.grad.image(), problem.x.image(), problem.weights(), wanted, scratch.get(),
                 nullptr) == cudaSuccess);
  const double limit = tolerance(c.element, true);
  if (wanted.x != nullptr) CHECK(close(x.values(), answer.x, limit));
  if (wanted.core != nullptr) CHECK(close(values(core), answer.core, limit));
  if (wanted.factor_out != nullptr) CHECK(close(values(factor_out), answer.factor_out, limit));
  if (wanted.factor_in != nullptr) CHECK(close(values(factor_in), answer.factor_in, limit));
  if (wanted.bias != nullptr) CHECK(close(values(bias), answer.bias, limit));
}

// A few multiprocessors give every block several tiles; little shared memory gives small tiles.
const DeviceLimits kDevices[] = {
    {2, 227 * 1024, 228 * 1024}, {132, 163 * 1024, 164 * 1024}, {1, 99 * 1024, 100 * 1024}};

// Under the address sanitizer a thirtieth of the speed is left: each case meets two of the twelve combinations.
#if defined(__SANITIZE_ADDRESS__)
constexpr int kEvery = 6;
#else
constexpr int kEvery = 1;
#endif

void test_cases() {
  int turn = 0;
  int index = 0;
  for (const Case& k : kCases) {
    turn = index;
    for (const Element element : {Element::kBfloat16, Element::kFloat16, Element::kTf32, Element::kFloat32}) {
      for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous, Layout::kSlice}) {
        // Every case meets every element and layout, and in turn every device and order.
        if (++turn % kEvery != 0) continue;
        emulation::set_order(static_cast<Order>(turn % 3));
        const DeviceLimits& device = kDevices[turn / 3 % 3];
        Problem problem(convolution(k, element), layout, static_cast<unsigned>(index + 1));
        const Answer answer = problem.answer();
        check_forward(problem, answer, device, layout, index);
        check_backward(problem, answer, device, layout, index, 31);
      }
    }
    ++index;
  }
}

void test_every_mask() {
  emulation::set_order(Order::kShuffled);
  for (const Case& k : {kCases[6], kCases[21], kCases[25]}) {
    Problem problem(convolution(k, Element::kFloat32), Layout::kChannelsLast, 3);
    const Answer answer = problem.answer();
    for (int mask = 1; mask < 32; mask += kEvery) {
      check_backward(problem, answer, kDevices[0], Layout::kChannelsLast, static_cast<int>(k.core), mask);
    }
  }
}

// Devices so small that tiles are, and a result in 8 or fewer columns: the forms that large ranks meet elsewhere.
void test_small_devices() {
  emulation::set_order(Order::kDescending);
  for (const int32_t kilobytes : {16, 20, 32}) {
    const DeviceLimits device{2, kilobytes * 1024, (kilobytes + 1) * 1024};
    for (const Element element : {Element::kBfloat16, Element::kFloat32}) {
      for (const int32_t rank : {34, 66}) {
        const Convolution c = convolution({F, 1, 9, 8, 12, rank, rank, 10, 1, 3, 3, 1, 1, 1, 1, 1, 1}, element);
        if (!fits(c, device)) continue;
        Problem problem(c, Layout::kChannelsLast, 11);
        const Answer answer = problem.answer();
        check_forward(problem, answer, device, Layout::kChannelsLast, kilobytes);
        check_backward(problem, answer, device, Layout::kChannelsLast, kilobytes, 31);
      }
    }
  }
}

// Large and small numbers of float32 come through the two parts each is split in.
void test_extreme_values() {
  const Convolution c = convolution({N, 1, 1, 4, 3, 2, 2, 3}, Element::kFloat32);
  Problem problem(c, Layout::kChannelsLast, 13);
  problem.x.array.set(0, 3.4e38);
  for (int64_t i = 0; i < problem.factor_in.size(); ++i) problem.factor_in.set(i, 1e-3 * problem.factor_in[i]);
  const Answer answer = problem.answer();
  check_forward(problem, answer, kDevices[0], Layout::kChannelsLast, 0);
}

// Rank-space input: core and last factor only.
void test_from_rank() {
  for (const Element element : {Element::kBfloat16, Element::kFloat32}) {
    for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
      for (const int32_t rank : {8, 13}) {
        Convolution c = convolution({F, 2, 9, 7, rank, rank, 12, 24, 1, 3, 3, 2, 1, 1, 1, 1, 1}, element);
        Problem problem(c, layout, 5);
        for (int64_t s = 0; s < rank; ++s)  // the first factor as the identity
          for (int64_t r = 0; r < rank; ++r) problem.factor_in.set(s * rank + r, s == r ? 1.0 : 0.0);
        const Answer answer = problem.answer();
        const Subject what(rank, element, layout, "from rank space");
        Array packed(Element::kFloat32, static_cast<int64_t>(packed_bytes(c)) / 4);
        CHECK(pack(c, problem.weights(), packed.get(), nullptr) == cudaSuccess);
        ImageData y(element, layout, c.batch, c.c_out, c.out_height, c.out_width);
        y.bytes = element_bytes(element);
        CHECK(forward(c, kDevices[0], problem.x.image(), packed.get(), problem.bias.get(), true, y.data(), y.strides,
                      nullptr) == cudaSuccess);
        CHECK(close(y.values(), answer.y, tolerance(element, false)));
      }
    }
  }
}

// The same bits whatever order threads run in.
void test_reproducible() {
  const Convolution c = convolution(kCases[5], Element::kFloat32);
  Problem problem(c, Layout::kChannelsLast, 9);
  std::vector<std::vector<double>> found;
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulation::set_order(order);
    Array factor_out(c.element, problem.factor_out.size()), core(c.element, problem.core_size());
    Gradients wanted;
    wanted.factor_out = factor_out.get();
    wanted.core = core.get();
    Array scratch(Element::kFloat32, static_cast<int64_t>(backward_scratch(c, kDevices[1], wanted)) / 4);
    CHECK(backward(c, kDevices[1], problem.grad.image(), problem.x.image(), problem.weights(), wanted, scratch.get(),
                   nullptr) == cudaSuccess);
    std::vector<double> all = values(factor_out);
    for (const double value : values(core)) all.push_back(value);
    found.push_back(all);
  }
  CHECK(found[0] == found[1]);
  CHECK(found[0] == found[2]);
}

}  // namespace

int main() {
  test_cases();
  test_every_mask();
  test_small_devices();
  test_extreme_values();
  test_from_rank();
  test_reproducible();
  return result("cuda_kernels");
}
