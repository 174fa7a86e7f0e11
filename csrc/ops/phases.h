// Runs a kernel's pieces on torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tensorcomp::ops {

// Calls run(phase, part) for `phases` times `parts` pieces, all pieces of a phase before the next one's. The pool is
// entered once: a fork and join costs about two microseconds, as much as a phase of a small problem.
//
// Thread i runs part i of every phase, whose data its cache holds, and then what others have not begun. So it makes no
// difference how many threads come, or when: one alone runs everything, and nobody waits for a piece that nobody runs.
// `run` must not throw: others would wait for the piece for ever, so that it ends the process.
template <class Run>
void run_phases(int64_t phases, int64_t parts, const Run& run) {
  if (parts == 1) {
    for (int64_t phase = 0; phase < phases; ++phase) run(phase, 0);
    return;
  }
  struct alignas(64) Line {
    std::atomic<int64_t> value{0};
  };
  std::vector<Line> begun(static_cast<size_t>(parts));  // phases of each part that somebody took
  Line done;                                            // pieces
  const auto take = [&](int64_t phase, int64_t part) noexcept {
    int64_t expected = phase;
    if (!begun[static_cast<size_t>(part)].value.compare_exchange_strong(expected, phase + 1)) return;
    run(phase, part);
    done.value.fetch_add(1, std::memory_order_release);
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      for (int64_t i = 0; i < parts; ++i) take(phase, (first + i) % parts);
      for (int64_t tries = 0; done.value.load(std::memory_order_acquire) < (phase + 1) * parts; ++tries) {
        constexpr int64_t kSpins = 4096;  // some tens of microseconds; then somebody else may need the core
        if (tries >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
      }
    }
  });
}

}  // namespace tensorcomp::ops
