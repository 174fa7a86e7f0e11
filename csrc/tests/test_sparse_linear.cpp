// Products with packed sparse matrices of every instruction set against plain loops, with one row of x and many, and
// their gradients; and matrices with numbers that lead nowhere, which must be refused or be harmless.
#include <cstdio>
#include <deque>

#include "check.h"
#include "guarded.h"
#include "problem.h"

using namespace tensorcomp;
using namespace tensorcomp::test;

namespace {

struct Entry {
  int64_t row, column;
};

// Arrays of exactly the sizes that a matrix has.
struct Packed {
  int64_t m, n, count;
  DType dtype;
  bool bits;
  Array values;
  Bytes offsets, positions;

  Packed(int64_t rows, int64_t columns, const std::vector<Entry>& entries, DType type, bool as_bits)
      : m(rows),
        n(columns),
        count(static_cast<int64_t>(entries.size())),
        dtype(type),
        bits(as_bits),
        values(type, count),
        offsets(static_cast<size_t>(m * segments() + 1) * 4),
        positions(static_cast<size_t>(as_bits ? m * ((n + 7) / 8) : 2 * count)) {
    std::mt19937 engine(5);
    std::normal_distribution<float> normal;
    std::vector<int32_t> counts(static_cast<size_t>(m * segments()));
    if (as_bits) std::memset(positions.get(), 0, static_cast<size_t>(m * ((n + 7) / 8)));
    for (int64_t k = 0; k < count; ++k) {
      const Entry& e = entries[static_cast<size_t>(k)];
      values.set(k, normal(engine));
      ++counts[static_cast<size_t>(e.row * segments() + e.column / kSegment)];
      if (as_bits) bytes()[e.row * ((n + 7) / 8) + e.column / 8] |= static_cast<uint8_t>(1 << (e.column % 8));
      else static_cast<uint16_t*>(positions.get())[k] = static_cast<uint16_t>(e.column % kSegment);
    }
    auto* at = static_cast<int32_t*>(offsets.get());
    *at = 0;
    for (const int32_t c : counts) {
      at[1] = at[0] + c;
      ++at;
    }
  }

  int64_t segments() const { return segments_of(n); }
  uint8_t* bytes() const { return static_cast<uint8_t*>(positions.get()); }
  SparseMatrix matrix() const {
    SparseMatrix s;
    s.m = m;
    s.n = n;
    s.count = count;
    s.values = values.get();
    s.offsets = static_cast<const int32_t*>(offsets.get());
    if (bits) s.bits = bytes();
    else s.columns = static_cast<const uint16_t*>(positions.get());
    return s;
  }
};

std::vector<Entry> some_entries(int64_t m, int64_t n, double kept, unsigned seed = 1) {
  std::mt19937 engine(seed);
  std::vector<Entry> entries;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      // An empty row, and a full one.
      if (i % 7 == 3 || (i % 7 != 4 && engine() >= kept * 4294967296.0)) continue;
      entries.push_back({i, j});
    }
  }
  return entries;
}

void fill(Array& a, int64_t count) {
  std::mt19937 engine(9);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) a.set(i, normal(engine));
}

Doubles product(const Packed& s, const std::vector<Entry>& entries, const Array& x, int64_t x_row, int64_t rows) {
  Doubles y(static_cast<size_t>(rows * s.m));
  for (int64_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < entries.size(); ++k) {
      const Entry& e = entries[k];
      y[static_cast<size_t>(r * s.m + e.row)] += s.values[static_cast<int64_t>(k)] * x[r * x_row + e.column];
    }
  }
  return y;
}

void run_linear(const SparseMatrix& s, DType dtype, const Array& x, int64_t x_row, int64_t rows, int64_t threads,
                void* y) {
  const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(dtype);
  SparseLinearParams p;
  p.dtype = dtype;
  p.sparse = s;
  p.rows = rows;
  p.x = x.get();
  p.x_row = x_row;
  p.y = y;
  const SparseLinearPlan plan = kernels.linear_plan(p, threads);
  Bytes scratch(plan.scratch_bytes);
  p.scratch = scratch.get();
  run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.linear_run(p, plan, phase, part); });
}

