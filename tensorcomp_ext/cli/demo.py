"""``tensorcomp demo``: train a small network, compress it twice, and show what that brought."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.cli import plots
from tensorcomp_ext.cli.common import Screen, check_model, parse_batches, warn_of_loss
from tensorcomp_ext.cli.html import environment, write_html
from tensorcomp_ext.cli.networks import IMAGE_SIZE, example
from tensorcomp_ext.cli.spectra import add_spectra
from tensorcomp_ext.cli.summary import state_bytes, summary_table
from tensorcomp_ext.compress.latency import measure_network
from tensorcomp_ext.compress.measure import refresh
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.storage import load, save
from tensorcomp_ext.compress.surgery import compress
from tensorcomp_ext.data.digits import INSTALL_DEMO
from tensorcomp_ext.plan import tune as tune_plans
from tensorcomp_ext.ranks import VBMF, Energy, RankRule

RULES: dict[str, RankRule] = {"VBMF": VBMF(), "energy 0.95": Energy(0.95)}
TUNE_SECONDS, LAYER_SECONDS, NETWORK_SECONDS = 0.03, 0.04, 1.5  # per candidate, per layer, per batch size


@dataclass(frozen=True)
class Lesson:
    """How long and how fast a data set is learnt, and learnt again after decomposition.

    ``decay`` is the L2 coefficient on the convolution weights while training; see `_train`.
    """

    epochs: int
    batch: int
    decay: float = 0.05
    lr: float = 0.1
    tuning_epochs: int = 1
    tuning_lr: float = 0.02


LESSONS = {
    "digits": Lesson(epochs=8, batch=64, tuning_epochs=2),
    "mnist": Lesson(epochs=2, batch=128),
    "fashion-mnist": Lesson(epochs=2, batch=128),
    "kmnist": Lesson(epochs=2, batch=128),
    "cifar10": Lesson(epochs=5, batch=128, decay=0.02),
    "cifar100": Lesson(epochs=5, batch=128, decay=0.02),
    "svhn": Lesson(epochs=2, batch=128, decay=0.02),
}


@dataclass(frozen=True)
class Setting:
    """What all steps of one demonstration share."""

    screen: Screen
    model: str
    options: dict[str, Any]
    images: data.Dataset
    lesson: Lesson
    seed: int
    batches: tuple[int, ...]
    output: Path

    def input(self, batch: int) -> torch.Tensor:
        return example(self.images, self.options, self.model, batch, channels_last=True)

    def score(self, model: nn.Module) -> recipes.Accuracy:
        return recipes.evaluate(model, self.images, "test", channels_last=True)


def demo(
    data_dir: Annotated[
        Path | None,
        typer.Option("--data", exists=True, file_okay=False, help="Folder with the files of the data set."),
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"Data set: {', '.join(data.names())}.")] = "digits",
    model: Annotated[str, typer.Option(help=f"Network: {', '.join(models.names())}.")] = "resnet20",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of training; by default as many as the data set needs.")
    ] = None,
    train_images: Annotated[
        int | None, typer.Option(min=1, help="Train on the first so many images only.")
    ] = None,
    html: Annotated[Path, typer.Option(dir_okay=False, help="Write the report here.")] = Path("report.html"),
    output: Annotated[Path, typer.Option(file_okay=False, help="Save the networks here.")] = Path(
        "runs/demo"
    ),
    batch: Annotated[str, typer.Option(help="Batch sizes to tune and measure for.")] = "1,64",
    seed: Annotated[int, typer.Option(help="Seed of initial weights and training.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a network, compress it with VBMF and with energy ranks, fine-tune, tune, measure and save it."""
    check_model(model)
    if dataset not in data.names():
        raise typer.BadParameter(f"{dataset!r} is none of {', '.join(data.names())}", param_hint="--dataset")
    if dataset != "digits" and data_dir is None:
        raise typer.BadParameter(f"{dataset} needs --data, the folder of its files", param_hint="--data")
    if not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"no folder {html.absolute().parent}", param_hint="--html")
    batches = parse_batches(batch)
    if threads is not None:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    screen = Screen(as_json)
    if not plots.available():
        typer.echo(f"no plots in the report without {INSTALL_DEMO.format(module='matplotlib')}", err=True)
    size = IMAGE_SIZE.get(model, 32 if dataset == "digits" or model == "vgg16" else None)
    images = data.load(dataset, data_dir, size=size).first(train=train_images)
    options: dict[str, Any] = {"num_classes": len(images.classes), "in_channels": images.channels}
    if model in ("lenet5", "mlp"):
        options["input_size"] = images.image_size[0]
    lesson = LESSONS[dataset]
    output.mkdir(parents=True, exist_ok=True)
    setting = Setting(screen, model, options, images, lesson, seed, batches, output)

    screen.say(
        f"{model} on {dataset}: {len(images.train_labels):,} training images, "
        f"{len(images.test_labels):,} held-out test images"
    )
    torch.manual_seed(seed)
    dense = models.build(model, **options)
    history = _train(setting, dense, epochs or lesson.epochs)
    trained = setting.score(dense)
    screen.say(f"dense: {trained} after {len(history)} epochs, {sum(e.seconds for e in history):.0f} s")
    save(dense, output / "dense.safetensors", meta=_meta(setting))

    reports = {name: _run(setting, dense, name, trained) for name in RULES}
    write_html(
        html,
        {
            "title": f"{model} on {dataset}, compressed to Tucker-2",
            "description": _description(setting, dense, trained, len(history)),
            "environment": environment(),
            "runs": [{"name": name, "report": report} for name, report in reports.items()],
        },
    )
    seconds = time.perf_counter() - started
    screen.say(f"wrote {html} and the networks in {output}; {seconds:.0f} s in all")
    screen.result(
        {
            "model": {"name": model, **options},
            "dataset": dataset,
            "images": {"train": len(images.train_labels), "test": len(images.test_labels)},
            "seed": seed,
            "history": [epoch.to_dict() for epoch in history],
            "runs": [{"name": name, "report": report.to_dict()} for name, report in reports.items()],
            "html": str(html),
            "seconds": seconds,
        }
    )


