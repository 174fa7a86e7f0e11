// Runs CUDA kernels as plain C++, one thread of a block after the other, so that they are tested where there is no GPU.
//
// Every thread of a block is a fiber that runs until the next point where threads meet. Blocks run one after another.
// It is stricter than a device where that finds mistakes: shared memory starts as NaN, asynchronous copies
// leave NaN when they set out and arrive at the wait that guarantees them, no sooner, the order of threads between two
// meetings is the caller's choice (what depends on it is a race), and threads of a warp that meet at different places
// are an error. Built with the address sanitizer, every access beyond a buffer is one too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define TC_DEVICE inline
#define TC_KERNEL(threads, blocks) inline void
#define TC_GRID_CONSTANT

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorAssert = 710
};
using cudaStream_t = void*;

namespace tensorcomp::cuda {

namespace emulation {

// Between two meetings: ascending, descending, or shuffled anew each time.
enum class Order { kAscending, kDescending, kShuffled };
void set_order(Order order);
// The most dynamic shared memory a block may have.
constexpr size_t kSharedLimit = 227 * 1024;

// Where threads of a warp meet; `site` tells the meeting places apart. The last to arrive runs `together` for all.
void meet_warp(int site, void* argument, void (*together)(void* const* arguments));
void meet_block();
int thread();
int threads();
int64_t block();
int64_t blocks();
char* shared();
void copy(void* to, const void* from, int bytes, int width);
void commit();
// The launch returns cudaErrorAssert; its threads go on, where a device would stop them.
void fail_assertion();
void wait(int pending);
cudaError_t run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body);

struct LoadMatrices {
  uint32_t* result;
  const void* row;
};
struct MatrixProduct {
  float* acc;
  const uint32_t* a;
  uint32_t b[2];
};
void load_matrices(void* const* arguments);
void load_matrices_transposed(void* const* arguments);
void mma_bfloat16(void* const* arguments);
void mma_float16(void* const* arguments);
void mma_tf32(void* const* arguments);
// Arguments are the threads' values, in place of which they get the results.
void warp_sum(void* const* arguments);
void warp_prefix(void* const* arguments);
void warp_last(void* const* arguments);

}  // namespace emulation

inline int thread_index() { return emulation::thread(); }
inline int warp_index() { return emulation::thread() / 32; }
inline int block_threads() { return emulation::threads(); }
inline int64_t block_index() { return emulation::block(); }
inline int64_t grid_blocks() { return emulation::blocks(); }
inline char* shared_memory() { return emulation::shared(); }
inline void sync_block() { emulation::meet_block(); }
inline void sync_warp() {
  emulation::meet_warp(0, nullptr, [](void* const*) {});
}
inline float warp_sum(float value) {
  emulation::meet_warp(6, &value, emulation::warp_sum);
  return value;
}
inline int32_t warp_prefix(int32_t value) {
  emulation::meet_warp(7, &value, emulation::warp_prefix);
  return value;
}
inline int32_t warp_last(int32_t value) {
  emulation::meet_warp(8, &value, emulation::warp_last);
  return value;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline void device_assert(bool holds, const char*) {
  if (!holds) emulation::fail_assertion();
}
template <int kWidth = 16>
inline void copy_async(void* to, const void* from, int bytes) {
  static_assert(kWidth == 4 || kWidth == 8 || kWidth == 16);
  emulation::copy(to, from, bytes, kWidth);
}
inline void copy_commit() { emulation::commit(); }
template <int kPending>
inline void copy_wait() {
  emulation::wait(kPending);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulation::LoadMatrices call{r, row};
  emulation::meet_warp(1, &call, emulation::load_matrices);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::LoadMatrices call{r, row};
  emulation::meet_warp(2, &call, emulation::load_matrices_transposed);
}
inline void mma_bfloat16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MatrixProduct call{acc, a, {b0, b1}};
  emulation::meet_warp(3, &call, emulation::mma_bfloat16);
}
inline void mma_float16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MatrixProduct call{acc, a, {b0, b1}};
  emulation::meet_warp(4, &call, emulation::mma_float16);
}
inline void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MatrixProduct call{acc, a, {b0, b1}};
  emulation::meet_warp(5, &call, emulation::mma_tf32);
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool special = (bits & 0x7f800000u) == 0x7f800000u;
  return special ? bits : (bits + 0x1000u) & ~0x1fffu;
}
inline float bfloat16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float float16_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline uint16_t float_to_float16(float value) {
  const _Float16 narrow = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}

struct alignas(16) Words4 {
  uint32_t word[4];
};
inline Words4 load_constant(const Words4* from) { return *from; }
inline void store_streaming(Words4* to, const Words4& value) { *to = value; }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  return emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace tensorcomp::cuda
