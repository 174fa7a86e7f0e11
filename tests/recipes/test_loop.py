"""What the training loop offers methods and users beyond plain descent: tasks, parts of batches, logs."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from stopping import StopAt
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.recipes import Accuracy, Batch, Task, schedule


def linear(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 4))


class Sums(Task):
    """Two numbers and their sum."""

    name = "sums"

    def __init__(self, size=96):
        self.pairs = torch.randn(size, 2, generator=torch.Generator().manual_seed(0))

    @property
    def size(self):
        return len(self.pairs)

    def batch(self, indices, generator, device):
        pairs = self.pairs[indices].to(device)
        return Batch((pairs[:, :1], pairs[:, 1:]), pairs.sum(1, keepdim=True))

    def loss(self, outputs, labels):
        return (outputs - labels).square().mean()

    def count(self, outputs, labels):
        return ((outputs - labels).abs() < 0.1).sum(), torch.tensor(labels.numel())

    def evaluate(self, model):
        model.eval()
        with torch.no_grad():
            outputs = model(self.pairs[:, :1], self.pairs[:, 1:])
        error = (outputs - self.pairs.sum(1, keepdim=True)).square().mean()
        return Accuracy(int(error < 1e-3), 1), {"error": float(error)}

    def settings(self):
        return {"dataset": self.name, "pairs": self.size}


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, a, b):
        return self.weight[0] * a + self.weight[1] * b


def test_a_task_of_one_s_own():
    model = Added()
    result = recipes.train(
        model, Sums(), epochs=20, lr=0.1, batch_size=16, weight_decay=0.0, test_each_epoch=True
    )
    torch.testing.assert_close(model.weight.detach(), torch.ones(2), rtol=0, atol=1e-3)
    last = result.history[-1]
    assert last.extra["error"] < 1e-5 and last.test == Accuracy(1, 1) and last.train == Accuracy(96, 96)
    assert model.training  # as it was, though the task's evaluation changed it


def test_what_is_for_images_is_refused_for_a_task():
    for option in ({"augment": True}, {"label_smoothing": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for a Dataset of images"):
            recipes.train(Added(), Sums(), epochs=1, **option)
    with pytest.raises(TypeError, match=r"data\.Dataset.*or a recipes\.Task, got list"):
        recipes.train(Added(), [1, 2], epochs=1)


@pytest.mark.parametrize("accumulate", [2, 5])
def test_parts_of_a_batch_make_the_same_step(dataset, accumulate):
    whole, parts = linear(), linear()
    options = {"epochs": 2, "lr": 0.05, "batch_size": 40, "label_smoothing": 0.1}
    first = recipes.train(whole, dataset, **options).history
    second = recipes.train(parts, dataset, accumulate=accumulate, **options).history
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert [e.train for e in first] == [e.train for e in second]
    assert [e.loss for e in second] == pytest.approx([e.loss for e in first], rel=1e-5)


def test_batches_that_cannot_be_parted(dataset):
    with pytest.raises(ValueError, match=r"a batch of 32 examples cannot be parted equally among 1 proc.* 3"):
        recipes.train(linear(), dataset, epochs=1, batch_size=32, accumulate=3)


def test_bf16_computes_in_bfloat16_and_keeps_float32(dataset):
    seen = []

    class Watch(recipes.Callback):
        def on_loss(self, state, loss):
            seen.append((state.outputs.dtype, loss.dtype))
            return loss

    model = linear()
    history = recipes.train(model, dataset, epochs=4, precision="bf16", callbacks=[Watch()]).history
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    assert history[-1].loss < history[0].loss


def test_schedules_with_warm_up():
    assert [schedule.multistep(step, 8) for step in range(8)] == pytest.approx(
        [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    warm = [schedule.warmed_up("constant", step, 10, 4) for step in range(6)]
    assert warm == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedule.warmed_up("cosine", 3, 10, 0) == schedule.cosine(3, 10)
    assert schedule.warmed_up("cosine", 3, 10, 8) == pytest.approx(schedule.cosine(3, 10) / 2)


class Samples(recipes.Callback):
    """The mean of three forward passes a step, and a figure of each epoch."""

    def __init__(self):
        self.losses, self.batches = [], 0

    def on_batch(self, state):
        self.batches += 1
        assert state.labels is not None and state.inputs[0].shape[0] == len(state.labels)

    def on_loss(self, state, loss):
        more = [state.forward() for _ in range(2)]
        self.losses.append([loss.item(), *(m.item() for m in more)])
        return torch.stack([loss, *more]).mean()

    def log(self):
        return {"samples": {"count": len(self.losses)}}


def test_several_samples_a_step_and_their_log(dataset, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))
    callback = Samples()
    history = recipes.train(
        model, dataset, epochs=2, batch_size=80, callbacks=[callback], logs=tmp_path
    ).history
    assert all(len(set(losses)) == 3 for losses in callback.losses)  # dropout is drawn anew
    assert history[0].loss == pytest.approx(sum(map(sum, callback.losses[:2])) / 6, rel=1e-5)
    assert [e.extra for e in history] == [{"samples": {"count": 2}}, {"samples": {"count": 4}}]
    assert callback.batches == 4
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [(r["epoch"], r["samples.count"]) for r in rows] == [("1", "2"), ("2", "4")]
    assert float(rows[1]["loss"]) == history[1].loss
    assert float(rows[1]["train"]) == history[1].train.fraction


def test_logs_of_a_resumed_run_have_each_epoch_once(dataset, tmp_path):
    options = {"epochs": 3, "checkpoint": tmp_path / "c.pt", "logs": tmp_path / "logs"}
    with pytest.raises(KeyboardInterrupt):
        recipes.train(linear(), dataset, callbacks=[StopAt(epoch=1)], **options)
    recipes.train(linear(), dataset, callbacks=[StopAt()], **options)
    lines = (tmp_path / "logs" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(json.loads(line)["loss"]) for line in lines)
    left = {f.name for f in (tmp_path / "logs").iterdir() if not f.name.startswith("events.")}
    assert left == {"history.csv", "history.jsonl"}
    # Killed between the last checkpoint and its logs: nothing is left to train, but to write.
    (tmp_path / "logs" / "history.jsonl").write_text(lines[0] + "\n")
    recipes.train(linear(), dataset, callbacks=[StopAt()], **options)
    assert (tmp_path / "logs" / "history.jsonl").read_text().splitlines() == lines


class Narrow(recipes.Callback):
    """Halves the hidden layer after the first epoch: a network whose shapes change while it learns."""

    def __init__(self, stop=False):
        self.stop, self.width = stop, 12

    def cut(self, state):
        first, last = state.model[1], state.model[3]
        old = {first.weight: 0, first.bias: 0, last.weight: 1}
        first.weight = nn.Parameter(first.weight.detach()[:6].clone())
        first.bias = nn.Parameter(first.bias.detach()[:6].clone())
        last.weight = nn.Parameter(last.weight.detach()[:, :6].clone())
        group = state.optimizer.param_groups[0]
        group["params"] = [first.weight, first.bias, last.weight, last.bias]
        for parameter in old:
            state.optimizer.state.pop(parameter, None)
        self.width = 6
        state.networks_changed()

    def on_epoch(self, state):
        if state.epoch == 0:
            self.cut(state)
        if state.epoch == 1 and self.stop:
            raise KeyboardInterrupt

    def state_dict(self):
        return {"width": self.width}

    def reshape(self, state, saved):
        if saved["width"] == 6:
            self.cut(state)

    def load_state_dict(self, state):
        assert state["width"] == self.width


def test_resumes_a_network_whose_shapes_have_changed(dataset, tmp_path):
    whole = linear()
    options = {"epochs": 4, "lr": 0.05, "batch_size": 32}
    reference = recipes.train(whole, dataset, callbacks=[Narrow()], **options).history
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        recipes.train(linear(), dataset, callbacks=[Narrow(stop=True)], checkpoint=path, **options)
    resumed = linear(seed=9)
    history = recipes.train(resumed, dataset, callbacks=[Narrow()], checkpoint=path, **options).history
    assert whole[1].weight.shape == (6, 64)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [e.loss for e in history] == [e.loss for e in reference]


def test_test_examples_are_counted_before_what_follows_an_epoch(dataset):
    """What a method does for the next epoch is not part of the last one's figure."""

    class Ruin(recipes.Callback):
        def on_epoch(self, state):
            if state.epoch == 1:
                with torch.no_grad():
                    state.model[3].weight.zero_()

    clean = recipes.train(linear(), dataset, epochs=2, test_each_epoch=True).history
    ruined = recipes.train(linear(), dataset, epochs=2, test_each_epoch=True, callbacks=[Ruin()]).history
    assert [e.test for e in ruined] == [e.test for e in clean]


