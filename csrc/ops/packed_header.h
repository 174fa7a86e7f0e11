// Weights packed for the kernels lie behind a header of 64 bytes that tells what for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include "tensor_utils.h"

namespace tensorcomp::ops {

// Memory for a header and so many bytes behind it; pack(void*) fills those.
template <class Header, class Pack>
Tensor packed_behind(const Header& header, size_t bytes, const Pack& pack) {
  static_assert(sizeof(Header) == 64, "what is packed starts at a cache line");
  Tensor packed = empty_bytes(sizeof(Header) + bytes);
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  *reinterpret_cast<Header*>(to) = header;
  pack(to + sizeof(Header));
  return packed;
}

// The tensor's memory, which holds a header at least.
inline const void* front_of(const char* op, const Tensor& packed, size_t header, const std::string& maker) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      packed.numel() >= static_cast<int64_t>(header),
                  op, ": packed must come from ", maker);
  return packed.const_data_ptr();
}

// What lies behind the header; raises unless that is `expected` with so many bytes. `maker` packs, `made_for` says what
// the header tells.
template <class Header>
const void* behind_header(const char* op, const Tensor& packed, const Header& expected, size_t bytes,
                          const std::string& maker, const char* made_for) {
  const char* from = static_cast<const char*>(front_of(op, packed, sizeof(Header), maker));
  STD_TORCH_CHECK(std::equal(from, from + sizeof(Header), reinterpret_cast<const char*>(&expected)), op, ": ", made_for,
                  ": pack them again");
  STD_TORCH_CHECK(packed.numel() == static_cast<int64_t>(sizeof(Header) + bytes), op, ": packed is truncated");
  return from + sizeof(Header);
}

}  // namespace tensorcomp::ops
