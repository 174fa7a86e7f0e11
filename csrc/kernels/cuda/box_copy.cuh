// Boxes of matrices on their way to shared memory: as wide copies as the matrix's place and rows allow.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/lowrank_sparse.h"

namespace tensorcomp::cuda {

// Rows [begin, end) of a box of kRowBytes a row whose corner is element (row, column) of the matrix; zeros beyond it.
// Arrives with the copies of the thread's open group, or at once.
template <typename Element, int kRowBytes, int kWidth>
TC_DEVICE void copy_box_by(char* to, int32_t pitch, const MatrixSource& s, int64_t row, int64_t column, int32_t begin,
                           int32_t end) {
  constexpr int32_t kPieces = kRowBytes / kWidth;
  const auto* from = static_cast<const Element*>(s.data);
  for (int32_t i = begin * kPieces + thread_index(); i < end * kPieces; i += block_threads()) {
    const int32_t of_box = i / kPieces, piece = i % kPieces;
    const int64_t at = column + piece * (kWidth / static_cast<int32_t>(sizeof(Element)));
    const int64_t left = row + of_box < s.rows ? (s.columns - at) * static_cast<int64_t>(sizeof(Element)) : 0;
    const int32_t bytes = left <= 0 ? 0 : left < kWidth ? static_cast<int32_t>(left) : kWidth;
    copy_async<kWidth>(to + of_box * pitch + piece * kWidth, bytes > 0 ? from + (row + of_box) * s.row + at : from,
                       bytes);
  }
}

template <typename Element, int kRowBytes>
TC_DEVICE void copy_box(char* to, int32_t pitch, const MatrixSource& s, int64_t row, int64_t column, int32_t begin,
                        int32_t end) {
  if constexpr (kRowBytes >= 16) {
    if (s.width == 16) return copy_box_by<Element, kRowBytes, 16>(to, pitch, s, row, column, begin, end);
  }
  if constexpr (kRowBytes >= 8) {
    if (s.width == 8) return copy_box_by<Element, kRowBytes, 8>(to, pitch, s, row, column, begin, end);
  }
  if constexpr (kRowBytes >= 4) {
    if (s.width == 4) return copy_box_by<Element, kRowBytes, 4>(to, pitch, s, row, column, begin, end);
  }
  constexpr int32_t kElements = kRowBytes / static_cast<int32_t>(sizeof(Element));
  const auto* from = static_cast<const Element*>(s.data);
  const int32_t rows = end - begin;
  // Neighbouring threads take neighbouring memory.
  const bool along = s.column == 1 || s.columns == 1;
  for (int32_t i = thread_index(); i < rows * kElements; i += block_threads()) {
    const int32_t of_box = begin + (along ? i / kElements : i % rows), e = along ? i % kElements : i / rows;
    const bool inside = row + of_box < s.rows && column + e < s.columns;
    *reinterpret_cast<Element*>(to + of_box * pitch + e * static_cast<int32_t>(sizeof(Element))) =
        inside ? from[(row + of_box) * s.row + (column + e) * s.column] : Element{};
  }
}

// A part of a mask.
template <int kRowBytes>
TC_DEVICE void copy_mask_box(char* to, const MatrixSource& s, int64_t row, int64_t first_byte, int32_t begin,
                             int32_t end) {
  copy_box<uint8_t, kRowBytes>(to, kRowBytes, s, row, first_byte, begin, end);
}

// Bits of kCount entries of a part of a mask in shared memory, from a column on that is a multiple of kCount; bit i is
// column i.
template <int kCount>
TC_DEVICE uint32_t kept_bits(const char* row, bool bits, int32_t column) {
  const auto* at = reinterpret_cast<const uint8_t*>(row);
  if (bits) return static_cast<uint32_t>(at[column / 8]) >> column % 8 & ((1u << kCount) - 1);
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) found |= at[column + i] != 0 ? 1u << i : 0u;
  return found;
}

// What remains of 16 bytes of a matrix where only entries whose bit is set are kept.
template <typename Storage>
TC_DEVICE Words4 only_kept(Words4 v, uint32_t kept) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Storage) == 2) {
      const uint32_t pair = kept >> 2 * i;
      v.word[i] &= (pair & 1 ? 0xffffu : 0u) | (pair & 2 ? 0xffff0000u : 0u);
    } else {
      v.word[i] = kept >> i & 1 ? v.word[i] : 0u;
    }
  }
  return v;
}

}  // namespace tensorcomp::cuda
