// The bottleneck kernel: a block takes tiles of output pixels; of each it brings the input under the tile into rank
// space (enter), applies the core there, and multiplies out (leave). What lies between stays in shared memory.
//
// Weights come in the order of tensor-core fragments, 16 bytes a thread, straight from L1: every warp of a block reads
// the same ones. Source of the scheme: the three-stage Tucker-2 convolution of Kim et al. 2016, fused.
#pragma once

#include "kernels/cuda/stages.cuh"

namespace tensorcomp::cuda {

template <typename E, int kM, int kN>
class BottleneckBlock {
 public:
  using Storage = typename E::Storage;
  static constexpr int kBytes = sizeof(Storage);

  TC_DEVICE explicit BottleneckBlock(const BottleneckParams& params)
      : p(params),
        layout(shared_layout(params)),
        shared(shared_memory()),
        lane(thread_index() % 32),
        warp(warp_index()),
        rows_at_once(params.tile.warps * kM * 16) {}

  TC_DEVICE void run() {
    const int64_t tiles = p.tile.tiles_n * p.tile.tiles_h * p.tile.tiles_w;
    for (int64_t tile = block_index(); tile < tiles; tile += grid_blocks()) {
      span = tile_span(p, tile);
      clear_border();
      if (p.enter) {
        enter();
      } else {
        load_rank_image();
      }
      sync_block();  // U is complete, and the chunks' memory free
      if (p.core == Core::kFull) {
        full_core();
      } else if (p.core == Core::kDepthwise) {
        depthwise_core();
      }
      sync_block();  // nobody reads U (with a core) or the chunks (without one) any more: the output may go there
      if (p.rank_image != nullptr) store_rank_image();
      if (p.leave) leave();
      sync_block();  // nobody reads V or writes out of shared memory any more
    }
  }

 private:
  // Blocks of 16 rows of this warp among `rows`: warp, warp + warps, ...
  TC_DEVICE int my_blocks(int32_t rows) const {
    const int32_t blocks = (rows + 15) / 16;
    return blocks <= warp ? 0 : least(kM, (blocks - warp - 1) / p.tile.warps + 1);
  }
  TC_DEVICE int32_t block_row(int i) const { return (i * p.tile.warps + warp) * 16; }
  // The row of a 16-row block, and the 16 bytes of a step, that this thread names to ldmatrix.
  TC_DEVICE int32_t matrix_row() const { return lane % 16; }
  TC_DEVICE int32_t matrix_bytes() const { return lane / 16 * 16; }

  TC_DEVICE char* chunk(int stage) const { return shared + layout.second + stage * rows_at_once * kChunkPitch; }
  TC_DEVICE int64_t* row_offsets() const { return reinterpret_cast<int64_t*>(shared + layout.row_offsets); }
  // What the last stage reads: V, or without a core U.
  TC_DEVICE const char* last_rows() const { return p.core == Core::kNone ? shared : shared + layout.second; }
  TC_DEVICE int32_t last_pitch() const { return p.core == Core::kNone ? layout.u_pitch : layout.v_pitch; }

  // The row that taps on the border read; what goes out of the tile before may have been written over it.
  TC_DEVICE void clear_border() const {
    for (int32_t i = thread_index() * 16; i < layout.u_pitch; i += block_threads() * 16) {
      *reinterpret_cast<Words4*>(shared + p.tile.region_rows * layout.u_pitch + i) = Words4{{0, 0, 0, 0}};
    }
  }

  // --- enter: U = X point_in over the region, chunks of channels streaming through shared memory ---

