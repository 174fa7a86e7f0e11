// The index arithmetic of the CUDA kernels on the host, position by position over small shapes: which input positions
// an axis gathers, which tile holds a grid position, where a tap finds it in shared memory, what lies where in packed
// weights, and how sums over pixels are cut.
#include <algorithm>
#include <cstdio>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "kernels/cuda/axes.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/plan.h"

using namespace tensorcomp;
using namespace tensorcomp::cuda;
using namespace tensorcomp::test;

namespace {

template <typename T>
bool all_different(const std::multiset<T>& values) {
  return std::adjacent_find(values.begin(), values.end()) == values.end();
}

// (output, input, tap) of every product along one direction.
using Products = std::multiset<std::tuple<int64_t, int64_t, int32_t>>;

Products products_of(const Axis& axis) {
  Products found;
  for (int64_t g = 0; g < axis.grid; ++g)
    for (int32_t i = 0; i < axis.taps; ++i) {
      const int64_t in = g * axis.step + axis.offset + static_cast<int64_t>(i) * axis.gap;
      if (in >= 0 && in < axis.in) found.insert({axis.first + g * axis.out_step, in, axis.tap + i * axis.tap_step});
    }
  return found;
}

template <typename Body>
void for_each_axis(Body body) {
  for (int32_t kernel = 1; kernel <= 5; ++kernel)
    for (int32_t stride = 1; stride <= 4; ++stride)
      for (int32_t pad = 0; pad <= 3; ++pad)
        for (int32_t dilation = 1; dilation <= 4; ++dilation)
          for (int64_t in = 1; in <= 13; ++in) {
            const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
            if (room >= 0) body(kernel, stride, pad, dilation, in, room / stride + 1);
          }
}

// The phases of the transpose hold the products of the convolution, each once, and write each position once.
void test_axes() {
  for_each_axis([](int32_t kernel, int32_t stride, int32_t pad, int32_t dilation, int64_t in, int64_t out) {
    Products expected, plain;
    for (int64_t o = 0; o < out; ++o)
      for (int32_t k = 0; k < kernel; ++k) {
        const int64_t i = o * stride - pad + k * dilation;
        if (i >= 0 && i < in) {
          plain.insert({o, i, k});
          expected.insert({i, o, k});
        }
      }
    CHECK(products_of(convolution_axis(in, out, kernel, stride, pad, dilation)) == plain);
    Products found;
    std::multiset<int64_t> written;
    for (int32_t phase = 0; phase < std::min<int64_t>(stride, in); ++phase) {
      const Axis axis = transposed_axis(out, in, kernel, stride, pad, dilation, phase);
      found.merge(products_of(axis));
      for (int64_t g = 0; g < axis.grid; ++g) written.insert(axis.first + g * axis.out_step);
    }
    CHECK(found == expected);
    CHECK(static_cast<int64_t>(written.size()) == in);
    CHECK(all_different(written));
  });
}

// The span of input under some grid positions is what they touch within the image, no more and no less.
void test_input_spans() {
  for_each_axis([](int32_t kernel, int32_t stride, int32_t pad, int32_t dilation, int64_t in, int64_t out) {
    for (const Axis& axis : {convolution_axis(in, out, kernel, stride, pad, dilation),
                             transposed_axis(out, in, kernel, stride, pad, dilation, 0)}) {
      for (int64_t begin = 0; begin < axis.grid; ++begin)
        for (int32_t size = 1; begin + size <= axis.grid; ++size) {
          const Span span = input_span(axis, {begin, size});
          int64_t low = axis.in, high = -1;
          for (int64_t g = begin; g < begin + size; ++g)
            for (int32_t i = 0; i < axis.taps; ++i) {
              const int64_t position = g * axis.step + axis.offset + static_cast<int64_t>(i) * axis.gap;
              if (position < 0 || position >= axis.in) continue;
              low = std::min(low, position);
              high = std::max(high, position);
            }
          // Where taps jump over the whole image the span may hold positions that nobody reads.
          if (high >= 0) CHECK(span.begin <= low && span.begin + span.size > high);
          CHECK(span.begin >= 0 && span.begin + span.size <= axis.in && span.size >= 0);
          CHECK(span.size <= most_inputs(axis, size));
        }
    }
  });
}

BottleneckParams small_problem(const Axis& h, const Axis& w, int64_t batch, Core core) {
  BottleneckParams p;
  p.element = Element::kBfloat16;
  p.core = core;
  p.batch = batch;
  p.h = h;
  p.w = w;
  p.c_in = p.c_out = 8;
  p.rank_in = p.rank_out = 5;
  return p;
}

// Tiles hold every grid position once; the row of shared memory a tap reads is the input position it should read.
void check_tiles(const BottleneckParams& p) {
  std::multiset<std::tuple<int64_t, int64_t, int64_t>> seen;
  const int64_t tiles = p.tile.tiles_n * p.tile.tiles_h * p.tile.tiles_w;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const TileSpan span = tile_span(p, tile);
    CHECK(span.pixels() <= p.tile.warps * p.tile.blocks_m * 16);
    CHECK(span.region() <= p.tile.region_rows);
    for (int32_t pixel = 0; pixel < span.pixels() + 3; ++pixel) {
      const Anchor anchor = anchor_of(p, span, pixel);
      const Place at = place_of(pixel, span.h.size, span.w.size);
      const int64_t n = span.n.begin + at.n, h = span.h.begin + at.h, w = span.w.begin + at.w;
      if (pixel < span.pixels()) seen.insert({n, h, w});
      if (p.core == Core::kNone) continue;
      for (int32_t y = 0; y < p.h.taps; ++y)
        for (int32_t x = 0; x < p.w.taps; ++x) {
          const int32_t row = region_row(span, anchor, y * p.h.gap, x * p.w.gap, -7);
          const int64_t in_h = h * p.h.step + p.h.offset + static_cast<int64_t>(y) * p.h.gap;
          const int64_t in_w = w * p.w.step + p.w.offset + static_cast<int64_t>(x) * p.w.gap;
          const bool inside = pixel < span.pixels() && in_h >= 0 && in_h < p.h.in && in_w >= 0 && in_w < p.w.in;
          if (!CHECK((row == -7) == !inside) || !inside) continue;
          const Place found = place_of(row, span.in_h.size, span.in_w.size);
          CHECK(row < span.region());
          CHECK(span.n.begin + found.n == n && span.in_h.begin + found.h == in_h && span.in_w.begin + found.w == in_w);
        }
    }
  }
  CHECK(static_cast<int64_t>(seen.size()) == p.batch * p.h.grid * p.w.grid);
  CHECK(all_different(seen));
}

