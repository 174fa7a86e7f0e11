"""Reading published weight files into our networks, without unpickling anything."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The CIFAR ResNets published by Yerlan Idelbayev were trained on images normalised with ImageNet's figures.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# What torch.load raises on damaged bytes, depending on where the damage lies.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def load_weights(model: nn.Module, path: str | Path) -> Normalization | None:
    """Load weights into a network of the same architecture; the model is untouched unless all of them fit.

    Takes a state dict saved by torch, alone or under "state_dict" or "model" (a training checkpoint of
    `recipes.train`); a "module." prefix left by DataParallel is dropped, and "downsample" / "fc" are taken
    for the "shortcut" / "linear" of our ResNets.

    Arguments:
        model: network whose parameters and buffers are overwritten.
        path: file to read, with weights_only=True.

    Returns the (mean, std) per channel of images in 0..1 that the weights were trained with, where the file
    tells, else None.
    Raises FileNotFoundError; ValueError for a file that is damaged, holds other objects than tensors, or does
    not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: no file {path}")
    content = read_tensor_file(path)
    nested = next((key for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), None)
    tensors = content if nested is None else content[nested]
    wanted = model.state_dict()
    state = _renamed(tensors, wanted)
    _check_fit(state, wanted, path)
    model.load_state_dict(state, strict=False)
    return _normalization(content)


def read_tensor_file(path: str | Path) -> dict[str, Any]:
    """A dict of tensors, numbers, strings, lists and dicts saved by torch; nothing else is ever unpickled.

    Raises OSError where the file cannot be opened, ValueError where it is damaged or holds anything else.
    """
    with Path(path).open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except _LOAD_ERRORS as error:
            raise ValueError(
                f"{path} is not a readable file of tensors: truncated, damaged, or holding other objects "
                f"({type(error).__name__})"
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    return content


def _renamed(tensors: Mapping[str, Any], wanted: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    state = {}
    for key, value in tensors.items():
        name = str(key).removeprefix("module.")
        if name not in wanted:
            name = name.replace(".downsample.", ".shortcut.")
            name = f"linear.{name.removeprefix('fc.')}" if name.startswith("fc.") else name
        state[name] = value
    return state


def _check_fit(state: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], path: Path) -> None:
    # Files from before torch 0.4.1 lack this counter of batch normalisation, which inference never reads; of
    # tied parameters one name is enough.
    given_memory = {wanted[k].data_ptr() for k in state if k in wanted} - {0}
    missing = [
        k
        for k, tensor in wanted.items()
        if k not in state and not k.endswith("num_batches_tracked") and tensor.data_ptr() not in given_memory
    ]
    unexpected = [k for k in state if k not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"load_weights: {path} is for another network: {len(missing)} missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]}"
        )
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.shape != wanted[key].shape:
            given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"load_weights: {path}: {key} must be {list(wanted[key].shape)}, got {given}")


def _normalization(content: Mapping[str, Any]) -> Normalization | None:
    recorded = content.get("normalization")
    if isinstance(recorded, Mapping):
        return tuple(map(float, recorded["mean"])), tuple(map(float, recorded["std"]))
    return _IMAGENET if "best_prec1" in content and "state_dict" in content else None
