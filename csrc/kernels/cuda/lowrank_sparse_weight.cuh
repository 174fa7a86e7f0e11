// The dense weight of a low-rank and a sparse matrix: a block a tile of 128 rows and 256 bytes of columns. The factors'
// chunks stream through shared memory into tensor-core products, and with them, a part at each chunk, come the tile's
// values and mask; the sum takes the values' place and leaves in whole lines. Source: Hawkins et al. 2021.
//
// Traffic: m n (2 elements and the mask's bit or byte) from and to memory, to which a tile adds rank (128 + columns)
// elements of the factors, from the L2 cache: at 4096 x 4096 bfloat16 69 MB, and at rank 204 another 107. Shared
// memory: three chunks of 18.5 KB, values 34 KB, mask 2 KB as bits and 16 KB as bytes, so 92 and 106 KB; 81 and 88 in
// 32 bits. Registers: 64 accumulators a thread (32 in 32 bits), and at most 128 in all. So two blocks share a
// multiprocessor of Hopper, one waiting for memory while the other multiplies.
//
// By operations 4.8 TB/s allow a rank of 250 or so in 16 bits and TF32, at what mma instructions give (some 600 and 300
// TFLOP/s), and 85 in float32, whose products are three: beyond it the products take longer than the memory does. All
// of this is predicted; none was measured.
#pragma once

#include "kernels/cuda/box_copy.cuh"
#include "kernels/cuda/fragments.cuh"

namespace tensorcomp::cuda {

// What blocks of 256 threads share out among their warps: tiles of 128 rows and 256 bytes.
template <typename E>
struct WeightTile {
  using Storage = typename E::Storage;
  static constexpr int32_t kBytes = sizeof(Storage), kColumns = weight_columns(kBytes);
  static constexpr int32_t kSummed = kChunkBytes / kBytes;  // of a chunk
  static constexpr int kSteps = kChunkBytes / kStepBytes;
  static constexpr int kM = 2, kN = kColumns / 16;  // blocks of a warp
  static constexpr int32_t kElements = 16 / kBytes;
  static constexpr int32_t kPitch = wide_pitch(kBytes, kColumns);
  using Sums = Accumulators<kM, kN>;
  static TC_DEVICE int32_t warp_row(int warp) { return warp / 2 * 32; }
  static TC_DEVICE int32_t warp_column(int warp) { return warp % 2 * (kColumns / 2); }
};

template <typename E>
class WeightBlock {
 public:
  using T = WeightTile<E>;
  using Storage = typename E::Storage;

  TC_DEVICE explicit WeightBlock(const WeightParams& params)
      : p(params),
        layout(weight_layout(params)),
        shared(shared_memory()),
        lane(thread_index() % 32),
        warp(warp_index()),
        row(block_index() / across() * kWeightRows),
        column(block_index() % across() * T::kColumns) {}