void test_tiles() {
  const DeviceLimits device{4, 99 * 1024, 100 * 1024};
  for_each_axis([&](int32_t kernel, int32_t stride, int32_t pad, int32_t dilation, int64_t in, int64_t out) {
    if (in % 4 != 1 && in != 12) return;  // every size along one direction would take minutes along two
    const Axis h = convolution_axis(in, out, kernel, stride, pad, dilation);
    const Axis w = convolution_axis(7, 7, 3, 1, 1, 1);
    for (const int64_t batch : {1, 3}) {
      for (BottleneckParams p :
           {small_problem(h, w, batch, Core::kFull),
            small_problem(transposed_axis(out, in, kernel, stride, pad, dilation, 0), w, batch, Core::kDepthwise),
            small_problem(pixel_axis(in), pixel_axis(out), batch, Core::kNone)}) {
        if (!CHECK(plan_tile(p, device))) continue;
        check_tiles(p);
        // Sizes that the planner would not choose.
        for (const auto& [images, rows, columns] : {std::tuple{1, 2, 3}, {2, 1, 1}, {1, 5, 4}, {3, 3, 2}}) {
          p.tile.images = images;
          p.tile.rows = rows;
          p.tile.columns = columns;
          p.tile.warps = 2;
          p.tile.blocks_m = 2;
          if (CHECK(detail::complete(p, device))) check_tiles(p);
        }
      }
    }
  });
}

// Ranks so large that only the smallest tiles are left.
void test_tiles_of_large_ranks() {
  const Axis axis = convolution_axis(9, 9, 3, 1, 1, 1);
  for (const int32_t kilobytes : {12, 16, 24, 48, 99, 163, 227}) {
    const DeviceLimits device{4, kilobytes * 1024, (kilobytes + 1) * 1024};
    for (const int32_t rank : {20, 50, 66, 130, 300, 500, 700, 1000, 1500, 2000})
      for (const Core core : {Core::kFull, Core::kDepthwise}) {
        for (const Element element : {Element::kBfloat16, Element::kFloat32}) {
          BottleneckParams p = small_problem(axis, axis, 2, core);
          p.element = element;
          p.rank_in = p.rank_out = rank;
          BottleneckParams smallest = p;
          const bool any = detail::smallest_tile(smallest, device);
          if (!CHECK(plan_tile(p, device) == any) || !any) continue;
          check_tiles(p);
        }
      }
  }
}

