// The order in which the rows of an embedding are computed: equal indices together, then those with equal digits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../params.h"

namespace tensorcomp {

struct EmbeddingOrder {
  std::vector<int32_t> digits;   // [rows][cores] of the different indices
  std::vector<int64_t> first;    // [rows + 1]: where the places of each begin
  std::vector<int64_t> place;    // places of the indices, ascending for each
  std::vector<int64_t> padding;  // places of the padding index
  int64_t wrong = -1;            // place of the first index out of range
  int64_t rows() const { return static_cast<int64_t>(first.size()) - 1; }
};

namespace embedding_detail {

// Quotients by one divisor, of numbers below 2^52: a multiplication where the processor's division takes 20 cycles.
struct Divisor {
  int64_t by;
  double inverse;
  explicit Divisor(int64_t d) : by(d), inverse(1.0 / static_cast<double>(d)) {}
  int64_t operator()(int64_t x) const {
    if (x >> 52) return x / by;
    int64_t q = static_cast<int64_t>(static_cast<double>(x) * inverse);
    const int64_t rest = x - q * by;
    q -= rest < 0;
    q += rest >= by;
    return q;
  }
};

struct Entry {
  int64_t key, place;
};

// Stable, by the lowest `bits` bits of the key.
inline void sort_by_key(std::vector<Entry>& entries, int bits) {
  constexpr int kDigit = 11;
  constexpr size_t kFew = 128;
  if (entries.size() <= kFew) {
    std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.key < b.key; });
    return;
  }
  std::vector<Entry> other(entries.size());
  for (int shift = 0; shift < bits; shift += kDigit) {
    int64_t begin[(1 << kDigit) + 1] = {};
    const auto digit = [shift](const Entry& e) { return (e.key >> shift) & ((1 << kDigit) - 1); };
    for (const Entry& e : entries) ++begin[digit(e) + 1];
    for (int i = 0; i < 1 << kDigit; ++i) begin[i + 1] += begin[i];
    for (const Entry& e : entries) other[static_cast<size_t>(begin[digit(e)]++)] = e;
    entries.swap(other);
  }
}

}  // namespace embedding_detail

// Of three cores and more the second digit comes before the first: rows that share the slice of the second core, the
// largest, follow each other, and those that share both digits still do.
template <class Index>
EmbeddingOrder embedding_order(const EmbeddingShape& s, const Index* indices, int64_t count) {
  using embedding_detail::Divisor;
  using embedding_detail::Entry;
  EmbeddingOrder order;
  order.first.push_back(0);
  const bool turned = s.cores > 2;
  int64_t low = 1, all = 1;
  for (int64_t k = 0; k < s.cores; ++k) all *= s.vocab[k];
  for (int64_t k = 2; k < s.cores; ++k) low *= s.vocab[k];
  const Divisor by_low(low), by_second(s.vocab[1]), by_first(s.vocab[0]);
  std::vector<Divisor> by_vocab;
  for (int64_t k = 0; k < s.cores; ++k) by_vocab.emplace_back(s.vocab[k]);
  std::vector<Entry> entries;
  entries.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = indices[i];
    if (index < 0 || index >= s.num_embeddings) {
      order.wrong = i;
      return order;
    }
    if (index == s.padding_idx) {
      order.padding.push_back(i);
      continue;
    }
    int64_t key = index;
    if (turned) {
      const int64_t high = by_low(index), first = by_second(high), second = high - first * s.vocab[1];
      key = (second * s.vocab[0] + first) * low + (index - high * low);
    }
    entries.push_back({key, i});
  }
  int bits = 1;
  while (((all - 1) >> bits) != 0) ++bits;
  embedding_detail::sort_by_key(entries, bits);

  const size_t cores = static_cast<size_t>(s.cores);
  order.place.reserve(entries.size());
  order.first.reserve(entries.size() + 1);
  order.digits.reserve(entries.size() * cores);
  int64_t before = -1;
  for (const Entry& e : entries) {
    if (e.key != before) {
      if (before >= 0) order.first.push_back(static_cast<int64_t>(order.place.size()));
      before = e.key;
      const size_t at = order.digits.size();
      order.digits.resize(at + cores);
      int64_t rest = e.key;
      for (size_t k = cores; k-- > 2;) {
        const int64_t above = by_vocab[k](rest);
        order.digits[at + k] = static_cast<int32_t>(rest - above * s.vocab[k]);
        rest = above;
      }
      const int64_t above = turned ? by_first(rest) : by_second(rest);
      const int64_t below = rest - above * s.vocab[turned ? 0 : 1];
      order.digits[at + (turned ? 1 : 0)] = static_cast<int32_t>(above);
      order.digits[at + (turned ? 0 : 1)] = static_cast<int32_t>(below);
    }
    order.place.push_back(e.place);
  }
  if (before >= 0) order.first.push_back(static_cast<int64_t>(order.place.size()));
  return order;
}

}  // namespace tensorcomp
