"""``tensorcomp tune``: measure the plans of a saved network here and keep the choice in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tensorcomp_ext import models
from tensorcomp_ext.cli.common import Screen, build_from, check_model, parse_batches
from tensorcomp_ext.cli.compress import example, tune_for
from tensorcomp_ext.compress.calls import trace
from tensorcomp_ext.compress.measure import refresh
from tensorcomp_ext.compress.selection import considered
from tensorcomp_ext.compress.storage import read_header, save
from tensorcomp_ext.nn import FactorizedLayer


def tune(
    checkpoint: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Network saved by tensorcomp.")
    ],
    model: Annotated[
        str | None, typer.Option(help=f"Its kind, where the file does not say: {', '.join(models.names())}.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Save the tuned network here; default: the same file.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to tune for.")] = "1,64",
    channels_last: Annotated[
        bool, typer.Option("--channels-last/--contiguous", help="Memory format of the images.")
    ] = True,
    training: Annotated[bool, typer.Option(help="Tune for training steps instead of inference.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the plans of every layer of a saved network on this machine and save the fastest."""
    if model is not None:
        check_model(model)
    batches = parse_batches(batch)
    screen = Screen(as_json)
    header = read_header(checkpoint)
    network = build_from(header, checkpoint, model).eval()
    recorded = header.meta.get("model")
    options: dict[str, Any] = dict(recorded) if isinstance(recorded, dict) else {}
    name = str(model or options.get("name"))
    tune_for(screen, network, None, options, name, batches, channels_last, training)
    report = header.report
    if report is not None:
        refresh(report, network, example(None, options, name, batches[0], channels_last))
    target = output or checkpoint
    save(network, target, report=report, meta=header.meta or {"model": {"name": name}})

    layers = {name: layer for name, layer in considered(network) if isinstance(layer, FactorizedLayer)}
    found: dict[str, dict[str, Any]] = {}
    for size in batches:
        _, calls = trace(network, layers, example(None, options, name, size, channels_last))
        for layer_name, made in calls.items():
            if made:
                candidates = layers[layer_name].plans(made[0].input(), training=training)
                found.setdefault(layer_name, {})[str(size)] = [c.to_dict() for c in candidates]
    screen.show(_table(found))
    screen.say(f"saved {target}")
    screen.result({"checkpoint": str(checkpoint), "output": str(target), "layers": found})


def _table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table("layer", "batch", "plan", "ms", "the others")
    for layer, batches in found.items():
        for size, candidates in batches.items():
            chosen = next((c for c in candidates if c["chosen"]), None)
            others = [f"{c['name']}: {c['reason']}" for c in candidates if not c["chosen"]]
            name = chosen["name"] if chosen else "–"
            time = f"{chosen['measured'] * 1e3:.3f}" if chosen and chosen["measured"] else ""
            table.add_row(layer, size, name, time, "; ".join(others))
    return table
