"""Ranks by measured latency: tables of layers, a knapsack over them, and the whole network measured again."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tensorcomp_ext._warnings import warn
from tensorcomp_ext.compress.allocate import Allocation
from tensorcomp_ext.compress.calibration import moments
from tensorcomp_ext.compress.calls import Call
from tensorcomp_ext.compress.factorize import Choice, assembled
from tensorcomp_ext.compress.latency import Latency as Measured
from tensorcomp_ext.compress.latency_tables import FITS, Table, measure_tables, tables_of
from tensorcomp_ext.compress.stopwatch import Stopwatch, WallClock
from tensorcomp_ext.compress.swap import adopt, copied, restore, swap
from tensorcomp_ext.ranks import Latency
from tensorcomp_ext.ranks.knapsack import knapsack
from tensorcomp_ext.ranks.layouts import Ranks

Progress = Callable[[int, int, str], None]
NEAR = 0.1
"""Share of the speed-up asked for by which what was reached may differ without a warning."""
BUSY = 1.25
"""Ratio of the dense network's longest and shortest median from which on measurements do not fit together."""


@dataclass
class _Round:
    """One choice for the network: what the tables say of it, and what was measured."""

    chosen: tuple[int, ...]
    loss: float
    saved: float
    predicted: float
    dense: Measured
    compressed: Measured
    sure: bool
    """Whether these are the times of a second, longer look."""

    @property
    def speedup(self) -> float:
        return self.dense.p50 / self.compressed.p50

    @property
    def times(self) -> dict[str, Measured]:
        return {"dense": self.dense, "compressed": self.compressed}

    def to_dict(self) -> dict[str, Any]:
        return {
            "predicted": self.predicted,
            "measured": self.speedup,
            "loss": self.loss,
            "dense_seconds": self.dense._asdict(),
            "compressed_seconds": self.compressed._asdict(),
        }


def allocate_latency(
    rule: Latency,
    model: nn.Module,
    choices: Sequence[Choice],
    calls: Mapping[str, list[Call]],
    example_inputs: Any,
    progress: Progress | None = None,
    stopwatch: Stopwatch | None = None,
) -> Allocation:
    """Ranks for which the network is measured to be as fast as the rule asks, at the least Σ error².

    With T the latency of the dense network, S its speed-up and s_c what the tables say candidate c saves of
    its layer, the knapsack takes the candidates of least loss with ρ Σ s_c ≥ T(1 − 1/S). ρ, one at first,
    is then what the measured network saves over what the tables said it would, and the choice is made again.

    ``stopwatch`` measures; tests give tables. What was measured is in ``details["latency_rule"]``, from which
    `replay` makes the choice again.

    Raises:
        ValueError: no layer in a format that the rule knows; calibration without batches or not finite.
    """
    watch = stopwatch or WallClock()
    started = time.perf_counter()
    dense = {c.name: f"{rule} ranks {' and '.join(FITS)} only" for c in choices if c.format not in FITS}
    able = [choice for choice in choices if choice.format in FITS]
    if not able:
        formats = ", ".join(sorted({choice.format for choice in choices}))
        raise ValueError(f"compress: {rule} ranks the formats {' and '.join(FITS)}, got {formats}")
    found = (
        moments(model, {c.name: c.layer for c in able}, rule.batches())
        if rule.calibration is not None
        else {}
    )
    weighed = set(found)
    tables = tables_of(able, calls, found)
    measure_tables(tables, watch, rule.seconds * 2 / 3, progress)
    tables = [table for table in tables if table.ranks]
    members = [(table, choice) for table in tables for choice in table.members]
    dense |= {
        c.name: f"{rule}: no rank saves operations" for c in able if all(c is not m for _, m in members)
    }

    network = _Network(model, members, example_inputs, watch, rule.seconds / (3 * (rule.rounds + 2)))
    rounds = _search(rule, members, network, progress)
    best = _best(rule, rounds)
    if best is None:
        ranks: list[Ranks | None] = [None] * len(members)
        final = network.measure(())
    else:
        ranks = [_rank(table, place) for (table, _), place in zip(members, best.chosen, strict=True)]
        final = best.times if best.sure else network.measure(best.chosen, 2.0)
    reached = final["dense"].p50 / final["compressed"].p50
    kept = []
    for (table, choice), rank in zip(members, ranks, strict=True):
        if rank is None:
            dense[choice.name] = f"{rule}: dense is the better use of the time"
            continue
        choice.rank = rank[0] if len(rank) == 1 else rank
        choice.tuned = copy.deepcopy(table.layers[table.ranks.index(rank)].tuned)
        if choice.name in weighed:
            choice.factors = table.fits[choice.name].factors(rank)
        kept.append(choice)
    details = {
        "asked": rule.speedup,
        "predicted": 1.0 if best is None else best.predicted,
        "measured": reached,
        "reached": reached >= rule.speedup * (1 - NEAR),
        "dense_seconds": final["dense"]._asdict(),
        "compressed_seconds": final["compressed"]._asdict(),
        "rounds": [entry.to_dict() for entry in rounds],
        "batch": _batch(example_inputs),
        "threads": torch.get_num_threads(),
        "calibrated": bool(weighed),
        "loss": 0.0 if best is None else best.loss,
        "saved_seconds": 0.0 if best is None else best.saved,
        "seconds": time.perf_counter() - started,
        "tables": [table.to_dict() for table in tables],
    }
    if not details["reached"]:
        warn(_shortfall(rule, members, rounds, reached, network.medians))
    elif best is not None and reached > rule.speedup * (1 + NEAR):
        warn(
            f"compress: {rule}: the compressed network is measured {reached:.2f}x as fast, more than was "
            "asked for: of the choices measured none came nearer. report.details['latency_rule'] has every "
            "measurement",
        )
    return Allocation([c for c in choices if any(c is k for k in kept)], dense, {"latency_rule": details})


