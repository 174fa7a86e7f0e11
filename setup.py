"""Builds the native code of tensorcomp_ext; everything else of the package is in pyproject.toml.

Three libraries come out of ``csrc``:

* ``tensorcomp_ext/_ops.so``: the op library, on the LibTorch stable interface and free of Python,
* ``tensorcomp_ext/_ops_cuda.so``: the same for CUDA,
* ``tensorcomp_ext/_C``: a small pybind11 module with what an op schema cannot express.

Environment:

* ``TENSORCOMP_NATIVE=0`` installs without compiling: every op then runs through its PyTorch reference.
* ``TENSORCOMP_CUDA=auto|0|1``: build the CUDA library when a toolkit and a CUDA torch are there (the
  default), never, or whenever a toolkit is there, even against a CPU-only torch.
* ``TORCH_CUDA_ARCH_LIST``: as everywhere in PyTorch; no visible GPU is needed.
* ``TENSORCOMP_PYTHON_MODULE=0``: leave out ``_C``, where Python's headers are missing; no op needs it.
* ``TENSORCOMP_WERROR=1``: warnings are errors.
* ``MAX_JOBS``: compilers to run at once.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as setuptools_build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# One binary serves this torch and every later one.
OLDEST_TORCH = (2, 10)
TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000ULL"
# Ampere with PTX for whatever has no code of its own, Hopper, and what came later where the toolkit knows it.
CUDA_ARCHS = ("8.0+PTX", "9.0a")
LATER_CUDA_ARCHS = {"compute_100": "10.0", "compute_120": "12.0"}
OP_LIBRARIES = ("_ops", "_ops_cuda")
HOST_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
# A warning of a compiler we have not met must not stop a user's installation; our own builds set this.
WARNINGS_ARE_ERRORS = os.environ.get("TENSORCOMP_WERROR", "0") == "1"
if WARNINGS_ARE_ERRORS:
    HOST_FLAGS.append("-Werror")
# Messages name files within the project, not where it was built.
HOST_FLAGS.append(f"-fmacro-prefix-map={ROOT}/=")

NO_TORCH = """
tensorcomp_ext is compiled against the PyTorch it will run with, and {problem}.

  1. pip install "torch>={oldest}" "setuptools>=77" wheel ninja
  2. pip install --no-build-isolation .

Without --no-build-isolation, pip compiles in an environment of its own that cannot see your torch.
To install without compiling anything: TENSORCOMP_NATIVE=0 pip install .
"""


def sources(*patterns: str) -> list[str]:
    """Files below csrc, sorted, relative to the project: objects then land at the same place every time."""
    found = (path for pattern in patterns for path in CSRC.glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in found)


# Run, not imported: the package's own imports need torch.
NATIVE_BUILD = runpy.run_path(str(ROOT / "tensorcomp_ext" / "_native_build.py"))


def sources_hash() -> str:
    """Identifies the native sources a build was made from."""
    return NATIVE_BUILD["sources_hash"](CSRC)


def system_includes(*directories: str | Path) -> list[str]:
    """Headers of others: warnings in them must not stop a build with -Werror."""
    return [argument for directory in directories for argument in ("-isystem", str(directory))]


def torch_include() -> Path:
    import torch

    return Path(torch.__file__).parent / "include"


def torch_library_directory() -> Path:
    import torch

    return Path(torch.__file__).parent / "lib"


def cuda_home() -> Path | None:
    """The CUDA toolkit, also where torch itself is CPU-only and therefore does not look for it."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc is not None and (Path(nvcc).resolve().parent.parent / "include" / "cuda_runtime.h").exists():
        return Path(nvcc).resolve().parent.parent
    usual = Path("/usr/local/cuda")
    return usual if (usual / "bin" / "nvcc").exists() else None


