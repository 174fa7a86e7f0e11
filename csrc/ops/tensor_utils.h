// Small things every op needs from torch's stable interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/params.h"
#include "huge_pages.h"

namespace tensorcomp::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool has_native_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16;
}

inline DType kernel_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? DType::kFloat32 : DType::kBfloat16;
}

inline int32_t torch_dtype(DType dtype) {
  return dtype == DType::kFloat32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
}

// "[2, 3]"
inline std::string sizes_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor empty_cpu(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
  prefer_huge_pages(made.mutable_data_ptr(), static_cast<size_t>(made.numel()) * made.element_size());
  return made;
}

template <size_t kDims>
inline Tensor empty_cpu(const std::array<int64_t, kDims>& sizes, const std::array<int64_t, kDims>& strides,
                        int32_t dtype) {
  return empty_cpu(static_cast<int64_t>(kDims), sizes.data(), strides.data(), dtype);
}

// A contiguous tensor.
inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, DType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return empty_cpu(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), torch_dtype(dtype));
}

inline Tensor empty_bytes(size_t bytes) {
  return empty_cpu<1>({static_cast<int64_t>(bytes)}, {1}, aoti_torch_dtype_uint8());
}

inline Strides4 strides4(const Tensor& t) {
  const auto s = t.strides();
  return {s[0], s[1], s[2], s[3]};
}

// torch's own rule for which memory format a tensor suggests for results (c10/core/MemoryFormat.h).
inline bool suggests_channels_last(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = strides[d];
    if (sizes[d] > 1) least *= sizes[d];
  }
  return true;
}

// A dense [n, c, h, w] tensor in the memory format asked for.
inline Tensor empty_image(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, DType dtype) {
  const std::array<int64_t, 4> sizes{n, c, h, w};
  // Strides of empty modes count as one, as torch computes them.
  const int64_t c1 = std::max<int64_t>(c, 1), h1 = std::max<int64_t>(h, 1), w1 = std::max<int64_t>(w, 1);
  const std::array<int64_t, 4> strides = channels_last ? std::array<int64_t, 4>{c1 * h1 * w1, 1, c1 * w1, c1}
                                                       : std::array<int64_t, 4>{c1 * h1 * w1, h1 * w1, w1, 1};
  return empty_cpu<4>(sizes, strides, torch_dtype(dtype));
}

// Threads worth waking for so many rows of so many multiply-adds each: a fork and join costs about what this many take.
inline int64_t useful_threads(int64_t rows, int64_t macs) {
  constexpr int64_t kMacsPerThread = 200'000;
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  // A product past 63 bits is worth all threads.
  const int64_t worth = macs < (int64_t{1} << 62) / std::max<int64_t>(rows, 1) ? rows * macs / kMacsPerThread : most;
  return std::max<int64_t>(1, std::min(most, worth));
}

inline int64_t useful_threads(int64_t macs) { return useful_threads(1, macs); }

}  // namespace tensorcomp::ops
