// Calls the Tucker-2 convolution through torch's dispatcher and compares it with the dense convolution.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>

#include "kernels/cpu/dispatch.h"

int main() {
  const c10::optional<c10::OperatorHandle> op =
      c10::Dispatcher::singleton().findSchema({"tensorcomp::tucker2_conv2d", ""});
  if (!op) {
    std::fprintf(stderr, "consumer: tensorcomp::tucker2_conv2d is not registered\n");
    return 1;
  }
  at::manual_seed(0);
  const at::Tensor x = at::randn({2, 17, 9, 11}), core = at::randn({7, 5, 3, 3});
  const at::Tensor factor_out = at::randn({13, 7}), factor_in = at::randn({17, 5}), bias = at::randn({13});
  const std::vector<int64_t> stride{2, 1}, padding{1, 1}, dilation{1, 1};
  std::vector<c10::IValue> stack{x, core, factor_out, factor_in, bias, stride, padding, dilation, false};
  op->callBoxed(stack);
  const at::Tensor y = stack.at(0).toTensor();

  const at::Tensor weight =
      at::einsum("tb,bayx,sa->tsyx", {factor_out.to(at::kDouble), core.to(at::kDouble), factor_in.to(at::kDouble)});
  const at::Tensor dense =
      at::conv2d(x.to(at::kDouble), weight, bias.to(at::kDouble), at::IntArrayRef(stride), at::IntArrayRef(padding));
  const double error = ((y.to(at::kDouble) - dense).norm() / dense.norm()).item<double>();
  std::printf("consumer: instruction set %s, relative error %.2e\n", tensorcomp_isa(), error);
  return y.sizes() == dense.sizes() && error < 1e-5 ? 0 : 1;
}
