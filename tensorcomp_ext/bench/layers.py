"""A factorized layer as a candidate, as it comes and after ``tune``, with the plan that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..plan import PlannedLayer, tune
from .candidates import Candidate
from .measure import TUNED, offer
from .ours import LAYER

LayerType = TypeVar("LayerType", bound=PlannedLayer)

_TUNE_S = 0.02


def default_way(
    layout: str, build: Callable[[], LayerType], call: Callable[[LayerType], Any], example: Tensor
) -> Candidate:
    """The layer on the plan it chooses by itself, before any measurement."""

    def make() -> Candidate:
        layer = build()
        return _held(LAYER, layout, layer, call, example)

    return offer(LAYER, "ours", layout, make)


def tuned_way(
    layout: str, build: Callable[[], LayerType], call: Callable[[LayerType], Any], example: Tensor
) -> Candidate:
    """The layer on the plan that ``tune`` measured to be the fastest."""

    def make() -> Candidate:
        layer = build()
        with torch.inference_mode(False):
            graphs = example.device.type == "cuda"
            tune(layer, example, training=layer.training, min_seconds=_TUNE_S, cuda_graphs=graphs)
        return _held(TUNED, layout, layer, call, example)

    return offer(TUNED, "ours", layout, make)


def _held(
    name: str, layout: str, layer: LayerType, call: Callable[[LayerType], Any], example: Tensor
) -> Candidate:
    found = Candidate(name, "ours", layout, call(layer))
    with torch.inference_mode(False):
        chosen = [plan for plan in layer.plans(example, training=layer.training) if plan.chosen]
    if chosen:
        found.note, found.macs = chosen[0].name, chosen[0].macs
    return found
