// tensorcomp::tucker2_core_pack for CUDA. The schema, the fake kernel and the kernel for other devices are in
// tensorcomp_ext/ops/tucker2_core_pack.py.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels/cuda/launch.h"

namespace tensorcomp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t element_bytes(const Tensor& core) {
  switch (core.scalar_type()) {
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: STD_TORCH_CHECK(false, "tucker2_core_pack: core must be float32, float16 or bfloat16 on CUDA");
  }
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor tucker2_core_pack(const Tensor& core) {
  STD_TORCH_CHECK(core.dim() == 4, "tucker2_core_pack: core must be [R_out, R_in, kH, kW], got ", core.dim(),
                  " dimensions");
  const torch::stable::accelerator::DeviceGuard guard(core.get_device_index());
  Tucker2PackParams params;
  params.element_bytes = element_bytes(core);
  params.rank_out = core.size(0);
  params.rank_in = core.size(1);
  params.kernel_h = core.size(2);
  params.kernel_w = core.size(3);
  params.stride_out = core.stride(0);
  params.stride_in = core.stride(1);
  params.stride_h = core.stride(2);
  params.stride_w = core.stride(3);
  Tensor packed = torch::stable::new_empty(core, {params.kernel_h, params.kernel_w, params.rank_in, params.rank_out});
  params.core = core.const_data_ptr();
  params.packed = packed.mutable_data_ptr();
  STD_CUDA_CHECK(launch_tucker2_pack(params, current_stream(core.get_device_index())));
  return packed;
}

}  // namespace
}  // namespace tensorcomp

STABLE_TORCH_LIBRARY_IMPL(tensorcomp, CUDA, m) {
  m.impl("tucker2_core_pack", TORCH_BOX(&tensorcomp::tucker2_core_pack));
}
