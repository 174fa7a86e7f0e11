"""Options refused by name: what was expected, and what was given."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def check_number(
    name: str, option: str, value: Any, low: float, high: float, form: str, kind: type = float
) -> None:
    """Raise unless a number is in the range; a bound that ``form`` has with a round bracket is not.

    Args:
        name: of the function asked.
        kind: int for whole numbers alone.

    Raises:
        TypeError: no number, or a fraction for an int; bools are none. ValueError: out of range, NaN.
    """
    allowed, what = ((int,), "an int") if kind is int else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TypeError(f"{name}: {option} must be {what}, got {value!r}")
    above = value > low if form[0] == "(" else value >= low
    below = value < high if form[-1] == ")" else value <= high
    if not (above and below):
        raise ValueError(f"{name}: {option} must be in {form}, got {value}")


def check_choice(name: str, option: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise unless an option is one of the names."""
    names = tuple(allowed)
    if value not in names:
        raise ValueError(f"{name}: {option} must be one of {', '.join(names)}, got {value!r}")


def check_flag(name: str, option: str, value: Any) -> None:
    """Raise unless an option is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {option} must be a bool, got {value!r}")


def check_places(name: str, checkpoint: Any, logs: Any) -> None:
    """Raise unless a checkpoint file and a folder of logs, where given, can be written.

    Raises:
        TypeError: no path. ValueError: a folder as checkpoint, a file as logs or as a folder above either, a
            folder that cannot be written.
    """
    for option, value in (("checkpoint", checkpoint), ("logs", logs)):
        if value is None:
            continue
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name}: {option} must be a path, got {value!r}")
        path = Path(value)
        if option == "checkpoint" and path.is_dir():
            raise ValueError(f"{name}: checkpoint must be a file, got the folder {path}")
        folder = path if option == "logs" else path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"{name}: {option} must be in a folder, got {path}, where {folder} is a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{name}: {option} must be writable, got {path}, where {folder} is not")


SEEDS = 2**42  # a million times as much, and an epoch, are what generators take
NUMBERS: dict[str, tuple[type, float, float, str]] = {
    "epochs": (int, 0, math.inf, "[0, inf)"),
    "lr": (float, 0, math.inf, "[0, inf)"),
    "batch_size": (int, 1, math.inf, "[1, inf)"),
    "momentum": (float, 0, 1, "[0, 1)"),
    "weight_decay": (float, 0, math.inf, "[0, inf)"),
    "warmup": (int, 0, math.inf, "[0, inf)"),
    "accumulate": (int, 1, math.inf, "[1, inf)"),
    "seed": (int, -SEEDS, SEEDS, "[-2^42, 2^42]"),
    "label_smoothing": (float, 0, 1, "[0, 1]"),
}
"""Of the numbers that training takes: type, bounds and how these are written."""


def check_known(name: str, option: str, value: Any, label: str | None = None) -> None:
    """Raise unless one of :data:`NUMBERS` is of its type and in its range; ``label`` is said instead."""
    kind, low, high, form = NUMBERS[option]
    check_number(name, label or option, value, low, high, form, kind)
