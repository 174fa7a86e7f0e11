// What every isa_*.cpp includes before it switches the target: the standard library's inline functions must be
// compiled for the baseline, or the linker could pick an AVX-512 copy of one for everybody.
#pragma once

#include <ctime>

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../params.h"
#include "dispatch.h"

#if defined(TC_X86)
#include <immintrin.h>
#endif

#define TC_INLINE __attribute__((always_inline)) inline
#define TC_LAMBDA __attribute__((always_inline))

// GCC 12 reports its own intrinsics headers' deliberately undefined values, and the accumulators that a switch over
// every enumerator initialises.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
// Each file uses its own choice of the shared helpers.
#pragma GCC diagnostic ignored "-Wunused-function"
