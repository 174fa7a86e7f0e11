"""Installing: without compiling, and the advice given where compiling is impossible."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COPIED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A copy of the source tree without anything built: installing leaves no traces in the real one."""
    copy = tmp_path_factory.mktemp("sources")
    for name in COPIED:
        if (repository / name).exists():
            shutil.copy(repository / name, copy / name)
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("tensorcomp_ext", "csrc"):
        shutil.copytree(repository / folder, copy / folder, ignore=unbuilt)
    return copy


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TENSORCOMP_")}
    return subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_installs_without_compiling_and_computes(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    install = run([*pip, "--target", str(target), "."], sources, TENSORCOMP_NATIVE="0")
    assert install.returncode == 0, install.stderr
    assert list(target.rglob("*.so")) == []
    assert (target / "tensorcomp_ext" / "py.typed").exists()
    templates = {path.name for path in (sources / "tensorcomp_ext").rglob("*.j2")}
    assert {path.name for path in (target / "tensorcomp_ext").rglob("*.j2")} == templates

    script = (
        "import torch, tensorcomp_ext as tc\n"
        f"assert tc.__file__.startswith({str(target)!r}), tc.__file__\n"
        "x, core = torch.randn(2, 5, 7, 6, requires_grad=True), torch.randn(3, 4, 3, 3)\n"
        "out, into = torch.randn(8, 3), torch.randn(5, 4)\n"
        "y = tc.ops.tucker2_conv2d(x, core, out, into, padding=1)\n"
        "weight = torch.einsum('tb,bayx,sa->tsyx', out, core, into)\n"
        "dense = torch.nn.functional.conv2d(x, weight, padding=1)\n"
        "assert ((y - dense).norm() / dense.norm()).item() < 1e-5\n"
        "y.sum().backward()\n"
        "try:\n"
        "    tc.ops.tucker2_conv2d(x, core, out, into, backend='native')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    used = run([sys.executable, "-W", "error", "-c", script], tmp_path, PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    assert "installed without native code" in used.stdout


def test_says_what_to_do_without_torch(sources: Path, tmp_path: Path) -> None:
    """setup.py where torch cannot be imported, as in pip's isolated build environment."""
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    built = run([sys.executable, "setup.py", "build_ext"], sources, PYTHONPATH=str(tmp_path))
    assert built.returncode != 0
    assert "pip install --no-build-isolation ." in built.stderr
    assert "TENSORCOMP_NATIVE=0" in built.stderr
    assert "Traceback" not in built.stderr


def test_says_what_to_do_with_an_old_torch(sources: Path, tmp_path: Path) -> None:
    fake = tmp_path / "torch"
    (fake / "utils").mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = '2.9.1+cpu'\n")
    (fake / "utils" / "__init__.py").write_text("")
    (fake / "utils" / "cpp_extension.py").write_text("")
    built = run([sys.executable, "setup.py", "build_ext"], sources, PYTHONPATH=str(tmp_path))
    assert built.returncode != 0
    assert "2.9.1+cpu" in built.stderr and "torch>=2.10" in built.stderr


def test_rejects_an_unknown_cuda_choice(sources: Path) -> None:
    built = run([sys.executable, "setup.py", "build_ext"], sources, TENSORCOMP_CUDA="perhaps")
    assert built.returncode != 0
    assert "TENSORCOMP_CUDA must be auto, 0 or 1, got 'perhaps'" in built.stderr


def test_a_source_tree_that_hides_the_installed_package_says_so(tmp_path: Path, repository: Path) -> None:
    tree, installed = tmp_path / "tree", tmp_path / "site" / "tensorcomp_ext"
    shutil.copytree(
        repository / "tensorcomp_ext", tree / "tensorcomp_ext", ignore=shutil.ignore_patterns("*.so")
    )
    installed.mkdir(parents=True)
    (installed / "_ops.so").touch()
    show = "from tensorcomp_ext import _native; print(_native.status().reason)"
    done = run([sys.executable, "-c", show], tree, PYTHONPATH=str(tmp_path / "site"))
    assert f"hides the package installed at {installed}: leave the folder" in done.stdout
    assert "RuntimeWarning: tensorcomp_ext: native code is off" in done.stdout + done.stderr
