"""When the emulator's library is compiled: after every change that matters, and not without one."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import emulated_build
import pytest
from emulated_build import CompilerError, NoCompiler, library

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two sources, one of which includes a header."""
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "number.h").write_text("constexpr int kNumber = 1;\n")
    (folder / "one.cpp").write_text('#include "number.h"\nextern "C" int number() { return kNumber; }\n')
    (folder / "two.cpp").write_text('extern "C" int two() { return 2; }\n')
    return folder


def built(project: Path, *flags: str) -> Path:
    sources = [project / "one.cpp", project / "two.cpp"]
    return library(project / "build", sources, ["-fPIC", "-Wall", "-Werror", *flags], [])


def times(project: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted((project / "build").glob("*.o"))]


@needs_compiler
def test_what_has_not_changed_is_kept(project: Path) -> None:
    first, before = built(project), times(project)
    made = first.stat().st_mtime_ns
    assert built(project) == first and first.stat().st_mtime_ns == made
    assert len(before) == 2 and times(project) == before
    # A touched file is the same file.
    (project / "one.cpp").touch()
    assert built(project) == first and times(project) == before


@needs_compiler
def test_a_header_compiles_what_includes_it(project: Path) -> None:
    first, (one, two) = built(project), times(project)
    assert ctypes.CDLL(str(first)).number() == 1
    (project / "number.h").write_text("constexpr int kNumber = 7;\n")
    second = built(project)
    assert ctypes.CDLL(str(second)).number() == 7
    assert times(project)[0] > one and times(project)[1] == two
    assert not first.exists()


@needs_compiler
@pytest.mark.parametrize("changed", ["torch", "flags"])
def test_another_torch_or_flag_compiles_everything(
    project: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(project)
    before = times(project)
    if changed == "torch":
        monkeypatch.setattr(emulated_build.torch, "__version__", "1000.0")
    built(project, *(["-O1"] if changed == "flags" else []))
    assert all(after > at for after, at in zip(times(project), before, strict=True))


@needs_compiler
def test_what_does_not_compile_is_an_error_every_time(project: Path) -> None:
    """Also with a library of before at hand."""
    built(project)
    for wrong, message in (("int broken( {", "broken"), ("static int unused;", "unused")):
        (project / "two.cpp").write_text(wrong + "\n")
        for _ in range(2):
            with pytest.raises(CompilerError, match=message):
                built(project)
    (project / "two.cpp").write_text('extern "C" int two() { return 3; }\n')
    assert ctypes.CDLL(str(built(project))).two() == 3


@needs_compiler
def test_what_does_not_link_is_an_error_every_time(project: Path) -> None:
    for _ in range(2):
        with pytest.raises(CompilerError, match="no_such_library"):
            library(project / "build", [project / "one.cpp"], ["-fPIC"], ["-lno_such_library"])


def test_without_a_compiler_the_reason_is_given(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(NoCompiler, match=r"g\+\+"):
        built(project)


def test_every_op_of_the_bindings_is_tried(emulated: object) -> None:
    """The list of ops here is that of csrc/ops/cuda."""
    from emulated_problems import OPS

    text = "".join(path.read_text() for path in (emulated_build.CSRC / "ops/cuda").glob("*.cpp"))
    registered = {part.split('"')[1] for part in text.split("m.impl(")[1:]}
    assert registered == set(OPS)
