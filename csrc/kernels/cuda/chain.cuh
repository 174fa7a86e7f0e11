// The chain kernel: a block takes tiles of rows through all products of a chain. The states between lie in shared
// memory, two at a time, each as the left matrix of the product that reads it; weights come in the order of tensor-core
// fragments, 16 bytes a thread, straight from L1. Source of the form: the TT layer of Novikov et al. 2015.
#pragma once

#include "kernels/cuda/chain.h"
#include "kernels/cuda/stages.cuh"

namespace tensorcomp::cuda {

template <typename E, int kM, int kN>
class ChainBlock {
 public:
  using Storage = typename E::Storage;
  static constexpr int kBytes = sizeof(Storage);
  static constexpr int32_t kElements = 16 / kBytes;

  TC_DEVICE explicit ChainBlock(const ChainParams& params)
      : p(params), shared(shared_memory()), lane(thread_index() % 32), warp(warp_index()) {}

  TC_DEVICE void run() {
    fill_tables();
    const int64_t tiles = (p.rows + p.tile.rows - 1) / p.tile.rows;
    for (int64_t tile = block_index(); tile < tiles; tile += grid_blocks()) {
      first = tile * p.tile.rows;
      count = static_cast<int32_t>(p.rows - first < p.tile.rows ? p.rows - first : p.tile.rows);
      load_rows();
      sync_block();  // the first state is complete, and so are the tables
      for (int32_t i = 0; i < p.run; ++i) {
        const ChainStep& s = p.step[i];
        if (s.state != nullptr) keep_state(s, state(i));
        multiply(s, state(i), state(i + 1));
        sync_block();  // the next state is complete, and nobody reads this one any more
      }
      if (p.run < p.steps) {
        if (p.step[p.run].state != nullptr) keep_state(p.step[p.run], state(p.run));
      } else if (p.y != nullptr) {
        store_rows(state(p.steps));
      }
      sync_block();  // nobody reads the last state any more
    }
  }

 private:
  TC_DEVICE char* state(int32_t i) const { return shared + (i % 2 == 0 ? 0 : p.tile.odd); }
  TC_DEVICE int32_t* tables() const { return reinterpret_cast<int32_t*>(shared + p.tile.tables); }

  TC_DEVICE void fill_table(const DigitMap& map, int32_t* to, int32_t entries) const {
    for (int32_t i = thread_index(); i < entries; i += block_threads()) to[i] = map.value(i);
  }
  TC_DEVICE void fill_tables() const {
    fill_table(p.to_high, tables(), p.high_count);
    fill_table(p.to_low, tables() + p.high_count, p.low_count);
    for (int32_t i = 0; i < p.run; ++i) {
      const ChainStep& s = p.step[i];
      fill_table(s.to_m, tables() + s.table, s.kept);
      fill_table(s.to_n, tables() + s.table + s.kept, s.n);
    }
    sync_block();
  }

  // Bytes from the start of a row's first state to a feature of x.
  TC_DEVICE int32_t place_of_feature(int32_t feature) const {
    const int32_t high = p.low.quotient(feature);
    return tables()[high] + tables()[p.high_count + feature - high * p.low_count];
  }

  TC_DEVICE void load_rows() const {
    const Storage* x = static_cast<const Storage*>(p.x) + first * p.x_row;
    if (p.in_pieces && p.x_feature == 1 && p.x_row % kElements == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0) {
      const int32_t pieces = p.in / kElements;
      for (int32_t i = thread_index(); i < count * pieces; i += block_threads()) {
        const int32_t row = p.features.quotient(i * kElements), feature = i * kElements - row * p.in;
        copy_async(shared + row * p.in_row_bytes + place_of_feature(feature), x + row * p.x_row + feature, 16);
      }
      copy_commit();
      copy_wait<0>();
      return;
    }
    for (int32_t i = thread_index(); i < count * p.in; i += block_threads()) {
      const int32_t row = p.features.quotient(i), feature = i - row * p.in;
      *reinterpret_cast<Storage*>(shared + row * p.in_row_bytes + place_of_feature(feature)) =
          x[row * p.x_row + feature * p.x_feature];
    }
  }

  // The left matrix of a step as it lies in shared memory, for the gradients of weights.
  TC_DEVICE void keep_state(const ChainStep& s, const char* from) const {
    const int64_t row_bytes = static_cast<int64_t>(s.kept) * s.pitch;
    char* to = static_cast<char*>(s.state) + first * row_bytes;
    for (int32_t i = 16 * thread_index(); i < count * row_bytes; i += 16 * block_threads()) {
      *reinterpret_cast<Words4*>(to + i) = *reinterpret_cast<const Words4*>(from + i);
    }
  }

  // One product: blocks of rows times passes over the columns, shared out among the warps.
  TC_DEVICE void multiply(const ChainStep& s, const char* from, char* to) const {
    const int32_t rows = count * s.kept, blocks = (rows + 15) / 16;
    const int32_t pairs = (s.n + 15) / 16, passes = (pairs + kN / 2 - 1) / (kN / 2);
    // With few blocks every warp takes one, so that none waits.
    const int32_t together = blocks * passes <= p.tile.warps ? 1 : kM, groups = (blocks + together - 1) / together;
    for (int32_t item = warp; item < groups * passes; item += p.tile.warps) {
      // Neighbouring warps read the same weights.
      const int32_t pass = item / groups, block = (item - pass * groups) * together;
      multiply_block(s, from, to, rows, block, least(blocks - block, together), pass * (kN / 2),
                     least(pairs - pass * (kN / 2), kN / 2));
    }
  }

