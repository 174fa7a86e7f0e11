// What ops say of tensors that do not fit, in the words of the Python functions.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

#include "../kernels/sparse_matrix.h"
#include "tensor_utils.h"

namespace tensorcomp::ops {

// "torch.float32"
inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string dtype_of_tensor(const Tensor& t) { return dtype_name(t.scalar_type()); }

// "cpu" or "cuda:0"
inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device:") + std::to_string(t.get_device_index());
}

inline void check_device(const char* op, const std::string& argument, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  STD_TORCH_CHECK(
      t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
      op, ": ", argument, " must be on ", like_name, "'s device ", device_name(like), ", got ", device_name(t));
}

// Raises unless `t` has the dtype of `like` and lies beside it.
inline void check_like(const char* op, const std::string& argument, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", argument, " must have ", like_name, "'s dtype ",
                  dtype_of_tensor(like), ", got ", dtype_of_tensor(t));
  check_device(op, argument, t, like_name, like);
}

// Of a weight [m, n]: `entries` is what has its shape, the values or the gradient.
inline void check_sparse_weight(const char* op, const Tensor& a, const Tensor& b, const Tensor& entries,
                                const char* what, const Tensor& mask) {
  STD_TORCH_CHECK(a.dim() == 2, op, ": a must be [m, r], got ", sizes_of(a));
  STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == a.size(1), op, ": b must be [r, n] with r = ", a.size(1), ", got ",
                  sizes_of(b));
  const int64_t m = a.size(0), n = b.size(1);
  STD_TORCH_CHECK(entries.dim() == 2 && entries.size(0) == m && entries.size(1) == n, op, ": ", what,
                  " must be [m, n] = [", m, ", ", n, "], got ", sizes_of(entries));
  check_like(op, "b", b, "a", a);
  check_like(op, what, entries, "a", a);
  const bool bits = mask.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bits || mask.scalar_type() == ScalarType::Bool, op,
                  ": mask must be bool, or uint8 as pack_mask makes it, got ", dtype_of_tensor(mask));
  const int64_t width = bits ? (n + 7) / 8 : n;
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == m && mask.size(1) == width, op, ": mask of dtype ",
                  bits ? "uint8 must be [m, ceil(n / 8)] = [" : "bool must be [m, n] = [", m, ", ", width, "], got ",
                  sizes_of(mask));
  check_device(op, "mask", mask, "a", a);
}

// Of a packed matrix [m, n] whose values may be of any dtype; the numbers in it are not looked at.
inline void check_sparse_places(const char* op, int64_t m, int64_t n, const Tensor& values, const Tensor& offsets,
                                const Tensor& positions) {
  const int64_t segments = segments_of(n);
  const bool bits = positions.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bits || positions.scalar_type() == ScalarType::Short, op, ": positions must be uint8 or int16, got ",
                  dtype_of_tensor(positions));
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int, op, ": offsets must be int32, got ",
                  dtype_of_tensor(offsets));
  STD_TORCH_CHECK(values.dim() == 1, op, ": values must be [nnz], got ", sizes_of(values));
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == m * segments + 1, op,
                  ": offsets must be [m * segments + 1] = [", m * segments + 1, "] with segments = ", segments,
                  ", got ", sizes_of(offsets));
  if (bits) {
    STD_TORCH_CHECK(positions.dim() == 2 && positions.size(0) == m && positions.size(1) == (n + 7) / 8, op,
                    ": positions of dtype uint8 must be [m, ceil(n / 8)] = [", m, ", ", (n + 7) / 8, "], got ",
                    sizes_of(positions));
  } else {
    STD_TORCH_CHECK(positions.dim() == 1 && positions.size(0) == values.size(0), op,
                    ": positions of dtype int16 must be [nnz] = [", values.size(0), "], got ", sizes_of(positions));
  }
  check_device(op, "offsets", offsets, "values", values);
  check_device(op, "positions", positions, "values", values);
}

// The weights of a layer a b + sparse.
inline void check_sparse_layer(const char* op, const Tensor& a, const Tensor& b, const Tensor& values,
                               const Tensor& offsets, const Tensor& positions) {
  STD_TORCH_CHECK(a.dim() == 2 && a.size(1) > 0, op, ": a must be [m, r] with r >= 1, got ", sizes_of(a));
  STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == a.size(1), op, ": b must be [r, n] with r = ", a.size(1), ", got ",
                  sizes_of(b));
  check_like(op, "b", b, "a", a);
  check_like(op, "values", values, "a", a);
  check_sparse_places(op, a.size(0), b.size(1), values, offsets, positions);
}

}  // namespace tensorcomp::ops
