"""``--recipe lowrank-sparse``, and what it is compared with: ``sparse`` and ``lowrank`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.cli.recipes.base import Common, Recipe, one_of, register, within
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.formats import format_names
from tensorcomp_ext.formats.lowrank_sparse import MODES
from tensorcomp_ext.recipes.pruning import CRITERIA
from tensorcomp_ext.recipes.sparse_start import METHODS, LowRank
from tensorcomp_ext.recipes.sparsity import SPARSITY_SCHEDULES

LOW_RANK = [name for name in format_names() if not name.startswith("lowrank_sparse")]


@register
@dataclass(frozen=True)
class LowRankSparse(Recipe):
    """Decompose, prune the sparse part gradually while training against the dense network, and pack."""

    names: ClassVar[tuple[str, ...]] = METHODS

    low_rank: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[conv=|linear=]NAME",
            help="Format of the low-rank parts, tt by default. Twice for one of each kind of layer.",
        ),
    ] = None
    mode: Annotated[
        str, typer.Option(help="The sparse part is added (additive) or takes the place (masking).")
    ] = "additive"
    init: Annotated[
        str, typer.Option(help="Fit the weights (residual) or those below the largest (masking).")
    ] = "residual"
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a layer's weights for its low-rank part.")
    ] = 0.1
    sparsity: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the sparse parts that is pruned.")
    ] = 0.9
    storage: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Instead, share of the weights stored, low-rank parts too."),
    ] = None
    prune_epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs until the sparsity is reached; all by default.")
    ] = None
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the labels in the loss, not of the teacher.")
    ] = 0.9
    temperature: Annotated[float, typer.Option(help="By which the logits are divided.")] = 3.0
    sparsity_schedule: Annotated[
        str, typer.Option(help="slow-start (at the end most) or zhu-gupta (at the start most).")
    ] = "slow-start"
    criterion: Annotated[
        str, typer.Option(help="What is small: magnitude of S or, with --mode masking, difference S - L.")
    ] = "magnitude"
    direction: Annotated[
        str, typer.Option(help="Divergence learned from: teacher-student (Hinton) or student-teacher.")
    ] = "teacher-student"

    def check(self, name: str, common: Common) -> None:
        super().check(name, common)
        formats = parse_low_rank(self.low_rank)
        for each in [formats] if isinstance(formats, str) else formats.values():
            one_of("low-rank", each, LOW_RANK)
        one_of("mode", self.mode, MODES)
        one_of("init", self.init, ("residual", "masking"))
        one_of("sparsity-schedule", self.sparsity_schedule, tuple(SPARSITY_SCHEDULES))
        one_of("criterion", self.criterion, CRITERIA)
        one_of("direction", self.direction, ("teacher-student", "student-teacher"))
        within("fraction", self.fraction, 0, 1)
        within("storage", self.storage, 0, 1)
        within("temperature", self.temperature, 0)
        if not 0 <= self.sparsity < 1:
            raise typer.BadParameter(
                f"must be at least 0 and below 1, got {self.sparsity:g}", param_hint="--sparsity"
            )
        if self.prune_epochs is not None and self.prune_epochs > common.epochs:
            raise typer.BadParameter(
                f"must be at most --epochs, {common.epochs}, got {self.prune_epochs}",
                param_hint="--prune-epochs",
            )
        if self.criterion == "difference" and (self.mode, name) != ("masking", "lowrank-sparse"):
            raise typer.BadParameter(
                "'difference' is for --recipe lowrank-sparse --mode masking", param_hint="--criterion"
            )

    def run(
        self, name: str, common: Common, screen: Screen, dense: nn.Module, images: Dataset, x: torch.Tensor
    ) -> recipes.LowRankSparseResult:
        given = {"lr": 0.01, **common.training}
        with screen.training(name) as step:
            return recipes.lowrank_sparse(
                dense,
                images,
                method=name,  # type: ignore[arg-type]
                example_inputs=x,
                exclude=list(common.exclude or ()) or None,
                epochs=common.epochs,
                progress=step,
                **{**self.options(), "low_rank": parse_low_rank(self.low_rank)},
                **given,
            )


def parse_low_rank(texts: Sequence[str] | None) -> LowRank:
    """All ``--low-rank`` options together: one format, or one for each kind of layer."""
    if not texts:
        return "tt"
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    pairs = [text.partition("=")[::2] for text in texts]
    if sorted(kind for kind, _ in pairs) != ["conv", "linear"]:
        raise typer.BadParameter(
            f"{' '.join(texts)!r} must be one format, or both conv=NAME and linear=NAME",
            param_hint="--low-rank",
        )
    return dict(pairs)


def stored_rows(stored: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of the network: what is stored of the compressed layers, with and without indices."""
    weights, count = stored["weights"], stored["stored"]
    smaller = f"{weights / max(count, 1):.2f}× smaller"
    rows: list[tuple[str, ...]] = [("weights of compressed layers", f"{weights:,}", f"{count:,}", smaller)]
    if stored["sparse"]:
        text = f"{stored['low_rank']:,} + {stored['sparse']:,}"
        rows.append(("of these low-rank + sparse", "", text, f"sparsity {stored['sparsity']:.3f}"))
        rows.append(("their bytes with indices", "", f"{stored['stored_bytes']:,}", ""))
    return rows