// A matrix in panels, in arrays of exactly their sizes.
class Panels {
 public:
  Panels(const SparseMatrix& s, DType dtype) : Panels(make_panels(s), s, dtype) {}

  void run(const Array& x, int64_t x_row, int64_t rows, int64_t threads, void* y) const {
    const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(panels.dtype);
    std::vector<int64_t> slots, loose;
    if (!panel_starts(panels, &slots, &loose)) return;
    SparsePanelsParams p;
    p.panels = panels;
    p.slot_starts = slots.data();
    p.loose_starts = loose.data();
    p.rows = rows;
    p.x = x.get();
    p.x_row = x_row;
    p.y = y;
    Bytes scratch(kernels.panels_scratch_bytes(p, threads));
    p.scratch = scratch.get();
    run_phases(1, threads, [&](int64_t, int64_t part) { kernels.panels_run(p, threads, part); });
  }

  SparsePanels panels;
  Bytes half_steps, loose_steps, order, places, loose_columns;
  Array values, loose_values;

 private:
  Panels(const MadePanels& made, const SparseMatrix& s, DType dtype)
      : half_steps(made.half_steps.size()),
        loose_steps(made.loose_steps.size() * 4),
        order(made.order.size() * 4),
        places(made.places.size()),
        loose_columns(made.loose_columns.size() * 4),
        values(dtype, static_cast<int64_t>(made.values.size())),
        loose_values(dtype, static_cast<int64_t>(made.loose_values.size())) {
    const auto copy = [](const auto& from, const Bytes& to) {
      if (!from.empty()) std::memcpy(to.get(), from.data(), from.size() * sizeof(from[0]));
    };
    copy(made.half_steps, half_steps);
    copy(made.loose_steps, loose_steps);
    copy(made.order, order);
    copy(made.places, places);
    copy(made.loose_columns, loose_columns);
    take(made.values, s, dtype, &values);
    take(made.loose_values, s, dtype, &loose_values);
    panels.dtype = dtype;
    panels.m = s.m;
    panels.n = s.n;
    panels.slots = static_cast<int64_t>(made.values.size()) / kPanelLanes;
    panels.loose = static_cast<int64_t>(made.loose_values.size()) / kPanelLanes;
    panels.half_steps = static_cast<const uint8_t*>(half_steps.get());
    panels.loose_steps = static_cast<const int32_t*>(loose_steps.get());
    panels.order = static_cast<const int32_t*>(order.get());
    panels.values = values.get();
    panels.places = static_cast<const uint8_t*>(places.get());
    panels.loose_values = loose_values.get();
    panels.loose_columns = static_cast<const int32_t*>(loose_columns.get());
  }

  static void take(const std::vector<uint32_t>& which, const SparseMatrix& s, DType dtype, Array* to) {
    for (size_t i = 0; i < which.size(); ++i) {
      const uint32_t at = which[i];
      float v = 0;
      if (at != 0 && dtype == DType::kFloat32) v = static_cast<const float*>(s.values)[at - 1];
      else if (at != 0) v = from_bfloat16(static_cast<const uint16_t*>(s.values)[at - 1]);
      to->set(static_cast<int64_t>(i), v);
    }
  }
};

