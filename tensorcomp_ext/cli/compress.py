"""``tensorcomp compress``: a trained network in, a smaller and faster one out, with what it cost."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.cli.common import (
    RANK_HELP,
    Screen,
    build_from,
    check_model,
    is_checkpoint,
    parse_batches,
    parse_ranks,
    warn_of_loss,
)
from tensorcomp_ext.cli.html import write_report
from tensorcomp_ext.cli.recipe import NAMES, Recipe, parse_low_rank, refuse_without_recipe, stored_rows
from tensorcomp_ext.cli.spectra import add_spectra
from tensorcomp_ext.compress.latency import Latency, faster, measure_network
from tensorcomp_ext.compress.measure import refresh
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.storage import read_header, save
from tensorcomp_ext.compress.surgery import compress as compress_network
from tensorcomp_ext.formats import format_names
from tensorcomp_ext.plan import tune as tune_plans
from tensorcomp_ext.recipes.settings import OPTIMIZERS

LAYER_SECONDS = 0.05  # measuring time per layer: 20 to 1,000 calls, enough for a median
IMAGE_SIZE = {"lenet5": 28, "deit_small": 224}  # side of the images a network is given, 32 unless named


def compress(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=f"Network: {', '.join(models.names())}.")],
    rank: Annotated[list[str] | None, typer.Option(help=RANK_HELP)] = None,
    weights: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Trained weights: a torch file or one of ours."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data", exists=True, file_okay=False, help="Folder with the files of the data set."),
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"Data set: {', '.join(data.names())}.")] = "cifar10",
    format: Annotated[
        str | None,
        typer.Option(
            help="Format for all layers that it is for; the others stay dense: "
            f"{', '.join(format_names())}. By default each layer gets the one for its kind."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Replace only layers of such names. Repeat.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave layers of such names dense. Repeat.")
    ] = None,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            help="Measure batch normalisation again after decomposition, on up to 1,280 training images.",
        ),
    ] = False,
    finetune_epochs: Annotated[int, typer.Option(min=0, help="Epochs of training after decomposition.")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="Largest learning rate of that training.")] = 0.01,
    optimizer: Annotated[str, typer.Option(help=f"Of that training: {', '.join(OPTIMIZERS)}.")] = "sgd",
    recipe: Annotated[
        str | None,
        typer.Option(help=f"Compress while training for --finetune-epochs: {NAMES}. Needs no --rank."),
    ] = None,
    low_rank: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[conv=|linear=]NAME",
            help="Recipe: format of the low-rank parts, tt by default. Twice for one of each kind of layer.",
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Recipe: the sparse part is added (additive) or takes the place (masking).")
    ] = "additive",
    init: Annotated[
        str, typer.Option(help="Recipe: fit the weights (residual) or those below the largest (masking).")
    ] = "residual",
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Recipe: share of a layer's weights for its low-rank part.")
    ] = 0.1,
    sparsity: Annotated[
        float, typer.Option(min=0, max=1, help="Recipe: share of the sparse parts that is pruned.")
    ] = 0.9,
    storage: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Recipe: instead, share of the weights stored, low-rank parts too."),
    ] = None,
    prune_epochs: Annotated[
        int | None, typer.Option(min=1, help="Recipe: epochs until the sparsity is reached; all by default.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Recipe: share of the labels in the loss, not of the teacher.")
    ] = 0.9,
    temperature: Annotated[float, typer.Option(help="Recipe: by which the logits are divided.")] = 3.0,
    sparsity_schedule: Annotated[
        str, typer.Option(help="Recipe: slow-start (at the end most) or zhu-gupta (at the start most).")
    ] = "slow-start",
    criterion: Annotated[
        str,
        typer.Option(help="Recipe: what is small: magnitude of S or, with --mode masking, difference S - L."),
    ] = "magnitude",
    direction: Annotated[
        str,
        typer.Option(help="Recipe: divergence learned from: teacher-student (Hinton) or student-teacher."),
    ] = "teacher-student",
    resume: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Recipe: written after every epoch, and gone on from."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of that training and of the images to recalibrate on.")] = 0,
    output: Annotated[Path | None, typer.Option(dir_okay=False, help="Save the network here.")] = None,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Write a report for a browser.")] = None,
    tune: Annotated[bool, typer.Option(help="Measure the plans of every layer and keep the fastest.")] = True,
    batch: Annotated[str, typer.Option(help="Batch sizes to tune and measure for.")] = "1,64",
    seconds: Annotated[
        float, typer.Option(min=0, help="Measuring time for the network per batch size.")
    ] = 3.0,
    channels_last: Annotated[
        bool, typer.Option("--channels-last/--contiguous", help="Memory format of network and images.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compress a trained network, fine-tune it, tune it for this machine, measure it and save it."""
    check_model(model)
    if format is not None and format not in format_names():
        raise typer.BadParameter(f"{format!r} is none of {', '.join(format_names())}", param_hint="--format")
    ranks, batches = parse_ranks(rank or ["vbmf"]), parse_batches(batch)
    procedure: Recipe | None = None
    if recipe is not None:
        # The options of a recipe have the names of its fields.
        names = [field for field in Recipe.__dataclass_fields__ if field not in ("method", "low_rank")]
        options_of = {name: context.params[name] for name in names}
        procedure = Recipe(recipe, parse_low_rank(low_rank), **options_of)
        procedure.check(finetune_epochs, rank, (format, layers, recalibrate))
    else:
        refuse_without_recipe(context)
    if optimizer not in OPTIMIZERS:
        raise typer.BadParameter(
            f"{optimizer!r} is none of {', '.join(OPTIMIZERS)}", param_hint="--optimizer"
        )
    if dataset not in data.names():
        raise typer.BadParameter(f"{dataset!r} is none of {', '.join(data.names())}", param_hint="--dataset")
    if finetune_epochs and data_dir is None and dataset != "digits":
        raise typer.BadParameter("fine-tuning needs --data", param_hint="--finetune-epochs")
    if recalibrate and data_dir is None and dataset != "digits":
        raise typer.BadParameter("recalibration needs --data", param_hint="--recalibrate")
    if resume is not None and procedure is None:  # of fine-tuning alone a checkpoint does not say the start
        raise typer.BadParameter("this is for --recipe, which is not given", param_hint="--resume")
    for path in (output, html, resume):
        _check_folder(path)
    screen = Screen(as_json)
    images = load_images(model, dataset, data_dir, train=recalibrate or finetune_epochs > 0)
    dense, images, options = load_network(model, weights, images)
    if channels_last:
        dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dense.eval()

    summary: dict[str, Any] = {"model": model, "options": options, "accuracy": {}, "latency": {}}
    if images is not None:
        summary["images"] = {"dataset": images.name, "test": len(images.test_labels)}
        _score(screen, summary, "before", dense, images, channels_last)
    inputs = example(images, options, model, batches[0], channels_last)
    training: dict[str, Any] = {"epochs": finetune_epochs, "lr": lr, "optimizer": optimizer, "seed": seed}
    training |= {"channels_last": channels_last, "checkpoint": resume}
    if procedure is not None:
        assert images is not None  # as checked above: epochs need images
        made = procedure.run(screen, dense, images, inputs, exclude or (), **training)
        small, report = made.model, made.report
        summary |= report.details
        _score(screen, summary, "finetuned", small, images, channels_last)
    else:
        with screen.progress("decomposing") as tick:
            small, report = compress_network(
                dense,
                format=format,
                rank=ranks,
                example_inputs=inputs,
                layers=layers or None,
                exclude=exclude or (),
                progress=tick,
            )
    if images is not None and procedure is None:
        _score(screen, summary, "decomposed", small, images, channels_last)
        if recalibrate:
            if recipes.recalibrate_batchnorm(small, images, seed=seed, channels_last=channels_last):
                _score(screen, summary, "recalibrated", small, images, channels_last)
            else:
                warnings.warn("--recalibrate: the network has no batch normalisation", stacklevel=1)
        if finetune_epochs:
            with screen.training("fine-tuning") as step:
                recipes.finetune(small, images, progress=step, **training)
            _score(screen, summary, "finetuned", small, images, channels_last)
    small.eval()
    if not report.replaced:
        warnings.warn(_nothing_compressed(report, weights is None), stacklevel=1)
    elif tune:
        tune_for(screen, small, images, options, model, batches, channels_last)
    with screen.progress("measuring layers") as tick:
        refresh(report, small, inputs, dense, LAYER_SECONDS, tick)
    for size in batches:
        images_of = example(images, options, model, size, channels_last)
        taken = measure_network({"dense": dense, "compressed": small}, images_of, seconds)
        summary["latency"][str(size)] = {name: value._asdict() for name, value in taken.items()}
    summary["bytes"] = {"before": state_bytes(dense), "after": state_bytes(small)}
    report.details = summary
    if html is not None:
        add_spectra(report, dense)

    if output is not None:
        meta: dict[str, Any] = {"model": {"name": model, **options}}
        if images is not None:
            meta["normalization"] = {"mean": list(images.mean), "std": list(images.std)}
        save(small, output, report=report, meta=meta)
        summary["output"] = {"path": str(output), "bytes": output.stat().st_size}
    if html is not None:
        write_report(html, report)
    screen.show(report.table(f"{model}, one call with a batch of {batches[0]}"))
    screen.show(summary_table(summary))
    if output is not None:
        screen.say(f"saved {output} ({output.stat().st_size:,} bytes)")
    if html is not None:
        screen.say(f"wrote the report {html}")
    _warn(summary["accuracy"], finetune_epochs, lr, procedure is not None)
    screen.result({**summary, "report": report.to_dict()})


