"""What the op library is linked to, and which symbols of torch it asks for."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tensorcomp_ext
from tensorcomp_ext import _native
from tensorcomp_ext.ops._register import _normalized

TARGET = (2, 10)
LIBRARY = Path(tensorcomp_ext.__file__).with_name("_ops.so")
INCLUDE = Path(torch.__file__).parent / "include" / "torch"
SHIMS = ("csrc/stable/c/shim.h", "csrc/inductor/aoti_torch/c/shim.h")

pytestmark = pytest.mark.native


def readelf(*options: str) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    command = ["readelf", "--wide", *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols() -> set[str]:
    rows = (line.split() for line in readelf("--dyn-syms").splitlines())
    return {row[7].split("@")[0] for row in rows if len(row) > 7 and row[6] == "UND"}


def declared_since(header: str) -> dict[str, tuple[int, int]]:
    """The functions a shim header declares, each with the version its guard names, else (0, 0)."""
    guards: list[tuple[int, int] | None] = []
    found: dict[str, tuple[int, int]] = {}
    for line in header.splitlines():
        if re.match(r"\s*#\s*if", line):
            version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_\d+", line)
            guards.append((int(version[1]), int(version[2])) if version else None)
        elif re.match(r"\s*#\s*endif", line):
            guards.pop()
        else:
            since = max((guard for guard in guards if guard is not None), default=(0, 0))
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                found[name] = min(since, found.get(name, since))
    return found


def shims() -> dict[str, tuple[int, int]]:
    """All functions of the stable C interface."""
    texts = [(INCLUDE / name).read_text() for name in SHIMS]
    found: dict[str, tuple[int, int]] = {}
    for text in texts:
        found.update(declared_since(text))
    return found


def test_needs_no_python_and_no_openmp() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("--dynamic"))
    assert needed, "the library needs nothing at all: readelf's output was not understood"
    assert [name for name in needed if re.match(r"lib(python|gomp|omp|iomp5|torch_python)", name)] == []
    assert [name for name in undefined_symbols() if re.match(r"_?Py[A-Z_]|GOMP_|omp_|__kmpc", name)] == []


def test_is_no_extension_module() -> None:
    assert not re.search(r"\bPyInit_", readelf("--dyn-syms"))


def test_declaration_guards_are_read() -> None:
    header = """
    AOTI_TORCH_EXPORT int torch_old(int a);
    #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
    AOTI_TORCH_EXPORT int torch_target(
        int a);
    #ifdef OTHER
    AOTI_TORCH_EXPORT int aoti_torch_nested();
    #endif
    #endif // TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
    #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
    AOTI_TORCH_EXPORT int torch_new();
    #endif
    """
    assert declared_since(header) == {
        "torch_old": (0, 0),
        "torch_target": (2, 10),
        "aoti_torch_nested": (2, 10),
        "torch_new": (2, 13),
    }


def test_asks_for_nothing_newer_than_the_target() -> None:
    """One binary serves torch 2.10 and later: every C function it asks for must be in 2.10's interface."""
    declared = shims()
    asked = {name for name in undefined_symbols() if re.match(r"(aoti_)?torch_", name)}
    assert "torch_call_dispatcher" in asked, (
        "the library asks for nothing of torch: the listing was not understood"
    )
    assert sorted(asked - declared.keys()) == []
    assert {name: declared[name] for name in sorted(asked) if declared[name] > TARGET} == {}


def test_asks_for_no_cxx_symbol_of_torch() -> None:
    """Mangled names of torch's C++ namespaces change between versions."""
    namespaces = re.compile(r"_ZN?K?[0-9]*(?:St)?(?:2at|3c10|5torch|10onnx_torch)\d")
    assert sorted(name for name in undefined_symbols() if namespaces.match(name)) == []


def test_exports_only_its_c_interface() -> None:
    rows = (line.split() for line in readelf("--dyn-syms").splitlines())
    exported = {row[7] for row in rows if len(row) > 7 and row[4] == "GLOBAL" and row[6].isdigit()}
    assert "tensorcomp_isa" in exported
    from_linker = {"__bss_start", "_edata", "_end", "_init", "_fini"}
    assert sorted(name for name in exported - from_linker if not name.startswith("tensorcomp_")) == []


