"""What training and recipes refuse before any work: types, ranges, places, checkpoints of other runs."""

import dataclasses
import importlib
import os
import re

import pytest
import torch
from small_texts import sentences, text, translations
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.recipes.checkpoint import checksum


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(512, 4),
    )


def frozen():
    return network().requires_grad_(False)


WRONG = [
    ({"lr": "x"}, TypeError, "lr must be a number, got 'x'"),
    ({"batch_size": "8"}, TypeError, "batch_size must be an int, got '8'"),
    ({"batch_size": 2.5}, TypeError, "batch_size must be an int, got 2.5"),
    ({"epochs": True}, TypeError, "epochs must be an int, got True"),
    ({"accumulate": None}, TypeError, "accumulate must be an int, got None"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, got 'a'"),
    ({"augment": "yes"}, TypeError, "augment must be a bool, got 'yes'"),
    ({"channels_last": 1}, TypeError, "channels_last must be a bool, got 1"),
    ({"test_each_epoch": "no"}, TypeError, "test_each_epoch must be a bool, got 'no'"),
    ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
    ({"seed": 2**62}, ValueError, r"seed must be in [-2^42, 2^42], got 4611686018427387904"),
    ({"momentum": 1.0}, ValueError, "momentum must be in [0, 1), got 1.0"),
    ({"lr": float("inf")}, ValueError, "lr must be in [0, inf), got inf"),
    ({"schedule": 3}, ValueError, "schedule must be one of cosine"),
    ({"callbacks": [3]}, TypeError, "callbacks must be a sequence of Callback, got 3 among them"),
    ({"callbacks": None}, TypeError, "callbacks must be a sequence of Callback, got None"),
    ({"progress": 1}, TypeError, "progress must be a function or None, got 1"),
    ({"checkpoint": 3}, TypeError, "checkpoint must be a path, got 3"),
]


RECIPES = {
    "train": recipes.train,
    "posttraining": lambda *a, **o: recipes.posttraining(*a, **o),
    "lowrank_sparse": recipes.lowrank_sparse,
    "decompose_finetune": recipes.decompose_finetune,
    "nrmf": recipes.nrmf,
}
EVERY = {
    **RECIPES,
    "progressive": recipes.progressive,
    "l0": recipes.l0,
    "mars": recipes.mars,
    "reinforce": recipes.reinforce,
    "uniform": lambda *a, **o: recipes.uniform(*a, rank=2, **o),
}


@pytest.mark.parametrize("options,kind,message", WRONG, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("name", RECIPES)
def test_options_are_refused_by_name(dataset, nothing_begun, name, options, kind, message):
    model = network()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(kind, match=re.escape(message)):
        RECIPES[name](model, dataset, **{"epochs": 1, **options})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_refused_by_name(dataset, nothing_begun, name):
    with pytest.raises(TypeError, match=rf"{name}: model must be a torch\.nn\.Module, got 'net'"):
        RECIPES[name]("net", dataset, epochs=1)
    with pytest.raises(ValueError, match=f"{name}: model must have a parameter that requires gradients"):
        RECIPES[name](frozen(), dataset, epochs=1)


@pytest.mark.parametrize(
    "parameters,kind,message",
    [
        ([], ValueError, "got no parameter in 0 groups"),
        ([{"params": []}], ValueError, "got no parameter in 1 groups"),
        ([torch.zeros(2)], TypeError, "got Tensor among them"),
        ({"params": []}, TypeError, "got dict"),
        ([{"params": torch.zeros(2), "lr": "fast"}], TypeError, r"lr of parameters\[0\] must be a number"),
        ([{"params": torch.zeros(2), "weight_decay": -1}], ValueError, r"weight_decay of parameters\[0\]"),
    ],
)
def test_groups_are_refused(dataset, parameters, kind, message):
    with pytest.raises(kind, match=message):
        recipes.train(network(), dataset, epochs=1, parameters=parameters)


def test_callbacks_and_parameters_may_be_read_once(dataset):
    model = network()

    class Count(recipes.Callback):
        steps = 0

        def on_step(self, state):
            self.steps += 1

    counted = Count()
    groups = ({"params": (p for p in model.parameters())} for _ in range(1))
    recipes.train(
        model, dataset, epochs=1, batch_size=80, callbacks=(c for c in [counted]), parameters=groups
    )
    assert counted.steps == 2


@pytest.mark.parametrize("name", EVERY)
def test_places_are_refused(dataset, nothing_begun, tmp_path, name):
    file = tmp_path / "file"
    file.write_text("no checkpoint")
    for options, message in (
        ({"checkpoint": tmp_path}, f"{name}: checkpoint must be a file, got the folder {tmp_path}"),
        (
            {"checkpoint": file / "x"},
            f"{name}: checkpoint must be in a folder, got {file / 'x'}, where {file}",
        ),
        ({"logs": file}, f"{name}: logs must be in a folder, got {file}, where {file} is a file"),
        ({"logs": str(file / "a" / "b")}, f"{name}: logs must be in a folder"),
        ({"checkpoint": file}, f"{file} is not a readable file of tensors"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            EVERY[name](network(), dataset, epochs=1, **options)


def test_a_folder_that_cannot_be_written(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for option in ("checkpoint", "logs"):
        with pytest.raises(
            ValueError, match=rf"train: {option} must be writable, got .*, where {tmp_path} is"
        ):
            recipes.train(network(), dataset, epochs=1, **{option: tmp_path / "new" / "place"})


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "train"])
def test_checkpoints_of_other_runs_are_refused_before_any_work(dataset, nothing_begun, tmp_path, name):
    path = tmp_path / "run.ckpt"
    options = {"epochs": 1, "lr": 0.01, "schedule": "cosine", "weight_decay": 1e-4, "checkpoint": path}
    recipes.train(network(), dataset, **options)
    with pytest.raises(ValueError, match="is of a run with other settings: callbacks"):
        RECIPES[name](network(), dataset, **options)
    with pytest.raises(ValueError, match=r"run with other settings: lr \(checkpoint 0.01, now 0.02\)"):
        RECIPES[name](network(), dataset, **{**options, "lr": 0.02})
    begun = importlib.import_module("tensorcomp_ext.recipes.decisions").Begun({"recipe": "another"})
    path.unlink()
    recipes.train(network(), dataset, callbacks=[begun], **options)
    with pytest.raises(ValueError, match=f"is of a run of another, not of {name}"):
        RECIPES[name](network(), dataset, **options)


@pytest.mark.parametrize(
    "options,kind,message",
    [
        ({"mode": "sum"}, ValueError, "mode must be one of additive, masking, got 'sum'"),
        ({"init": "zero"}, ValueError, "init must be one of residual, masking, got 'zero'"),
        ({"iterations": 0}, ValueError, "iterations must be in [1, inf), got 0"),
        ({"iterations": 2.5}, TypeError, "iterations must be an int, got 2.5"),
        ({"sparsity": "most"}, TypeError, "sparsity must be a number, got 'most'"),
        ({"prune_epochs": 3}, ValueError, "prune_epochs must be in [1, epochs] = [1, 1], got 3"),
        ({"storage": "small"}, TypeError, "storage must be a number, got 'small'"),
        ({"low_rank": 3}, TypeError, "low_rank must be the name of a format"),
        ({"warm": 1}, TypeError, "lowrank_sparse: unknown option 'warm'; did you mean 'warmup'"),
    ],
)
def test_lowrank_sparse_refuses_before_decompositions(dataset, nothing_begun, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        recipes.lowrank_sparse(network(), dataset, **{"epochs": 1, **options})


def test_a_stale_second_phase_is_refused_before_the_first(dataset, tmp_path):
    options = {"epochs": 1, "finetune_epochs": 1, "batch_size": 80, "p": 0.7}
    recipes.nrmf(network(), dataset, **options, checkpoint=tmp_path / "run.ckpt")
    (tmp_path / "run.ckpt").unlink()

    def progress(state):
        pytest.fail("trained before the checks")

    for changed, message in (
        (
            {},
            "run.finetune.ckpt is of another run, as in .*, the first phase, 0 of 1 epochs are done",
        ),
        ({"p": 0.8}, "run.finetune.ckpt is of a run with other settings: callbacks"),
        ({"finetune_lr": 0.5}, r"other settings: lr \(checkpoint 0.001, now 0.5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.nrmf(
                network(),
                dataset,
                **{**options, **changed},
                checkpoint=tmp_path / "run.ckpt",
                progress=progress,
            )
    (tmp_path / "run.finetune.ckpt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"run\.finetune\.ckpt is not a readable file"):
        recipes.nrmf(network(), dataset, **options, checkpoint=tmp_path / "run.ckpt", progress=progress)


def test_other_images_or_normalisation_are_not_resumed(dataset, tmp_path):
    path = tmp_path / "c.pt"
    recipes.train(network(), dataset, epochs=1, checkpoint=path)
    others = {
        "fingerprint": dataclasses.replace(dataset, train_images=255 - dataset.train_images),
        "fingerprint ": dataclasses.replace(dataset, train_labels=dataset.train_labels.flip(0)),
        "mean": dataset.with_normalization((0.4,), dataset.std),
        "std": dataset.with_normalization(dataset.mean, (0.4,)),
    }
    for key, other in others.items():
        with pytest.raises(ValueError, match=rf"other settings: {key.strip()} \(checkpoint"):
            recipes.train(network(), other, epochs=1, checkpoint=path)
    same = dataclasses.replace(
        dataset, train_images=dataset.train_images.clone(), test_labels=dataset.test_labels
    )
    assert len(recipes.train(network(), same, epochs=1, checkpoint=path).history) == 1


def test_other_options_of_groups_are_not_resumed(dataset, tmp_path):
    path = tmp_path / "c.pt"

    def run(**options):
        model = network()
        groups = [{"params": [model[0].weight], **options}, {"params": list(model[4].parameters())}]
        return recipes.train(model, dataset, epochs=1, batch_size=80, parameters=groups, checkpoint=path)

    run(lr=0.01, betas=(0.9, 0.99))
    assert len(run(lr=0.01, betas=(0.9, 0.99)).history) == 1
    with pytest.raises(ValueError, match=r"other settings: parameters .*'lr': 0.01.*now .*'lr': 0.5"):
        run(lr=0.5, betas=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"other settings: parameters .* now None"):
        recipes.train(network(), dataset, epochs=1, batch_size=80, checkpoint=path)


def replaced(data):
    return dataclasses.replace(data, train=data.train.flip(0))


@pytest.mark.parametrize("seed", [0, 1])
def test_tasks_of_text_know_their_contents(seed):
    tasks = [
        (
            recipes.SentenceTask(sentences(seed=s)),
            recipes.LanguageTask(text() if s == 0 else replaced(text()), window=8),
            recipes.TranslationTask(translations(seed=s), bleu=False),
        )
        for s in (0, seed)
    ]
    for one, other in zip(*tasks, strict=True):
        assert (one.settings() == other.settings()) == (seed == 0)


def test_checksums():
    rows = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert checksum(rows) == checksum(rows.clone()) == checksum(rows.T.contiguous().T)
    different = [rows.T, rows.float(), rows + 1, rows[:, :0], rows[:0]]
    assert len({checksum(t) for t in (rows, *different)}) == 6
    assert checksum(rows, rows) != checksum(rows)
    large = torch.zeros(3, 2**21, dtype=torch.uint8)
    assert checksum(large) != checksum(large + 1)
    assert checksum(torch.zeros(4, dtype=torch.bfloat16)) != checksum(torch.ones(4, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "x"}, "l0: unknown option 'name'"),
        ({"trains": False}, "l0: unknown option 'trains'"),
        ({"known": ()}, "l0: unknown option 'known'"),
        ({"trainin": 1}, "l0: unknown option 'trainin'$"),
        ({"gatelr": 1}, "l0: unknown option 'gatelr'; did you mean 'gate_lr'"),
    ],
)
def test_options_there_are_not(dataset, nothing_begun, options, message):
    with pytest.raises(TypeError, match=message):
        recipes.l0(network(), dataset, epochs=1, **options)


@pytest.mark.parametrize(
    ("name", "options", "changed"),
    [
        ("l0", {"format": "svd"}, {"weight": 0.3}),
        ("l0", {"format": "svd"}, {"sigma": 0.4}),
        ("l0", {"format": "svd"}, {"start": "decompose"}),
        ("reinforce", {"format": "svd"}, {"samples": 3}),
        ("mars", {"format": "svd"}, {"remove_below": 0.01}),
        ("progressive", {"target": 0.5}, {"decay": "sine"}),
        ("progressive", {"target": 0.5}, {"share": 0.5}),
    ],
)
def test_a_checkpoint_of_other_options_is_refused_before_decompositions(
    dataset, request, tmp_path, name, options, changed
):
    options = {"epochs": 1, "batch_size": 80, "checkpoint": tmp_path / "run.ckpt", **options}
    if name != "progressive":
        options["rank"] = 2
    getattr(recipes, name)(network(), dataset, **options)
    request.getfixturevalue("nothing_begun")
    with pytest.raises(ValueError, match=rf"other settings: callbacks: \w+\.(gate\.)?{next(iter(changed))} "):
        getattr(recipes, name)(network(), dataset, **options, **changed)
