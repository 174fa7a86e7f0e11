"""``--recipe vbmf``, ``energy`` and ``latency``: ranks of trained weights, fine-tuned where asked to."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.cli.recipes.base import Common, Made, Recipe, register, within
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.ranks import VBMF, Energy, Latency, RankRule

UNFOLDED = ("svd", "tucker", "tucker2", "tt", "ttm")
"""Formats whose ranks are those of unfoldings, which a spectrum decides."""

Refresh = Annotated[
    bool,
    typer.Option("--refresh/--no-refresh", help="Measure batch normalisation again, on training images."),
]


@dataclass(frozen=True)
class _PostTraining(Recipe):
    """Ranks by a rule, batch normalisation measured again, and --epochs of fine-tuning."""

    takes: ClassVar[frozenset[str]] = frozenset({"format", "layers"})
    trains: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...]] = UNFOLDED

    refresh: Refresh = True

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        if common.format is not None and common.format not in self.formats:
            raise typer.BadParameter(
                f"--recipe {name} cannot choose ranks of {common.format!r}: it reads the spectra of "
                f"unfoldings, which decide the ranks of {', '.join(self.formats)}",
                param_hint="--format",
            )

    @abstractmethod
    def _rule(self) -> RankRule:
        """The rule of these options."""

    def _inputs(self, x: torch.Tensor) -> dict[str, Any]:
        """What the recipe is to count and measure with."""
        return {"example_inputs": x}

    def run(
        self, name: str, common: Common, screen: Screen, dense: nn.Module, images: Dataset, x: torch.Tensor
    ) -> Made:
        with screen.training(name) if common.epochs else nullcontext() as step:
            progress: dict[str, Any] = {"progress": step} if common.epochs else {}
            return recipes.posttraining(
                dense,
                images,
                rank=self._rule(),
                format=common.format,
                layers=common.layers or None,
                exclude=tuple(common.exclude or ()),
                recalibrate=self.refresh,
                epochs=common.epochs,
                **self._inputs(x),
                **progress,
                **common.training,
            )


@register
@dataclass(frozen=True)
class Vbmf(_PostTraining):
    """Ranks by empirical variational Bayesian matrix factorisation, then --epochs of fine-tuning."""

    names: ClassVar[tuple[str, ...]] = ("vbmf",)

    exact_threshold: Annotated[
        bool, typer.Option("--exact-threshold", help="Solve for the threshold instead of 2.5129 sqrt(alpha).")
    ] = False

    def _rule(self) -> RankRule:
        return VBMF(exact_threshold=self.exact_threshold)


@register
@dataclass(frozen=True)
class EnergyRanks(_PostTraining):
    """Ranks that keep a share of each unfolding's energy, then --epochs of fine-tuning."""

    names: ClassVar[tuple[str, ...]] = ("energy",)

    p: Annotated[float, typer.Option(help="Share of each unfolding's energy that its rank keeps.")] = 0.95

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        within("p", self.p, 0, 1)

    def _rule(self) -> RankRule:
        return Energy(self.p)


@register
@dataclass(frozen=True)
class LatencyRanks(_PostTraining):
    """Ranks of least error with which the network is measured to be so much faster on this machine."""

    names: ClassVar[tuple[str, ...]] = ("latency",)
    formats: ClassVar[tuple[str, ...]] = ("tucker2", "svd")

    speedup: Annotated[float, typer.Option(help="Dense latency over that of the compressed network.")] = 2.0
    measure_batch: Annotated[int, typer.Option(min=1, help="Images a call in these measurements.")] = 64
    calibration: Annotated[
        int, typer.Option(min=0, help="Training images that weigh errors; 0 weighs the weights alone.")
    ] = 256
    measure_seconds: Annotated[float, typer.Option(min=1, help="About how long to measure.")] = 60.0

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        if not 1.0 < self.speedup < float("inf"):
            raise typer.BadParameter(f"must be above 1, got {self.speedup:g}", param_hint="--speedup")

    def _rule(self) -> RankRule:
        return Latency(self.speedup, seconds=self.measure_seconds)

    def _inputs(self, x: torch.Tensor) -> dict[str, Any]:
        return {"batch": self.measure_batch, "calibration": self.calibration}
