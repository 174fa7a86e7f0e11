// torch.ops.tensorcomp.chain for CUDA, and its packed form for inference. Schemas, fake kernels and autograd are in
// tensorcomp_ext/ops.

#include "ops/cuda/chain.h"

namespace tensorcomp::ops::cuda {
namespace {

Tensor packed_chain(const PreparedChain& chain, size_t size, const CallDevice& device,
                    const std::vector<Tensor>& matrices) {
  Tensor packed = bytes_on(matrices[0], size);
  const DenseMatrices given(matrices);
  TC_CHECK_LAUNCH(
      pack_chain(chain.program, chain.element, given.data, false, packed.mutable_data_ptr(), device.stream()));
  return packed;
}

Tensor run_chain(const PreparedChain& chain, const CallDevice& device, const Tensor& x, const Tensor& packed,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool relu) {
  const int64_t out = chain.forward.out, count = rows_of(kChainName, x, "x", chain.forward.in);
  Tensor y = rows_like(x, out);
  const std::optional<Tensor> kept_bias = dense_bias(kChainName, "[" + std::to_string(out) + "]", bias, x, out);
  std::optional<Tensor> kept_residual;
  if (residual.has_value()) {
    STD_TORCH_CHECK(
        residual->scalar_type() == x.scalar_type() && residual->get_device_index() == x.get_device_index() &&
            std::equal(residual->sizes().begin(), residual->sizes().end(), y.sizes().begin(), y.sizes().end()),
        kChainName,
        "_packed: residual must have the shape, dtype and device "
        "of the output, got ",
        sizes_of(*residual));
    kept_residual = dense(*residual);
  }
  if (count == 0) return y;
  const Rows rows(x);
  ChainCall call;
  if (kept_bias.has_value()) call.bias = kept_bias->const_data_ptr();
  if (kept_residual.has_value()) call.residual = kept_residual->const_data_ptr();
  call.relu = relu;
  TC_CHECK_LAUNCH(forward_chain(chain.forward, device.limits(), chain_rows(rows, count), packed.const_data_ptr(), call,
                                y.mutable_data_ptr(), device.stream()));
  return y;
}

Tensor chain(const Tensor& x, std::vector<Tensor> matrices, std::optional<Tensor> bias, std::vector<int64_t> program,
             bool allow_tf32) {
  if (served(x)) {
    const CallDevice device(x);
    const PreparedChain& prepared = prepared_chain(program, element_of(x, allow_tf32), device);
    check_matrices(prepared.program, matrices, x);
    if (takes_rows(prepared, rows_of(kChainName, x, "x", prepared.program.in()))) {
      return run_chain(prepared, device, x, packed_chain(prepared, prepared.packed_bytes, device, matrices), bias,
                       std::nullopt, false);
    }
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(x), from(matrices), from(bias), from(program), from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tensorcomp::chain_reference", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor chain_pack(std::vector<Tensor> matrices, std::vector<int64_t> program) {
  STD_TORCH_CHECK(!matrices.empty() && served(matrices[0]), kChainName,
                  "_pack: matrices must be float32, float16 or bfloat16");
  const CallDevice device(matrices[0]);
  const PreparedChain& prepared = prepared_chain(program, element_of(matrices[0], false), device);
  check_matrices(prepared.program, matrices, matrices[0]);
  STD_TORCH_CHECK(prepared.fits, kChainName, "_pack: a row of the chain does not fit this device's shared memory");
  return packed_chain(prepared, prepared.packed_size, device, matrices);
}

Tensor chain_packed(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::vector<int64_t> program,
                    std::optional<Tensor> residual, bool relu, bool allow_tf32) {
  STD_TORCH_CHECK(served(x), kChainName, "_packed: x must be float32, float16 or bfloat16");
  const CallDevice device(x);
  const PreparedChain& prepared = prepared_chain(program, element_of(x, allow_tf32), device);
  STD_TORCH_CHECK(holds_packed(packed, prepared.packed_size, x), kChainName,
                  "_packed: the matrices were packed for another program, "
                  "another dtype or another device");
  STD_TORCH_CHECK(takes_rows(prepared, rows_of(kChainName, x, "x", prepared.program.in())), kChainName,
                  "_packed: a row of the chain does not fit this device's shared memory");
  return run_chain(prepared, device, x, packed, bias, residual, relu);
}

}  // namespace
}  // namespace tensorcomp::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(TC_CUDA_OPS, TC_CUDA_KEY, m) {
  m.impl("chain", TORCH_BOX(&tensorcomp::ops::cuda::chain));
  m.impl("chain_pack", TORCH_BOX(&tensorcomp::ops::cuda::chain_pack));
  m.impl("chain_packed", TORCH_BOX(&tensorcomp::ops::cuda::chain_packed));
}
