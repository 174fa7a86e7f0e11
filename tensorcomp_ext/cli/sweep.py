"""``tensorcomp bench --sweep``: one network at several ranks, what each costs and what it is worth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from tensorcomp_ext import data, recipes
from tensorcomp_ext.bench.suite import write_json
from tensorcomp_ext.cli.common import Screen, Tick, check_model, parse_rank
from tensorcomp_ext.cli.html import environment, write_html
from tensorcomp_ext.cli.networks import example, load_images, load_network
from tensorcomp_ext.compress.latency import Latency, measure_network
from tensorcomp_ext.compress.surgery import compress, count_parameters
from tensorcomp_ext.plan import tune

RANKS = ("0.1", "0.2", "0.3", "0.5", "energy:0.8", "energy:0.9", "energy:0.95")
FORMAT = 1


def sweep(
    dense: nn.Module,
    x: torch.Tensor,
    ranks: Sequence[str] = RANKS,
    *,
    images: data.Dataset | None = None,
    channels_last: bool = True,
    seconds: float = 2.0,
    min_seconds: float = 0.03,
    progress: Tick | None = None,
) -> list[dict[str, Any]]:
    """Compress ``dense`` at every rank, tune and measure it beside ``dense``; the first point is ``dense``.

    Arguments:
        x: example input; latencies are of this batch.
        ranks: as the command line takes them.
        images: count correct answers on its test images, too.
        seconds: measuring time of each network; min_seconds: of each candidate plan while tuning.

    A point has "rank", "parameters", "macs", "output_error" (relative L2, None for ``dense``), "latency"
    and "dense_latency" ({"p10", "p50", "p90"} in seconds, measured in turn), "replaced" (layers) and, with
    images, "accuracy" ({"correct", "total"}). Nothing is fine-tuned.
    """
    tick = progress or (lambda done, total, what: None)
    dense.eval()

    def score(model: nn.Module) -> dict[str, Any]:
        if images is None:
            return {}
        return {"accuracy": recipes.evaluate(model, images, "test", channels_last=channels_last)._asdict()}

    points: list[dict[str, Any]] = []
    for done, rank in enumerate(ranks):
        tick(done, len(ranks), rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ranks clipped, nothing replaced: the point says so
            small, report = compress(dense, rank=parse_rank(rank), example_inputs=x)
        small.eval()
        if report.replaced:
            tune(small, x, min_seconds=min_seconds)
        taken = measure_network({"dense": dense, "compressed": small}, x, seconds)
        points.append(
            {
                "rank": rank,
                "parameters": report.parameters_after,
                "macs": report.macs_after,
                "output_error": report.output_error,
                "latency": taken["compressed"]._asdict(),
                "dense_latency": taken["dense"]._asdict(),
                "replaced": len(report.replaced),
                **score(small),
            }
        )
        macs = report.macs_before
    tick(len(ranks), len(ranks), "")
    if not points:
        return points
    first = {
        "rank": "dense",
        "parameters": count_parameters(dense),
        "macs": macs,
        "output_error": None,
        "latency": points[0]["dense_latency"],
        "dense_latency": points[0]["dense_latency"],
        "replaced": 0,
        **score(dense),
    }
    return [first, *points]


def run_sweep(
    screen: Screen,
    name: str,
    ranks: Sequence[str] | None,
    weights: Path | None,
    source: tuple[str, Path | None],
    batch: int,
    seconds: float | None,
    html: Path | None,
    output: Path | None,
) -> None:
    """The command: build or load the network, sweep, show, and write JSON (``-`` for stdout) and HTML.

    Arguments:
        source: name of the data set and its folder; "digits" needs none.
    """
    check_model(name)
    for rank in ranks or ():
        parse_rank(rank)
    images = load_images(name, *source, train=False)
    dense, images, options = load_network(name, weights, images)
    dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = example(images, options, name, batch, channels_last=True)
    with screen.progress("sweep") as tick:
        points = sweep(dense, x, ranks or RANKS, images=images, seconds=seconds or 2.0, progress=tick)
    screen.show(sweep_table(points))
    found = {"format": FORMAT, "suite": "sweep", "network": name, "batch": batch, "points": points}
    found["environment"] = environment()
    if output is not None and str(output) != "-":
        write_json(output, found)
    if html is not None:
        title = f"{name} at several ranks"
        write_html(html, {"title": title, "sweep": points, "environment": environment()})
        screen.say(f"wrote the report {html}")
    screen.result(found)


def sweep_table(points: Sequence[dict[str, Any]]) -> Table:
    """A line for each rank."""
    scored = bool(points) and "accuracy" in points[0]
    heads = ("rank", "layers", "parameters", "MACs", "output error", "ms p50", "over dense")
    table = Table(*heads, *(("correct",) if scored else ()), title="ranks")
    cell: Callable[[Any], str] = lambda value: "" if value is None else f"{value:,}"  # noqa: E731
    for point in points:
        mine, dense = Latency(**point["latency"]), Latency(**point["dense_latency"])
        noisy = mine.noisy or dense.noisy
        cells = [point["rank"], str(point["replaced"]), cell(point["parameters"]), cell(point["macs"])]
        cells.append("" if point["output_error"] is None else f"{point['output_error']:.3f}")
        cells += [f"{mine.p50 * 1e3:.2f}", "noisy" if noisy else f"{dense.p50 / mine.p50:.2f}×"]
        if scored:
            cells.append(f"{point['accuracy']['correct']} of {point['accuracy']['total']}")
        table.add_row(*cells)
    return table
