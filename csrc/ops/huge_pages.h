// Large results in large pages: on most systems a fresh result of tens of megabytes is memory that nobody has touched,
// and to map it page by page of 4 KiB takes longer than a memory-bound kernel takes to fill it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tensorcomp::ops {

// Asks for 2 MiB pages where they are to be had on request. Contents do not change, and where it is refused nothing
// does.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  // Smaller ones the allocator keeps and hands out again, mapped as they are.
  constexpr size_t kLeast = size_t{32} << 20;
  if (bytes < kLeast) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace tensorcomp::ops
