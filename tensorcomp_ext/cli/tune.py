"""``tensorcomp tune``: measure the plans of a saved network here and keep the choice in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from tensorcomp_ext import models
from tensorcomp_ext.cli.common import Screen, build_from, check_model, parse_batches
from tensorcomp_ext.cli.networks import example
from tensorcomp_ext.compress.calls import trace
from tensorcomp_ext.compress.measure import refresh
from tensorcomp_ext.compress.selection import considered
from tensorcomp_ext.compress.storage import read_header, save
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.plan import tune as tune_plans


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
    device: Annotated[str, typer.Option(help="Where to tune: cpu, cuda or cuda:1.")] = "cpu",
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Tune for serving under CUDA graphs: time their replays.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the plans of every layer of a saved network on this machine and save the fastest."""
    if model is not None:
        check_model(model)
    batches = parse_batches(batch)
    place = parse_device(device)
    if cuda_graphs and place.type != "cuda":
        raise typer.BadParameter(f"there are none on {device}; add --device cuda", param_hint="--cuda-graphs")
    screen = Screen(as_json)
    header = read_header(checkpoint)
    network = build_from(header, checkpoint, model).to(place).eval()
    recorded = header.meta.get("model")
    options: dict[str, Any] = dict(recorded) if isinstance(recorded, dict) else {}
    name = str(model or options.get("name"))
    inputs = {size: example(None, options, name, size, channels_last).to(place) for size in batches}
    with screen.progress("tuning") as tick:
        examples = [*inputs.values()]
        tune_plans(network, examples, training=training, progress=tick, cuda_graphs=cuda_graphs)
    report = header.report
    if report is not None:
        refresh(report, network, inputs[batches[0]])
    target = output or checkpoint
    save(network, target, report=report, meta=header.meta or {"model": {"name": name}})

    layers = {name: layer for name, layer in considered(network) if isinstance(layer, FactorizedLayer)}
    found: dict[str, dict[str, Any]] = {}
    for size, x in inputs.items():
        _, calls = trace(network, layers, x)
        for layer_name, made in calls.items():
            if made:
                candidates = layers[layer_name].plans(made[0].input(), training=training)
                found.setdefault(layer_name, {})[str(size)] = [c.to_dict() for c in candidates]
    screen.show(_table(found))
    screen.say(f"saved {target}")
    screen.result({"checkpoint": str(checkpoint), "output": str(target), "layers": found})


def parse_device(text: str) -> torch.device:
    """The device of that name; typer.BadParameter for one that torch cannot use here."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise typer.BadParameter(f"{text!r} must be cpu, cuda or cuda:1", param_hint="--device") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{text!r} must be cpu, cuda or cuda:1", param_hint="--device")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise typer.BadParameter(f"{text!r}: torch has {count} CUDA devices here", param_hint="--device")
    return device


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
