// What ops say of tensors that do not fit, in the words of the Python functions.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

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

}  // namespace tensorcomp::ops
