// The choice of instruction set, and the two measuring functions.
#include <cstring>

#include "check.h"
#include "problem.h"

using namespace tensorcomp;
using namespace tensorcomp::test;

namespace {

void test_caps() {
  const std::vector<std::string> names = instruction_sets();
  CHECK(!names.empty());
  CHECK(names.back() == "portable");
  for (const std::string& name : names) {
    subject() = name.c_str();
    CHECK(tensorcomp_set_isa_cap(name.c_str()) == 0);
    CHECK(name == tensorcomp_isa());
    CHECK(name == kernel_table().name);
  }
  subject() = "";
  CHECK(tensorcomp_set_isa_cap("") == 0);
  CHECK(names.front() == tensorcomp_isa());
  CHECK(tensorcomp_set_isa_cap("portable") == 0);
  CHECK(tensorcomp_set_isa_cap(nullptr) == 0);
  CHECK(names.front() == tensorcomp_isa());
}

void test_unknown_cap_changes_nothing() {
  CHECK(tensorcomp_set_isa_cap("portable") == 0);
  CHECK(tensorcomp_set_isa_cap("avx1024") != 0);
  CHECK(std::strcmp(tensorcomp_isa(), "portable") == 0);
  CHECK(tensorcomp_set_isa_cap("") == 0);
}

void test_tables_are_complete() {
  for (const std::string& name : instruction_sets()) {
    CHECK(tensorcomp_set_isa_cap(name.c_str()) == 0);
    for (const DType dtype : {DType::kFloat32, DType::kBfloat16}) {
      const BottleneckKernels& kernels = kernel_table().bottleneck(dtype);
      CHECK(kernels.packed_bytes && kernels.pack && kernels.pack_for && kernels.plan && kernels.run);
    }
  }
  CHECK(tensorcomp_set_isa_cap("") == 0);
}

void test_rates() {
  for (const std::string& name : instruction_sets()) {
    subject() = name.c_str();
    CHECK(tensorcomp_set_isa_cap(name.c_str()) == 0);
    CHECK(tensorcomp_fma_peak(0, 0.005) > 0);
    CHECK(tensorcomp_fma_peak(1, 0.005) > 0);
  }
  subject() = "";
  CHECK(tensorcomp_set_isa_cap("") == 0);
  for (const size_t bytes : {size_t{1}, size_t{4097}}) {
    std::vector<char> from(bytes, 'x'), to(bytes);
    CHECK(tensorcomp_copy_bandwidth(to.data(), from.data(), bytes, 0.002) > 0);
    CHECK(to == from);
  }
}

}  // namespace

int main() {
  test_caps();
  test_unknown_cap_changes_nothing();
  test_tables_are_complete();
  test_rates();
  return result("dispatch");
}
