// What the CUDA ops need from torch's stable interface and from the device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/convolution.h"
#include "ops/tensor_utils.h"

// The emulator of the tests (csrc/tests/cuda) runs these ops on CPU tensors, under another namespace.
#ifdef TENSORCOMP_EMULATE_CUDA
#define TC_CUDA_OPS tensorcomp_emulated
#define TC_CUDA_KEY CPU
#define TC_CHECK_LAUNCH(call) STD_TORCH_CHECK((call) == cudaSuccess, "a launch failed")
#else
#define TC_CUDA_OPS tensorcomp
#define TC_CUDA_KEY CUDA
#define TC_CHECK_LAUNCH(call) STD_CUDA_CHECK(call)
#endif

namespace tensorcomp::ops::cuda {

using namespace tensorcomp::cuda;

#ifdef TENSORCOMP_EMULATE_CUDA

struct CallDevice {
  explicit CallDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  // Small, so that small problems make several tiles a block.
  DeviceLimits limits() const { return {3, 163 * 1024, 164 * 1024}; }
  bool old() const { return false; }
};

#else

// Makes the device of a tensor the current one for a call.
class CallDevice {
 public:
  explicit CallDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    limits_ = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
               attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  const DeviceLimits& limits() const { return limits_; }
  // Before Ampere there are neither asynchronous copies nor these matrix instructions.
  bool old() const { return attribute(cudaDevAttrComputeCapabilityMajor) < 8; }

 private:
  int32_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  DeviceLimits limits_;
};

#endif

// Whether the kernels take a problem on a device: tiles that fit its shared memory.
inline bool kernels_take(const Convolution& c, const CallDevice& device) {
  return !device.old() && fits(c, device.limits());
}

inline bool served(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline Element element_of(const Tensor& t, bool allow_tf32) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Element::kFloat16;
    case ScalarType::BFloat16: return Element::kBfloat16;
    default: return allow_tf32 ? Element::kTf32 : Element::kFloat32;
  }
}

// Uninitialised memory from torch's allocator, on the device of `like`.
template <size_t kDims>
Tensor empty_on(const Tensor& like, const std::array<int64_t, kDims>& sizes, const std::array<int64_t, kDims>& strides,
                int32_t dtype) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(kDims), sizes.data(), strides.data(),
                                                         dtype, type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline Tensor bytes_on(const Tensor& like, size_t bytes) {
  return empty_on<1>(like, {static_cast<int64_t>(bytes)}, {1}, aoti_torch_dtype_uint8());
}

// Bytes of packed weights. A header could not be read without waiting for the device, so a few bytes at the end, whose
// number follows from sizes and dtype, tell what they were packed for.
inline size_t size_with_tag(size_t bytes, const std::vector<int64_t>& packed_for) {
  uint64_t tag = 0;
  for (const int64_t v : packed_for) {
    tag = (tag ^ static_cast<uint64_t>(v)) * 0x9e3779b97f4a7c15u;
    tag ^= tag >> 29;
  }
  return bytes + 1 + tag % 4093;
}

inline size_t packed_size(const Convolution& c) {
  const bool half = c.element == Element::kFloat16;
  return size_with_tag(packed_bytes(c), {c.c_in, c.rank_in, c.rank_out, c.c_out, c.ring, c.kernel_h, c.kernel_w,
                                         static_cast<int64_t>(c.core), element_bytes(c.element), half});
}

inline bool holds_packed(const Tensor& packed, size_t size, const Tensor& x) {
  return packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
         packed.get_device_index() == x.get_device_index() && packed.numel() == static_cast<int64_t>(size) &&
         reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
}

// Whether these bytes are weights packed for a problem.
inline bool is_packed_for(const Convolution& c, const Tensor& packed, const Tensor& x) {
  return holds_packed(packed, packed_size(c), x);
}

// The bias of a call, dense; raises where it does not fit.
inline std::optional<Tensor> dense_bias(const char* op, const std::string& expected, const std::optional<Tensor>& bias,
                                        const Tensor& x, int64_t c_out) {
  if (!bias.has_value()) return std::nullopt;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == c_out && bias->scalar_type() == x.scalar_type() &&
                      bias->get_device_index() == x.get_device_index(),
                  op, ": bias must be ", expected, " in the dtype and on the device of x, got ", sizes_of(*bias));
  return dense(*bias);
}

// A dense tensor of up to four dimensions in the dtype of `like`.
template <size_t kDims>
Tensor contiguous_on(const Tensor& like, const std::array<int64_t, kDims>& sizes) {
  std::array<int64_t, kDims> strides;
  int64_t step = 1;
  for (size_t d = kDims; d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_on<kDims>(like, sizes, strides, dtype_of(like));
}

inline Tensor image_on(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (!channels_last) return contiguous_on<4>(like, {n, c, h, w});
  const int64_t c1 = std::max<int64_t>(c, 1), h1 = std::max<int64_t>(h, 1), w1 = std::max<int64_t>(w, 1);
  return empty_on<4>(like, {n, c, h, w}, {h1 * w1 * c1, 1, w1 * c1, c1}, dtype_of(like));
}

// Strides of an image that torch may have filled with anything where a size is one: of no meaning, but tested for
// alignment and order.
inline Strides4 image_strides(const Tensor& t) {
  Strides4 s = strides4(t);
  const bool one_channel = t.size(1) == 1;
  if (one_channel) s.c = 1;
  if (t.size(3) == 1) s.w = one_channel || s.c == 1 ? t.size(1) : 1;
  if (t.size(2) == 1) s.h = s.w * t.size(3);
  if (t.size(0) == 1) s.n = s.h * t.size(2);
  return s;
}

inline Image image_of(const Tensor& t) { return {t.const_data_ptr(), image_strides(t)}; }

// Both of a pair that may be given as one number.
inline std::array<int64_t, 2> pair_of(const char* op, const char* argument, const std::vector<int64_t>& values) {
  STD_TORCH_CHECK(values.size() == 1 || values.size() == 2, op, ": ", argument, " must be an int or a pair");
  return {values[0], values[values.size() - 1]};
}

}  // namespace tensorcomp::ops::cuda
