"""What recipes decide before and while they train: options refused in time, ranks all processes share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tensorcomp_ext._names import nearest
from tensorcomp_ext.compress import CompressionResult, compress
from tensorcomp_ext.compress.calls import trace
from tensorcomp_ext.compress.selection import Uses, as_patterns, considered, matches, refusal, require_matches
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.ranks.layouts import Ranks

from . import processes
from .callbacks import Callback
from .checkpoint import check_settings, read_checkpoint
from .evaluate import device_of
from .prepare import check_model, checked_callbacks, prepare
from .settings import Settings
from .task import Task
from .train import train

Known = Sequence[tuple[type[Callback], Mapping[str, Any]]]
"""Types of callbacks and settings of theirs."""


class Begun(Callback):
    """What a run began with: with another start a checkpoint is of another run."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    def settings(self) -> dict[str, Any]:
        return self.options


def check_training(
    name: str,
    dataset: Dataset | Task,
    epochs: int,
    training: Mapping[str, Any],
    *,
    option: str = "epochs",
    model: nn.Module | None = None,
    trains: bool = True,
) -> None:
    """Refuse what :func:`.train` would refuse, before any work.

    Args:
        name: of the recipe.
        training: what goes to ``train``, but for callbacks; an existing ``checkpoint`` must be of this recipe
            and of such settings.
        option: what the recipe calls the epochs.
        model: what the recipe is given, where that must be a network which can be trained.
        trains: False where nothing will be trained, and so no checkpoint resumed.

    Raises:
        ValueError, TypeError: as ``train``; an option it does not have; ``parameters``, as they are those of
            a network not yet made.
    """
    if training.get("parameters") is not None:
        raise ValueError(f"{name}: parameters must be None: the recipe makes them, got groups of them")
    if type(epochs) is not int:
        raise TypeError(f"{name}: {option} must be an int, got {epochs!r}")
    if epochs < 0:
        raise ValueError(f"{name}: {option} must be 0 or more, got {epochs}")
    if model is not None:
        check_model(name, model, trained=trains)
    taken = inspect.signature(train)
    for given in training.keys() - taken.parameters.keys():
        own = getattr(sys.modules[__package__], name, train)  # the recipe that was called
        known = {*taken.parameters, *inspect.signature(own).parameters} - {"training", "parameters"}
        raise TypeError(f"{name}: unknown option {given!r}{nearest(given, known)}")
    asked = taken.bind(None, dataset, epochs=epochs, **training)
    asked.apply_defaults()
    options = {**asked.arguments, "callbacks": []}
    del options["model"]
    task, settings = prepare(name, **options)
    if model is not None and epochs:
        task.check(name, model)
    wanted = settings.recorded()
    path = options["checkpoint"]
    if not trains or path is None or not Path(path).exists():
        return
    content = read_checkpoint(path)
    found = Settings.completed(content, wanted)
    recipes = {entry["recipe"] for entry in found["callbacks"] if "recipe" in entry}
    if recipes and name not in recipes:
        raise ValueError(f"checkpoint {path} is of a run of {', '.join(sorted(recipes))}, not of {name}")
    unknown = ("parameters", "callbacks")  # of a network not yet made
    found, wanted = ({k: v for k, v in part.items() if k not in unknown} for part in (found, wanted))
    check_settings(path, found, wanted)


def checked_run(
    name: str,
    dataset: Dataset | Task,
    epochs: int,
    training: Mapping[str, Any],
    *,
    model: nn.Module,
    callbacks: Any,
    known: Known,
    trains: bool = True,
) -> list[Callback]:
    """The callbacks of a recipe that trains once, after :func:`check_training` and :func:`check_attached`.

    Args:
        callbacks: as the recipe is given them.
        known: as :func:`check_attached` takes it.
    """
    check_training(name, dataset, epochs, training, model=model, trains=trains)
    found = checked_callbacks(name, callbacks)
    if trains:
        check_attached(training.get("checkpoint"), found, known)
    return found


