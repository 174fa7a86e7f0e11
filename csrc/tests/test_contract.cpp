// Contractions of every instruction set against plain loops, forward and backward, over odd shapes and threads; what
// lies around each result stays as it was.
#include <array>
#include <cstdio>
#include <deque>
#include <utility>

#include "check.h"
#include "guarded.h"

using namespace tensorcomp;
using namespace tensorcomp::test;

namespace {

using Numbers = std::vector<int64_t>;

// Labels as letters from 'a', and the sizes of the letters.
struct ContractCase {
  const char* name;
  std::vector<std::string> cores;
  std::string result;
  std::vector<std::pair<int, int>> pairs;
  Numbers sizes;
};

const ContractCase kCases[] = {
    {"numbers", {"", ""}, "", {{0, 1}}, {}},
    {"dot", {"a", "a"}, "", {{0, 1}}, {9}},
    {"outer", {"ab", "c"}, "cab", {{0, 1}}, {3, 5, 7}},
    {"matrix", {"ab", "bc"}, "ac", {{0, 1}}, {33, 31, 65}},
    {"turned matrix", {"ab", "bc"}, "ca", {{0, 1}}, {12, 5, 9}},
    {"all sizes 1", {"ab", "bc", "cd"}, "ad", {{0, 1}, {2, 3}}, {1, 1, 1, 1}},
    {"train",
     {"aib", "bjc", "ckd", "dle"},
     "klij",
     {{0, 1}, {2, 3}, {4, 5}},
     // a to l
     {1, 6, 5, 7, 1, 0, 0, 0, 4, 3, 8, 5}},
    {"ring", {"aib", "bjc", "ckd", "dla"}, "lkij", {{1, 2}, {0, 3}, {4, 5}}, {3, 6, 10, 7, 0, 0, 0, 0, 5, 4, 9, 8}},
    {"matrix train", {"aijb", "bklc", "cmna"}, "ikmjln", {{0, 1}, {2, 3}}, {2, 5, 3, 0, 0, 0, 0, 0, 4, 3, 2, 6, 8, 3}},
    {"tucker", {"abc", "ia", "jb", "kc"}, "ikj", {{0, 2}, {3, 4}, {1, 5}}, {4, 6, 17, 0, 0, 0, 0, 0, 5, 9, 3}},
    {"large", {"aib", "bjc", "ckd", "dla"}, "lijk", {{0, 1}, {2, 4}, {3, 5}}, {9, 10, 10, 10, 0, 0, 0, 0, 8, 4, 9, 32}},
};

// The numbers of a program, as _contract_program.py writes them.
Numbers encoded(const ContractCase& c) {
  Numbers numbers;
  const auto add = [&](const std::string& letters) {
    int64_t number = 0;
    for (size_t i = letters.size(); i-- > 0;) number = number << 5 | (letters[i] - 'a' + 1);
    numbers.push_back(number);
  };
  for (const std::string& core : c.cores) add(core);
  add(c.result);
  for (const auto& [first, second] : c.pairs) numbers.push_back(first | second << 5);
  return numbers;
}

std::vector<Numbers> shapes_of(const ContractCase& c) {
  std::vector<Numbers> shapes;
  for (const std::string& core : c.cores) {
    shapes.emplace_back();
    for (const char letter : core) shapes.back().push_back(c.sizes[static_cast<size_t>(letter - 'a')]);
  }
  return shapes;
}

bool decode(const Numbers& numbers, const std::vector<Numbers>& shapes, ContractProgram* program) {
  std::vector<ContractShape> given;
  for (const Numbers& s : shapes) given.push_back({static_cast<int>(s.size()), s.data()});
  return decode_contract(numbers.data(), static_cast<int64_t>(numbers.size()), given.data(),
                         static_cast<int>(given.size()), program);
}

struct ContractProblem {
  ContractProgram program;
  std::deque<Array> cores;
  Array grad;
  Doubles result;
  std::vector<Doubles> grads;

  explicit ContractProblem(const ContractCase& c) : grad(DType::kFloat32, decoded(c).result().elements) {
    std::mt19937 engine(7);
    std::normal_distribution<float> normal(1);  // sums of both signs would lose digits
    for (int i = 0; i < program.cores; ++i) {
      const int64_t n = program.tensors[i].elements;
      cores.emplace_back(DType::kFloat32, n);
      for (int64_t at = 0; at < n; ++at) cores.back().set(at, normal(engine));
      grads.emplace_back(static_cast<size_t>(n));
    }
    const int64_t n = program.result().elements;
    for (int64_t at = 0; at < n; ++at) grad.set(at, normal(engine));
    solve(n);
  }

 private:
  const ContractProgram& decoded(const ContractCase& c) {
    CHECK(decode(encoded(c), shapes_of(c), &program));
    return program;
  }

