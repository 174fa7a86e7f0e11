"""``tensorcomp compress``: a trained network in, a smaller and faster one out, with what it cost."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.cli.common import (
    RANK_HELP,
    Screen,
    check_model,
    parse_batches,
    parse_ranks,
    warn_of_loss,
)
from tensorcomp_ext.cli.html import write_report
from tensorcomp_ext.cli.networks import example, load_images, load_network
from tensorcomp_ext.cli.recipes import (
    Common,
    Recipe,
    recipe_class,
    recipe_names,
    recipe_values,
)
from tensorcomp_ext.cli.recipes.base import one_of
from tensorcomp_ext.cli.spectra import add_spectra
from tensorcomp_ext.cli.summary import state_bytes, summary_table
from tensorcomp_ext.compress.latency import measure_network
from tensorcomp_ext.compress.measure import refresh
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.storage import save
from tensorcomp_ext.compress.surgery import compress as compress_network
from tensorcomp_ext.formats import format_names
from tensorcomp_ext.plan import tune as tune_plans
from tensorcomp_ext.ranks import VBMF
from tensorcomp_ext.recipes.settings import OPTIMIZERS, PRECISIONS

LAYER_SECONDS = 0.05  # measuring time per layer: 20 to 1,000 calls, enough for a median


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
    epochs: Annotated[
        int,
        typer.Option("--epochs", "--finetune-epochs", min=0, help="Epochs of training, or of fine-tuning."),
    ] = 0,
    lr: Annotated[
        float | None,
        typer.Option(min=0, help="Largest learning rate of that training; the recipe's own, or 0.01."),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help=f"Of that training: {', '.join(OPTIMIZERS)}; the recipe's own, or sgd.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"A procedure that chooses ranks, trains, or both: {', '.join(recipe_names())}. "
            "--recipe NAME --help shows its options.",
        ),
    ] = None,
    train_batch: Annotated[int, typer.Option(min=1, help="Images a step of that training.")] = 128,
    precision: Annotated[
        str, typer.Option(help=f"Of that training: {' or '.join(PRECISIONS)} (autocast).")
    ] = "float32",
    logs: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for its history: CSV, JSON lines, TensorBoard's events."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Recipe: written after every epoch, and gone on from."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="Seed of training, of what is drawn, of images to recalibrate on."),
    ] = 0,
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
    batches = parse_batches(batch)
    one_of("optimizer", optimizer or "sgd", OPTIMIZERS)
    one_of("precision", precision, PRECISIONS)
    one_of("dataset", dataset, data.names())
    training: dict[str, Any] = {"seed": seed, "channels_last": channels_last, "checkpoint": resume}
    training |= {"precision": precision, "logs": logs, "batch_size": train_batch}
    training |= {key: value for key, value in (("lr", lr), ("optimizer", optimizer)) if value is not None}
    common = Common(
        epochs=epochs,
        training=training,
        rank=parse_ranks(rank) if rank else None,
        format=format,
        layers=layers,
        exclude=exclude,
        recalibrate=recalibrate,
        explicit=_given(context),
    )
    procedure: Recipe | None = None
    if recipe is not None:
        procedure = recipe_class(recipe)(**recipe_values(context))
        procedure.check(recipe, common)
    has_images = data_dir is not None or dataset == "digits"
    if epochs and not has_images:
        raise typer.BadParameter("training needs --data", param_hint="--epochs")
    if procedure is not None and not has_images:
        raise typer.BadParameter("a recipe needs --data", param_hint="--recipe")
    if recalibrate and not has_images:
        raise typer.BadParameter("recalibration needs --data", param_hint="--recalibrate")
    if resume is not None and procedure is None:  # of fine-tuning alone a checkpoint does not say the start
        raise typer.BadParameter("this is for --recipe, which is not given", param_hint="--resume")
    for path in (output, html, resume):
        _check_folder(path)
    screen = Screen(as_json)
    learns = recalibrate or epochs > 0 or procedure is not None
    images = load_images(model, dataset, data_dir, train=learns)
    drawn = procedure is not None and procedure.draws
    dense, images, options = load_network(model, weights, images, drawn, seed)
    if procedure is not None and recipe is not None:
        procedure.check_network(recipe, dense)
    if channels_last:
        dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dense.eval()

    summary: dict[str, Any] = {"model": model, "options": options, "accuracy": {}, "latency": {}}
    if images is not None:
        summary["images"] = {"dataset": images.name, "test": len(images.test_labels)}
        _score(screen, summary, "before", dense, images, channels_last)
    inputs = example(images, options, model, batches[0], channels_last)
    if procedure is not None and recipe is not None:
        assert images is not None  # as checked above
        made = procedure.run(recipe, common, screen, dense, images, inputs)
        small, report = made.model, made.report
        summary |= report.details
        learned = "trained" if drawn else "finetuned"
        _score(screen, summary, learned if epochs else "decomposed", small, images, channels_last)
    else:
        with screen.progress("decomposing") as tick:
            small, report = compress_network(
                dense,
                format=format,
                rank=VBMF() if common.rank is None else common.rank,
                example_inputs=inputs,
                layers=layers or None,
                exclude=exclude or (),
                progress=tick,
            )
        summary |= report.details
    if images is not None and procedure is None:
        _score(screen, summary, "decomposed", small, images, channels_last)
        if recalibrate:
            if recipes.recalibrate_batchnorm(small, images, seed=seed, channels_last=channels_last):
                _score(screen, summary, "recalibrated", small, images, channels_last)
            else:
                warnings.warn("--recalibrate: the network has no batch normalisation", stacklevel=1)
        if epochs:
            with screen.training("fine-tuning") as step:
                recipes.finetune(small, images, epochs=epochs, progress=step, **training)
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
    _warn(summary["accuracy"], epochs, recipe)
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


def _score(
    screen: Screen, summary: dict[str, Any], when: str, model: nn.Module, images: data.Dataset, last: bool
) -> None:
    counted = recipes.evaluate(model, images, "test", channels_last=last)
    summary["accuracy"][when] = counted._asdict()
    label = {"before": "dense", "finetuned": "fine-tuned"}.get(when, when)
    screen.say(f"{label + ':':13} {counted.correct} of {counted.total} test images correct")


def _warn(accuracy: dict[str, dict[str, int]], epochs: int, recipe: str | None) -> None:
    """Warn where the last step left the network much worse than it came."""
    if len(accuracy) < 2:
        return
    before, *_, after = (recipes.Accuracy(**counted) for counted in accuracy.values())
    more = f"more than {epochs} epochs of training or another --lr"
    first = more if epochs else "fine-tuning with --epochs 3"
    gentler = {
        None: "gentler ranks such as --rank energy:0.95",
        "lowrank-sparse": "a smaller --sparsity",
        "sparse": "a smaller --sparsity",
    }.get(recipe, f"gentler options of --recipe {recipe}, see its --help")
    warn_of_loss(before, after, f"{first}, or {gentler}")


def _given(context: typer.Context) -> frozenset[str]:
    """Names of the options that stood on the command line."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return frozenset(name for name, source in sources if source is not None and source.name == "COMMANDLINE")


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
