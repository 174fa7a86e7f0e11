// The embedding kernels of every instruction set against the definition, entry by entry, in double precision; nothing
// beside the results may be written.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/embedding_order.h"
#include "check.h"

using namespace tensorcomp;
using tensorcomp::test::subject;

namespace {

struct Case {
  std::vector<int64_t> vocab, dim, rank;  // the first rank is the ring
  int64_t missing, padding;
};

float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}

uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Numbers of one element type with a guard zone on both sides.
class Guarded {
 public:
  Guarded(int64_t count, bool low)
      : count_(count), low_(low), bytes_(2 * kGuard + static_cast<size_t>(count) * size(), kFill) {}
  void* data() { return bytes_.data() + kGuard; }
  float get(int64_t i) {
    float f;
    uint16_t h;
    if (low_) std::memcpy(&h, at(i), 2);
    else std::memcpy(&f, at(i), 4);
    return low_ ? from_bf16(h) : f;
  }
  void set(int64_t i, float f) {
    const uint16_t h = to_bf16(f);
    if (low_) std::memcpy(at(i), &h, 2);
    else std::memcpy(at(i), &f, 4);
  }
  bool untouched_around() const {
    const size_t end = bytes_.size();
    for (size_t i = 0; i < kGuard; ++i) {
      if (bytes_[i] != kFill || bytes_[end - 1 - i] != kFill) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kFill = 0x5a;
  size_t size() const { return low_ ? 2 : 4; }
  unsigned char* at(int64_t i) { return bytes_.data() + kGuard + static_cast<size_t>(i) * size(); }
  int64_t count_;
  bool low_;
  std::vector<unsigned char> bytes_;
};

double relative(const std::vector<double>& found, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference) / (norm > 0 ? std::sqrt(norm) : 1.0);
}

void run_case(const Case& c, bool low, int64_t count, int64_t parts, std::mt19937& random) {
  EmbeddingParams p;
  EmbeddingShape& s = p.shape;
  s.dtype = low ? DType::kBfloat16 : DType::kFloat32;
  s.cores = static_cast<int64_t>(c.vocab.size());
  int64_t rows = 1, dim = 1;
  std::normal_distribution<float> normal;
  std::vector<Guarded> cores, grads;
  for (int64_t k = 0; k < s.cores; ++k) {
    const size_t i = static_cast<size_t>(k);
    s.vocab[k] = c.vocab[i];
    s.dim[k] = c.dim[i];
    s.rank[k] = c.rank[i];
    s.rank[k + 1] = c.rank[(i + 1) % c.rank.size()];
    rows *= c.vocab[i];
    dim *= c.dim[i];
    const int64_t size = s.rank[k] * s.vocab[k] * s.dim[k] * s.rank[k + 1];
    cores.emplace_back(size, low);
    grads.emplace_back(size, low);
    for (int64_t j = 0; j < size; ++j) {
      cores.back().set(j, normal(random) / std::sqrt(static_cast<float>(s.rank[k])));
    }
  }
  s.num_embeddings = rows - c.missing;
  s.padding_idx = c.padding;
  std::vector<int64_t> indices(static_cast<size_t>(count));
  for (int64_t& index : indices) index = static_cast<int64_t>(random() % static_cast<uint64_t>(s.num_embeddings));
  const EmbeddingOrder order = embedding_order(s, indices.data(), count);
  CHECK(order.wrong < 0);
  p.rows = order.rows();
  p.digits = order.digits.data();
  p.first = order.first.data();
  p.place = order.place.data();
  Guarded y(count * dim, low), dy(count * dim, low);
  for (int64_t i = 0; i < count * dim; ++i) dy.set(i, normal(random));
  for (const int64_t place : order.padding) {
    for (int64_t j = 0; j < dim; ++j) y.set(place * dim + j, 0.0f);
  }
  for (int64_t k = 0; k < s.cores; ++k) {
    p.core[k] = cores[static_cast<size_t>(k)].data();
    p.grad_core[k] = grads[static_cast<size_t>(k)].data();
  }
  p.y = y.data();
  p.grad_y = dy.data();

  const EmbeddingKernels& kernels = kernel_table().embedding(s.dtype);
  if (p.rows > 0) {
    for (const bool backward : {false, true}) {
      const size_t bytes = kernels.scratch_bytes(p, parts, backward);
      std::vector<unsigned char> memory(bytes + 128, 0xa5);  // with what no sum may start from
      const size_t shift = (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
      p.scratch = memory.data() + shift;
      for (int64_t phase = 0; phase < (backward ? 2 : 1); ++phase) {
        for (int64_t part = parts; part-- > 0;) {
          if (backward) kernels.backward_run(p, parts, phase, part);
          else kernels.run(p, parts, part);
        }
      }
      for (size_t i = shift + bytes; i < memory.size(); ++i) CHECK(memory[i] == 0xa5);
    }
  }
  CHECK(y.untouched_around());

  // One row at a time: every path of ranks through the slices, with its gradient.
  std::vector<double> expected(static_cast<size_t>(count * dim), 0.0), found(expected.size());
  std::vector<std::vector<double>> slopes(static_cast<size_t>(s.cores));
  for (size_t k = 0; k < slopes.size(); ++k) {
    slopes[k].assign(static_cast<size_t>(s.rank[k] * s.vocab[k] * s.dim[k] * s.rank[k + 1]), 0.0);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = indices[static_cast<size_t>(i)];
    if (index == c.padding) continue;
    std::vector<int64_t> digit(c.vocab.size());
    int64_t rest = index;
    for (size_t k = c.vocab.size(); k-- > 0; rest /= c.vocab[k]) digit[k] = rest % c.vocab[k];
    const auto walk = [&](auto&& self, int64_t k, int64_t closing, int64_t rank, int64_t column, double product,
                          std::vector<int64_t>& path) -> void {
      if (k == s.cores) {
        if (rank != closing) return;
        expected[static_cast<size_t>(i * dim + column)] += product;
        const double slope = dy.get(i * dim + column);
        for (size_t q = 0; q < path.size(); ++q) {
          double others = slope;
          for (size_t o = 0; o < path.size(); ++o) {
            if (o != q) others *= cores[o].get(path[o]);
          }
          slopes[q][static_cast<size_t>(path[q])] += others;
        }
        return;
      }
      for (int64_t j = 0; j < s.dim[k]; ++j) {
        for (int64_t n = 0; n < s.rank[k + 1]; ++n) {
          const int64_t at = ((rank * s.vocab[k] + digit[static_cast<size_t>(k)]) * s.dim[k] + j) * s.rank[k + 1] + n;
          path.push_back(at);
          self(self, k + 1, closing, n, column * s.dim[k] + j, product * cores[static_cast<size_t>(k)].get(at), path);
          path.pop_back();
        }
      }
    };
    std::vector<int64_t> path;
    for (int64_t a = 0; a < s.rank[0]; ++a) walk(walk, 0, a, a, 0, 1.0, path);
  }
  for (size_t i = 0; i < found.size(); ++i) found[i] = y.get(static_cast<int64_t>(i));
  CHECK(relative(found, expected) <= (low ? 1e-2 : 1e-5));
  if (p.rows == 0) return;
  for (size_t k = 0; k < slopes.size(); ++k) {
    std::vector<double> slope(slopes[k].size());
    for (size_t i = 0; i < slope.size(); ++i) slope[i] = grads[k].get(static_cast<int64_t>(i));
    CHECK(relative(slope, slopes[k]) <= (low ? 1e-2 : 1e-5));
    CHECK(grads[k].untouched_around());
    CHECK(cores[k].untouched_around());
  }
}

void check_order() {
  EmbeddingShape s;
  s.cores = 3;
  s.vocab[0] = 3, s.vocab[1] = 5, s.vocab[2] = 4;
  s.num_embeddings = 57;
  const std::vector<int32_t> wrong{3, 57, -1};
  CHECK(embedding_order(s, wrong.data(), 3).wrong == 1);
  CHECK(embedding_order(s, wrong.data() + 2, 1).wrong == 0);
  CHECK(embedding_order(s, wrong.data(), 0).rows() == 0);
  std::vector<int64_t> many(5000);  // enough for the sort by digits
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int64_t>((i * 31) % 57);
  const EmbeddingOrder order = embedding_order(s, many.data(), 5000);
  CHECK(order.rows() == 57 && order.place.size() == 5000);
  for (int64_t u = 0; u < order.rows(); ++u) {
    const int32_t* d = order.digits.data() + 3 * u;
    const int64_t index = (d[0] * 5 + d[1]) * 4 + d[2];
    for (int64_t i = order.first[static_cast<size_t>(u)]; i < order.first[static_cast<size_t>(u) + 1]; ++i) {
      const size_t at = static_cast<size_t>(i);
      CHECK(many[static_cast<size_t>(order.place[at])] == index);
      CHECK(i == order.first[static_cast<size_t>(u)] || order.place[at] > order.place[at - 1]);
    }
  }
}

}  // namespace

int main() {
  const std::vector<Case> cases{
      {{3, 5, 4}, {2, 3, 4}, {1, 4, 5}, 3, -1},
      {{6, 5}, {3, 4}, {1, 3}, 1, 7},
      {{2, 2}, {1, 1}, {1, 1}, 0, 0},
      {{5, 4}, {2, 9}, {3, 4}, 2, 3},
      {{3, 2, 3}, {3, 2, 5}, {2, 3, 7}, 1, -1},
      {{2, 3, 2, 2}, {2, 1, 3, 2}, {1, 2, 6, 3}, 5, 2},
      {{2, 3, 2}, {2, 3, 17}, {1, 9, 18}, 0, -1},
  };
  check_order();
  std::string names = tensorcomp_isa_available();
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    const std::string isa = names.substr(begin, end - begin);
    begin = end + 1;
    CHECK(tensorcomp_set_isa_cap(isa.c_str()) == 0);
    subject() = isa.c_str();
    std::mt19937 random(1);
    for (const Case& c : cases) {
      for (const bool low : {false, true}) {
        for (const int64_t parts : {1, 3}) {
          for (const int64_t count : {0, 1, 9, 70}) run_case(c, low, count, parts, random);
        }
      }
    }
  }
  tensorcomp_set_isa_cap(nullptr);
  return tensorcomp::test::result("embedding");
}
