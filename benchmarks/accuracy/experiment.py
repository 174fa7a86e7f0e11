"""Rows of an experiment, one after the other or in several processes, written as they are done.

A driver describes its rows and how one is run; this runs those that are not done yet. Each row has a file of
its own in the work folder, so that several processes of the same command share the rows among them, and a
killed one, started again, goes on with the row it was at from its last epoch.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensorcomp_ext.bench.machine import isa, machine, versions
from tensorcomp_ext.bench.suite import write_json


@dataclass(frozen=True)
class Row:
    """What tells a row from others, in JSON types."""

    method: str
    dataset: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the row's files."""
        options = (f"{name}-{value}" for name, value in self.options.items())
        parts = (self.method, *options, self.dataset, f"seed-{self.seed}")
        return "_".join(parts).replace("/", "-").replace(" ", "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "dataset": self.dataset,
            "seed": self.seed,
            "options": dict(self.options),
        }


@dataclass(frozen=True)
class Experiment:
    """Rows and how to run them.

    Attributes:
        suite, name: what the results are called, as a group and among it.
        config: what all rows share, in JSON types; results of another one are not gone on with.
        rows: in the order in which they are run.
        run: ``run(row, checkpoint) -> {figure: value}`` with a path for a checkpoint of that row.
    """

    suite: str
    name: str
    config: dict[str, Any]
    rows: Sequence[Row]
    run: Callable[[Row, Path], dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all drivers have."""
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("TENSORCOMP_DATA"),
        help="folder of the data; TENSORCOMP_DATA by default",
    )
    parser.add_argument("--json", type=Path, required=True, help="results go here, after every row")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and rows; beside --json by default")
    parser.add_argument("--only", default="", help="rows whose names hold one of these texts, by commas")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no row begins")
    parser.add_argument("--threads", type=int, default=1)


def checked(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The parsed options, with a data folder and a work folder."""
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data is needed (or TENSORCOMP_DATA): the folder with images, text and weights")
    options.work = options.work or options.json.with_suffix(".work")
    return options


def drive(experiment: Experiment, options: argparse.Namespace) -> int:
    """Run what is left of an experiment; 0 when nothing failed.

    Raises:
        ValueError: results of other settings in the way.
    """
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [text for text in options.only.split(",") if text]
    _assemble(experiment, options)
    for row in experiment.rows:
        path = options.work / f"{row.key}.json"
        if path.exists() or (wanted and not any(text in row.key for text in wanted)):
            continue
        if time.perf_counter() - began > options.limit:
            print("the time is over: started again, the run goes on", flush=True)
            return 0
        with _claimed(options.work / f"{row.key}.claim") as mine:
            if mine and not path.exists():
                _run(experiment, row, path)
                _assemble(experiment, options)
    return 0


def _run(experiment: Experiment, row: Row, path: Path) -> None:
    """Run a row, write what was found beside its checkpoint, and leave nothing else of it."""
    started = time.perf_counter()
    found = experiment.run(row, path.with_suffix(".ckpt"))
    seconds = time.perf_counter() - started
    write_json(path, {**row.to_dict(), **found, "revision": revision(), "seconds": seconds})
    for leftover in path.parent.glob(f"{row.key}*.ckpt"):
        leftover.unlink()
    print(f"{row.key}: {_said(found)}, {seconds:.0f} s", flush=True)


def revision() -> str:
    """The commit that runs, with "-dirty" where files differ from it; "unknown" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process may run a row, for as long as it does; a killed one lets go."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            # Who has opened the file before and locks it now finds the row done.
            path.unlink(missing_ok=True)


def _assemble(experiment: Experiment, options: argparse.Namespace) -> None:
    """Write the results of all rows that are done, those of an earlier file included, in their order."""
    folder = os.open(options.work, os.O_RDONLY)
    try:
        # Or of two processes the slower one would write what it read before the other's row was there.
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_json(options.json, _results(experiment, options))
    finally:
        os.close(folder)


def _results(experiment: Experiment, options: argparse.Namespace) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    older: dict[str, Any] = {}
    if options.json.exists():
        older = json.loads(options.json.read_text(encoding="utf-8"))
        if older.get("name") != experiment.name or older.get("config") != experiment.config:
            raise ValueError(f"{options.json} has results of other settings: move it away, or name another")
        kept = {_identity(row): row for row in older["rows"]}
    for row in experiment.rows:
        path = options.work / f"{row.key}.json"
        if path.exists():
            kept[_identity(row.to_dict())] = json.loads(path.read_text(encoding="utf-8"))
        elif _identity(row.to_dict()) in kept:
            write_json(path, kept[_identity(row.to_dict())])
    order = [_identity(row.to_dict()) for row in experiment.rows]
    return {
        "suite": experiment.suite,
        "name": experiment.name,
        "started": older.get("started")
        or datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "complete": set(order) <= set(kept),
        "machine": machine(),
        "versions": versions(),
        "isa": isa(),
        "threads": options.threads,
        "config": experiment.config,
        "rows": [kept[key] for key in order if key in kept]
        + [row for key, row in kept.items() if key not in order],
    }


def _identity(row: Mapping[str, Any]) -> str:
    return json.dumps([row["method"], row["dataset"], row["seed"], row["options"]], sort_keys=True)


def _said(found: Mapping[str, Any]) -> str:
    """The figures of a row that are numbers, in one line."""
    numbers = {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    test = found.get("test")
    parts = [f"{test['correct']} of {test['total']}"] if isinstance(test, Mapping) else []
    return ", ".join([*parts, *(f"{k} {v:.4g}" for k, v in numbers.items())])