def check_attached(
    checkpoint: str | Path | None,
    callbacks: Iterable[Callback],
    known: Known = (),
) -> None:
    """Refuse a checkpoint of a run without these callbacks, before any work.

    Args:
        callbacks: those there are by then.
        known: types of those the recipe will make, with those of their settings that are known by then.

    Raises:
        ValueError: there is such a checkpoint.
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return
    found = read_checkpoint(checkpoint)["settings"]["callbacks"]
    attached = [(kind, dict(settings)) for kind, settings in known]
    attached += [(type(callback), callback.settings()) for callback in callbacks]
    for kind, settings in attached:
        wanted = {"type": kind.__name__, **settings}
        of_type = [entry for entry in found if entry["type"] == wanted["type"]]
        if not any(all(entry.get(k) == v for k, v in wanted.items()) for entry in of_type):
            # Of settings that are not known by now nothing can be said.
            saved = [{key: entry.get(key) for key in wanted} for entry in of_type[:1]]
            check_settings(checkpoint, {"callbacks": saved}, {"callbacks": [wanted]})


def compressible(
    name: str,
    model: nn.Module,
    exclude: str | Iterable[str] = (),
    *,
    windows: bool = False,
    example_inputs: Any = None,
) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a network that can be factorized, by name.

    Args:
        name: of the recipe, for messages.
        exclude: patterns of layers to leave out.
        windows: only convolutions whose window has more than one tap.
        example_inputs: only layers that they call, where they are given.

    Raises:
        ValueError: none is left, a pattern that matches no layer, NaN or Inf in one of the weights.
    """
    found = dict(considered(model))
    left_out = as_patterns(exclude, "exclude")
    require_matches(left_out, list(found), "exclude")
    uses = Uses(model)
    layers: dict[str, nn.Module] = {}
    for place, layer in found.items():
        kinds = (_ConvNd,) if windows else (_ConvNd, nn.Linear)
        if not isinstance(layer, kinds) or matches(place, left_out) or refusal(place, layer, uses):
            continue
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if windows and weight[0, 0].numel() == 1:
            continue
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: the weight of layer {place!r} has NaN or Inf")
        layers[place] = layer
    if example_inputs is not None:
        calls = trace(model, layers, example_inputs)[1]
        layers = {place: layer for place, layer in layers.items() if calls[place]}
    if not layers:
        what = "convolution with a window" if windows else "convolution or linear layer"
        done = [place for place, layer in model.named_modules() if isinstance(layer, FactorizedLayer)]
        already = f"; {', '.join(done[:8])} are compressed already" if done else ""
        raise ValueError(f"{name}: the model has no {what} to compress, apart from what is excluded{already}")
    return layers


def same_ranks(
    model: nn.Module, choose: Callable[[], Mapping[str, Ranks | None]], sizes: Mapping[str, int]
) -> dict[str, Ranks | None]:
    """The ranks by layer that the first process chooses, in all processes.

    Args:
        choose: None stands for a layer that stays dense.
        sizes: how many ranks each layer has.
    """

    def flat() -> list[int]:
        ranks = choose()
        return [rank for name, size in sizes.items() for rank in ranks[name] or (0,) * size]

    values, found = iter(processes.decided(device_of(model), flat)), {}
    for name, size in sizes.items():
        ranks = tuple(next(values) for _ in range(size))
        found[name] = ranks if all(ranks) else None
    return found


def decomposed_at(
    model: nn.Module,
    ranks: Mapping[str, Ranks | None],
    *,
    exclude: str | Iterable[str] = (),
    example_inputs: Any = None,
    others: str,
) -> CompressionResult:
    """A copy of a network with layers at these ranks, convolutions in "tucker2", linear layers in "svd".

    Args:
        ranks: by name; None for a layer that stays dense, as it would not get smaller.
        exclude, example_inputs: as ``compress`` takes them.
        others: what the report says of layers without ranks.
    """
    wanted = {name: found[0] if len(found) == 1 else found for name, found in ranks.items() if found}
    result = compress(model, rank=wanted, exclude=exclude, example_inputs=example_inputs)
    for entry in result.report.layers:
        if entry.skipped == "no rank pattern fits":
            entry.skipped = "would not get smaller" if entry.name in ranks else others
    return result
