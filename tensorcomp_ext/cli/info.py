"""``tensorcomp info``: what this installation is and can do."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tensorcomp_ext import _native
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.compress.storage import library_version
from tensorcomp_ext.plan.cache import cache_directory, hardware


def gather() -> dict[str, Any]:
    """Versions, the state of the native code, threads, cache folder and CUDA, as a JSON-able dictionary."""
    native = _native.status()
    return {
        "version": library_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "native": {"ok": native.ok, "reason": native.reason},
        "isa": _isa(),
        "processor": hardware(),
        "threads": torch.get_num_threads(),
        "cache": str(cache_directory()),
        "cuda": _cuda(),
    }


def _isa() -> str | None:
    """The instruction set in use; None where the native modules are not built."""
    if not _native.status().ok or importlib.util.find_spec("tensorcomp_ext._C") is None:
        return None
    return str(importlib.import_module("tensorcomp_ext._C").isa())


def _cuda() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = (
            f"torch is built for CUDA {built}, no device is usable"
            if built
            else f"torch is built without CUDA ({_native.cuda_status().reason})"
        )
        return {"available": False, "reason": reason, "devices": []}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"available": True, "reason": "", "devices": devices}


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, the state of the native code, threads, the cache folder and CUDA."""
    screen = Screen(as_json)
    found = gather()
    native, cuda = found["native"], found["cuda"]
    table = Table(show_header=False, box=None)
    table.add_row("tensorcomp_ext", found["version"])
    table.add_row("Python", found["python"])
    table.add_row("torch", found["torch"])
    table.add_row("native code", "on" if native["ok"] else f"off: {native['reason']}")
    table.add_row("instruction set", found["isa"] or "–")
    table.add_row("processor", found["processor"])
    table.add_row("threads", str(found["threads"]))
    table.add_row("cache folder", found["cache"])
    table.add_row("CUDA", ", ".join(cuda["devices"]) if cuda["available"] else f"off: {cuda['reason']}")
    screen.show(table)
    screen.result(found)