  TC_DEVICE void multiply_block(const ChainStep& s, const char* from, char* to, int32_t rows, int32_t block, int blocks,
                                int32_t pair, int32_t pairs) const {
    constexpr int32_t kStep = kStepBytes / kBytes;
    const Right right{reinterpret_cast<const Words4*>(static_cast<const char*>(p.packed) + s.fragments),
                      (s.n + 15) / 16, pair};
    const char* start[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const int32_t row = (block + i) * 16 + lane % 16;
      // Rows beyond the last are not stored: any that is there serves.
      start[i] = from + (row < rows ? row : 0) * s.pitch + lane / 16 * 16;
    }
    Accumulators<kM, kN> acc;
    acc.clear();
    sync_warp();  // threads store more or less; the matrix instructions want all of them
    with_shape<kM, kN>(blocks, pairs, [&](auto b, auto n) {
      constexpr int kBlocks = decltype(b)::value, kPairs = decltype(n)::value;
      const int32_t steps = s.k / kStep;
      const char* at[kM];
#pragma unroll 2
      for (int32_t step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < kM; ++i) at[i] = start[i] + step * kStepBytes;
        multiply_step<E, kBlocks, kPairs>(acc, at, right, step, lane);
      }
      if (steps * kStep == s.k) return;
      // What lies behind the last column is of another row, or was never written.
#pragma unroll
      for (int i = 0; i < kM; ++i) at[i] = start[i] + steps * kStepBytes;
      multiply_step<E, kBlocks, kPairs, true>(acc, at, right, steps, lane, s.k - steps * kStep);
    });
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      if (i < blocks) store(s, acc, i, to, (block + i) * 16, rows, pair * 16);
    }
  }

  // Accumulators of block i, rows from `row` and columns from `column` on, to where the next product wants them.
  TC_DEVICE void store(const ChainStep& s, const Accumulators<kM, kN>& acc, int i, char* to, int32_t row, int32_t rows,
                       int32_t column) const {
    const int32_t* to_m = tables() + s.table;
    const int32_t* to_n = to_m + s.kept;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t at = row + lane / 4 + 8 * half;
      if (at >= rows) continue;
      const int32_t of_x = s.rows.quotient(at);
      char* place = to + of_x * s.row_bytes + to_m[at - of_x * s.kept];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int32_t n = column + 8 * j + 2 * (lane % 4);
        if (n >= s.n) continue;
        const float one = acc.value[i][j][2 * half], two = acc.value[i][j][2 * half + 1];
        if (s.pairs) {
          store_pair<E>(place + to_n[n], one, two);
          continue;
        }
        *reinterpret_cast<Storage*>(place + to_n[n]) = E::from_float(one);
        if (n + 1 < s.n) *reinterpret_cast<Storage*>(place + to_n[n + 1]) = E::from_float(two);
      }
    }
  }

  // --- out ---

  struct alignas(16) Piece {
    Storage element[kElements];
  };

  TC_DEVICE Storage finished(Storage value, float bias, float residual) const {
    if (p.bias == nullptr && p.residual == nullptr && !p.relu) return value;
    const float sum = E::to_float(value) + bias + residual;
    // A NaN stays one.
    return E::from_float(p.relu && sum < 0.0f ? 0.0f : sum);
  }

  TC_DEVICE static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

  TC_DEVICE void store_rows(const char* from) const {
    const Storage* bias = static_cast<const Storage*>(p.bias);
    const Storage* residual = static_cast<const Storage*>(p.residual);
    if (residual != nullptr) residual += first * p.out;
    Storage* y = static_cast<Storage*>(p.y) + first * p.out;
    if (p.out % kElements == 0 && aligned(p.y) && aligned(p.bias) && aligned(p.residual)) {
      const int32_t pieces = p.out / kElements;
      for (int32_t i = thread_index(); i < count * pieces; i += block_threads()) {
        const int32_t row = i / pieces, at = (i - row * pieces) * kElements;
        Piece piece = *reinterpret_cast<const Piece*>(from + row * p.out_row_bytes + at * kBytes), add{}, other{};
        if (bias != nullptr) add = *reinterpret_cast<const Piece*>(bias + at);
        if (residual != nullptr) other = *reinterpret_cast<const Piece*>(residual + row * p.out + at);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          piece.element[e] = finished(piece.element[e], E::to_float(add.element[e]), E::to_float(other.element[e]));
        }
        *reinterpret_cast<Piece*>(y + row * p.out + at) = piece;
      }
      return;
    }
    for (int32_t i = thread_index(); i < count * p.out; i += block_threads()) {
      const int32_t row = i / p.out, at = i - row * p.out;
      const Storage value = reinterpret_cast<const Storage*>(from + row * p.out_row_bytes)[at];
      y[i] = finished(value, bias != nullptr ? E::to_float(bias[at]) : 0.0f,
                      residual != nullptr ? E::to_float(residual[i]) : 0.0f);
    }
  }

  const ChainParams& p;
  char* const shared;
  const int lane, warp;
  int64_t first = 0;
  int32_t count = 0;
};

}  // namespace tensorcomp::cuda