  // All passes over rows and columns are one stream of chunks: the first ones of a pass are on their way while the last
  // of the pass before are multiplied.
  TC_DEVICE void enter() {
    const int32_t rows = span.region(), columns = p.ring * rank_padded(p.rank_in);
    for (int32_t i = thread_index(); i < rows; i += block_threads()) {
      const Place at = place_of(i, span.in_h.size, span.in_w.size);
      row_offsets()[i] = (span.n.begin + at.n) * p.x_strides.n + (span.in_h.begin + at.h) * p.x_strides.h +
                         (span.in_w.begin + at.w) * p.x_strides.w;
    }
    sync_block();
    constexpr int32_t kElements = kChunkBytes / kBytes;
    const int32_t chunks = (p.c_in + kElements - 1) / kElements;
    const int32_t across = (columns + 8 * kN - 1) / (8 * kN);
    const int32_t all = (rows + rows_at_once - 1) / rows_at_once * across * chunks;
    const bool vectors = x_vectors();
    const auto load = [&](int32_t i) {
      if (i < all) {
        const int32_t first = i / (across * chunks) * rows_at_once;
        load_chunk<E>(chunk(i % kChunkStages), p.x, row_offsets() + first, least(rows - first, rows_at_once),
                      p.x_strides.c, p.c_in, i % chunks * kElements, vectors);
      }
      copy_commit();
    };
    const Words4* fragments = static_cast<const Words4*>(p.enter_fragments);
    int32_t first = 0, column = 0, c = 0;
    Accumulators<kM, kN> acc;
    acc.clear();
#pragma unroll
    for (int i = 0; i < kChunkStages - 1; ++i) load(i);
    for (int32_t i = 0; i < all; ++i) {
      copy_wait<kChunkStages - 2>();
      sync_block();  // chunk i is there for all, and nobody reads chunk i - 1 any more
      load(i + kChunkStages - 1);
      sync_warp();  // threads load more or less; the matrix instructions want all of them
      const int32_t here = least(rows - first, rows_at_once), used = least(columns - column, 8 * kN) / 16;
      const Right right{fragments, columns / 16, column / 16};
      multiply_chunk(acc, chunk(i % kChunkStages), my_blocks(here), used, right, c * kStepsOfChunk);
      if (++c < chunks) continue;
#pragma unroll
      for (int b = 0; b < kM; ++b) {
        if (b < my_blocks(here)) {
          store_block<E>(acc, b, shared + (first + block_row(b)) * layout.u_pitch + column * kBytes, layout.u_pitch,
                         here - block_row(b), 2 * used, lane);
        }
      }
      acc.clear();
      c = 0;
      column += 8 * kN;
      if (column < columns) continue;
      column = 0;
      first += rows_at_once;
    }
    copy_wait<0>();
  }

  static constexpr int kStepsOfChunk = kChunkBytes / kStepBytes;

  TC_DEVICE void multiply_chunk(Accumulators<kM, kN>& acc, const char* from, int blocks, int32_t used,
                                const Right& right, int32_t first_step) const {
    const int32_t steps = least(steps_of(p.c_in, kBytes) - first_step, kStepsOfChunk);
    with_shape<kM, kN>(blocks, used, [&](auto b, auto n) {
#pragma unroll
      for (int s = 0; s < kStepsOfChunk; ++s) {
        if (s >= steps) break;
        const char* rows_of[kM];
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          rows_of[i] = from + (block_row(i) + matrix_row()) * kChunkPitch + s * kStepBytes + matrix_bytes();
        }
        multiply_step<E, decltype(b)::value, decltype(n)::value>(acc, rows_of, right, first_step + s, lane);
      }
    });
  }

  // Whether a pixel's channels can be copied 16 bytes at a time.
  TC_DEVICE bool x_vectors() const {
    constexpr int64_t kElements = 16 / kBytes;
    return p.x_strides.c == 1 && p.x_strides.n % kElements == 0 && p.x_strides.h % kElements == 0 &&
           p.x_strides.w % kElements == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  }

  // Instead of enter: U as it lies in memory, c_in channels and zeros up to the padded rank.
  TC_DEVICE void load_rank_image() {
    constexpr int32_t kElements = 16 / kBytes;
    const int32_t rows = span.region(), pieces = (layout.u_pitch - kRowPadBytes) / 16;
    const bool vectors = x_vectors(), channels_first = p.x_strides.c != 1;
    const Storage* from = static_cast<const Storage*>(p.x);
    for (int32_t i = thread_index(); i < rows * pieces; i += block_threads()) {
      const int32_t row = channels_first ? i % rows : i / pieces, piece = channels_first ? i / rows : i % pieces;
      const Place at = place_of(row, span.in_h.size, span.in_w.size);
      const int32_t channel = piece * kElements;
      const bool inside = channel < p.c_in;
      const Storage* pixel = from + (span.n.begin + at.n) * p.x_strides.n + (span.in_h.begin + at.h) * p.x_strides.h +
                             (span.in_w.begin + at.w) * p.x_strides.w;
      char* to = shared + row * layout.u_pitch + piece * 16;
      if (vectors) {
        copy_async(to, inside ? pixel + channel : from, inside ? piece_bytes<Storage>(p.c_in - channel) : 0);
      } else {
        gather_piece<E>(to, inside ? pixel + channel * p.x_strides.c : from, p.x_strides.c,
                        inside ? p.c_in - channel : 0);
      }
    }
    copy_commit();
    copy_wait<0>();
  }

  // --- core: V = sum over taps of U, shifted, times one matrix a tap ---

