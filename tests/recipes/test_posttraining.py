"""Post-training compression: rules on training examples alone, normalisation, fine-tuning, resuming."""

import copy
import importlib
import json

import pytest
import torch
from small_images import quadrants
from stopping import StopAt
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext import recipes
from tensorcomp_ext.compress import Latency
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLayer
from tensorcomp_ext.plan import export_choices

module = importlib.import_module("tensorcomp_ext.recipes.posttraining")


class Counted:
    """A clock for which a layer takes as long as it has weights, and whose plan is the dense one."""

    def seconds(self, model):
        return 1e-9 * sum(p.numel() for p in model.parameters())

    def layers(self, dense, call, made, seconds):
        x = call.input()
        for layer in made:
            layer.tuned = {str(layer.case(x, training=False)): {"plan": "dense", "seconds": {"dense": 1.0}}}
        return [self.seconds(layer) for layer in (dense, *made)]

    def networks(self, models, example_inputs, seconds):
        return {name: Latency(*[self.seconds(model)] * 3) for name, model in models.items()}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    rule = importlib.import_module("tensorcomp_ext.compress.latency_rule")
    monkeypatch.setattr(rule, "WallClock", Counted)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(256, 4),
    )


@pytest.fixture(scope="module")
def trained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = network()
    recipes.train(model, quadrants(), epochs=3, lr=0.05, batch_size=32)
    torch.set_num_threads(threads)
    return model.eval()


@pytest.mark.parametrize("rank", ["vbmf", "energy:0.9", "latency:1.5", "network-params:0.5", (3, 2), 0.5])
def test_every_rule(rank, trained, dataset):
    before = copy.deepcopy(trained.state_dict())
    result = recipes.posttraining(trained, dataset, rank=rank, exclude="8", epochs=1, lr=1e-3, batch_size=32)
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())
    assert isinstance(result, recipes.RecipeResult)
    assert any(isinstance(layer, FactorizedConv2d) for layer in result.model.modules())
    assert len(result.history) == 1
    assert result.report.parameters_after == sum(p.numel() for p in result.model.parameters())
    assert result.report.details["posttraining"]["recalibrated"] == 2
    assert result.report.output_error is not None  # the first training images were example inputs
    expected = recipes.evaluate(trained, dataset).correct
    assert recipes.evaluate(result.model, dataset).correct > 0.5 * expected


def test_without_epochs_it_is_compress_and_recalibration(trained, dataset):
    result = recipes.posttraining(trained, dataset, rank="energy:0.8", recalibrate=False)
    plain = tc.compress(trained, rank="energy:0.8").model
    x = dataset.normalize(dataset.train_images[:8])
    with torch.no_grad():
        assert torch.equal(result.model(x), plain(x))
    assert result.history == []
    again = recipes.posttraining(trained, dataset, rank="energy:0.8", seed=3)
    recipes.recalibrate_batchnorm(plain, dataset, seed=3)
    assert torch.equal(again.model[1].running_mean, plain[1].running_mean)
    assert not torch.equal(again.model[4].running_var, result.model[4].running_var)


def test_latency_sees_the_first_training_images_only(trained, dataset, monkeypatch):
    seen = []
    moments = importlib.import_module("tensorcomp_ext.compress.calibration").moments

    def spy(model, layers, batches):
        seen.extend(batch[0] for batch in batches)
        return moments(model, layers, batches)

    monkeypatch.setattr(importlib.import_module("tensorcomp_ext.compress.latency_rule"), "moments", spy)
    result = recipes.posttraining(trained, dataset, rank=tc.ranks.Latency(1.6), calibration=70, batch=5)
    assert torch.equal(torch.cat(seen), dataset.normalize(dataset.train_images[:70]))
    details = result.report.details["latency_rule"]
    assert details["batch"] == 5
    assert details["calibrated"]
    assert details["measured"] >= 1.6 * 0.95
    seen.clear()
    plain = recipes.posttraining(trained, dataset, rank="latency:1.6", calibration=0)
    assert not seen
    assert not plain.report.details["latency_rule"]["calibrated"]


def test_a_killed_run_keeps_its_measured_ranks(trained, dataset, tmp_path, monkeypatch):
    options = {"rank": "latency:1.6", "epochs": 3, "lr": 1e-3, "batch_size": 32}
    whole = recipes.posttraining(trained, dataset, **options)

    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        recipes.posttraining(trained, dataset, checkpoint=path, callbacks=[StopAt(epoch=1)], **options)

    monkeypatch.setattr(Counted, "layers", lambda *arguments: pytest.fail("measured again"))
    resumed = recipes.posttraining(trained, dataset, checkpoint=path, callbacks=[StopAt()], **options)
    assert [entry.loss for entry in resumed.history] == [entry.loss for entry in whole.history]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)
    assert resumed.report.details["latency_rule"]["asked"] == 1.6
    why = [[(entry.name, entry.skipped) for entry in made.report.layers] for made in (whole, resumed)]
    assert why[0] == why[1]
    plans = export_choices(resumed.model)
    assert any(entry["tuned"] for entry in plans["layers"].values())
    assert plans == json.loads(path.with_name("run.ckpt.ranks").read_text())["plans"]
    for other in ({"rank": "latency:1.3"}, {"calibration": 0}):
        with pytest.raises(ValueError, match="other settings"):
            recipes.posttraining(
                trained, dataset, checkpoint=path, callbacks=[StopAt()], **{**options, **other}
            )
    path.with_name("run.ckpt.ranks").write_text("{")
    with pytest.raises(ValueError, match=r"run.ckpt.ranks, the ranks of the run in .*, cannot be read"):
        recipes.posttraining(trained, dataset, checkpoint=path, **options)


def test_bad_options_are_refused_before_any_work(trained, dataset, monkeypatch):
    monkeypatch.setattr(module, "compress", lambda *arguments: pytest.fail("began"))
    for options, message in [
        ({"epochs": -1}, "epochs must be"),
        ({"batch": 0}, "batch must be an int of at least 1, got 0"),
        ({"calibration": 1.5}, r"calibration must be an int of at least 0, got 1.5"),
        ({"rank": "many"}, "unknown rank rule 'many'"),
        ({"lr": -1.0}, "lr"),
        ({"schedule": "none"}, "schedule"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipes.posttraining(trained, dataset, **options)
    with pytest.raises(TypeError, match="recalibrate must be a bool"):
        recipes.posttraining(trained, dataset, recalibrate="yes")
    monkeypatch.setattr(module.processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="measures in one process only"):
        recipes.posttraining(trained, dataset, rank="latency")


def test_another_task_than_images(trained, dataset):
    """A task of its own inputs: the first of its examples are example inputs and calibration."""

    class Sums(recipes.Task):
        name = "sums"
        rows = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
        size = 96

        def batch(self, indices, generator, device):
            return recipes.Batch((self.rows[indices],), (self.rows[indices].sum(1) > 0).long())

        def loss(self, outputs, labels):
            return nn.functional.cross_entropy(outputs, labels)

        def count(self, outputs, labels):
            return (outputs.argmax(1) == labels).sum(), torch.tensor(len(labels))

        def evaluate(self, model):
            return recipes.Accuracy(1, 1), {}

        def settings(self):
            return {}

    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 2))
    result = recipes.posttraining(model, Sums(), rank="latency:1.3", epochs=1, lr=1e-2, batch_size=16)
    assert any(isinstance(layer, FactorizedLayer) for layer in result.model)
    assert result.report.details["posttraining"]["recalibrated"] == 0
