"""Compiles every CUDA kernel and binding, and links the whole CUDA op library.

Kernels are compiled for sm_80, sm_90a and the later architectures the toolkit knows.
It links against the installed torch, CPU-only or not; the result must hold code for every architecture, and
need nothing that torch and the CUDA runtime do not provide.

Needs the CUDA toolkit (``CUDA_HOME``, or ``nvcc`` on the path), no GPU. Run by ``make cuda-check``.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "cuda-check"
LATER = {"compute_100": (100, "10.0"), "compute_120": (120, "12.0")}
FATBIN_MAGIC = 0xBA55ED50
CUBIN = 2
# What torch, the CUDA runtime and the C++ runtime provide.
PROVIDED = re.compile(r"aoti_torch_|torch_|_ITM_|__gmon_start__|.*@")


def architectures() -> dict[int, str]:
    """Architectures to compile for, as numbers in device binaries and as torch spells them."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    later = (arch for name, arch in LATER.items() if name in listing.stdout.split())
    return {80: "8.0", 90: "9.0a", **dict(later)}


def build(archs: str) -> Path:
    choices = {"TENSORCOMP_NATIVE": "1", "TENSORCOMP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": archs}
    # Only the libraries go elsewhere: objects of the CPU code are shared with the usual build.
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(TREE)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **choices}, check=True)
    return TREE / "tensorcomp_ext" / "_ops_cuda.so"


def cubins(library: Path) -> Counter[int]:
    """How many device binaries the library holds for each architecture.

    Read from the headers of the fat binary, since cuobjdump is not part of every toolkit installation.
    """
    with tempfile.TemporaryDirectory() as folder:
        section = Path(folder) / "fatbin"
        select = ["--only-section=.nv_fatbin", "--set-section-flags", ".nv_fatbin=alloc"]
        subprocess.run(["objcopy", "-O", "binary", *select, str(library), str(section)], check=True)
        data = section.read_bytes()
    found: Counter[int] = Counter()
    at = 0
    while at + 16 <= len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
        if magic != FATBIN_MAGIC:  # padding between the binaries of two files
            at += 8
            continue
        entry, at = at + header, at + header + size
        while entry < at:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            if kind == CUBIN:
                found[struct.unpack_from("<I", data, entry + 28)[0]] += 1
            entry += entry_header + entry_size
    return found


def unexpected_symbols(library: Path) -> list[str]:
    """Undefined symbols nothing known provides: they would show only when a GPU machine loads the library."""
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--format=posix", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split()[0] for line in listing.stdout.splitlines()]
    return [name for name in names if not PROVIDED.match(name)]


def main() -> None:
    archs = architectures()
    library = build(";".join(archs.values()))
    kernels = len(list((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")))
    found = cubins(library)
    for number, name in archs.items():
        if found[number] < kernels:
            raise SystemExit(
                f"cuda-check: {kernels} .cu files, but {found[number]} device binaries for {name}"
            )
    strange = unexpected_symbols(library)
    if strange:
        raise SystemExit(f"cuda-check: undefined symbols that nothing provides: {', '.join(strange)}")
    print(f"cuda-check: {kernels} kernel file(s), each for {', '.join(archs.values())}, linked and complete")


if __name__ == "__main__":
    main()
