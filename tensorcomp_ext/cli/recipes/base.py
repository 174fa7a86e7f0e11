"""What every recipe of ``tensorcomp compress --recipe`` has: options of its own, checks, and a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
import typer
from torch import nn

from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.data import Dataset

COMMON = ("rank", "format", "layers", "recalibrate")
"""Options of the command that only some recipes take."""

_RECIPES: dict[str, type[Recipe]] = {}


class Made(Protocol):
    """What a recipe gives back: at least the network and what was done to it."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def report(self) -> Report: ...


@dataclass(frozen=True)
class Common:
    """The options that the command has of its own, as far as a recipe may take them.

    Attributes:
        epochs: of training.
        training: lr, optimizer, seed, channels_last and checkpoint, as ``recipes.train`` takes them; lr and
            optimizer only where they were given.
        rank, format, layers, exclude, recalibrate: as the command has them.
        explicit: names of the options that were given.
    """

    epochs: int
    training: dict[str, Any]
    rank: Any
    format: str | None
    layers: Sequence[str] | None
    exclude: Sequence[str] | None
    recalibrate: bool
    explicit: frozenset[str]


@dataclass(frozen=True)
class Recipe(ABC):
    """Options of a recipe; its fields are annotated as typer takes the parameters of a command."""

    names: ClassVar[tuple[str, ...]]
    """What --recipe calls it; several where one set of options serves several."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """Which of :data:`COMMON` it has a use for."""
    trains: ClassVar[bool] = True
    """Whether it cannot do without epochs of training."""

    @property
    def draws(self) -> bool:
        """Whether it begins with random factors, whatever weights the network has."""
        return False

    def check(self, name: str, common: Common) -> None:
        """typer.BadParameter (exit status 2) for options that do not fit, before any work."""
        unused = [option for option in COMMON if option in common.explicit and option not in self.takes]
        if unused:
            raise typer.BadParameter(
                f"--recipe {name} has no use for it, it decides that itself; see --recipe {name} --help",
                param_hint=f"--{unused[0]}",
            )
        if self.trains and common.epochs < 1:
            raise typer.BadParameter(
                "this recipe trains: say for how long with --epochs", param_hint=f"--recipe {name}"
            )

    def check_network(self, name: str, dense: nn.Module) -> None:  # noqa: B027 - most have nothing to refuse
        """typer.BadParameter for options that do not fit the network, before it is evaluated."""

    @abstractmethod
    def run(
        self, name: str, common: Common, screen: Screen, dense: nn.Module, images: Dataset, x: torch.Tensor
    ) -> Made:
        """Compress ``dense``, which takes inputs like ``x``, and train it on ``images``."""

    def options(self) -> dict[str, Any]:
        """The fields as the recipe's function takes them."""
        return asdict(self)


def register(recipe: type[Recipe]) -> type[Recipe]:
    """Make a recipe known under its names."""
    _RECIPES.update(dict.fromkeys(recipe.names, recipe))
    return recipe


def recipe_names() -> tuple[str, ...]:
    """What --recipe may be."""
    return tuple(_RECIPES)


def recipe_class(name: str) -> type[Recipe]:
    """The recipe of a name; typer.BadParameter with the names otherwise."""
    if name not in _RECIPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(_RECIPES)}", param_hint="--recipe")
    return _RECIPES[name]


@cache
def parameters_of(recipe: type[Recipe]) -> tuple[Any, ...]:
    """The fields of a recipe as parameters of a command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(recipe)
    return tuple(p for p in typer.main.get_command(app).params if p.name != "help")


def owners_of(option: str) -> list[str]:
    """Names of the recipes that have an option such as ``--sparsity``."""
    return [name for name, recipe in _RECIPES.items() if any(option in p.opts for p in parameters_of(recipe))]


def one_of(option: str, value: Any, allowed: Sequence[Any]) -> None:
    """typer.BadParameter unless a value is among those allowed."""
    if value not in allowed:
        raise typer.BadParameter(
            f"{value!r} is none of {', '.join(map(str, allowed))}", param_hint=f"--{option}"
        )


def as_recipe(name: str, check: Callable[..., object], *values: Any) -> None:
    """typer.BadParameter for what a recipe's own check refuses, which is called with its name and values."""
    try:
        check(f"--recipe {name}", *values)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def within(option: str, value: float | None, low: float, high: float = float("inf")) -> None:
    """typer.BadParameter unless a number is above ``low``, at most ``high`` and finite; None passes."""
    if value is not None and not (low < value <= high and value != float("inf")):
        most = "" if high == float("inf") else f" and at most {high:g}"
        raise typer.BadParameter(f"must be above {low:g}{most}, got {value:g}", param_hint=f"--{option}")