def cuda_archs(home: Path) -> str:
    """The architectures to compile for where TORCH_CUDA_ARCH_LIST does not say."""
    listing = subprocess.run(
        [home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True
    )
    known = listing.stdout.split()
    return ";".join([*CUDA_ARCHS, *(arch for name, arch in LATER_CUDA_ARCHS.items() if name in known)])


def want_cuda() -> bool:
    choice = os.environ.get("TENSORCOMP_CUDA", "auto").lower()
    if choice not in {"auto", "0", "1"}:
        raise SystemExit(f"TENSORCOMP_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "auto":
        import torch

        return torch.version.cuda is not None and cuda_home() is not None
    if choice == "1" and cuda_home() is None:
        raise SystemExit("TENSORCOMP_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
    return choice == "1"


def stable_macros() -> list[tuple[str, str | None]]:
    """For everything on the stable interface. The torch version is there so that another one recompiles."""
    import torch

    return [
        ("TORCH_TARGET_VERSION", TARGET_VERSION),
        ("TENSORCOMP_TORCH_VERSION", f'"{torch.__version__}"'),
    ]


def op_library() -> Extension:
    return Extension(
        "tensorcomp_ext._ops",
        sources("kernels/cpu/*.cpp", "ops/*.cpp"),
        include_dirs=[str(CSRC)],
        define_macros=stable_macros(),
        extra_compile_args=[*HOST_FLAGS, *system_includes(torch_include())],
        # Named by soname, without a path: at load it is the copy torch has loaded already.
        library_dirs=[str(torch_library_directory())],
        libraries=["torch_cpu"],
        extra_link_args=["-Wl,--as-needed"],
        language="c++",
    )


def cuda_op_library() -> Extension:
    home = cuda_home()
    assert home is not None
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(home))
    includes = system_includes(torch_include(), home / "include")
    errors = ["-Werror"] if WARNINGS_ARE_ERRORS else []
    host = ",".join(["-Wall", "-Wextra", "-fvisibility=hidden", *errors])
    return Extension(
        "tensorcomp_ext._ops_cuda",
        sources("kernels/cuda/*.cu", "kernels/cuda/*.cpp", "ops/cuda/*.cpp"),
        include_dirs=[str(CSRC)],
        define_macros=[*stable_macros(), ("USE_CUDA", "1")],
        extra_compile_args={
            "cxx": [*HOST_FLAGS, *includes],
            "nvcc": [
                "-std=c++17",
                "-O3",
                *(["-Werror=all-warnings"] if WARNINGS_ARE_ERRORS else []),
                f"-Xcompiler={host}",
                *includes,
            ],
        },
        library_dirs=[str(home / "lib64"), str(torch_library_directory())],
        libraries=["cudart", "torch_cpu"],
        # libtorch.so is an empty library that needs all of torch: with it, the symbols of libtorch_cuda.so
        # resolve at load although a CPU-only torch has none of them to link against.
        extra_link_args=["-Wl,--as-needed", "-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"],
        language="c++",
    )


def python_module(cuda: bool) -> Extension:
    import torch

    return Extension(
        "tensorcomp_ext._C",
        ["csrc/module.cpp"],
        include_dirs=[str(CSRC)],
        define_macros=[
            ("TENSORCOMP_TORCH_VERSION", f'"{torch.__version__}"'),
            ("TENSORCOMP_TARGET_VERSION", f'"{OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"'),
            ("TENSORCOMP_SOURCES_HASH", f'"{sources_hash()}"'),
            ("TENSORCOMP_WITH_CUDA", str(int(cuda))),
        ],
        extra_compile_args=[*HOST_FLAGS, *system_includes(torch_include(), sysconfig.get_paths()["include"])],
        libraries=["dl"],
        extra_link_args=["-Wl,--as-needed"],
        language="c++",
    )


def refuse(problem: str) -> dict[str, Any]:
    """A build that fails with advice when, and only when, something is to be compiled (not for an sdist)."""

    class BuildWithoutTorch(setuptools_build_ext):
        def run(self) -> None:
            oldest = ".".join(map(str, OLDEST_TORCH))
            sys.stderr.write(NO_TORCH.format(problem=problem, oldest=oldest))
            raise SystemExit(1)

    placeholder = Extension("tensorcomp_ext._ops", [])
    return {"ext_modules": [placeholder], "cmdclass": {"build_ext": BuildWithoutTorch}}


def native() -> dict[str, Any]:
    """setup()'s arguments for the native code."""
    if os.environ.get("TENSORCOMP_NATIVE", "1") == "0":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return refuse(f"torch cannot be imported here ({error})")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return refuse(f"the torch here is {torch.__version__}")

    class BuildExtension(cpp_extension.BuildExtension):
        def get_ext_filename(self, ext_name: str) -> str:
            """Op libraries are plain shared libraries, so their names carry no Python version."""
            package, _, name = ext_name.rpartition(".")
            if name in OP_LIBRARIES:
                return os.path.join(*package.split("."), f"{name}.so")
            return super().get_ext_filename(ext_name)

        def build_extension(self, ext: Extension) -> None:
            """Builds one library and writes beside it what it was built from."""
            super().build_extension(ext)
            if ext.name.rpartition(".")[2] in OP_LIBRARIES:
                archs = os.environ["TORCH_CUDA_ARCH_LIST"] if ext.name.endswith("_cuda") else ""
                library = Path(self.get_ext_fullpath(ext.name))
                NATIVE_BUILD["add_record"](library, sources=built_from, torch=torch.__version__, archs=archs)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            # Only a build in place gets here; the record lies in the build folder.
            for ext in self.extensions:
                name = ext.name.rpartition(".")[2]
                built = Path(self.build_lib, "tensorcomp_ext")
                if name in OP_LIBRARIES and (facts := NATIVE_BUILD["read_record"](built).get(f"{name}.so")):
                    NATIVE_BUILD["add_record"](ROOT / "tensorcomp_ext" / f"{name}.so", **facts)

        def get_export_symbols(self, ext: Extension) -> list[str]:
            return []

    built_from = sources_hash()  # before compiling: what changes meanwhile is another build's
    extensions = [op_library()]
    cuda = want_cuda()
    if cuda:
        extensions.append(cuda_op_library())
        # A CPU-only torch leaves this unset; BuildExtension takes nvcc from it.
        cpp_extension.CUDA_HOME = str(cuda_home())
    if os.environ.get("TENSORCOMP_PYTHON_MODULE", "1") != "0":
        extensions.append(python_module(cuda))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


setup(**native())