def _train(setting: Setting, model: nn.Module, epochs: int) -> list[recipes.Epoch]:
    """Train from scratch, with an L2 penalty on the convolutions that is the NRMF regulariser.

    A network trained briefly still carries its random initial weights, which have full rank. The penalty lets
    them decay, so that the weights left are those the data asked for; batch normalisation keeps the scale.
    """
    convolutions = [p for p in model.parameters() if p.dim() == 4]
    others = [p for p in model.parameters() if p.dim() != 4]
    normalised = _normalised(model)
    groups: list[dict[str, Any]] | None = None
    if normalised:
        groups = [{"params": convolutions, "weight_decay": setting.lesson.decay}, {"params": others}]
    lesson = setting.lesson
    with setting.screen.training("training") as step:
        return recipes.train(
            model,
            setting.images,
            epochs=epochs,
            lr=lesson.lr if normalised else lesson.lr / 5,
            batch_size=lesson.batch,
            seed=setting.seed,
            channels_last=True,
            parameters=groups,
            progress=step,
        ).history


def _run(setting: Setting, dense: nn.Module, name: str, trained: recipes.Accuracy) -> Report:
    """Compress, fine-tune, tune, measure, save, reload and compare, with one rule for the ranks."""
    screen, lesson, images = setting.screen, setting.lesson, setting.images
    dense.eval()
    # Ten classes need most of the last layer's rank, and it is small.
    last = [layer for layer, module in dense.named_modules() if isinstance(module, nn.Linear)][-1]
    with screen.progress(f"{name}: decomposing") as tick:
        small, report = compress(
            dense,
            rank=RULES[name],
            example_inputs=setting.input(setting.batches[0]),
            exclude=last,
            progress=tick,
        )
    decomposed = setting.score(small)
    with screen.training(f"{name}: fine-tuning") as step:
        recipes.finetune(
            small,
            images,
            epochs=lesson.tuning_epochs,
            lr=lesson.tuning_lr,
            batch_size=lesson.batch,
            seed=setting.seed,
            channels_last=True,
            progress=step,
        )
    finetuned = setting.score(small)
    small.eval()
    inputs = [setting.input(size) for size in setting.batches]
    if report.replaced:  # an energy rule may find that no layer would get smaller
        with screen.progress(f"{name}: tuning") as tick:
            tune_plans(small, inputs, progress=tick, min_seconds=TUNE_SECONDS)
    with screen.progress(f"{name}: measuring") as tick:
        refresh(report, small, inputs[0], dense, LAYER_SECONDS, tick)
    latency = {}
    for x in inputs:
        taken = measure_network({"dense": dense, "compressed": small}, x, NETWORK_SECONDS)
        latency[str(len(x))] = {network: value._asdict() for network, value in taken.items()}
    report.details = {
        "model": setting.model,
        "rank": name,
        "accuracy": {
            "before": trained._asdict(),
            "decomposed": decomposed._asdict(),
            "finetuned": finetuned._asdict(),
        },
        "latency": latency,
        "bytes": {"before": state_bytes(dense), "after": state_bytes(small)},
    }
    add_spectra(report, dense)
    path = setting.output / f"{name.replace(' ', '-').lower()}.safetensors"
    save(small, path, report=report, meta=_meta(setting))
    report.details["files"] = {
        "before": (setting.output / "dense.safetensors").stat().st_size,
        "after": path.stat().st_size,
    }
    report.details["reload"] = _reload(setting, small, path)
    screen.show(report.table(f"{name}: layers, one call with a batch of {setting.batches[0]}"))
    screen.show(summary_table(report.details))
    screen.say(
        f"{name}: {trained} dense, {decomposed} decomposed, {finetuned} fine-tuned; "
        f"saved {path} ({path.stat().st_size:,} bytes), loaded back with the same outputs"
    )
    warn_of_loss(trained, finetuned, "more epochs of training with --epochs")
    return report


