// What an op schema cannot express: how this build was made, and which instruction set the kernels use.
//
// The functions live in the op library. It is looked up among the libraries already loaded, never loaded from
// here: loading it registers ops, which is for tensorcomp_ext._native to decide.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"

namespace py = pybind11;

namespace {

struct OpLibrary {
  decltype(&tensorcomp_isa) isa;
  decltype(&tensorcomp_set_isa_cap) set_isa_cap;
  decltype(&tensorcomp_isa_available) isa_available;
  decltype(&tensorcomp_fma_peak) fma_peak;
  decltype(&tensorcomp_copy_bandwidth) copy_bandwidth;
};

// The op library lies beside this module.
std::string op_library_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&op_library_path), &info) == 0 || info.dli_fname == nullptr) {
    throw py::import_error("tensorcomp_ext._C: cannot tell where this module was loaded from");
  }
  const std::string self = info.dli_fname;
  return self.substr(0, self.find_last_of('/') + 1) + "_ops.so";
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) {
    throw py::import_error(std::string("tensorcomp_ext._C: the op library has no ") + name +
                           "; it is of another build, rebuild the package");
  }
  function = reinterpret_cast<Function>(symbol);
}

OpLibrary find_op_library() {
  const std::string path = op_library_path();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) {
    throw py::import_error("tensorcomp_ext._C: the op library is not loaded; tensorcomp_ext._native.status() says why");
  }
  OpLibrary ops{};
  find(library, "tensorcomp_isa", ops.isa);
  find(library, "tensorcomp_set_isa_cap", ops.set_isa_cap);
  find(library, "tensorcomp_isa_available", ops.isa_available);
  find(library, "tensorcomp_fma_peak", ops.fma_peak);
  find(library, "tensorcomp_copy_bandwidth", ops.copy_bandwidth);
  return ops;
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> names;
  for (std::size_t begin = 0; begin < list.size();) {
    const std::size_t end = std::min(list.find(',', begin), list.size());
    names.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

void check_seconds(const char* function, double seconds) {
  if (!(seconds > 0.0 && seconds <= 60.0)) {
    throw py::value_error(std::string(function) + ": seconds must be in (0, 60], got " + std::to_string(seconds));
  }
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["torch_version"] = TENSORCOMP_TORCH_VERSION;
  info["target_version"] = TENSORCOMP_TARGET_VERSION;
  info["sources_hash"] = TENSORCOMP_SOURCES_HASH;
  info["cuda"] = TENSORCOMP_WITH_CUDA != 0;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the native code, and the instruction set its kernels use.";
  static const OpLibrary ops = find_op_library();

  m.def("build_info", &build_info,
        "Compiler, torch built against, oldest torch served, hash of the native sources, built with CUDA or "
        "not.");
  m.def("isa", [] { return std::string(ops.isa()); }, "The instruction set in use.");
  m.def(
      "isa_available", [] { return split(ops.isa_available()); },
      "The instruction sets this machine can run, best first.");
  m.def(
      "set_isa_cap",
      [](const std::string& name) {
        if (ops.set_isa_cap(name.c_str()) != 0) {
          throw py::value_error("set_isa_cap: expected one of " + std::string(ops.isa_available()) + ", got '" + name +
                                "'");
        }
      },
      py::arg("name"), "Use no instruction set better than this one; an empty name removes the cap.");
  m.def(
      "fma_peak",
      [](bool bfloat16, double seconds) {
        check_seconds("fma_peak", seconds);
        py::gil_scoped_release release;
        return ops.fma_peak(bfloat16 ? 1 : 0, seconds);
      },
      py::arg("bfloat16") = false, py::arg("seconds") = 0.1,
      "Floating-point operations per second (a multiply-add counts two) the calling thread reaches.");
  m.def(
      "copy_bandwidth",
      [](std::size_t bytes, double seconds) {
        check_seconds("copy_bandwidth", seconds);
        if (bytes == 0) {
          throw py::value_error("copy_bandwidth: bytes must be positive");
        }
        py::gil_scoped_release release;
        const std::vector<unsigned char> source(bytes, 1);
        std::vector<unsigned char> target(bytes);
        return ops.copy_bandwidth(target.data(), source.data(), bytes, seconds);
      },
      py::arg("bytes") = std::size_t{1} << 28, py::arg("seconds") = 0.1,
      "Bytes read plus bytes written per second by the calling thread, copying between two buffers of this "
      "size.");
}
