"""``tensorcomp compress --recipe``: procedures that train while they compress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer
from torch import nn

from tensorcomp_ext import data, recipes
from tensorcomp_ext.cli.common import Screen
from tensorcomp_ext.formats import format_names
from tensorcomp_ext.formats.lowrank_sparse import MODES
from tensorcomp_ext.recipes.pruning import CRITERIA
from tensorcomp_ext.recipes.sparse_start import METHODS, LowRank
from tensorcomp_ext.recipes.sparsity import SPARSITY_SCHEDULES

NAMES = ", ".join(METHODS)
LOW_RANK = [name for name in format_names() if not name.startswith("lowrank_sparse")]


def refuse_without_recipe(context: typer.Context) -> None:
    """typer.BadParameter where a command was given options of recipes and no recipe."""
    given = [
        f"--{field.replace('_', '-')}"
        for field in Recipe.__dataclass_fields__
        if (source := context.get_parameter_source(field)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter("this is for --recipe, which is not given", param_hint=given[0])


@dataclass(frozen=True)
class Recipe:
    """What the options of the command say about a recipe; None where it is not to run."""

    method: str
    low_rank: LowRank
    mode: str
    init: str
    fraction: float
    sparsity: float
    storage: float | None
    prune_epochs: int | None
    alpha: float
    temperature: float
    sparsity_schedule: str
    criterion: str
    direction: str

    def check(self, epochs: int, rank: Sequence[str] | None, others: Sequence[object]) -> None:
        """typer.BadParameter (exit status 2) for options that do not fit, before any work.

        Args:
            epochs: of training.
            rank: the ranks asked for.
            others: further options of compression without a recipe.
        """
        names = [self.low_rank] if isinstance(self.low_rank, str) else self.low_rank.values()
        choices = (
            ("--recipe", self.method, METHODS),
            *(("--low-rank", name, LOW_RANK) for name in names),
            ("--mode", self.mode, MODES),
            ("--init", self.init, ("residual", "masking")),
            ("--sparsity-schedule", self.sparsity_schedule, tuple(SPARSITY_SCHEDULES)),
            ("--criterion", self.criterion, CRITERIA),
            ("--direction", self.direction, ("teacher-student", "student-teacher")),
        )
        for option, value, allowed in choices:
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}", param_hint=option)
        shares = (("--fraction", self.fraction), ("--storage", 1.0 if self.storage is None else self.storage))
        for option, share in shares:
            if not 0 < share <= 1:
                raise typer.BadParameter(f"must be above 0 and at most 1, got {share:g}", param_hint=option)
        if not 0 <= self.sparsity < 1:
            raise typer.BadParameter(
                f"must be at least 0 and below 1, got {self.sparsity:g}", param_hint="--sparsity"
            )
        if not 0 < self.temperature < math.inf:
            raise typer.BadParameter(f"must be above 0, got {self.temperature:g}", param_hint="--temperature")
        if self.prune_epochs is not None and self.prune_epochs > epochs:
            raise typer.BadParameter(
                f"must be at most --finetune-epochs, {epochs}, got {self.prune_epochs}",
                param_hint="--prune-epochs",
            )
        if self.criterion == "difference" and (self.mode, self.method) != ("masking", "lowrank-sparse"):
            raise typer.BadParameter(
                "'difference' is for --recipe lowrank-sparse --mode masking", param_hint="--criterion"
            )
        if rank or any(others):
            raise typer.BadParameter(
                "a recipe chooses formats and ranks itself, by --low-rank and --fraction; leave out --rank, "
                "--format, --layers and --recalibrate",
                param_hint="--recipe",
            )
        if epochs < 1:
            raise typer.BadParameter(
                "a recipe trains: say for how long with --finetune-epochs", param_hint="--recipe"
            )

    def run(
        self,
        screen: Screen,
        dense: nn.Module,
        images: data.Dataset,
        example_inputs: torch.Tensor,
        exclude: Sequence[str],
        **training: Any,
    ) -> recipes.LowRankSparseResult:
        """Compress ``dense`` and train it; ``training`` as ``recipes.train`` takes it."""
        with screen.training(self.method) as step:
            return recipes.lowrank_sparse(
                dense,
                images,
                example_inputs=example_inputs,
                exclude=list(exclude) or None,
                progress=step,
                **asdict(self),
                **training,
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
