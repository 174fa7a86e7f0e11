#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace tensorcomp {

#define TC_DECLARE(isa)                           \
  namespace isa {                                 \
  BottleneckKernels bottleneck_float32();         \
  BottleneckKernels bottleneck_bfloat16();        \
  EmbeddingKernels embedding_float32();           \
  EmbeddingKernels embedding_bfloat16();          \
  ChainKernels chain_float32();                   \
  ChainKernels chain_bfloat16();                  \
  ContractKernels contract();                     \
  LowrankSparseKernels lowrank_sparse_float32();  \
  LowrankSparseKernels lowrank_sparse_bfloat16(); \
  double fma_peak(double seconds);                \
  }

TC_DECLARE(portable)
#if defined(TC_X86)
TC_DECLARE(avx2)
TC_DECLARE(avx512)
namespace avx512_bf16 {
BottleneckKernels bottleneck_bfloat16();
ChainKernels chain_bfloat16();
LowrankSparseKernels lowrank_sparse_bfloat16();
double fma_peak_bfloat16(double seconds);
}  // namespace avx512_bf16
#endif
#undef TC_DECLARE

namespace {

// Widened bfloat16 multiplies as float32 does.
double portable_peak(bool, double seconds) { return portable::fma_peak(seconds); }
#if defined(TC_X86)
double avx2_peak(bool, double seconds) { return avx2::fma_peak(seconds); }
double avx512_peak(bool, double seconds) { return avx512::fma_peak(seconds); }
double avx512_bf16_peak(bool bfloat16, double seconds) {
  return bfloat16 ? avx512_bf16::fma_peak_bfloat16(seconds) : avx512::fma_peak(seconds);
}
#endif

// Best first.
struct Tables {
  KernelTable table[4];
  bool available[4];
  static constexpr int kCount =
#if defined(TC_X86)
      4;
#else
      1;
#endif
};

const Tables& tables() {
  static const Tables all = [] {
    Tables t{};
    int i = 0;
#if defined(TC_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    t.table[i] = {"avx512_bf16",
                  4,
                  avx512::bottleneck_float32(),
                  avx512_bf16::bottleneck_bfloat16(),
                  avx512::chain_float32(),
                  avx512_bf16::chain_bfloat16(),
                  avx512_bf16_peak,
                  avx512::embedding_float32(),
                  avx512::embedding_bfloat16(),
                  avx512::contract(),
                  avx512::lowrank_sparse_float32(),
                  avx512_bf16::lowrank_sparse_bfloat16()};
    t.available[i++] = avx512 && __builtin_cpu_supports("avx512bf16");
    t.table[i] = {"avx512",
                  3,
                  avx512::bottleneck_float32(),
                  avx512::bottleneck_bfloat16(),
                  avx512::chain_float32(),
                  avx512::chain_bfloat16(),
                  avx512_peak,
                  avx512::embedding_float32(),
                  avx512::embedding_bfloat16(),
                  avx512::contract(),
                  avx512::lowrank_sparse_float32(),
                  avx512::lowrank_sparse_bfloat16()};
    t.available[i++] = avx512;
    t.table[i] = {"avx2",
                  2,
                  avx2::bottleneck_float32(),
                  avx2::bottleneck_bfloat16(),
                  avx2::chain_float32(),
                  avx2::chain_bfloat16(),
                  avx2_peak,
                  avx2::embedding_float32(),
                  avx2::embedding_bfloat16(),
                  avx2::contract(),
                  avx2::lowrank_sparse_float32(),
                  avx2::lowrank_sparse_bfloat16()};
    t.available[i++] = avx2;
#endif
    t.table[i] = {"portable",
                  1,
                  portable::bottleneck_float32(),
                  portable::bottleneck_bfloat16(),
                  portable::chain_float32(),
                  portable::chain_bfloat16(),
                  portable_peak,
                  portable::embedding_float32(),
                  portable::embedding_bfloat16(),
                  portable::contract(),
                  portable::lowrank_sparse_float32(),
                  portable::lowrank_sparse_bfloat16()};
    t.available[i] = true;
    return t;
  }();
  return all;
}

int index_of(const char* name) {
  for (int i = 0; i < Tables::kCount; ++i) {
    if (std::strcmp(tables().table[i].name, name) == 0) return i;
  }
  return -1;
}

const KernelTable* best_from(int first) {
  for (int i = first; i < Tables::kCount; ++i) {
    if (tables().available[i]) return &tables().table[i];
  }
  return &tables().table[Tables::kCount - 1];
}

std::atomic<const KernelTable*>& selected() {
  static std::atomic<const KernelTable*> table = [] {
    const char* cap = std::getenv("TENSORCOMP_CPU_ISA");
    const int first = cap && *cap ? index_of(cap) : 0;
    return best_from(first < 0 ? 0 : first);
  }();
  return table;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

}  // namespace

const KernelTable& kernel_table() { return *selected().load(std::memory_order_relaxed); }

}  // namespace tensorcomp

#define TC_EXPORT __attribute__((visibility("default")))

extern "C" {

TC_EXPORT const char* tensorcomp_isa() { return tensorcomp::kernel_table().name; }

TC_EXPORT const char* tensorcomp_isa_available() {
  static char names[64];
  static const bool filled = [] {
    for (int i = 0; i < tensorcomp::Tables::kCount; ++i) {
      if (!tensorcomp::tables().available[i]) continue;
      if (names[0]) std::strcat(names, ",");
      std::strcat(names, tensorcomp::tables().table[i].name);
    }
    return true;
  }();
  (void)filled;
  return names;
}

TC_EXPORT int tensorcomp_set_isa_cap(const char* name) {
  const int first = name && *name ? tensorcomp::index_of(name) : 0;
  if (first < 0) return 1;
  tensorcomp::selected().store(tensorcomp::best_from(first), std::memory_order_relaxed);
  return 0;
}

TC_EXPORT double tensorcomp_fma_peak(int bfloat16, double seconds) {
  return tensorcomp::kernel_table().fma_peak(bfloat16 != 0, seconds);
}

TC_EXPORT double tensorcomp_copy_bandwidth(void* dst, const void* src, size_t bytes, double seconds) {
  double best = 0.0;
  const double end = tensorcomp::now() + seconds;
  // Small copies are repeated so that one timing is well above the clock's own cost.
  const size_t repeats = bytes < (size_t{1} << 22) ? (size_t{1} << 22) / (bytes ? bytes : 1) + 1 : 1;
  do {
    const double start = tensorcomp::now();
    for (size_t i = 0; i < repeats; ++i) {
      std::memcpy(dst, src, bytes);
      asm volatile("" : : "r"(dst) : "memory");
    }
    const double rate = 2.0 * static_cast<double>(bytes) * static_cast<double>(repeats) / (tensorcomp::now() - start);
    if (rate > best) best = rate;
  } while (tensorcomp::now() < end);
  return best;
}

}  // extern "C"
