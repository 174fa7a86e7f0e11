"""``--recipe progressive``: dense weights that fade beside Tucker-2 factors whose ranks shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import typer
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.cli.recipes.base import Common, Made, Recipe, as_recipe, one_of, register
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.nn.fading import STARTS
from tensorcomp_ext.recipes.fades import FADES
from tensorcomp_ext.recipes.progressive import check_fade, check_target


@register
@dataclass(frozen=True)
class Progressive(Recipe):
    """Train Tucker-2 factors beside the dense weights, which fade out, while ranks are cut to a target."""

    names: ClassVar[tuple[str, ...]] = ("progressive",)

    target: Annotated[
        float, typer.Option(help="Share of the compressible layers' weights that is stored in the end.")
    ] = 0.1
    init: Annotated[
        str, typer.Option(help=f"Of the factors: {' or '.join(STARTS)}; both begin with the same answers.")
    ] = "residual"
    decay: Annotated[str, typer.Option(help=f"Of the dense weights: {', '.join(FADES)}.")] = "cosine"
    share: Annotated[float, typer.Option(help="Of the steps, in which the dense weights fade.")] = 0.8
    rank_every: Annotated[int, typer.Option(min=1, help="Epochs between two cuts of ranks.")] = 1
    start: Annotated[
        float, typer.Option(min=1, help="First size over the target; 1 chooses ranks once, at the start.")
    ] = 1.3

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        one_of("init", self.init, STARTS)
        one_of("decay", self.decay, tuple(FADES))
        as_recipe(name, check_target, self.target)
        as_recipe(name, check_fade, self.decay, self.share, self.start, self.rank_every)

    def run(
        self, name: str, common: Common, screen: Screen, dense: nn.Module, images: Dataset, x: torch.Tensor
    ) -> Made:
        with screen.training(name) as step:
            return recipes.progressive(
                dense,
                images,
                epochs=common.epochs,
                exclude=tuple(common.exclude or ()),
                example_inputs=x,
                progress=step,
                **self.options(),
                **common.training,
            )
