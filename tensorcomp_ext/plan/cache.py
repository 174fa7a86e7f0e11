"""A small JSON store in the user's cache directory, for figures measured once per machine."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VERSION = 1


def cache_directory() -> Path:
    """``TENSORCOMP_CACHE_DIR``, else the platform's user cache directory."""
    chosen = os.environ.get("TENSORCOMP_CACHE_DIR")
    if chosen:
        return Path(chosen)
    # Only here: a machine that names its own directory can do without the package.
    import platformdirs

    return Path(platformdirs.user_cache_dir("tensorcomp_ext"))


def hardware(device: str = "cpu") -> str:
    """A name for the processor, so that figures of one machine do not serve another.

    "cuda" is the current device, "cuda:1" the second one; equal devices have one name, whatever their index.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return _processor()


@lru_cache(maxsize=1)
def _processor() -> str:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # no such file outside Linux; the platform module's name serves
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def machine(device: str = "cpu") -> str:
    """Hardware and torch version, the two things measured choices depend on beside the case itself."""
    return f"{hardware(device)}, torch {torch.__version__}"


def load(path: Path) -> dict[str, Any]:
    """The entries of a store; empty where the file is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return {}
    entries = content.get("entries")
    return entries if isinstance(entries, dict) else {}


def store(path: Path, key: str, value: Any) -> bool:
    """Add one entry, replacing the file atomically; False where the directory cannot be written."""
    entries = load(path)
    entries[key] = value
    text = json.dumps({"version": VERSION, "entries": entries}, indent=1)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        return False
    return True
