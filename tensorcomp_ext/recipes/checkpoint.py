"""Checkpoints of training: written atomically, read without unpickling objects."""

from __future__ import annotations

import hashlib
import reprlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorcomp_ext.compress.atomic import replacing
from tensorcomp_ext.models.weights import read_tensor_file

FORMAT = 1
_KIND = "tensorcomp training checkpoint"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def write_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts; a reader sees the old file or the whole new one.

    Raises OSError where the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as written:
        torch.save({"kind": _KIND, "format": FORMAT, **content}, written)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote; ValueError for a damaged file, another kind or a newer format."""
    path = Path(path)
    content = read_tensor_file(path)
    if content.get("kind") != _KIND:
        raise ValueError(f"{path} is not a training checkpoint of this package")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {content.get('format')}, this version reads format {FORMAT}"
        )
    return content


def check_settings(path: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError unless a checkpoint is of a run with the same settings: others would give another result."""
    changed = differences(found, wanted)
    if changed:
        raise ValueError(f"checkpoint {path} is of a run with other settings: {', '.join(changed)}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> list[str]:
    """Settings that differ, each with what a checkpoint has and what is asked for now, cut short.

    Args:
        within: said before their names.
    """
    changed = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if key == "callbacks" and old is not None and new is not None:
            changed += _of_callbacks(old, new)
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differences(old, new, f"{within}{key}.")
        else:
            changed.append(f"{within}{key} (checkpoint {_SHORT.repr(old)}, now {_SHORT.repr(new)})")
    return changed


def _of_callbacks(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    """Of callbacks of the same types in the same order the settings that differ, else the types."""
    before, now = ([entry["type"] for entry in entries] for entries in (found, wanted))
    if before != now:
        return [f"callbacks (checkpoint {', '.join(before) or 'none'}, now {', '.join(now) or 'none'})"]
    pairs = zip(found, wanted, strict=True)
    return [text for old, new in pairs for text in differences(old, new, f"callbacks: {old['type']}.")]


def checksum(*tensors: torch.Tensor) -> str:
    """Hexadecimal checksum of shapes, dtypes and rows of tensors: of each about a megabyte, evenly spread."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), found)
        rows = tensor.detach()[:: 1 + tensor.nbytes // 2**20].cpu().contiguous().reshape(-1)
        found = zlib.crc32(rows.view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal digest of names, dtypes, shapes and contents of a model's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        # Bytes, since numpy has no bfloat16; a tensor without dimensions has none to view.
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def load_model_state(path: str | Path, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load weights, after checking that all of them fit; ValueError before anything is changed."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if shapes != given:
        keys = sorted({key for key in {*shapes, *given} if shapes.get(key) != given.get(key)})
        first = f"{keys[0]} is {shapes.get(keys[0])} in the model and {given.get(keys[0])} in the checkpoint"
        raise ValueError(f"checkpoint {path} is for another model: {len(keys)} tensors differ, {first}")
    model.load_state_dict(dict(state))