  TC_DEVICE void run() {
    const int32_t chunks = (p.rank + T::kSummed - 1) / T::kSummed, turns = chunks > 0 ? chunks : 1;
    typename T::Sums acc;
    acc.clear();
    const auto load = [&](int32_t turn) {
      if (turn < turns) load_turn(turn, chunks, turns);
      copy_commit();
    };
    for (int32_t turn = 0; turn + 1 < p.stages; ++turn) load(turn);
    for (int32_t turn = 0; turn < turns; ++turn) {
      if (p.stages == 3) {
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      sync_block();  // what this turn takes is there for all, and nobody reads what the last one took
      load(turn + p.stages - 1);
      sync_warp();
      if (turn < chunks) {
        multiply_chunk<E, RowFragments<E, kChunkPitch>, TurnedFragments<E, T::kPitch>, T::kSteps>(
            acc, a_chunk(turn), b_chunk(turn), T::warp_row(warp), T::warp_column(warp), lane);
      }
    }
    copy_wait<0>();
    add(acc);
    sync_block();
    store();
  }

 private:
  TC_DEVICE int64_t across() const { return (p.n + T::kColumns - 1) / T::kColumns; }
  TC_DEVICE char* a_chunk(int32_t turn) const { return shared + turn % p.stages * (layout.a_chunk + layout.b_chunk); }
  TC_DEVICE char* b_chunk(int32_t turn) const { return a_chunk(turn) + layout.a_chunk; }

  // Chunk `turn` of the factors, and as large a share of values and mask.
  TC_DEVICE void load_turn(int32_t turn, int32_t chunks, int32_t turns) const {
    if (turn < chunks) {
      const int64_t summed = static_cast<int64_t>(turn) * T::kSummed;
      copy_box<Storage, kChunkBytes>(a_chunk(turn), kChunkPitch, p.a, row, summed, 0, kWeightRows);
      copy_box<Storage, kWeightRowBytes>(b_chunk(turn), T::kPitch, p.b, summed, column, 0, T::kSummed);
    }
    const auto share = [&](int32_t i) { return static_cast<int32_t>(static_cast<int64_t>(kWeightRows) * i / turns); };
    copy_box<Storage, kWeightRowBytes>(shared + layout.values, T::kPitch, p.values, row, column, share(turn),
                                       share(turn + 1));
    if (p.bits) {
      copy_mask_box<T::kColumns / 8>(shared + layout.mask, p.mask, row, column / 8, share(turn), share(turn + 1));
    } else {
      copy_mask_box<T::kColumns>(shared + layout.mask, p.mask, row, column, share(turn), share(turn + 1));
    }
  }

  // W in place of the values; every thread writes where it alone has read.
  TC_DEVICE void add(const typename T::Sums& acc) const {
    const int32_t mask_pitch = mask_bytes(p.bits, T::kColumns);
#pragma unroll
    for (int i = 0; i < T::kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t of_tile = T::warp_row(warp) + 16 * i + lane / 4 + 8 * half;
        const char* mask = shared + layout.mask + of_tile * mask_pitch;
        char* values = shared + layout.values + of_tile * T::kPitch;
#pragma unroll
        for (int j = 0; j < T::kN; ++j) {
          const int32_t at = T::warp_column(warp) + 8 * j + 2 * (lane % 4);
          const uint32_t kept = kept_bits<2>(mask, p.bits, at);
          const auto* pair = reinterpret_cast<const Storage*>(values + at * T::kBytes);
          const float one = sum(acc.value[i][j][2 * half], pair[0], kept & 1);
          store_pair<E>(values + at * T::kBytes, one, sum(acc.value[i][j][2 * half + 1], pair[1], kept & 2));
        }
      }
    }
  }

  // What the mask hides of the values may be anything.
  TC_DEVICE float sum(float low, Storage value, bool kept) const {
    return kept ? (p.masking ? E::to_float(value) : low + E::to_float(value)) : low;
  }

  TC_DEVICE void store() const {
    constexpr int32_t kPieces = kWeightRowBytes / 16;
    auto* w = static_cast<Storage*>(p.w);
    if (p.n % T::kElements == 0) {
      for (int32_t i = thread_index(); i < kWeightRows * kPieces; i += block_threads()) {
        const int32_t of_tile = i / kPieces, piece = i % kPieces;
        const int64_t at = column + piece * T::kElements;
        if (row + of_tile >= p.m || at >= p.n) continue;
        store_streaming(reinterpret_cast<Words4*>(w + (row + of_tile) * p.n + at),
                        *reinterpret_cast<const Words4*>(shared + layout.values + of_tile * T::kPitch + piece * 16));
      }
      return;
    }
    for (int32_t i = thread_index(); i < kWeightRows * T::kColumns; i += block_threads()) {
      const int32_t of_tile = i / T::kColumns, e = i % T::kColumns;
      if (row + of_tile >= p.m || column + e >= p.n) continue;
      w[(row + of_tile) * p.n + column + e] =
          reinterpret_cast<const Storage*>(shared + layout.values + of_tile * T::kPitch)[e];
    }
  }

  const WeightParams& p;
  const WeightLayout layout;
  char* const shared;
  const int lane, warp;
  const int64_t row, column;
};

template <typename E>
TC_KERNEL(kWeightThreads, 2)
lowrank_sparse_weight_kernel(const TC_GRID_CONSTANT WeightParams p) {
  WeightBlock<E>(p).run();
}

}  // namespace tensorcomp::cuda
