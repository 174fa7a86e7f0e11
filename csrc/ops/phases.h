// Runs a kernel's pieces on torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>

namespace tensorcomp::ops {

// Calls run(phase, part) for `phases` times `parts` pieces, all pieces of a phase before the next one's. The pool is
// entered once: a fork and join costs about two microseconds, as much as a phase of a small problem.
//
// Pieces are handed out in order. A thread waits only for pieces that others hold already, so it makes no difference
// how many of them come, or when: one alone runs everything.
template <class Run>
void run_phases(int64_t phases, int64_t parts, const Run& run) {
  if (parts == 1) {
    for (int64_t phase = 0; phase < phases; ++phase) run(phase, 0);
    return;
  }
  alignas(64) std::atomic<int64_t> taken{0};
  alignas(64) std::atomic<int64_t> done{0};
  const auto work = [&] {
    for (;;) {
      const int64_t piece = taken.fetch_add(1, std::memory_order_relaxed);
      if (piece >= phases * parts) return;
      const int64_t before = piece / parts * parts;
      for (int64_t tries = 0; done.load(std::memory_order_acquire) < before; ++tries) {
        constexpr int64_t kSpins = 4096;  // some ten microseconds; then somebody else may need the core
        if (tries >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
      }
      run(piece / parts, piece % parts);
      done.fetch_add(1, std::memory_order_release);
    }
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t, int64_t) { work(); });
}

}  // namespace tensorcomp::ops