void check_backward(const Packed& s, const std::vector<Entry>& entries, int64_t rows, int64_t threads,
                    double tolerance) {
  const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(s.dtype);
  Array x(s.dtype, rows * s.n), grad(s.dtype, rows * s.m);
  fill(x, rows * s.n);
  fill(grad, rows * s.m);
  Guarded grad_x(s.dtype, rows * s.n), grad_values(s.dtype, s.count);
  Doubles right_x(static_cast<size_t>(rows * s.n), 0.5), right_values(static_cast<size_t>(s.count));
  for (int64_t i = 0; i < rows * s.n; ++i) {
    if (s.dtype == DType::kFloat32) static_cast<float*>(grad_x.get())[i] = 0.5f;
    else static_cast<uint16_t*>(grad_x.get())[i] = to_bfloat16(0.5f);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < entries.size(); ++k) {
      const Entry& e = entries[k];
      right_x[static_cast<size_t>(r * s.n + e.column)] += s.values[static_cast<int64_t>(k)] * grad[r * s.m + e.row];
      right_values[k] += grad[r * s.m + e.row] * x[r * s.n + e.column];
    }
  }
  SparseLinearBackwardParams q;
  q.dtype = s.dtype;
  q.sparse = s.matrix();
  q.rows = rows;
  q.x = x.get();
  q.x_row = s.n;
  q.grad = grad.get();
  q.grad_row = s.m;
  q.grad_x = grad_x.get();
  q.grad_values = grad_values.get();
  const SparseLinearBackwardPlan plan = kernels.linear_backward_plan(q, threads);
  // Whatever the rows of x: those of the matrix are for all threads.
  CHECK(plan.parts == threads && plan.row_parts <= threads);
  Bytes scratch(plan.scratch_bytes);
  q.scratch = scratch.get();
  run_phases(plan.phases, plan.parts,
             [&](int64_t phase, int64_t part) { kernels.linear_backward_run(q, plan, phase, part); });
  CHECK(distance(grad_x, right_x) < tolerance && grad_x.whole());
  CHECK(distance(grad_values, right_values) < tolerance && grad_values.whole());
}

void check(const Packed& s, const std::vector<Entry>& entries, int64_t rows, int64_t threads, double tolerance) {
  CHECK(kernel_table().lowrank_sparse(s.dtype).fault(s.matrix()) == SparseFault::kNone);
  const int64_t x_row = s.n + 5;
  Array x(s.dtype, rows * x_row);
  fill(x, rows * x_row);
  const Doubles right = product(s, entries, x, x_row, rows);
  Guarded y(s.dtype, rows * s.m), from_panels(s.dtype, rows * s.m);
  run_linear(s.matrix(), s.dtype, x, x_row, rows, threads, y.get());
  CHECK(distance(y, right) < tolerance && y.whole());
  Panels(s.matrix(), s.dtype).run(x, x_row, rows, threads, from_panels.get());
  CHECK(distance(from_panels, right) < tolerance && from_panels.whole());
  check_backward(s, entries, rows, threads, tolerance);
}

struct LinearCase {
  int64_t m, n;
  double kept;
};

const LinearCase kCases[] = {{1, 1, 1.0},   {3, 33, 0.3},  {65, 17, 0.1},   {40, 300, 0.1},   {130, 64, 0.5},
                             {9, 600, 0.0}, {20, 40, 1.0}, {70, 513, 0.02}, {2, 65600, 0.001}};

void test_matches_loops() {
  for (const std::string& isa : instruction_sets()) {
    tensorcomp_set_isa_cap(isa.c_str());
    for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
      const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
      for (const LinearCase& c : kCases) {
        const std::vector<Entry> entries = some_entries(c.m, c.n, c.kept);
        for (const bool bits : {false, true}) {
          const Packed packed(c.m, c.n, entries, dtype, bits);
          for (const int64_t rows : {1, 3, 18, 70}) {
            for (const int64_t threads : {1, 3}) {
              char text[120];
              std::snprintf(text, sizeof text, "[%d, %d], %s, %s, %s, %d rows, %d threads", static_cast<int>(c.m),
                            static_cast<int>(c.n), isa.c_str(), dtype == DType::kFloat32 ? "float32" : "bfloat16",
                            bits ? "bits" : "columns", static_cast<int>(rows), static_cast<int>(threads));
              subject() = text;
              check(packed, entries, rows, threads, tolerance);
              subject() = "";
            }
          }
        }
      }
    }
  }
  tensorcomp_set_isa_cap("");
}