def _reload(setting: Setting, saved: nn.Module, path: Path) -> dict[str, Any]:
    """Load the file into a fresh network and compare the outputs of both on test images."""
    fresh = load(path, models.build(setting.model, **setting.options))
    fresh = fresh.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = setting.input(64)
    with torch.inference_mode():
        expected, found = saved(x), fresh(x)
    distance = float((found - expected).norm() / expected.norm())
    if not distance <= 1e-5:
        raise RuntimeError(
            f"{path} gives other outputs than the network saved: relative distance {distance:.2e}"
        )
    return {"identical": bool(torch.equal(expected, found)), "relative_distance": distance}


def _meta(setting: Setting) -> dict[str, Any]:
    images = setting.images
    return {
        "model": {"name": setting.model, **setting.options},
        "normalization": {"mean": list(images.mean), "std": list(images.std)},
    }


def _normalised(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _description(setting: Setting, dense: nn.Module, trained: recipes.Accuracy, epochs: int) -> list[str]:
    images, lesson = setting.images, setting.lesson
    decay = f" Weight decay of {lesson.decay} on the convolutions while training made for low ranks."
    return [
        f"A {setting.model} was trained for {epochs} epochs on {len(images.train_labels):,} images of "
        f"{images.name}, and classifies {trained} held-out test images correctly. It was then compressed "
        "twice: convolutions to Tucker-2, linear layers to a truncated SVD, the last layer left as it was.",
        "The ranks come from the weights alone, once by variational Bayesian matrix factorisation (VBMF), "
        "once by keeping 95 % of the energy of each unfolding." + (decay if _normalised(dense) else ""),
        f"After decomposition each network was fine-tuned for {lesson.tuning_epochs} epoch(s), and the "
        "fastest way to run each layer was measured on this machine; where no factorised way is faster, the "
        "layer runs dense from a cached weight.",
        "Latencies are of alternating calls of the dense and the compressed network in one process. Each "
        "network was saved, loaded into a fresh one, and gave the same outputs.",
    ]
