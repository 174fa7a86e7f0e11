"""The training loop: it learns, repeats itself, resumes to the same bits, and refuses what it cannot do."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from tensorcomp_ext import models, recipes
from tensorcomp_ext.recipes import schedule
from tensorcomp_ext.recipes.augment import crop_and_flip
from tensorcomp_ext.recipes.checkpoint import check_settings


def network(dropout=0.2):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(6 * 64, 4),
    )


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_learns(dataset):
    model = network()
    assert recipes.evaluate(model, dataset).fraction < 0.6
    result = recipes.train(model, dataset, epochs=4, lr=0.05, batch_size=16, test_each_epoch=True)
    assert result.model is model
    assert recipes.evaluate(model, dataset).fraction > 0.95
    assert [e.epoch for e in result.history] == [1, 2, 3, 4]
    assert result.history[-1].loss < result.history[0].loss
    assert result.history[-1].test == recipes.evaluate(model, dataset)
    assert result.history[0].train.total == 160


@pytest.mark.parametrize("channels_last", [False, True])
def test_resnet_learns_in_both_layouts(dataset, channels_last):
    torch.manual_seed(0)
    model = models.build("resnet20", num_classes=4, in_channels=1)
    recipes.train(model, dataset, epochs=3, lr=0.05, batch_size=32, channels_last=channels_last)
    assert model.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert recipes.evaluate(model, dataset, channels_last=channels_last).fraction > 0.9


def test_first_step_is_nesterov_sgd(dataset):
    """One step against the equation: v = g + decay w; w -= lr (v + momentum v)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    weight = model[1].weight.detach().double().clone()
    bias = model[1].bias.detach().double()
    x = dataset.normalize(dataset.train_images).double().flatten(1)
    probability = torch.softmax(x @ weight.T + bias, 1)
    target = torch.eye(4, dtype=torch.float64)[dataset.train_labels] * 0.9 + 0.1 / 4
    gradient = (probability - target).T @ x / len(x) + 0.01 * weight
    recipes.train(
        model, dataset, epochs=1, lr=0.3, batch_size=500, momentum=0.8, weight_decay=0.01,
        schedule="constant", label_smoothing=0.1,
    )  # fmt: skip
    expected = weight - 0.3 * (gradient + 0.8 * gradient)
    difference = (model[1].weight.double() - expected).norm() / (expected - weight).norm()
    assert difference < 1e-5


