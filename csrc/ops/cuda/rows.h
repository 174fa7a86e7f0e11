// Tensors [..., features] as rows, for the CUDA ops of linear layers.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "ops/cuda/device_utils.h"

namespace tensorcomp::ops::cuda {

// Rows of a tensor [..., features]; raises where it has others.
inline int64_t rows_of(const char* op, const Tensor& x, const char* argument, int64_t features) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == features, op, ": ", argument, " must be [..., ", features,
                  "], got ", sizes_of(x));
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// Rows that lie at equal steps can be read where they are: the leading dimensions follow each other, of any stride.
inline std::optional<Image> rows_image(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  int64_t step = x.size(last), expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (expected < 0) step = x.stride(d);
    if (expected >= 0 && x.stride(d) != expected) return std::nullopt;
    expected = x.stride(d) * x.size(d);
  }
  const int64_t rows = x.numel() / std::max<int64_t>(x.size(last), 1);
  const int64_t channel = x.size(last) == 1 ? 1 : x.stride(last);
  return Image{x.const_data_ptr(), {rows * step, channel, rows * step, step}};
}

// The rows of a tensor as an image of one pixel a row, and what holds them.
struct Rows {
  explicit Rows(const Tensor& x) : kept(x) {
    std::optional<Image> found = rows_image(x);
    if (!found.has_value()) {
      kept = torch::stable::contiguous(x);
      found = rows_image(kept);
    }
    image = *found;
  }
  Tensor kept;
  Image image;
};

// A dense tensor of x's leading sizes and `features`.
inline Tensor rows_like(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
  sizes.back() = features;
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype_of(x), type, x.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

}  // namespace tensorcomp::ops::cuda