class _Network:
    """The dense network and a copy of it into which choices are put to be measured."""

    def __init__(
        self,
        model: nn.Module,
        members: Sequence[tuple[Table, Choice]],
        example_inputs: Any,
        watch: Stopwatch,
        seconds: float,
    ) -> None:
        self.model, self.members, self.inputs = model, members, example_inputs
        self.watch, self.seconds = watch, seconds
        self.copy = copied(model)
        self.medians: list[float] = []
        """Of the dense network, of every look."""

    def measure(self, chosen: Sequence[int], effort: float = 1.0) -> dict[str, Measured]:
        """Both networks under a choice, 0 for dense; () for dense throughout."""
        found = self._measured(chosen, effort)
        self.medians.append(found["dense"].p50)
        return found

    def _measured(self, chosen: Sequence[int], effort: float) -> dict[str, Measured]:
        replaced: dict[str, nn.Module] = {}
        for (table, choice), place in zip(self.members, chosen, strict=bool(chosen)):
            rank = _rank(table, place)
            if rank is not None:
                made = assembled(choice, rank, table.fits[choice.name].factors(rank))
                made.tuned = copy.deepcopy(table.layers[place - 1].tuned)
                replaced[choice.name] = adopt(made, choice.layer)
        models = {"dense": self.model}
        if "" in replaced:
            models["compressed"] = replaced[""]
            return self.watch.networks(models, self.inputs, effort * self.seconds)
        former = swap(self.copy, replaced)
        try:
            return self.watch.networks(
                {**models, "compressed": self.copy}, self.inputs, effort * self.seconds
            )
        finally:
            restore(self.copy, former)


