// What kernels ask of the device, in one place: thread indices, barriers, asynchronous copies, matrix instructions.
//
// Kernels use nothing else of CUDA, so that the same source also compiles as plain C++ for the emulator of the tests
// (csrc/tests/cuda/emulation.h), which runs it thread by thread where there is no GPU.
#pragma once

#include <cstdint>

#include "kernels/cuda/host_device.h"

#ifdef TENSORCOMP_EMULATE_CUDA
#include "emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The runtime declares it only where assertions are on, and builds of extensions switch them off.
extern "C" __device__ void __assert_fail(const char* assertion, const char* file, unsigned int line,
                                         const char* function) noexcept;

#define TC_DEVICE __device__ __forceinline__
#define TC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define TC_GRID_CONSTANT __grid_constant__

namespace tensorcomp::cuda {

TC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same for all threads of a warp, and the compiler knows.
TC_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }
TC_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
TC_DEVICE int64_t block_index() { return blockIdx.x; }
TC_DEVICE int64_t grid_blocks() { return gridDim.x; }

// Stops the kernel, and with it the process's use of the device, as torch's own assertions do.
TC_DEVICE void device_assert(bool holds, const char* text) {
  if (!holds) __assert_fail(text, "tensorcomp_ext", 0, "");
}

// Dynamic shared memory, 16-byte aligned.
TC_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

TC_DEVICE void sync_block() { __syncthreads(); }
TC_DEVICE void sync_warp() { __syncwarp(); }

// Of all 32 threads of a warp, always in the same order; every thread gets the sum.
TC_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
// Of the threads up to this one.
TC_DEVICE int32_t warp_prefix(int32_t value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(0xffffffffu, value, step);
    if (static_cast<int>(threadIdx.x) % 32 >= step) value += before;
  }
  return value;
}
TC_DEVICE int32_t warp_last(int32_t value) { return __shfl_sync(0xffffffffu, value, 31); }
TC_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
TC_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// 16 (or 4, or 8) bytes from global to shared memory, of which the first `bytes` are read and the rest are zero. Both
// addresses are multiples of the width.
template <int kWidth = 16>
TC_DEVICE void copy_async(void* to, const void* from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kWidth == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from), "r"(bytes), "n"(kWidth)
                 : "memory");
  }
}
TC_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, all groups but the latest kPending.
template <int kPending>
TC_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32 bits); lane l names row l % 8 of matrix l / 8.
TC_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same, each 16-bit matrix transposed.
TC_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// acc[16x8] += a[16xk] b[kx8], with k = 16 elements of 16 bits or 8 of 32: 32 bytes.
TC_DEVICE void mma_bfloat16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TC_DEVICE void mma_float16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TC_DEVICE void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To nearest: 10 stored bits of mantissa.
TC_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

TC_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
TC_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }

TC_DEVICE float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
TC_DEVICE uint16_t float_to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
TC_DEVICE float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
TC_DEVICE uint16_t float_to_float16(float value) { return __half_as_ushort(__float2half_rn(value)); }

struct alignas(16) Words4 {
  uint32_t word[4];
};
// 16 bytes that nobody writes while the kernel runs.
TC_DEVICE Words4 load_constant(const Words4* from) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
// 16 bytes that nobody reads soon.
TC_DEVICE void store_streaming(Words4* to, const Words4& v) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

// A checked launch; the error of this launch is returned and cleared, nothing waits for the device.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    // The same value at every launch: another thread may be launching the same kernel with another size.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most);
    }
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return error;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

}  // namespace tensorcomp::cuda

#endif  // TENSORCOMP_EMULATE_CUDA
