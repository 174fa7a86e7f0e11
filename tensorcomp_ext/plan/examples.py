"""Example inputs: how a model is called with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call ``model`` with a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        TypeError: anything else.
        RuntimeError, TypeError, ValueError: as the model raises them, with the name of the layer that did.
    """
    if not isinstance(example_inputs, (Tensor, Mapping, tuple)):
        raise TypeError(
            "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, got {type(example_inputs).__name__}"
        )
    try:
        if isinstance(example_inputs, Tensor):
            return model(example_inputs)
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        return model(*example_inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        name, kind = _layer_that_raised(model, error), type(error)
        # Classes derived from these may carry more than a text.
        if not name or kind not in (RuntimeError, TypeError, ValueError):
            raise
        raise kind(f"example_inputs do not pass layer {name!r}: {error}") from error


def _layer_that_raised(model: nn.Module, error: BaseException) -> str:
    """Name of the innermost module in whose method the error came up; empty for the model itself."""
    names = {id(module): name for name, module in model.named_modules()}
    found, frames = "", error.__traceback__
    while frames is not None:
        found = names.get(id(frames.tb_frame.f_locals.get("self")), found)
        frames = frames.tb_next
    return found
