"""``--recipe nrmf``: a norm that lowers ranks while training, then Tucker-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.cli.recipes.base import Common, Made, Recipe, one_of, register, within
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.recipes.nuclear_norm import NORMS


@register
@dataclass(frozen=True)
class Nrmf(Recipe):
    """Train dense under a norm that lowers ranks, decompose convolutions in Tucker-2, fine-tune."""

    names: ClassVar[tuple[str, ...]] = ("nrmf",)

    alpha: Annotated[
        float, typer.Option(min=0, help="Weight of the norm; 1e-3 to 1e-1 are worth trying.")
    ] = 1e-2
    p: Annotated[float, typer.Option(help="Share of each unfolding's energy that its rank keeps.")] = 0.95
    norm: Annotated[
        str,
        typer.Option(help="frobenius, that of the source, or nuclear, the sum of singular values (ours)."),
    ] = "frobenius"
    finetune_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of --epochs that is left for fine-tuning.")
    ] = 0.33
    finetune_lr: Annotated[float, typer.Option(min=0, help="Learning rate of fine-tuning.")] = 0.001

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        one_of("norm", self.norm, NORMS)
        within("p", self.p, 0, 1)

    def run(
        self, name: str, common: Common, screen: Screen, dense: nn.Module, images: Dataset, x: torch.Tensor
    ) -> Made:
        options: dict[str, Any] = self.options()
        after = round(options.pop("finetune_share") * common.epochs)
        with screen.training(name) as step:
            return recipes.nrmf(
                dense,
                images,
                epochs=common.epochs - after,
                finetune_epochs=after,
                exclude=tuple(common.exclude or ()),
                example_inputs=x,
                progress=step,
                **options,
                **common.training,
            )