// Regions of shared memory hold what is kept in them, and end within what the device has.
void test_shared_layout() {
  for (const int32_t rank : {1, 16, 17, 64, 65, 130, 200})
    for (const int32_t kernel : {1, 3, 7})
      for (const int32_t stride : {1, 2})
        for (const Core core : {Core::kFull, Core::kDepthwise, Core::kNone})
          for (const Element element : {Element::kFloat32, Element::kFloat16})
            for (const DeviceLimits& device : {DeviceLimits{}, DeviceLimits{8, 99 * 1024, 100 * 1024}}) {
              const bool gathers = core != Core::kNone;
              const Axis axis = gathers ? convolution_axis(56, (56 + 2 * (kernel / 2) - kernel) / stride + 1, kernel,
                                                           stride, kernel / 2, 1)
                                        : pixel_axis(56);
              BottleneckParams p = small_problem(axis, axis, 4, core);
              p.element = element;
              p.rank_in = p.rank_out = rank;
              if (!plan_tile(p, device)) continue;
              const SharedLayout s = shared_layout(p);
              const int32_t rows = p.tile.warps * p.tile.blocks_m * 16;
              CHECK(s.total <= device.shared_per_block && s.total == p.tile.shared_bytes);
              CHECK((p.tile.region_rows + 1) * s.u_pitch <= s.second && p.tile.region_rows % 16 == 0);
              const int32_t second = s.row_offsets - s.second;
              CHECK(kChunkStages * rows * kChunkPitch <= second);
              CHECK(rows * s.out_pitch <= (gathers ? s.second : second));
              if (gathers) CHECK(rows * s.v_pitch <= second);
              // Eight rows read together start in different groups of four banks.
              for (const int32_t pitch : {s.u_pitch, s.v_pitch, s.out_pitch, kChunkPitch}) CHECK(pitch % 32 == 16);
              CHECK(launch_blocks(p, device) >= 1);
            }
}

// Every element of a matrix lies at one place of its fragments, the place where the matrix instruction looks for it.
void test_packing() {
  for (const int32_t bytes : {2, 4}) {
    std::set<std::pair<int32_t, int32_t>> places;
    for (int32_t lane = 0; lane < 32; ++lane)
      for (int32_t word = 0; word < 4; ++word) {
        const FragmentPlace at = fragment_place(bytes, lane, word);
        // PTX: the columns of B go with the lane's group, the rows with its member.
        CHECK(at.n == lane / 4 + 8 * (word / 2));
        CHECK(at.k % (bytes == 2 ? 8 : 4) == (bytes == 2 ? 2 * (lane % 4) : lane % 4));
        for (int32_t e = 0; e < 4 / bytes; ++e) places.insert({at.k + e, at.n});
      }
    CHECK(static_cast<int32_t>(places.size()) == 32 / bytes * 16);
  }
  for (const int32_t slice : {1, 15, 16, 17, 40})
    for (const int32_t ring : {1, 3}) {
      std::multiset<int32_t> found;
      for (int32_t i = 0; i < ring * rank_padded(slice) + 5; ++i) {
        const int32_t from = unpadded(i, slice, ring, true);
        if (from >= 0) found.insert(from);
      }
      CHECK(static_cast<int32_t>(found.size()) == ring * slice);
      CHECK(*found.begin() == 0 && *found.rbegin() == ring * slice - 1);
    }
}

// Blocks of a sum over pixels: every tile of the result once a split, on the diagonal those that hold some of it; no
// piece of 16 bytes belongs to two taps.
void test_sum_blocks() {
  for (const int32_t m : {1, 16, 17, 64, 65, 130})
    for (const int32_t n : {1, 64, 100})
      for (const bool diagonal : {false, true}) {
        PixelSumParams p;
        p.m = m;
        p.n = diagonal ? m : n;
        p.m_pitch = sum_row_pitch(m, diagonal);
        p.h.taps = 3;
        p.w.taps = 2;
        p.splits = 3;
        p.diagonal = diagonal;
        CHECK(p.m_pitch >= m && p.m_pitch % kRankPad == 0 && sum_rows(p) == 6 * p.m_pitch);
        std::multiset<std::tuple<int64_t, int64_t, int32_t>> found;
        for (int64_t block = 0; block < sum_blocks(p); ++block) {
          const SumWork w = sum_work(p, block);
          CHECK(w.m < sum_rows(p) && w.n < rank_padded(p.n) && w.split < 3);
          found.insert({w.split, w.m, w.n});
          if (!diagonal) continue;
          // One tap, and the columns of the same ranks.
          CHECK(w.m / p.m_pitch == (w.m + kSumTile - 1) / p.m_pitch && w.m % p.m_pitch == w.n);
        }
        const int64_t tiles = sum_tiles(sum_rows(p)) * (diagonal ? 1 : sum_tiles(n));
        CHECK(static_cast<int64_t>(found.size()) == 3 * tiles);
        CHECK(all_different(found));
      }
}

}  // namespace

int main() {
  test_axes();
  test_input_spans();
  test_tiles();
  test_tiles_of_large_ranks();
  test_shared_layout();
  test_packing();
  test_sum_blocks();
  return result("cuda_shapes");
}