def test_loads_under_a_second_torch() -> None:
    """TENSORCOMP_SECOND_TORCH names the Python of an environment with another torch, 2.10 or later."""
    python = os.environ.get("TENSORCOMP_SECOND_TORCH")
    if not python:
        pytest.skip("TENSORCOMP_SECOND_TORCH names no Python with a second torch")
    script = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "x, core = torch.randn(2, 5, 7, 6), torch.randn(3, 4, 3, 3)\n"
        "out, into = torch.randn(8, 3), torch.randn(5, 4)\n"
        "y = torch.ops.tensorcomp.tucker2_conv2d(x, core, out, into, None, [1, 1], [1, 1], [1, 1])\n"
        "weight = torch.einsum('tb,bayx,sa->tsyx', out, core, into)\n"
        "dense = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)\n"
        "assert ((y - dense).norm() / dense.norm()).item() < 1e-5\n"
        "print(torch.__version__)\n"
    )
    command = [python, "-c", script, str(LIBRARY)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() != torch.__version__


def sources_hash(csrc: Path) -> str:
    """As setup.py computes it."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"}):
        if "tests" not in path.relative_to(csrc).parts:
            digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def test_build_information(repository: Path) -> None:
    from tensorcomp_ext import _C

    info = _C.build_info()
    assert info["target_version"] == ".".join(map(str, TARGET))
    assert info["compiler"]
    if os.environ.get("TENSORCOMP_EXPECT_NATIVE") == "1":
        assert info["torch_version"] == torch.__version__
        assert info["sources_hash"] == sources_hash(repository / "csrc"), "the build is outdated"


def test_instruction_sets() -> None:
    from tensorcomp_ext import _C

    assert _C.isa() in _C.isa_available()
    assert _C.isa_available()[-1] == "portable"
    with pytest.raises(ValueError, match="expected one of"):
        _C.set_isa_cap("z80")


def test_measures_rates() -> None:
    from tensorcomp_ext import _C

    assert _C.fma_peak(seconds=0.01) > 1e7
    assert _C.copy_bandwidth(bytes=1 << 20, seconds=0.01) > 1e7
    for function in (_C.fma_peak, _C.copy_bandwidth):
        with pytest.raises(ValueError, match="seconds must be in"):
            function(seconds=-1.0)


def test_python_module_does_not_load_the_op_library() -> None:
    """Loading registers ops; with TENSORCOMP_NATIVE=0 nothing may do so behind the user's back."""
    script = "import tensorcomp_ext; from tensorcomp_ext import _C"
    environment = {**os.environ, "TENSORCOMP_NATIVE": "0", "TENSORCOMP_EXPECT_NATIVE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert run.returncode != 0
    assert "the op library is not loaded" in run.stderr


def test_cuda_library_is_off_without_a_cuda_torch() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert not _native.cuda_status().ok
    assert "no CUDA" in _native.cuda_status().reason


def test_a_library_of_older_sources_is_left_alone() -> None:
    """Calls that its ops would refuse in mid-call go to the reference, and one warning says what to do."""
    script = (
        "import warnings, torch\n"
        "library = torch.library.Library('tensorcomp', 'FRAGMENT')\n"
        "def load(path):\n"
        "    if not path.endswith('_ops.so'): return\n"
        "    library.define('lowrank_sparse_weight(Tensor a, Tensor b, Tensor values, Tensor mask, "
        "bool masking) -> Tensor')\n"
        "    library.define('two_factor_linear(Tensor x) -> Tensor')\n"
        "    for op in ('lowrank_sparse_weight', 'two_factor_linear'):\n"
        "        library.impl(op, lambda *args: 1 / 0, 'CPU')\n"
        "torch.ops.load_library = load\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import tensorcomp_ext\n"
        "from tensorcomp_ext import _native, ops\n"
        "said = [str(w.message) for w in caught if 'native code is off' in str(w.message)]\n"
        "assert len(said) == 1 and 'rebuild with `pip install' in said[0], said\n"
        "for status in (_native.status(), _native.cuda_status()):\n"
        "    assert not status.ok and 'built of other sources, its op ' in status.reason, status\n"
        "a, b = torch.randn(5, 2, requires_grad=True), torch.randn(2, 7)\n"
        "values, mask = torch.randn(5, 7), torch.rand(5, 7) < 0.5\n"
        "w = ops.lowrank_sparse_weight(a, b, values, mask, mode='additive')\n"
        "torch.testing.assert_close(w, a @ b + values * mask)\n"
        "torch.testing.assert_close(torch.autograd.grad(w.sum(), a)[0], b.sum(1).expand(5, 2))\n"
        "x = torch.randn(3, 7)\n"
        "torch.testing.assert_close(ops.two_factor_linear(x, a, b), x @ b.T @ a.T)\n"
    )
    environment = {**os.environ, "TENSORCOMP_NATIVE": "1", "TENSORCOMP_EXPECT_NATIVE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_schemas_are_compared_as_torch_writes_them() -> None:
    """Spelled otherwise is the same; what the library brings is what Python says."""
    assert _normalized("x", "(Tensor a,  int[2] b=[1, 1] , bool c=False)->(Tensor)") == _normalized(
        "x", "(Tensor a, int[2] b=1, bool c=False) -> Tensor"
    )
    assert _normalized("x", "(Tensor a) -> Tensor") != _normalized("x", "(Tensor a, int b=0) -> Tensor")
    assert _native.status().ok