def test_first_step_of_adam(dataset):
    """The first step of Adam is lr times the gradient over its magnitude, decay included."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    before = model[1].weight.detach().clone()
    x = dataset.normalize(dataset.train_images).double().flatten(1)
    target = torch.eye(4, dtype=torch.float64)[dataset.train_labels]
    gradient = (torch.softmax(x @ weight.T + bias, 1) - target).T @ x / len(x) + 0.01 * weight
    expected = before.double() - 0.003 * gradient / (gradient.abs() + 1e-8)
    options = {"lr": 0.003, "batch_size": 500, "weight_decay": 0.01, "schedule": "constant"}
    recipes.train(model, dataset, epochs=1, optimizer="adam", **options)
    torch.testing.assert_close(model[1].weight.double() - before, expected - before, rtol=1e-3, atol=1e-6)


def test_repeats_itself_and_leaves_the_global_generator(dataset):
    state = torch.get_rng_state()
    a, b, c = network(), network(), network()
    torch.set_rng_state(state)
    recipes.train(a, dataset, epochs=2, batch_size=32, seed=4, augment=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    recipes.train(b, dataset, epochs=2, batch_size=32, seed=4, augment=True)
    recipes.train(c, dataset, epochs=2, batch_size=32, seed=5, augment=True)
    assert same(a, b) and not same(a, c)


class StopAt(recipes.Callback):
    """Interrupts in the middle of an epoch, once; keeps a count that must survive."""

    def __init__(self, step=None):
        self.step = step
        self.count = 0

    def on_step(self, state):
        self.count += 1
        if state.step == self.step:
            raise KeyboardInterrupt

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("step,optimizer", [(0, "sgd"), (7, "sgd"), (14, "adam"), (19, "sgd")])
def test_resume_gives_the_same_bits(dataset, tmp_path, step, optimizer):
    """Five steps an epoch, four epochs; interrupted at a step, a fresh model runs the rest."""
    options = {"epochs": 4, "lr": 0.05, "batch_size": 32, "augment": True, "seed": 2, "optimizer": optimizer}
    whole, counter = network(), StopAt()
    reference = recipes.train(whole, dataset, callbacks=[counter], **options).history
    path = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        recipes.train(network(), dataset, callbacks=[StopAt(step)], checkpoint=path, **options)
    assert path.exists() == (step >= 5)
    resumed, resumed_counter = network(), StopAt()
    with torch.no_grad():
        if step >= 5:
            resumed[0].weight.zero_()  # the checkpoint alone must decide
    history = recipes.train(resumed, dataset, callbacks=[resumed_counter], checkpoint=path, **options).history
    assert same(whole, resumed)
    assert counter.count == resumed_counter.count == 20
    assert [(e.epoch, e.loss, e.train, e.lr) for e in history] == [
        (e.epoch, e.loss, e.train, e.lr) for e in reference
    ]
    finished = network()
    recipes.train(finished, dataset, callbacks=[StopAt(0)], checkpoint=path, **options)  # nothing left to do
    assert same(whole, finished)


def test_killed_process_resumes(dataset, tmp_path):
    """SIGKILL in the middle of the second epoch; the next run must end as an unbroken one."""
    script = textwrap.dedent("""
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        from small_images import quadrants
        from test_train import network
        from tensorcomp_ext import recipes
        torch.set_num_threads(1)

        class Kill(recipes.Callback):
            def on_step(self, state):
                if state.step == 8:
                    os.kill(os.getpid(), signal.SIGKILL)

        data, path = quadrants(), sys.argv[2]
        recipes.train(network(), data, epochs=3, batch_size=32, callbacks=[Kill()], checkpoint=path)
    """)
    path = tmp_path / "checkpoint.pt"
    here = os.path.dirname(__file__)
    killed = subprocess.run([sys.executable, "-c", script, here, str(path)], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]

    class Kill(recipes.Callback):
        """Same name, as the settings record it; this one lets the run live."""

    resumed, whole = network(), network()
    history = recipes.train(
        resumed, dataset, epochs=3, batch_size=32, callbacks=[Kill()], checkpoint=path
    ).history
    recipes.train(whole, dataset, epochs=3, batch_size=32)
    assert len(history) == 3
    assert same(whole, resumed)


def test_failed_write_keeps_the_old_checkpoint(tmp_path):
    from tensorcomp_ext.recipes.checkpoint import read_checkpoint, write_checkpoint

    path = tmp_path / "c.pt"
    write_checkpoint(path, {"value": 1})
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        write_checkpoint(path, {"value": lambda: 0})
    assert read_checkpoint(path)["value"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "truncated, damaged"),
        ("other kind", "not a training checkpoint"),
        ("newer", "format 99"),
    ],
)
def test_damaged_checkpoint_changes_nothing(dataset, tmp_path, damage, message):
    path = tmp_path / "c.pt"
    recipes.train(network(), dataset, epochs=1, checkpoint=path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "other kind":
        torch.save(network().state_dict(), path)
    else:
        torch.save({**torch.load(path, weights_only=True), "format": 99}, path)
    model, untouched = network(), network()
    with pytest.raises(ValueError, match=message):
        recipes.train(model, dataset, epochs=1, checkpoint=path)
    assert same(model, untouched)


def test_checkpoint_of_other_settings_or_model(dataset, tmp_path):
    path = tmp_path / "c.pt"
    recipes.train(network(), dataset, epochs=1, lr=0.1, checkpoint=path)
    model, untouched = network(), network()
    with pytest.raises(ValueError, match=r"lr \(checkpoint 0.1, now 0.2\)"):
        recipes.train(model, dataset, epochs=1, lr=0.2, checkpoint=path)
    assert same(model, untouched)
    wider = nn.Sequential(
        nn.Conv2d(1, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(448, 4),
    )
    before = wider[0].weight.clone()
    with pytest.raises(ValueError, match="another model"):
        recipes.train(wider, dataset, epochs=1, lr=0.1, checkpoint=path)
    assert torch.equal(before, wider[0].weight)


def test_checkpoint_serves_as_weights_and_tells_the_normalisation(dataset, tmp_path):
    path = tmp_path / "c.pt"
    torch.manual_seed(0)
    model = models.build("resnet20", num_classes=4, in_channels=1)
    recipes.train(model, dataset, epochs=1, batch_size=80, checkpoint=path)
    fresh = models.build("resnet20", num_classes=4, in_channels=1)
    assert models.load_weights(fresh, path) == (dataset.mean, dataset.std)
    assert same(model, fresh)


class Penalty(recipes.Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, state):
        self.calls.append("start")

    def on_loss(self, state, loss):
        assert state.outputs.shape == (len(state.labels), 4) and state.inputs[0].dtype == torch.float32
        self.calls.append("loss")
        return loss + 1000 * state.model[0].weight.square().sum()

    def on_step(self, state):
        self.calls.append("step")

    def on_epoch(self, state):
        self.calls.append("epoch")


def test_callbacks_shape_the_loss_in_order(dataset):
    model, callback = network(), Penalty()
    norm = model[0].weight.norm().item()
    recipes.train(model, dataset, epochs=2, lr=1e-4, batch_size=80, callbacks=[callback])
    assert callback.calls == ["start"] + 2 * (["loss", "step"] * 2 + ["epoch"])
    assert model[0].weight.norm().item() < 0.9 * norm


def test_parameter_groups_and_progress(dataset):
    model = network()
    before = [p.clone() for p in model.parameters()]
    seen = []

    def progress(state):
        seen.append((state.epoch, state.step, [g["lr"] for g in state.optimizer.param_groups]))

    recipes.train(
        model, dataset, epochs=2, lr=0.1, batch_size=80, schedule="constant", progress=progress,
        parameters=[{"params": [model[0].weight], "lr": 0.01}, {"params": [model[5].weight]}],
    )  # fmt: skip
    assert seen == [(0, 0, [0.01, 0.1]), (0, 1, [0.01, 0.1]), (1, 2, [0.01, 0.1]), (1, 3, [0.01, 0.1])]
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [True, False, False, False, True, False]


def test_finetune_starts_at_its_rate_and_falls(dataset):
    rates = []
    recipes.finetune(
        network(), dataset, epochs=1, lr=0.02, batch_size=16,
        progress=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]),
    )  # fmt: skip
    assert rates[0] == 0.02 and rates == sorted(rates, reverse=True) and rates[-1] < 0.001


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 101])
def test_schedules(steps):
    assert schedule.cosine(0, steps) == 1
    values = [schedule.onecycle(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1
    assert math.isclose(schedule.onecycle(steps, steps), 0, abs_tol=1e-12)


@pytest.mark.parametrize(("channels", "height", "width", "pad"), [(1, 5, 8, 2), (3, 7, 7, 4)])
def test_crops_are_shifted_copies(channels, height, width, pad):
    images = torch.randint(1, 256, (20, channels, height, width), dtype=torch.uint8)
    result = crop_and_flip(images, torch.Generator().manual_seed(0), pad=pad)
    assert result.shape == images.shape and result.dtype == torch.uint8
    padded = nn.functional.pad(images, (pad,) * 4)
    mirrored = 0
    for i in range(len(images)):
        places = [
            (flip, top, left)
            for flip in (False, True)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            if torch.equal(
                result[i].flip(-1) if flip else result[i],
                padded[i, :, top : top + height, left : left + width],
            )
        ]
        assert places
        mirrored += places[0][0]
    assert 3 <= mirrored <= 17
    assert torch.equal(result, crop_and_flip(images, torch.Generator().manual_seed(0), pad=pad))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": math.nan}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"epochs": -1}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"momentum": 1.5}, "momentum"),
        ({"schedule": "steps"}, "cosine, onecycle, constant"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, got 'lion'"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
    ],
)
def test_bad_arguments(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        recipes.train(network(), dataset, **{"epochs": 1, **arguments})


def test_divergence_is_named(dataset):
    with pytest.raises(RuntimeError, match=r"epoch 1.*smaller lr"):
        recipes.train(network(), dataset, epochs=1, lr=1e30, batch_size=16, schedule="constant")


def test_zero_epochs_leave_the_model(dataset):
    model, untouched = network(), network()
    assert recipes.train(model, dataset, epochs=0).history == []
    assert same(model, untouched)


def test_testing_without_test_examples_is_refused_before_training(dataset):
    untested = dataclasses.replace(
        dataset, test_images=dataset.test_images[:0], test_labels=dataset.test_labels[:0]
    )
    model, untouched = network(), network()
    with pytest.raises(ValueError, match="test_each_epoch needs test examples, quadrants has none"):
        recipes.train(model, untested, epochs=1, test_each_epoch=True)
    assert same(model, untouched)


def test_what_differs_is_named_alone(tmp_path):
    """Of two runs with long settings a message says what is not the same, and nothing else."""
    path = tmp_path / "run.ckpt"
    ranks = {f"layer{k}": [25] * 7 for k in range(100)}
    gates = {"type": "Gates", "weight": 1.0, "ranks": ranks}
    found = {"lr": 0.1, "task": {"name": "digits", "mean": [0.5]}, "callbacks": [gates, {"type": "Begun"}]}
    wanted = {**found, "task": {"name": "digits", "mean": [0.4]}}
    wanted["callbacks"] = [{**gates, "weight": 0.3}, {"type": "Begun"}]
    check_settings(path, found, found)
    with pytest.raises(ValueError) as caught:
        check_settings(path, found, wanted)
    assert str(caught.value) == (
        f"checkpoint {path} is of a run with other settings: "
        "callbacks: Gates.weight (checkpoint 1.0, now 0.3), task.mean (checkpoint [0.5], now [0.4])"
    )
    wanted["callbacks"] = [{**gates, "ranks": {**ranks, "layer7": [24] * 7}}]
    with pytest.raises(ValueError, match=r"callbacks \(checkpoint Gates, Begun, now Gates\)"):
        check_settings(path, found, wanted)
    with pytest.raises(ValueError) as caught:
        check_settings(path, {"ranks": list(range(1000))}, {"ranks": list(range(999, 0, -1))})
    assert len(str(caught.value)) < 300
