"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import _native
from .roofline import native_module

_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512vl", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def machine() -> dict[str, Any]:
    """CPU model, cores, caches and instruction sets."""
    info = _cpu_info()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "family": info.get("cpu family"),
        "model": info.get("model"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "isa_flags": [
            flag for flag in _CPU_FLAGS if flag in info.get("flags", info.get("Features", "")).split()
        ],
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, Any]:
    """Python, torch, the native build and the source revision."""
    native = native_module()
    status = _native.status()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native": {
            "ok": status.ok,
            "reason": status.reason,
            "isa": native.isa() if native else None,
            "build": dict(native.build_info()) if native else None,
        },
        "compiler_for_torch_compile": _first_line([os.environ.get("CXX", "g++"), "--version"]),
        **revision(),
    }


def revision() -> dict[str, Any]:
    """Commit of the source tree the package runs from, and whether tracked files differ from it."""
    root = Path(__file__).resolve().parents[2]
    commit = _first_line(["git", "-C", str(root), "rev-parse", "HEAD"]) if (root / ".git").exists() else None
    if commit is None:
        return {"git_revision": None, "git_dirty": None}
    changed = _first_line(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return {"git_revision": commit, "git_dirty": bool(changed)}


def isa() -> str:
    """The instruction set our kernels use here."""
    native = native_module()
    return str(native.isa()) if native else "none (reference)"


def _first_line(command: list[str]) -> str | None:
    """First line of a command's output; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0] if done.returncode == 0 else None


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _caches() -> list[dict[str, str]]:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        names = {"level": "level", "type": "type", "size": "size", "shared_by_cpus": "shared_cpu_list"}
        found.append(
            {
                key: (index / file).read_text().strip()
                for key, file in names.items()
                if (index / file).exists()
            }
        )
    return found
