"""Tuned choices of a whole model as JSON, to be saved beside its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensorcomp_ext._warnings import warn

from .base import plans_for
from .cache import machine
from .case import Case
from .layer import PlannedLayer

_VERSION = 1


def export_choices(model: nn.Module) -> dict[str, Any]:
    """Forced plans, preferences and tuned choices of every factorized layer, in JSON types.

    Returns:
        ``{"version": 1, "machine": {device: name}, "layers": {layer name: {"plan", "prefer", "tuned"}}}``
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PlannedLayer)}
    devices = {Case.parse(key).device for layer in layers.values() for key in layer.tuned}
    return {
        "version": _VERSION,
        "machine": {device: machine(device) for device in sorted(devices)},
        "layers": {
            name: {
                "plan": layer.plan,
                "prefer": layer.prefer,
                "tuned": {
                    key: {"plan": e["plan"], "seconds": dict(e["seconds"])} for key, e in layer.tuned.items()
                },
            }
            for name, layer in layers.items()
        },
    }


def import_choices(model: nn.Module, choices: Mapping[str, Any], *, any_machine: bool = False) -> int:
    """Give the layers of ``model`` the choices of :func:`export_choices`.

    Everything is checked before anything is changed. Measurements made on other hardware or under another
    torch are left out (the cost model decides there), unless ``any_machine``.

    Returns:
        How many tuned choices were taken.

    Raises:
        ValueError: not such a mapping, a layer the model does not have, or a plan the layer does not know.
    """
    if not isinstance(choices, Mapping) or choices.get("version") != _VERSION:
        raise ValueError(f"import_choices: expected plan choices of version {_VERSION}")
    layers, made_on = choices.get("layers"), choices.get("machine")
    if not isinstance(layers, Mapping) or not isinstance(made_on, Mapping):
        raise ValueError("import_choices: 'layers' and 'machine' must be mappings")
    modules = dict(model.named_modules())
    checked: list[tuple[PlannedLayer, Mapping[str, Any], dict[str, dict[str, Any]]]] = []
    devices: dict[str, bool] = {}
    for name, content in layers.items():
        layer = modules.get(name)
        if not isinstance(layer, PlannedLayer):
            raise ValueError(f"import_choices: the model has no factorized layer {name!r}")
        checked.append((layer, content, _checked(name, layer, content)))
    for _, _, tuned in checked:
        for device in {Case.parse(key).device for key in tuned}:
            devices[device] = any_machine or made_on.get(device) == _machine(device)
    foreign = sorted(device for device, same in devices.items() if not same)
    if foreign:
        warn(
            f"import_choices: choices for {foreign} were tuned on {[made_on.get(d) for d in foreign]}; "
            "tune again on this machine",
        )
    taken = 0
    for layer, content, tuned in checked:
        kept = {key: entry for key, entry in tuned.items() if devices[Case.parse(key).device]}
        taken += len(kept)
        layer.tuned = kept
        layer.prefer = content.get("prefer", "latency")
        layer.plan = content.get("plan")
    return taken


def _machine(device: str) -> str | None:
    return machine(device) if device != "cuda" or torch.cuda.is_available() else None


def _checked(name: str, layer: PlannedLayer, content: Any) -> dict[str, dict[str, Any]]:
    known = [plan.name for plan in plans_for(layer)]
    where = f"import_choices: layer {name!r}"
    if not isinstance(content, Mapping) or not isinstance(content.get("tuned", {}), Mapping):
        raise ValueError(f"{where}: expected a mapping with 'plan', 'prefer' and 'tuned'")
    if content.get("plan") is not None and content["plan"] not in known:
        raise ValueError(f"{where}: plan must be None or one of {known}, got {content['plan']!r}")
    if content.get("prefer", "latency") not in ("latency", "memory"):
        raise ValueError(f"{where}: prefer must be 'latency' or 'memory', got {content['prefer']!r}")
    tuned: dict[str, dict[str, Any]] = {}
    for key, entry in content.get("tuned", {}).items():
        Case.parse(key)
        if not isinstance(entry, Mapping) or entry.get("plan") not in known:
            raise ValueError(f"{where}: the tuned plan of {key} must be one of {known}")
        seconds = entry.get("seconds", {})
        if not isinstance(seconds, Mapping) or not all(
            isinstance(s, (int, float)) and math.isfinite(s) for s in seconds.values()
        ):
            raise ValueError(f"{where}: the seconds of {key} must be finite numbers")
        tuned[key] = {"plan": entry["plan"], "seconds": {str(n): float(s) for n, s in seconds.items()}}
    return tuned