  // Pair by pair in doubles, over all values of a pair's labels, and back.
  void solve(int64_t n) {
    std::vector<Doubles> values, gradients;
    for (int i = 0; i < program.cores; ++i) {
      values.emplace_back();
      for (int64_t at = 0; at < program.tensors[i].elements; ++at)
        values.back().push_back(cores[static_cast<size_t>(i)][at]);
    }
    for (int i = 0; i < program.pairs; ++i) {
      const auto [a, b, c] = tensors(i);
      values.emplace_back(static_cast<size_t>(program.tensors[c].elements));
      visit(i, [&, a = a, b = b, c = c](size_t x, size_t y, size_t z) { values[c][z] += values[a][x] * values[b][y]; });
    }
    result = values.back();
    for (const Doubles& v : values) gradients.emplace_back(v.size());
    for (int64_t at = 0; at < n; ++at) gradients.back()[static_cast<size_t>(at)] = grad[at];
    for (int i = program.pairs; i-- > 0;) {
      const auto [a, b, c] = tensors(i);
      visit(i, [&, a = a, b = b, c = c](size_t x, size_t y, size_t z) {
        gradients[a][x] += gradients[c][z] * values[b][y];
        gradients[b][y] += gradients[c][z] * values[a][x];
      });
    }
    for (size_t i = 0; i < grads.size(); ++i) grads[i] = gradients[i];
  }

  std::array<size_t, 3> tensors(int pair) const {
    const int* t = program.pair[pair].tensors;
    return {static_cast<size_t>(t[0]), static_cast<size_t>(t[1]), static_cast<size_t>(t[2])};
  }

