"""One file for a compressed network: safetensors, with the layer configurations as JSON in its metadata.

Metadata key ``tensorcomp`` holds ``{"format_version", "library_version", "torch_version", "layers": {module
name: configuration}, "plans": what `plan.export_choices` says, "aliases": {state name: stored name},
"tensors": {state name: [dtype, shape]}, "report", "meta"}``. Nothing is pickled and nothing is unpickled.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tensorcomp_ext.compress.atomic import replacing
from tensorcomp_ext.compress.checkpoint import CheckpointError, Header, parse_header
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.restore import load_into
from tensorcomp_ext.nn import FactorizedLayer, FadingDense, FoldedLayer
from tensorcomp_ext.nn.gates import gates_of
from tensorcomp_ext.plan import export_choices

FORMAT_VERSION = 1
METADATA_KEY = "tensorcomp"
MAX_HEADER_BYTES = 64 << 20


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    report: Report | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters, buffers, factorised layers and plans of ``model`` to the file ``path``, atomically.

    The file is written beside its final place and renamed, so whoever is killed while saving leaves the
    former file whole. ``report`` and ``meta`` (JSON-able) travel with it and come back from ``read_header``.
    Tensors under several names are stored once.

    Raises:
        ValueError (CheckpointError): state that cannot be stored without pickling, ``meta`` that is no JSON,
            a network that ``tensorcomp_ext.fold`` made, layers in the middle of rank selection or of a fade.
        OSError: the folder is missing, not writable or full.
        TypeError: ``model`` is no module (of what ``compress`` returns, pass ``.model``).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"save: model must be a torch.nn.Module, got {type(model).__name__}"
            + (" (pass its .model)" if hasattr(model, "model") else "")
        )
    folded = next((name for name, m in model.named_modules() if isinstance(m, FoldedLayer)), None)
    if folded is not None:
        raise CheckpointError(
            f"save: the network is folded (layer {folded!r}), and no dense network could take its weights; "
            "save it before tc.fold, and fold it again after tc.load"
        )
    for name, module in model.named_modules():
        _check_finished(name, module)
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "save: there is no such folder", folder)
    state = model.state_dict()
    stored, aliases = _deduplicate(state)
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, FactorizedLayer)}
    header = {
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
        "torch_version": str(torch.__version__),
        "layers": {name: layer.config() for name, layer in layers.items()},
        "plans": export_choices(model),
        "aliases": aliases,
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()},
        "report": None if report is None else report.to_dict(),
        "meta": dict(meta or {}),
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"save: meta and layer configurations must be JSON: {error}") from error
    with replacing(path) as written:
        try:
            save_file(stored, written, {METADATA_KEY: text})
        except SafetensorError as error:
            raise OSError(f"save: {path}: {error}") from error


def _check_finished(name: str, module: nn.Module) -> None:
    """CheckpointError for layers as they are within a recipe only, whose file no network could take."""
    if gates_of(module) is not None:
        raise CheckpointError(
            f"save: layer {name!r} has gates on its ranks; multiply them in first, with fold_gates or "
            "GatedNetwork.fold, or save a checkpoint of the training"
        )
    if isinstance(module, FadingDense):
        raise CheckpointError(
            f"save: layer {name!r} still has its dense weight beside the factors; put its finalize() in its "
            "place first, or save a checkpoint of the training"
        )


def read_header(path: str | os.PathLike[str]) -> Header:
    """The configuration of a saved network without its tensors. CheckpointError for other files."""
    with _opened(path) as file:
        return parse_header(path, file.metadata(), _shapes(path, file), METADATA_KEY, FORMAT_VERSION)


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load a network saved by ``save`` into ``model`` and return it.

    ``model`` is the dense network freshly built, or one already factorised in the same way. The whole file is
    read and checked against the model first; then the factorised layers are put in place and the tensors
    copied. Parameters and buffers take the dtype of the file and keep the device of the model; training mode
    and hooks stay; tuned plans are taken over.

    Raises:
        ValueError (CheckpointError): no such format, truncated, damaged, of a newer version, for another
            model. The model is as it was.
        OSError: the file cannot be opened.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be a torch.nn.Module, got {type(model).__name__}")
    with _opened(path) as file:
        header = parse_header(path, file.metadata(), _shapes(path, file), METADATA_KEY, FORMAT_VERSION)
        try:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"load: {os.fspath(path)} is damaged: {error}") from error
    for alias, name in header.aliases.items():
        tensors[alias] = tensors[name]
    load_into(model, header, tensors, os.fspath(path))
    return model


def _opened(path: str | os.PathLike[str]) -> Any:
    """Open a safetensors file after looking at its length field, which a hostile file may set to anything."""
    name = os.fspath(path)
    with open(name, "rb") as raw:  # errors of the file system come from here, with the usual types and texts
        size = os.fstat(raw.fileno()).st_size
        first = raw.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise CheckpointError(f"load: {name} is no safetensors file or is truncated ({size} bytes)")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"load: {name} claims a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}"
        )
    try:
        return safe_open(name, framework="pt", device="cpu")
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"load: {name} is no safetensors file, truncated or damaged: {error}"
        ) from error


def _shapes(path: str | os.PathLike[str], file: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name in sorted(file.keys()):
        try:
            shapes[name] = tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise CheckpointError(f"load: {os.fspath(path)}: tensor {name!r}: {error}") from error
    return shapes


def _deduplicate(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Contiguous tensors to store, and the names that stand for another one's tensor."""
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"save: {name!r} is a {type(tensor).__name__}, only tensors are stored")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"save: {name!r} must be a plain dense tensor with values, got {tensor.layout}"
            )
        key = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        # A copy in every case: views of one storage, which safetensors refuses, must not meet in the file.
        stored[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return stored, aliases


def library_version() -> str:
    """Version of the installed package; "source" where it runs from a tree that was never installed."""
    try:
        return importlib.metadata.version("tensorcomp_ext")
    except importlib.metadata.PackageNotFoundError:
        return "source"
