// Results with a watch on what lies around them, and their distance from the right ones.
#pragma once

#include "problem.h"

namespace tensorcomp::test {

using Doubles = std::vector<double>;

// A result between two zones that nobody may write.
class Guarded {
 public:
  Guarded(DType dtype, int64_t count) : all_(dtype, count + 2 * kZone), count_(count) {
    for (int64_t i = 0; i < count + 2 * kZone; ++i) all_.set(i, kMark);
  }
  void* get() const { return static_cast<char*>(all_.get()) + kZone * static_cast<int64_t>(all_.size()); }
  double operator[](int64_t i) const { return all_[i + kZone]; }
  bool whole() const {
    for (int64_t i = 0; i < kZone; ++i) {
      if (all_[i] != kMark || all_[i + kZone + count_] != kMark) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kZone = 64;
  static constexpr float kMark = -77.0f;
  Array all_;
  int64_t count_;
};

// Parts of a phase in an order that nobody may rely on.
template <class Run>
void run_phases(int64_t phases, int64_t parts, const Run& run) {
  for (int64_t phase = 0; phase < phases; ++phase) {
    for (int64_t part = parts; part-- > 0;) run(phase, part);
  }
}

inline double distance(const Guarded& found, const Doubles& right) {
  double wrong = 0, whole = 0;
  for (size_t i = 0; i < right.size(); ++i) {
    const double d = found[static_cast<int64_t>(i)] - right[i];
    wrong += d * d;
    whole += right[i] * right[i];
  }
  return whole > 0 ? std::sqrt(wrong / whole) : std::sqrt(wrong);
}

}  // namespace tensorcomp::test