  TC_DEVICE void full_core() {
    const int blocks = my_blocks(span.pixels());
    if (blocks == 0) return;
    Anchor anchor[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) anchor[i] = anchor_of(p, span, block_row(i) + matrix_row());
    const int32_t in = rank_padded(p.rank_in), out = rank_padded(p.rank_out);
    for (int32_t q = 0; q < p.ring; ++q) {
      for (int32_t column = 0; column < out; column += 8 * kN) {
        const int32_t columns = least(out - column, 8 * kN);
        Accumulators<kM, kN> acc;
        acc.clear();
        core_columns(acc, anchor, blocks, q * in * kBytes, column / 16, columns / 16);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          if (i < blocks) {
            store_block<E>(acc, i, shared + layout.second + block_row(i) * layout.v_pitch + (q * out + column) * kBytes,
                           layout.v_pitch, 16, columns / 8, lane);
          }
        }
      }
    }
  }

  TC_DEVICE void core_columns(Accumulators<kM, kN>& acc, const Anchor (&anchor)[kM], int blocks, int32_t slice_bytes,
                              int32_t pair, int32_t used) {
    const int32_t pairs = rank_padded(p.rank_out) / 16, steps = steps_of(p.rank_in, kBytes);
    // As many steps as were packed: slices are padded to whole ones.
    const int32_t packed_steps = rank_padded(p.rank_in) * kBytes / kStepBytes;
    const int64_t tap_words = static_cast<int64_t>(packed_steps) * pairs * (kBytes == 4 ? 2 : 1) * 32;
    with_shape<kM, kN>(blocks, used, [&](auto b, auto n) {
      for (int32_t y = 0; y < p.h.taps; ++y) {
        for (int32_t x = 0; x < p.w.taps; ++x) {
          const int32_t tap = (p.h.tap + y * p.h.tap_step) * p.kernel_w + p.w.tap + x * p.w.tap_step;
          const Right right{static_cast<const Words4*>(p.core_fragments) + tap * tap_words, pairs, pair};
          const char* start[kM];
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            const int32_t row = region_row(span, anchor[i], y * p.h.gap, x * p.w.gap, p.tile.region_rows);
            start[i] = shared + row * layout.u_pitch + slice_bytes + matrix_bytes();
          }
          multiply_steps<decltype(b)::value, decltype(n)::value>(acc, start, right, steps);
        }
      }
    });
  }

  // Steps that follow each other in shared memory.
  template <int kBlocks, int kPairs>
  TC_DEVICE void multiply_steps(Accumulators<kM, kN>& acc, const char* const (&start)[kM], const Right& right,
                                int32_t steps) const {
#pragma unroll 2
    for (int32_t step = 0; step < steps; ++step) {
      const char* rows_of[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) rows_of[i] = start[i] + step * kStepBytes;
      multiply_step<E, kBlocks, kPairs>(acc, rows_of, right, step, lane);
    }
  }

  // One weight a rank and tap: no matrix product. Pairs of ranks go to neighbouring threads.
  TC_DEVICE void depthwise_core() {
    const int32_t pairs = rank_padded(p.rank_out) / 2, pixels = span.pixels();
    const float* weights = static_cast<const float*>(p.core_fragments);
    for (int i = 0; i < my_blocks(pixels); ++i) {
      for (int32_t item = lane; item < 16 * pairs; item += 32) {
        const int32_t row = block_row(i) + item / pairs, rank = item % pairs * 2;
        const Anchor anchor = anchor_of(p, span, row);
        float first = 0.0f, second = 0.0f;
        for (int32_t y = 0; y < p.h.taps; ++y) {
          for (int32_t x = 0; x < p.w.taps; ++x) {
            const int32_t from = region_row(span, anchor, y * p.h.gap, x * p.w.gap, p.tile.region_rows);
            const int32_t tap = (p.h.tap + y * p.h.tap_step) * p.kernel_w + p.w.tap + x * p.w.tap_step;
            const Storage* u = reinterpret_cast<const Storage*>(shared + from * layout.u_pitch) + rank;
            const float* c = weights + tap * 2 * pairs + rank;
            first += E::to_float(u[0]) * c[0];
            second += E::to_float(u[1]) * c[1];
          }
        }
        store_pair<E>(shared + layout.second + row * layout.v_pitch + rank * kBytes, first, second);
      }
    }
  }

  // --- out ---

  // Elements from the start of an output image to a pixel of the tile; below zero where the tile has no such pixel.
  TC_DEVICE int64_t out_offset(int32_t pixel, int64_t n, int64_t h, int64_t w) const {
    if (pixel >= span.pixels()) return -1;
    const Place at = place_of(pixel, span.h.size, span.w.size);
    return (span.n.begin + at.n) * n + (p.h.first + (span.h.begin + at.h) * p.h.out_step) * h +
           (p.w.first + (span.w.begin + at.w) * p.w.out_step) * w;
  }

  TC_DEVICE void store_rank_image() {
    const int32_t pieces = (last_pitch() - kRowPadBytes) / 16, pixels = span.pixels();
    const int64_t row_pieces = p.out_width;
    char* to = static_cast<char*>(p.rank_image);
    for (int32_t i = thread_index(); i < pixels * pieces; i += block_threads()) {
      const int32_t row = i / pieces, piece = i % pieces;
      const int64_t pixel = out_offset(row, p.out_height * row_pieces, row_pieces, 1);
      *reinterpret_cast<Words4*>(to + (pixel * pieces + piece) * 16) =
          *reinterpret_cast<const Words4*>(last_rows() + row * last_pitch() + piece * 16);
    }
  }

  // Y = V point_out + bias; each warp brings its rows to shared memory and from there to y in whole runs.
  TC_DEVICE void leave() {
    const int blocks = my_blocks(span.pixels());
    if (blocks == 0) return;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      if (i < blocks && lane < 16) {
        row_offsets()[block_row(i) + lane] =
            out_offset(block_row(i) + lane, p.y_strides.n, p.y_strides.h, p.y_strides.w);
      }
    }
    sync_warp();
    const int32_t pairs = rank_padded(p.c_out) / 16;
    const int32_t steps = p.ring * rank_padded(p.rank_out) * kBytes / kStepBytes;
    // Without a ring whole steps of padding may lie at the end.
    const int32_t used = p.ring == 1 ? steps_of(p.rank_out, kBytes) : steps;
    for (int32_t column = 0; column < p.c_out; column += 8 * kN) {
      const int32_t columns = least((p.c_out - column + 7) / 8, kN);
      const Right right{static_cast<const Words4*>(p.leave_fragments), pairs, column / 16};
      Accumulators<kM, kN> acc;
      acc.clear();
      const char* start[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        start[i] = last_rows() + (block_row(i) + matrix_row()) * last_pitch() + matrix_bytes();
      }
      with_shape<kM, kN>(blocks, (columns + 1) / 2, [&](auto b, auto n) {
        multiply_steps<decltype(b)::value, decltype(n)::value>(acc, start, right, used);
      });
      if (p.bias != nullptr) add_bias(acc, column, columns);
      char* out = shared + (p.core == Core::kNone ? layout.second : 0);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if (i < blocks) {
          store_block<E>(acc, i, out + block_row(i) * layout.out_pitch, layout.out_pitch, 16, columns, lane);
        }
      }
      sync_warp();
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if (i < blocks) {
          write_rows(out + block_row(i) * layout.out_pitch, row_offsets() + block_row(i), column,
                     least(p.c_out - column, 8 * kN));
        }
      }
      sync_warp();
    }
  }

  TC_DEVICE void add_bias(Accumulators<kM, kN>& acc, int32_t column, int32_t columns) const {
    const Storage* bias = static_cast<const Storage*>(p.bias);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (j >= columns) break;
      const int32_t c = column + 8 * j + 2 * (lane % 4);
      const float first = c < p.c_out ? E::to_float(bias[c]) : 0.0f;
      const float second = c + 1 < p.c_out ? E::to_float(bias[c + 1]) : 0.0f;
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        acc.value[i][j][0] += first;
        acc.value[i][j][1] += second;
        acc.value[i][j][2] += first;
        acc.value[i][j][3] += second;
      }
    }
  }

  // 16 rows of `count` channels from shared memory to y.
  TC_DEVICE void write_rows(const char* from, const int64_t* offsets, int32_t column, int32_t count) const {
    constexpr int32_t kElements = 16 / kBytes;
    Storage* y = static_cast<Storage*>(p.y);
    if (y_vectors()) {
      const int32_t pieces = count / kElements;
      for (int32_t i = lane; i < 16 * pieces; i += 32) {
        const int32_t row = i / pieces, piece = i % pieces;
        if (offsets[row] >= 0) {
          *reinterpret_cast<Words4*>(y + offsets[row] + column + piece * kElements) =
              *reinterpret_cast<const Words4*>(from + row * layout.out_pitch + piece * 16);
        }
      }
      return;
    }
    const bool channels_first = p.y_strides.c != 1;
    for (int32_t i = lane; i < 16 * count; i += 32) {
      const int32_t row = channels_first ? i % 16 : i / count, c = channels_first ? i / 16 : i % count;
      if (offsets[row] >= 0) {
        y[offsets[row] + (column + c) * p.y_strides.c] =
            reinterpret_cast<const Storage*>(from + row * layout.out_pitch)[c];
      }
    }
  }

  TC_DEVICE bool y_vectors() const {
    constexpr int64_t kElements = 16 / kBytes;
    return p.y_strides.c == 1 && p.c_out % kElements == 0 && p.y_strides.n % kElements == 0 &&
           p.y_strides.h % kElements == 0 && p.y_strides.w % kElements == 0 &&
           reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  }

  const BottleneckParams& p;
  const SharedLayout layout;
  char* const shared;
  const int lane, warp;
  const int32_t rows_at_once;
  TileSpan span;
};

}  // namespace tensorcomp::cuda
