// Storage types and their arithmetic: how kernels read, write and multiply elements of each.
#pragma once

#include "kernels/cuda/bottleneck.h"
#include "kernels/cuda/device.cuh"

namespace tensorcomp::cuda {

// A step along the summed dimension is 32 bytes wide: 16 elements of 16 bits or 8 of 32. A fragment of two 8-column
// blocks of one step is 512 bytes, 16 a thread; 32-bit elements have a second one with what TF32 rounds off.
constexpr int kStepBytes = 32;
constexpr int kFragmentBytes = 512;

struct Bfloat16 {
  using Storage = uint16_t;
  static constexpr int kStep = 16, kParts = 1;
  static TC_DEVICE float to_float(Storage value) { return bfloat16_to_float(value); }
  static TC_DEVICE Storage from_float(float value) { return float_to_bfloat16(value); }
  // One warp: acc[16x8] += a[16xstep] b[stepx8].
  static TC_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bfloat16(acc, a, b0, b1);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int kStep = 16, kParts = 1;
  static TC_DEVICE float to_float(Storage value) { return float16_to_float(value); }
  static TC_DEVICE Storage from_float(float value) { return float_to_float16(value); }
  static TC_DEVICE void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_float16(acc, a, b0, b1);
  }
};

struct Float32Storage {
  using Storage = float;
  static constexpr int kStep = 8;
  static TC_DEVICE float to_float(Storage value) { return value; }
  static TC_DEVICE Storage from_float(float value) { return value; }
};

// Once rounded.
struct Tf32 : Float32Storage {
  static constexpr int kParts = 1;
};

// Split in two: a b = a_high b_high + a_high b_low + a_low b_high. What is left out is 2^-22 of the product or less,
// about float32's own rounding.
struct SplitTf32 : Float32Storage {
  static constexpr int kParts = 2;
};

// An A fragment, ready to be multiplied by B fragments of the packed kind.
template <typename E>
struct Left {
  uint32_t a[4];
  TC_DEVICE void prepare() {}
  TC_DEVICE void multiply(float (&acc)[4], const uint32_t (&b)[2], const uint32_t (&)[2]) const {
    E::multiply(acc, a, b[0], b[1]);
  }
};

template <>
struct Left<Tf32> {
  uint32_t a[4];
  TC_DEVICE void prepare() {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = round_to_tf32(bits_to_float(a[i]));
  }
  TC_DEVICE void multiply(float (&acc)[4], const uint32_t (&b)[2], const uint32_t (&)[2]) const {
    mma_tf32(acc, a, b[0], b[1]);
  }
};

TC_DEVICE void split_tf32(uint32_t bits, uint32_t& high, uint32_t& low) {
  const float value = bits_to_float(bits);
  high = round_to_tf32(value);
  // The largest numbers must not be rounded up to infinity.
  if ((high & 0x7f800000u) == 0x7f800000u) high = bits & ~0x1fffu;
  const float rest = value - bits_to_float(high);
  // Infinity minus itself is NaN: the high part carries an infinity alone.
  low = rest == rest ? round_to_tf32(rest) : 0u;
}

template <>
struct Left<SplitTf32> {
  uint32_t a[4];
  uint32_t low[4];
  TC_DEVICE void prepare() {
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(a[i], a[i], low[i]);
  }
  // The small products first: they are lost if added to a large sum one by one. Each step is summed apart, since tensor
  // cores are said to cut off what they add to an accumulator, where an addition rounds (Ootomo and Yokota 2022).
  TC_DEVICE void multiply(float (&acc)[4], const uint32_t (&b)[2], const uint32_t (&b_low)[2]) const {
    float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_tf32(step, low, b[0], b[1]);
    mma_tf32(step, a, b_low[0], b_low[1]);
    mma_tf32(step, a, b[0], b[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += step[i];
  }
};

// Calls `body` with the arithmetic of `element` as a value of its type.
template <typename Body>
auto with_element(Element element, Body&& body) {
  switch (element) {
    case Element::kTf32: return body(Tf32{});
    case Element::kFloat16: return body(Float16{});
    case Element::kBfloat16: return body(Bfloat16{});
    case Element::kFloat32: break;
  }
  return body(SplitTf32{});
}

}  // namespace tensorcomp::cuda