// Whatever the numbers are: what is not refused must stay inside of the arrays, which a sanitizer watches.
void test_hostile_numbers() {
  std::mt19937 engine(11);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(engine()) % n; };
  for (const std::string& isa : instruction_sets()) {
    tensorcomp_set_isa_cap(isa.c_str());
    const LowrankSparseKernels& kernels = kernel_table().lowrank_sparse(DType::kFloat32);
    int64_t refused = 0, passed = 0;
    for (int round = 0; round < 300; ++round) {
      const int64_t m = 1 + below(9), n = round % 50 == 0 ? kSegment + 40 : 1 + below(90);
      const std::vector<Entry> entries = some_entries(m, n, n > kSegment ? 0.001 : 0.3, engine());
      const Packed s(m, n, entries, DType::kFloat32, round % 2 == 0);
      const int64_t numbers = s.m * s.segments() + 1;
      auto* offsets = static_cast<int32_t*>(s.offsets.get());
      for (int64_t times = below(3); times >= 0; --times) {
        const int kind = static_cast<int>(below(4));
        if (kind == 0) offsets[below(numbers)] = static_cast<int32_t>(engine());
        else if (kind == 1) offsets[below(numbers)] += static_cast<int32_t>(below(3)) - 1;
        else if (s.bits) s.bytes()[below(m * ((n + 7) / 8))] ^= static_cast<uint8_t>(1 << below(8));
        else if (s.count > 0)
          static_cast<uint16_t*>(s.positions.get())[below(s.count)] = static_cast<uint16_t>(engine());
      }
      SparseMatrix shorter = s.matrix();
      --shorter.count;  // values and columns are cut off
      CHECK(offsets[numbers - 1] == shorter.count || kernels.fault(shorter) == SparseFault::kEnds);
      if (kernels.fault(s.matrix()) != SparseFault::kNone) {
        ++refused;
        continue;
      }
      ++passed;
      const Array x(DType::kFloat32, 3 * n), grad(DType::kFloat32, 3 * m);
      Guarded y(DType::kFloat32, 3 * m);
      run_linear(s.matrix(), DType::kFloat32, x, n, 3, 2, y.get());
      Panels(s.matrix(), DType::kFloat32).run(x, n, 3, 2, y.get());
      CHECK(y.whole());
      check_backward(s, {}, 3, 2, 1e30);
    }
    CHECK(refused > 100 && passed > 5);
  }
  tensorcomp_set_isa_cap("");
}

void test_hostile_panels() {
  std::mt19937 engine(13);
  const std::vector<Entry> entries = some_entries(70, 90, 0.2);
  for (const std::string& isa : instruction_sets()) {
    tensorcomp_set_isa_cap(isa.c_str());
    const Packed s(70, 90, entries, DType::kFloat32, true);
    const Array x(DType::kFloat32, 3 * 90);
    for (int round = 0; round < 200; ++round) {
      const Panels panels(s.matrix(), DType::kFloat32);
      const auto spoil = [&](const Bytes& bytes, size_t size) {
        if (size > 0 && engine() % 2 == 0)
          static_cast<uint8_t*>(bytes.get())[engine() % size] = static_cast<uint8_t>(engine());
      };
      const SparsePanels& p = panels.panels;
      const auto lanes = static_cast<size_t>(kPanelLanes);
      if (round % 4 == 0) spoil(panels.half_steps, static_cast<size_t>(p.bundles() * p.chunks()));
      if (round % 4 == 1) spoil(panels.loose_steps, static_cast<size_t>(p.bundles() * kPanelGroups) * 4);
      spoil(panels.order, static_cast<size_t>(p.bundles() * kBundle) * 4);
      spoil(panels.places, static_cast<size_t>(p.slots) * lanes);
      spoil(panels.loose_columns, static_cast<size_t>(p.loose) * lanes * 4);
      Guarded y(DType::kFloat32, 3 * 70);
      panels.run(x, 90, 3, 2, y.get());
      CHECK(y.whole());
      // Counts that lead behind the end of what is there.
      std::vector<int64_t> slots, loose;
      SparsePanels shorter = p;
      if (panel_starts(p, &slots, &loose)) {
        --shorter.slots;
        CHECK(!panel_starts(shorter, &slots, &loose));
      }
    }
  }
  tensorcomp_set_isa_cap("");
}

}  // namespace

int main() {
  test_matches_loops();
  test_hostile_numbers();
  test_hostile_panels();
  return result("sparse_linear");
}
