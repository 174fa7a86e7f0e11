"""NRMF as a whole: both phases, elastic ranks, decay, histories, resuming, determinism, refusals."""

import pytest
import torch
from method_networks import copied, same_state, small_network
from small_images import quadrants
from stopping import StopAt
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.formats import Tucker2
from tensorcomp_ext.nn import FactorizedConv2d
from tensorcomp_ext.recipes import nrmf

OPTIONS = {"epochs": 3, "finetune_epochs": 2, "batch_size": 32, "alpha": 0.3, "p": 0.8, "lr": 0.05}


@pytest.fixture(scope="module")
def network():
    model = small_network()
    recipes.train(model, quadrants(), epochs=2, lr=0.05, batch_size=32)
    return model


def test_both_phases(network, dataset, tmp_path):
    before = copied(network)
    made = nrmf(
        network,
        dataset,
        **OPTIONS,
        example_inputs=torch.zeros(1, 1, 8, 8),
        logs=tmp_path,
        test_each_epoch=True,
    )
    assert same_state(before, copied(network))
    assert [entry.epoch for entry in made.history] == [1, 2, 3, 4, 5]
    assert [entry.extra["phase"] for entry in made.history] == ["regularised"] * 3 + ["finetune"] * 2
    # Under a strong norm energy and singular values fall from epoch to epoch.
    values = [entry.extra["nuclear_norm"]["value"] for entry in made.history[:3]]
    assert values[0] > values[1] > values[2]
    sums = [entry.extra["nuclear_norm"]["layers"]["3"]["sum_out"] for entry in made.history[:3]]
    assert sums[0] > sums[1] > sums[2]
    last = made.history[2].extra["nuclear_norm"]["layers"]
    details = made.report.details["nrmf"]
    for name in ("0", "3"):
        ranks = details["ranks"][name]
        found = made.model.get_submodule(name)
        if ranks is None:
            assert type(found) is nn.Conv2d and made.report[name].skipped == "would not get smaller"
            continue
        assert ranks == [last[name]["rank_out"], last[name]["rank_in"]]
        assert isinstance(found, FactorizedConv2d) and isinstance(found.weight, Tucker2)
        assert list(found.rank) == ranks and made.report[name].parameters_after == found.weight.numel
    assert any(details["ranks"].values())
    assert made.report["9"].skipped == "nrmf decomposes convolutions with a window"
    assert made.report.parameters_after == sum(p.numel() for p in made.model.parameters())
    assert made.report.output_error is not None and made.report["0"].input_shape == (1, 1, 8, 8)
    assert (tmp_path / "regularised" / "history.csv").exists()
    assert "nuclear_norm.layers.3.rank_in" in (tmp_path / "regularised" / "history.csv").read_text()
    assert (tmp_path / "finetune" / "history.csv").exists()


def test_decay_is_not_applied_twice(dataset):
    """With alpha = 0 and decay, without any gradient, only what is not regularised shrinks."""
    model = small_network()
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    class NoGradients(recipes.Callback):
        def on_loss(self, state, loss):
            self.groups = [dict(g) for g in state.optimizer.param_groups]
            return 0.0 * loss

    seen = NoGradients()
    made = nrmf(
        model,
        dataset,
        epochs=1,
        finetune_epochs=0,
        alpha=0.0,
        weight_decay=0.1,
        lr=0.1,
        p=0.5,
        callbacks=[seen],
    )
    assert [group["weight_decay"] for group in seen.groups] == [0.0, 0.1]
    shapes = [tuple(p.shape) for p in seen.groups[0]["params"]]
    assert shapes == [(8, 1, 3, 3), (12, 8, 3, 3)]
    assert torch.equal(seen.groups[0]["params"][1], model[3].weight)
    assert made.model[9].weight.norm() < model[9].weight.norm()
    assert "other parameters only" in made.report.details["nrmf"]["weight_decay"]


@pytest.mark.parametrize("step,epochs", [(7, 1), (12, 2)])
def test_a_run_stopped_in_the_first_phase(network, dataset, tmp_path, step, epochs):
    whole = nrmf(network, dataset, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        nrmf(network, dataset, **OPTIONS, checkpoint=tmp_path / "run.ckpt", callbacks=[StopAt(step)])
    assert not (tmp_path / "run.finetune.ckpt").exists()
    again = nrmf(network, dataset, **OPTIONS, checkpoint=tmp_path / "run.ckpt", callbacks=[StopAt(-1)])
    assert same_state(copied(again.model), copied(whole.model))
    assert [e.loss for e in again.history] == [e.loss for e in whole.history]
    assert epochs < 3


def test_a_run_stopped_in_the_second_phase(network, dataset, tmp_path):
    whole = nrmf(network, dataset, **OPTIONS)
    seen = []

    def stop(state):
        seen.append(state.step)
        if len(seen) == 3 * 5 + 7:  # in the second epoch of the second phase
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nrmf(network, dataset, **OPTIONS, checkpoint=tmp_path / "run.ckpt", progress=stop)
    assert (tmp_path / "run.finetune.ckpt").exists()
    seen.clear()
    again = nrmf(network, dataset, **OPTIONS, checkpoint=tmp_path / "run.ckpt", progress=stop)
    assert len(seen) == 5 and same_state(copied(again.model), copied(whole.model))
    with pytest.raises(ValueError, match="other settings"):
        nrmf(network, dataset, **{**OPTIONS, "p": 0.7}, checkpoint=tmp_path / "run.ckpt")


def test_same_seed_same_ranks(network, dataset):
    first, second = (nrmf(network, dataset, **OPTIONS, norm="nuclear", seed=3) for _ in range(2))
    assert first.report.details["nrmf"] == second.report.details["nrmf"]
    assert same_state(copied(first.model), copied(second.model))


def test_a_network_that_does_not_get_smaller_stays_dense(network, dataset):
    with pytest.warns(UserWarning, match="no layer gets smaller at p=1.0"):
        made = nrmf(network, dataset, **{**OPTIONS, "alpha": 0.0, "p": 1.0, "epochs": 0})
    assert made.report.replaced == [] and len(made.history) == 2


@pytest.mark.parametrize(
    "options,message",
    [
        ({"alpha": -0.1}, "alpha must be in"),
        ({"p": 2.0}, "p must be in"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"epochs": -1}, "nrmf: epochs must be 0 or more, got -1"),
        ({"finetune_epochs": -1}, "nrmf: finetune_epochs must be 0 or more, got -1"),
        ({"finetune_lr": -1.0}, r"nrmf: finetune_lr must be in \[0, inf\), got -1.0"),
        ({"schedule": "steep"}, "schedule must be one of"),
        ({"batch_size": 0}, r"nrmf: batch_size must be in \[1, inf\), got 0"),
        ({"parameters": [{}]}, "nrmf: parameters must be None"),
    ],
)
def test_refused_before_any_work(dataset, monkeypatch, options, message):
    monkeypatch.setattr(recipes.nrmf.__globals__["copy"], "deepcopy", lambda model: model)
    model = small_network()
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        nrmf(model, dataset, **{**OPTIONS, **options})
    assert same_state(before, copied(model))


def test_unsound_networks(dataset):
    with pytest.raises(ValueError, match="no convolution with a window"):
        nrmf(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), dataset, **OPTIONS)
    model = small_network()
    model[0].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '0' has NaN or Inf"):
        nrmf(model, dataset, **OPTIONS)
    with pytest.raises(TypeError, match="unknown option 'warm'; did you mean 'warmup'"):
        nrmf(small_network(), dataset, **OPTIONS, warm=1)