def _search(
    rule: Latency, members: Sequence[tuple[Table, Choice]], network: _Network, progress: Progress | None
) -> list[_Round]:
    """Choose and measure until it fits; empty where nothing has to be saved, or nothing can be."""
    options = [table.options(choice.name) for table, choice in members]
    if rule.speedup == 1.0 or not options:
        return []
    whole = network.measure(())["dense"].p50
    share, rounds, seen = 1.0, [], set()
    for turn in range(rule.rounds):
        if progress is not None:
            progress(turn, rule.rounds, "latency of the network")
        needed = whole * (1 - 1 / rule.speedup) / share
        chosen = _choose(options, needed)
        if chosen in seen:
            break
        seen.add(chosen)
        saved = -sum(table[place][0] for table, place in zip(options, chosen, strict=True))
        loss = sum(table[place][1] for table, place in zip(options, chosen, strict=True))
        left = max(whole - share * saved, 1e-3 * whole)
        times = network.measure(chosen)
        found = _Round(chosen, loss, saved, whole / left, times["dense"], times["compressed"], False)
        if _near(rule, found):
            # It may look near by chance alone: only what does so twice ends the search.
            times = network.measure(chosen, 2.0)
            found = replace(found, dense=times["dense"], compressed=times["compressed"], sure=True)
        rounds.append(found)
        if _near(rule, found):
            break
        whole = found.dense.p50
        if saved > 0:
            # A network that did not gain at all tells little: from one round to the next at most fourfold.
            real = max((whole - found.compressed.p50) / saved, share / 4)
            share = min(real, share * 4)
    return rounds


def _near(rule: Latency, found: _Round) -> bool:
    return abs(found.speedup / rule.speedup - 1) <= rule.tolerance


def _choose(options: Sequence[Sequence[tuple[float, float]]], needed: float) -> tuple[int, ...]:
    """The options that save what is needed at the least loss, or the fastest ones where none do."""
    found = knapsack(options, -needed)
    if found is not None:
        return found.chosen
    return tuple(min(range(len(table)), key=lambda k: table[k]) for table in options)


def _best(rule: Latency, rounds: Sequence[_Round]) -> _Round | None:
    """The least loss of what is fast enough, else the fastest."""
    enough = [entry for entry in rounds if entry.speedup >= rule.speedup * (1 - rule.tolerance)]
    if enough:
        return min(enough, key=lambda entry: entry.loss)
    return max(rounds, key=lambda entry: entry.speedup, default=None)


def _rank(table: Table, place: int) -> Ranks | None:
    return None if place == 0 else table.ranks[place - 1]


def _batch(example_inputs: Any) -> int | None:
    first = next((leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, torch.Tensor)), None)
    return None if first is None or first.dim() == 0 else first.shape[0]


def _shortfall(
    rule: Latency,
    members: Sequence[tuple[Table, Choice]],
    rounds: Sequence[_Round],
    reached: float,
    medians: Sequence[float],
) -> str:
    """What to say where a speed-up was not reached; ``medians`` are all those of the dense network."""
    text = f"compress: {rule} was not reached: the compressed network is measured {reached:.2f}x as fast"
    if rounds:
        whole = rounds[-1].dense.p50
        layers = sum(table.dense_seconds for table, _ in members)
        least = sum(min(0.0, *(s - table.dense_seconds for s in table.seconds)) for table, _ in members)
        text += (
            f"; the layers it may replace take {layers / whole:.0%} of the dense network's time, and at the "
            f"smallest ranks measured {(layers + least) / whole:.0%}"
        )
    if max(medians) > BUSY * min(medians):
        text += (
            f"; the dense network itself took {max(medians) / min(medians):.1f} times as long at one time as "
            "at another, so that figures do not fit together: choose by latency on a quiet machine"
        )
    return f"{text}. report.details['latency_rule'] has every measurement"


def replay(details: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Ranks by layer (None: dense) from the measurements in ``report.details["latency_rule"]``, chosen again.

    The knapsack over the recorded tables at the saving of the final choice. Raises KeyError for others.
    """
    names, options, ranks = [], [], []
    for table in details["tables"]:
        for name, losses in table["layers"].items():
            saved = [seconds - table["dense_seconds"] for seconds in table["seconds"]]
            names.append(name)
            options.append([(0.0, 0.0), *zip(saved, losses, strict=True)])
            ranks.append([None, *(tuple(rank) for rank in table["ranks"])])
    chosen = _choose(options, details["saved_seconds"])
    return {name: known[place] for name, known, place in zip(names, ranks, chosen, strict=True)}
