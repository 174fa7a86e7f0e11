"""Compiles the CUDA ops for the emulator: kernels as plain C++, bindings under a namespace of their own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
WORKERS = 2
# Optimised, for every thread of a kernel is run one by one. Pragmas to unroll are nvcc's.
FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
DEFINES = [
    "-DTENSORCOMP_EMULATE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",  # as setup.py
]


class NoCompiler(Exception):
    """There is nothing to compile with; the message says what was looked for."""


class CompilerError(Exception):
    """The compiler or linker refused; the message holds the command and what it wrote."""


def emulated_library(folder: Path) -> Path:
    """The library of ``tensorcomp_emulated`` ops in ``folder``, compiled as far as sources have changed.

    Raises:
        NoCompiler: there is no g++.
        CompilerError: the sources do not compile, warnings included.
    """
    # csrc/tests/cuda holds the emulator and test programs; kernels.cpp there includes the kernels.
    emulator = [p for p in (CSRC / "tests/cuda").glob("*.cpp") if not p.name.startswith("test_")]
    include = Path(torch.__file__).parent / "include"
    search = ["-isystem", str(include), f"-I{CSRC}", f"-I{CSRC / 'tests/cuda'}"]
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-Wl,--as-needed"]
    sources = sorted([*(CSRC / "ops/cuda").glob("*.cpp"), *emulator])
    return library(folder, sources, [*FLAGS, *DEFINES, *search], link)


def library(folder: Path, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str]) -> Path:
    """A shared library of ``sources`` in ``folder``; what neither flags, files nor torch changed is kept.

    Its name says what it was made from: a library of other sources is another file.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoCompiler("the CUDA emulator is compiled with g++, which is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test runs may go on at once
        objects = [folder / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *flags, "-MMD", "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(WORKERS) as pool:
            digests = list(pool.map(_compiled, commands, objects))
        linking = [compiler, "-shared", *map(str, objects), *link]
        target = folder / f"emulated-{_digest([*digests, *linking], [])}.so"
        if not target.exists():
            partial = folder / "partial.so"
            _run([*linking, "-o", str(partial)])
            for old in folder.glob("emulated-*.so"):
                old.unlink()
            os.replace(partial, target)
    return target


def _compiled(command: list[str], target: Path) -> str:
    """Compiles unless the object is of this command and these files; what it is made from."""
    made_from = target.with_suffix(".digest")
    digest = _object_digest(command, target)
    if digest is None or not made_from.exists() or made_from.read_text() != digest:
        made_from.unlink(missing_ok=True)
        _run(command)
        digest = _object_digest(command, target)
        assert digest is not None, f"{target.with_suffix('.d')} names no files, or some that are not there"
        made_from.write_text(digest)
    return digest


def _object_digest(command: list[str], target: Path) -> str | None:
    """Names the command, torch and every file of ours the compiler has read; None where one is missing."""
    listing = target.with_suffix(".d")
    if not target.exists() or not listing.exists():
        return None
    rule = listing.read_text().replace("\\\n", " ")  # as make reads it: one line, "target: files"
    files = [Path(name) for name in shlex.split(rule.partition(":")[2])]
    return _digest([*command, torch.__version__], files) if all(f.exists() for f in files) else None


def _digest(words: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        digest.update(b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompilerError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
