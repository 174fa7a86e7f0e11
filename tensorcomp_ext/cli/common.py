"""What the commands share: errors in one line, progress on a terminal, ranks as users write them."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from typer.core import TyperGroup

from tensorcomp_ext import models, ranks, recipes
from tensorcomp_ext.compress.checkpoint import CheckpointError, Header
from tensorcomp_ext.compress.storage import load, read_header

Tick = Callable[[int, int, str], None]
LOG_SECONDS = 20.0  # between two lines about a long step where no bar can be drawn
KEPT = 0.9  # share of the correct answers below which compression has done harm rather than its work

RANK_HELP = (
    "Ranks: a number (8), a pair R_out,R_in (8,6), a fraction of the layer's parameters (0.5), energy:0.95, "
    "vbmf, ratio:0.5, params:20000 or flops:1e6 per layer; network-params:0.3, network-flops:0.3 or, as "
    "measured here, latency:2.0 (times as fast) for the whole network. PATTERN=RANK is for the layers of "
    "that name, first fit wins. May be repeated."
)


class Commands(TyperGroup):
    """Commands whose expected failures end in one line on stderr and exit status 1.

    Set TENSORCOMP_TRACEBACK=1 to see where an error came from.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            with one_line_warnings():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise  # these are how commands end, although they are RuntimeErrors
        except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
            if os.environ.get("TENSORCOMP_TRACEBACK", "0") not in ("", "0"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(1) from None


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings as messages for the user of a command: one line on stderr, without the place in our source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        typer.echo(f"warning: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class Screen:
    """Where a command's output goes: results to stdout, everything else to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(width=None if os.isatty(1) else 200)
        self._err = Console(stderr=True)

    def say(self, text: str) -> None:
        """A line for people: on stdout, or on stderr where stdout is for machines."""
        (self._err if self.as_json else self._out).print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A table for people; nothing in JSON mode."""
        if not self.as_json:
            self._out.print(renderable)

    def result(self, data: Mapping[str, Any]) -> None:
        """The result for machines: one JSON document on stdout in JSON mode, else nothing."""
        if self.as_json:
            typer.echo(json.dumps(data, indent=2, default=str))

    @contextmanager
    def progress(self, label: str) -> Iterator[Tick]:
        """A function of (done, total, what): a bar on stderr, a line now and then without a terminal."""
        if not self._err.is_terminal:
            last = time.perf_counter()

            def line(done: int, total: int, what: str = "") -> None:
                nonlocal last
                if time.perf_counter() - last >= LOG_SECONDS:
                    last = time.perf_counter()
                    typer.echo(f"{label}: {done} of {total}{what and f', {what}'}", err=True)

            yield line
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[what]}"),
        )
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task(label, total=None, what="")

            def tick(done: int, total: int, what: str = "") -> None:
                bar.update(task, completed=done, total=total, what=what)

            yield tick

    @contextmanager
    def training(self, label: str) -> Iterator[Callable[[recipes.TrainState], None]]:
        """A progress function for ``recipes.train``: a bar, or a line per epoch without a terminal."""
        with self.progress(label) as tick:

            def step(state: recipes.TrainState) -> None:
                epoch = f"epoch {state.epoch + 1} of {state.epochs}"
                tick(state.step + 1, state.steps, epoch)
                ended = (state.step + 1) * state.epochs == (state.epoch + 1) * state.steps
                if ended and not self._err.is_terminal and state.loss is not None:
                    typer.echo(f"{label}: {epoch}, loss {float(state.loss):.3f} in the last batch", err=True)

            yield step


def warn_of_loss(before: recipes.Accuracy, after: recipes.Accuracy, advice: str) -> None:
    """Say on stderr that a network answers less than ``KEPT`` of what it did, and what would help."""
    if after.correct < KEPT * before.correct:
        typer.echo(
            f"warning: the compressed network has lost accuracy: {after.correct} of {after.total} test "
            f"images correct, {before.correct} before. What helps: {advice}",
            err=True,
        )


def parse_rank(text: str) -> ranks.RankSpec:
    """A rank as written on the command line; typer.BadParameter (exit status 2) for what is none."""
    try:
        return ranks.parse_rank(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rank") from error


def parse_ranks(texts: Sequence[str]) -> ranks.RankSpec:
    """All ``--rank`` options together: one rank, or a mapping from name pattern to rank."""
    mapping: dict[str, ranks.RankSpec] = {}
    for text in texts:
        pattern, equals, spec = text.rpartition("=")
        key = pattern if equals else "*"
        if key in mapping:
            raise typer.BadParameter(f"two ranks for {key!r}", param_hint="--rank")
        mapping[key] = parse_rank(spec)
    return mapping["*"] if set(mapping) == {"*"} else mapping


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes written as 1,64."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be numbers such as 1,64", param_hint="--batch") from error
    if min(sizes) < 1:
        raise typer.BadParameter(f"{text!r}: a batch has at least 1 image", param_hint="--batch")
    return sizes


def check_model(name: str) -> str:
    """The name of a network we have; typer.BadParameter with the names otherwise."""
    if name not in models.names():
        raise typer.BadParameter(f"{name!r} is none of {', '.join(models.names())}", param_hint="--model")
    return name


def build_from(header: Header, path: Path, name: str | None = None) -> nn.Module:
    """The network of a checkpoint: built by the name and options it records (or ``name``) and loaded."""
    recorded = header.meta.get("model")
    options = dict(recorded) if isinstance(recorded, Mapping) else {}
    known = options.pop("name", None)
    if name is None and known is None:
        raise ValueError(f"{path} does not say which network it holds; name it with --model")
    if name is not None and name != known:
        options = {}
    chosen = str(name or known)
    allowed = {"num_classes", "in_channels", "input_size", "option"}
    if not set(options) <= allowed or not all(isinstance(v, (int, str)) for v in options.values()):
        raise CheckpointError(
            f"{path} records options of {chosen} that are not understood: {sorted(options)}"
        )
    if any(isinstance(v, int) and not 1 <= v <= 1 << 16 for v in options.values()):
        raise CheckpointError(f"{path} records sizes of {chosen} that are out of range: {options}")
    return load(path, models.build(chosen, **options))


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` was written by ``tensorcomp_ext.save`` (else it is taken for a torch file)."""
    try:
        read_header(path)
    except CheckpointError:
        return path.suffix == ".safetensors"
    return True