  // Calls each(place in first, in second, in their product) for every value of the pair's labels.
  template <class Each>
  void visit(int pair, const Each& each) const {
    std::array<std::array<int64_t, 3>, kMaxContractLabels + 1> strides{};
    int64_t total = 1;
    std::array<bool, kMaxContractLabels + 1> seen{};
    for (size_t t = 0; t < 3; ++t) {
      const ContractTensor& tensor = program.tensors[program.pair[pair].tensors[t]];
      int64_t inside = 1;
      for (int d = tensor.dims; d-- > 0;) {
        const size_t label = static_cast<size_t>(tensor.label[d]);
        strides[label][t] = inside;
        inside *= program.size[label];
        if (!seen[label]) total *= program.size[label];
        seen[label] = true;
      }
    }
    for (int64_t i = 0; i < total; ++i) {
      int64_t rest = i;
      std::array<int64_t, 3> at{};
      for (size_t label = 1; label <= kMaxContractLabels; ++label) {
        if (!seen[label]) continue;
        for (size_t t = 0; t < 3; ++t) at[t] += rest % program.size[label] * strides[label][t];
        rest /= program.size[label];
      }
      each(static_cast<size_t>(at[0]), static_cast<size_t>(at[1]), static_cast<size_t>(at[2]));
    }
  }
};

void check_contraction(const ContractProblem& problem, int64_t threads) {
  const ContractProgram& program = problem.program;
  const ContractKernels& kernels = kernel_table().contract;
  Guarded result(DType::kFloat32, program.result().elements), saved(DType::kFloat32, program.saved);
  ContractParams p;
  p.program = &program;
  for (int i = 0; i < program.cores; ++i)
    p.cores[i] = static_cast<const float*>(problem.cores[static_cast<size_t>(i)].get());
  p.saved = static_cast<float*>(saved.get());
  p.result = static_cast<float*>(result.get());
  const auto run = [&] {
    const ContractPlan plan = kernels.plan(p, threads);
    Bytes scratch(plan.scratch_bytes);
    p.scratch = scratch.get();
    run_phases(plan.phases, plan.parts, [&](int64_t phase, int64_t part) { kernels.run(p, plan, phase, part); });
  };
  run();
  CHECK(distance(result, problem.result) < 1e-5 && result.whole() && saved.whole());
  // All gradients, then those of every other core.
  for (const bool all : {true, false}) {
    std::deque<Guarded> grads;
    p.grad = static_cast<const float*>(problem.grad.get());
    p.wanted = 0;
    for (int i = 0; i < program.cores; ++i) {
      const bool wanted = all || i % 2 == 0;
      grads.emplace_back(DType::kFloat32, wanted ? program.tensors[i].elements : 0);
      p.grad_cores[i] = wanted ? static_cast<float*>(grads.back().get()) : nullptr;
      if (wanted) p.wanted |= 1u << i;
    }
    for (int i = 0; i < program.pairs; ++i) {
      const int* t = program.pair[i].tensors;
      if ((p.wanted >> t[0] | p.wanted >> t[1]) & 1) p.wanted |= 1u << t[2];
    }
    run();
    for (size_t i = 0; i < grads.size(); ++i) {
      CHECK(grads[i].whole());
      if (all || i % 2 == 0) CHECK(distance(grads[i], problem.grads[i]) < 1e-5);
    }
    CHECK(saved.whole());
  }
}

void test_matches_loops() {
  for (const ContractCase& c : kCases) {
    const ContractProblem problem(c);
    for (const std::string& isa : instruction_sets()) {
      tensorcomp_set_isa_cap(isa.c_str());
      for (const int64_t threads : {1, 2, 3}) {
        char text[120];
        std::snprintf(text, sizeof text, "%s, %s, %d threads", c.name, isa.c_str(), static_cast<int>(threads));
        subject() = text;
        check_contraction(problem, threads);
        subject() = "";
      }
    }
  }
  tensorcomp_set_isa_cap("");
}

// Any numbers are refused or make a program all of whose places lie within its tensors, which the products are run on.
void test_any_numbers() {
  std::mt19937_64 engine(3);
  for (const ContractCase& c : kCases) {
    const Numbers good = encoded(c);
    const std::vector<Numbers> shapes = shapes_of(c);
    for (int i = 0; i < 2000; ++i) {
      Numbers numbers = good;
      for (uint64_t changes = 1 + engine() % 3; changes > 0; --changes) {
        int64_t& number = numbers[engine() % numbers.size()];
        switch (engine() % 5) {
          case 0: number = static_cast<int64_t>(engine()); break;
          case 1: number = good[engine() % good.size()]; break;
          case 2: number ^= int64_t{1} << engine() % 20; break;
          case 3: number = static_cast<int64_t>(engine() % 4); break;
          default: number = -number;
        }
      }
      ContractProgram program;
      if (!decode(numbers, shapes, &program)) continue;
      if (program.saved > 1 << 20 || program.macs > 1 << 24) continue;
      ContractParams p;
      p.program = &program;
      std::deque<Bytes> cores;
      for (int core = 0; core < program.cores; ++core) {
        cores.emplace_back(static_cast<size_t>(program.tensors[core].elements) * 4);
        std::memset(cores.back().get(), 0, static_cast<size_t>(program.tensors[core].elements) * 4);
        p.cores[core] = static_cast<const float*>(cores.back().get());
      }
      Bytes saved(static_cast<size_t>(program.saved) * 4);
      Guarded result(DType::kFloat32, program.result().elements);
      p.saved = static_cast<float*>(saved.get());
      p.result = static_cast<float*>(result.get());
      const ContractPlan plan = kernel_table().contract.plan(p, 2);
      Bytes scratch(plan.scratch_bytes);
      p.scratch = scratch.get();
      run_phases(plan.phases, plan.parts,
                 [&](int64_t phase, int64_t part) { kernel_table().contract.run(p, plan, phase, part); });
      CHECK(distance(result, Doubles(static_cast<size_t>(program.result().elements))) == 0 && result.whole());
    }
  }
}

void test_refuses_what_is_no_program() {
  const ContractCase& matrix = kCases[3];
  const Numbers good = encoded(matrix);
  ContractProgram program;
  const auto decodes = [&](const ContractCase& c) { return decode(encoded(c), shapes_of(c), &program); };
  CHECK(decodes(matrix));
  for (size_t length = 0; length < good.size(); ++length)
    CHECK(!decode({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length)}, shapes_of(matrix), &program));
  Numbers more = good;
  more.push_back(0);
  CHECK(!decode(more, shapes_of(matrix), &program));
  CHECK(!decode(good, {{33, 31}, {31, 65, 1}}, &program));              // a mode too many
  CHECK(!decode(good, {{33, 31}, {30, 65}}, &program));                 // sizes that differ
  CHECK(!decode(good, {{33, 0}, {0, 65}}, &program));                   // empty
  CHECK(!decodes({"kept", {"ab", "bc"}, "abc", {{0, 1}}, {2, 3, 4}}));  // shared and kept
  CHECK(!decodes({"alone", {"ab", "bc"}, "a", {{0, 1}}, {2, 3, 4}}));   // summed alone
  CHECK(decodes({"alone", {"ab", "bc"}, "a", {{0, 1}}, {2, 3, 1}}));    // but for size 1
  CHECK(!decodes({"three", {"ab", "bc", "bd"}, "acd", {{0, 1}, {2, 3}}, {2, 3, 4, 5}}));
  CHECK(!decodes({"twice", {"ab", "bc"}, "aac", {{0, 1}}, {2, 3, 4}}));
  CHECK(!decodes({"trace", {"aab", "bc"}, "c", {{0, 1}}, {2, 3, 4}}));
  CHECK(!decodes({"unknown", {"ab", "bc"}, "acd", {{0, 1}}, {2, 3, 4, 5}}));
  CHECK(!decodes({"used twice", {"ab", "bc", "cd"}, "ad", {{0, 1}, {0, 2}}, {2, 3, 4, 5}}));
  CHECK(!decodes({"itself", {"ab", "bc", "cd"}, "ad", {{0, 1}, {3, 3}}, {2, 3, 4, 5}}));
  CHECK(!decodes({"not there yet", {"ab", "bc", "cd"}, "ad", {{0, 4}, {1, 3}}, {2, 3, 4, 5}}));
  CHECK(!decodes({"long result", {"abcdefg", "ghijklmn"}, "abcdefhijklmn", {{0, 1}}, Numbers(14, 2)}));
  const int64_t large = int64_t{1} << 30;
  CHECK(!decodes({"large product", {"ab", "bc"}, "ac", {{0, 1}}, {large, 1, large}}));
  CHECK(!decodes({"large core", {"ab", "bc"}, "ac", {{0, 1}}, {large, large, 1}}));
}

}  // namespace

int main() {
  test_matches_loops();
  test_any_numbers();
  test_refuses_what_is_no_program();
  return result("contract");
}