def _nothing_compressed(report: Report, untrained: bool) -> str:
    """Why the network is as it was, and what to do about it."""
    reasons = Counter(layer.skipped for layer in report.skipped)
    listed = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.most_common(3))
    if untrained:
        advice = (
            "random weights have no low-rank structure to find: give trained ones with --weights, or ranks "
            "that do not look at the weights, such as --rank 0.5"
        )
    else:
        advice = "smaller ranks, such as --rank 0.5, would compress it"
    return f"nothing was compressed and nothing tuned ({listed or 'no layer to compress'}); {advice}"


def _check_folder(path: Path | None) -> None:
    """Fail before hours of work rather than after: the file's folder must exist."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(
            f"no folder {path.absolute().parent}", param_hint="--output, --html, --resume"
        )


def load_images(model: str, dataset: str, root: Path | None, train: bool) -> data.Dataset | None:
    """A data set at the size the network takes; None where it needs a folder and there is none."""
    if root is None and dataset != "digits":
        return None
    size = IMAGE_SIZE.get(model, 32)
    return data.load(dataset, root, size=None if dataset == "mnist" and size == 28 else size, train=train)


def load_network(
    name: str, weights: Path | None, images: data.Dataset | None
) -> tuple[nn.Module, data.Dataset | None, dict[str, Any]]:
    """The network with its weights, the images normalised as it expects them, and how to build it again."""
    options: dict[str, Any] = {}
    if images is not None:
        options = {"num_classes": len(images.classes), "in_channels": images.channels}
    if weights is None:
        warnings.warn("no --weights: the network has random weights", stacklevel=2)
        return models.build(name, **options), images, options
    if is_checkpoint(weights):
        header = read_header(weights)
        network = build_from(header, weights, name)
        recorded = header.meta.get("model")
        options = (
            {k: v for k, v in recorded.items() if k != "name"} if isinstance(recorded, dict) else options
        )
        normalization = header.meta.get("normalization")
        pair = (normalization["mean"], normalization["std"]) if isinstance(normalization, dict) else None
    else:
        network = models.build(name, **options)
        pair = models.load_weights(network, weights)
    if images is not None and pair is not None:
        images = images.with_normalization(*pair)
    return network, images, options


def example(
    images: data.Dataset | None, options: dict[str, Any], model: str, batch: int, channels_last: bool
) -> torch.Tensor:
    """A batch of the size wanted: test images, over again where they run out, else noise of their shape."""
    if images is None:
        size = int(options.get("input_size", models.image_size(model)))
        channels = int(options.get("in_channels", 1 if model == "lenet5" else 3))
        x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    else:
        x = images.normalize(images.test_images[torch.arange(batch) % len(images.test_labels)])
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _score(
    screen: Screen, summary: dict[str, Any], when: str, model: nn.Module, images: data.Dataset, last: bool
) -> None:
    counted = recipes.evaluate(model, images, "test", channels_last=last)
    summary["accuracy"][when] = counted._asdict()
    label = {"before": "dense", "finetuned": "fine-tuned"}.get(when, when)
    screen.say(f"{label + ':':13} {counted.correct} of {counted.total} test images correct")


def _warn(accuracy: dict[str, dict[str, int]], epochs: int, lr: float, recipe: bool) -> None:
    """Warn where the last step left the network much worse than it came."""
    if not accuracy:
        return
    before, *_, after = (recipes.Accuracy(**counted) for counted in accuracy.values())
    more = f"more than {epochs} epochs of fine-tuning or another --lr than {lr:g}"
    first = more if epochs else "fine-tuning with --finetune-epochs 3"
    gentler = "a smaller --sparsity" if recipe else "gentler ranks such as --rank energy:0.95"
    warn_of_loss(before, after, f"{first}, or {gentler}")


def tune_for(
    screen: Screen,
    model: nn.Module,
    images: data.Dataset | None,
    options: dict[str, Any],
    name: str,
    batches: tuple[int, ...],
    channels_last: bool,
) -> None:
    """Tune a network for several batch sizes."""
    inputs = [example(images, options, name, size, channels_last) for size in batches]
    with screen.progress("tuning") as tick:
        tune_plans(model, inputs, progress=tick)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def summary_table(summary: dict[str, Any]) -> Table:
    """Accuracy, size and latency of the whole network, before and after."""
    table = Table(title="network", show_lines=False)
    for column in ("", "dense", "compressed", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    accuracy = summary.get("accuracy") or {}
    for when in ("decomposed", "recalibrated", "finetuned"):
        if when in accuracy:
            before, after = accuracy["before"], accuracy[when]
            label = f"correct, {'fine-tuned' if when == 'finetuned' else when}"
            table.add_row(
                label, str(before["correct"]), str(after["correct"]), f"of {after['total']} test images"
            )
    for row in stored_rows(summary["lowrank_sparse"]) if "lowrank_sparse" in summary else ():
        table.add_row(*row)
    if "bytes" in summary:
        before, after = summary["bytes"]["before"], summary["bytes"]["after"]
        table.add_row(
            "bytes of weights", f"{before:,}", f"{after:,}", f"{before / max(after, 1):.2f}× smaller"
        )
    for batch, taken in (summary.get("latency") or {}).items():
        dense, small = Latency(**taken["dense"]), Latency(**taken["compressed"])
        for label, index in (("p50", 1), ("p90", 2)):
            ratio = "noisy" if dense.noisy or small.noisy else faster(dense[index], small[index])
            cells = (f"{dense[index] * 1e3:.2f}", f"{small[index] * 1e3:.2f}")
            table.add_row(f"ms at batch {batch}, {label}", *cells, ratio)
    return table
