"""Imports point downward only; the kernels know neither torch nor Python; no file outgrows a reader."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

# A package may import those of lower levels; those of one level leave each other alone.
LEVELS = (
    ("reference",),
    ("_native",),
    ("ops",),
    ("decompose",),
    ("formats",),
    ("plan",),
    ("ranks",),
    ("nn",),
    ("models", "data"),
    ("compress",),
    ("recipes",),
    ("bench",),
    ("cli",),
)
RANK = {name: level for level, names in enumerate(LEVELS) for name in names}
# These know torch and numpy only.
LEAVES = {"reference", "models", "data"}
LONGEST_FILE = 400
ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "tensorcomp_ext"
NATIVE = sorted(
    path
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in {".cpp", ".h", ".cu", ".cuh"} and path.is_file()
)


def imported_parts(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """First-level parts of tensorcomp_ext that a module of ``package`` imports."""
    parts: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
        else:
            continue
        parts |= {name[1] for name in names if len(name) > 1 and name[0] == "tensorcomp_ext"}
    return parts


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .. import reference", {"reference"}),
        ("from ..plan.cost import x", {"plan"}),
        ("from . import tucker2", {"formats"}),
        ("import tensorcomp_ext.nn.conv", {"nn"}),
        ("from tensorcomp_ext import ops, ranks", {"ops", "ranks"}),
        ("import torch.nn\nfrom numpy import linalg", set()),
        ("def f():\n    from ..cli.main import app", {"cli"}),
    ],
)
def test_imports_are_read(source: str, expected: set[str]) -> None:
    assert imported_parts(ast.parse(source), ("tensorcomp_ext", "formats")) == expected


def test_imports_point_downward() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own not in RANK:
            assert len(relative.parts) == 1, f"{own} has no place in the order of LEVELS"
            continue
        package = ("tensorcomp_ext", *relative.parts[:-1])
        for part in sorted(imported_parts(ast.parse(path.read_text()), package) - {own}):
            if part not in RANK:
                continue
            downward = RANK[part] < RANK[own]
            ranks_by_name = own in {"nn", "plan"} and part == "ranks"
            if (own in LEAVES) or not (downward or ranks_by_name):
                wrong.append(f"{relative} imports {part}")
    assert wrong == []


def test_kernels_know_neither_torch_nor_python() -> None:
    includes = re.compile(
        r'^\s*#\s*include\s*[<"](torch/|ATen/|c10/|caffe2/|pybind11/|Python\.h|ops/|\.\./ops)', re.M
    )
    kernels = [path for path in NATIVE if "kernels" in path.relative_to(ROOT / "csrc").parts]
    assert kernels
    assert [str(path.relative_to(ROOT)) for path in kernels if includes.search(path.read_text())] == []


def test_ops_use_the_stable_interface_only() -> None:
    unstable = re.compile(
        r'^\s*#\s*include\s*[<"](ATen/|c10/|torch/(?!csrc/(stable|inductor)/|headeronly/))', re.M
    )
    ops = [path for path in NATIVE if path.relative_to(ROOT / "csrc").parts[0] == "ops"]
    assert [str(path.relative_to(ROOT)) for path in ops if unstable.search(path.read_text())] == []


def test_no_file_outgrows_a_reader() -> None:
    files = [*NATIVE, *PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"]
    assert {
        str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > LONGEST_FILE
    } == {}


def test_no_forbidden_compiler_flags() -> None:
    """One binary for every machine, with IEEE arithmetic."""
    flags = re.compile(r"-march=native|-ffast-math|-Ofast|-fopenmp")
    builds = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "Makefile", *(ROOT / "cmake").glob("*")]
    assert [path.name for path in [*builds, *NATIVE] if flags.search(path.read_text())] == []
