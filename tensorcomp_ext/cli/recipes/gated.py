"""``--recipe l0``, ``reinforce`` and ``mars``, which learn ranks, and ``uniform``, which does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.cli.recipes.base import Common, Made, Recipe, as_recipe, one_of, register
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.nn.base import STARTS
from tensorcomp_ext.recipes.l0 import REDUCTIONS, check_penalty, check_sigma
from tensorcomp_ext.recipes.mars import STRENGTHS, check_masks
from tensorcomp_ext.recipes.presets import PRESETS, layout
from tensorcomp_ext.recipes.reinforce import check_samples
from tensorcomp_ext.recipes.selection import check_gates
from tensorcomp_ext.recipes.start import WITH_RANKS

Preset = Annotated[
    str | None,
    typer.Option(help=f"A published layout instead of --format and --layers: {', '.join(PRESETS)}."),
]
Start = Annotated[
    str,
    typer.Option(
        help="Draw the factors and train from scratch (random), or decompose the weights (decompose)."
    ),
]
Target = Annotated[
    float | None,
    typer.Option(help="Ratio of parameters, dense to stored, at which ranks are frozen; none by default."),
]
GateLr = Annotated[
    float, typer.Option(min=0, help="Learning rate of the gates over that of weights; 5 to 10 in few epochs.")
]
RemoveBelow = Annotated[
    float, typer.Option(min=0, help="Cut entries that are open with at most this probability while training.")
]
RemoveEvery = Annotated[
    int, typer.Option(min=0, help="Steps after which that is looked at; 0: after epochs only.")
]


@dataclass(frozen=True)
class _Factorized(Recipe):
    """What trains a factorised network."""

    takes: ClassVar[frozenset[str]] = frozenset({"rank", "format", "layers"})

    preset: Preset = None
    start: Start = "random"

    @property
    def draws(self) -> bool:
        return self.start == "random"

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        one_of("start", self.start, STARTS)
        if self.preset is not None:
            one_of("preset", self.preset, tuple(PRESETS))
            if common.format is not None or common.layers or common.exclude:
                raise typer.BadParameter(
                    "says formats and layers itself: leave out --format, --layers and --exclude",
                    param_hint="--preset",
                )
        if common.format is not None and common.format not in WITH_RANKS:
            raise typer.BadParameter(
                f"--recipe {name} is about ranks between factors, which {common.format!r} does not have; "
                f"formats that do: {', '.join(WITH_RANKS)}",
                param_hint="--format",
            )

    def check_network(self, name: str, dense: nn.Module) -> None:
        preset = self.preset
        if preset is not None:
            as_recipe(name, lambda said: layout(preset, dense))

    def _recipe(self, name: str) -> Callable[..., Made]:
        """The function of that name."""
        found: Callable[..., Made] = getattr(recipes, name)
        return found

    def run(
        self, name: str, common: Common, screen: Screen, dense: nn.Module, images: Dataset, x: torch.Tensor
    ) -> Made:
        rank: dict[str, Any] = {} if common.rank is None else {"rank": common.rank}
        with screen.training(name) as step:
            return self._recipe(name)(
                dense,
                images,
                format=common.format,
                layers=common.layers or None,
                exclude=tuple(common.exclude or ()),
                example_inputs=x,
                epochs=common.epochs,
                progress=step,
                **rank,
                **self.options(),
                **common.training,
            )


def _check_gates(name: str, given: L0 | Reinforce | Mars) -> None:
    """typer.BadParameter for bounds that the recipes have."""
    as_recipe(name, check_gates, given.remove_below, given.remove_every, given.target, given.gate_lr)


@register
@dataclass(frozen=True)
class L0(_Factorized):
    """Train in factors with noisy gates on all ranks and a penalty on open ones; cut what they shut.

    Ranks begin at --rank, 25 by default.
    """

    names: ClassVar[tuple[str, ...]] = ("l0",)

    weight: Annotated[
        float, typer.Option(min=0, help="Of the penalty, lambda; 0.1 to 1.5 were published.")
    ] = 1.0
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise.")] = 0.5
    reduction: Annotated[
        str, typer.Option(help=f"Over the gates of a rank in the penalty: {' or '.join(REDUCTIONS)}.")
    ] = "mean"
    target: Target = None
    gate_lr: GateLr = 1.0
    remove_below: RemoveBelow = 0.05
    remove_every: RemoveEvery = 0

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        one_of("reduction", self.reduction, REDUCTIONS)
        _check_gates(name, self)
        as_recipe(name, check_penalty, self.weight, self.reduction)
        as_recipe(name, check_sigma, self.sigma)


@register
@dataclass(frozen=True)
class Reinforce(_Factorized):
    """Gates that are 0 or 1, trained by REINFORCE: noisy, there to be compared with l0.

    Ranks begin at --rank, 25 by default.
    """

    names: ClassVar[tuple[str, ...]] = ("reinforce",)

    weight: Annotated[float, typer.Option(min=0, help="Of the number of open gates, lambda.")] = 0.2
    samples: Annotated[int, typer.Option(min=1, help="Of all gates a step, a forward pass each.")] = 5
    target: Target = None
    gate_lr: GateLr = 1.0
    remove_below: RemoveBelow = 0.0
    remove_every: RemoveEvery = 0

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        _check_gates(name, self)
        as_recipe(name, check_samples, self.weight, self.samples)


@register
@dataclass(frozen=True)
class Mars(_Factorized):
    """Masks on all ranks under a prior that would rather have them shut (masked tensorised networks).

    Ranks begin at --rank, 20 by default.
    """

    names: ClassVar[tuple[str, ...]] = ("mars",)

    strength: Annotated[str, typer.Option(help=f"Of the prior: {' or '.join(STRENGTHS)}.")] = "soft"
    prior: Annotated[
        float | None, typer.Option(help="Probability of an open mask, instead of the strength's.")
    ] = None
    logit: Annotated[float | None, typer.Option(help="First logits, instead of the strength's.")] = None
    target: Target = None
    gate_lr: GateLr = 1.0
    remove_below: RemoveBelow = 0.02
    remove_every: RemoveEvery = 0

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        one_of("strength", self.strength, tuple(STRENGTHS))
        _check_gates(name, self)
        as_recipe(name, check_masks, self.strength, self.prior, self.logit, self.target, self.remove_below)


@register
@dataclass(frozen=True)
class Uniform(_Factorized):
    """Train in factors of the given --rank, 10 by default, without selecting any (TRN, tensor trains)."""

    names: ClassVar[tuple[str, ...]] = ("uniform",)