def test_checkpoint_of_an_older_version_resumes(dataset, tmp_path):
    """Their settings say nothing of precision, parts, warm-up, processes, groups and contents of images."""
    path = tmp_path / "c.pt"
    trained = linear()
    recipes.train(trained, dataset, epochs=1, checkpoint=path)
    content = torch.load(path, weights_only=True)
    later = ("precision", "accumulate", "warmup", "processes", "parameters", "mean", "std", "fingerprint")
    for key in later:
        del content["settings"][key]
    for entry in content["history"]:
        del entry["extra"]
    torch.save(content, path)
    assert len(recipes.train(linear(2), dataset, epochs=1, checkpoint=path).history) == 1
    with pytest.raises(ValueError, match=r"precision \(checkpoint 'float32', now 'bf16'\)"):
        recipes.train(linear(2), dataset, epochs=1, checkpoint=path, precision="bf16")
    with pytest.raises(ValueError, match=r"std \(checkpoint \[0.2\], now \[0.3\]\)"):
        recipes.train(linear(2), dataset.with_normalization((0.3,), (0.3,)), epochs=1, checkpoint=path)


@pytest.mark.parametrize("name,augments", [("cifar10", True), ("cifar100", True), ("mnist", False)])
def test_images_that_mean_the_same_mirrored_are_augmented(dataset, name, augments):
    named = dataclasses.replace(dataset, name=name)
    assert recipes.ImageTask(named).settings()["augment"] == augments
    assert not recipes.ImageTask(named, augment=False).augment
