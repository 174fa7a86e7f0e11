"""Baselines of equal size: what each stores, that it learns, resumes and refuses."""

import warnings

import pytest
import torch
from method_networks import copied, same_state, small_network
from small_images import quadrants
from stopping import StopAt
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext import recipes
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.ranks import VBMF
from tensorcomp_ext.recipes import decompose_finetune
from tensorcomp_ext.recipes.decompose_finetune import FORMATS, METHODS

OPTIONS = {"epochs": 2, "batch_size": 32, "lr": 0.02}
NUMEL = {"0": 72, "3": 864, "6": 192, "9": 5120, "11": 80}


@pytest.fixture(scope="module")
def network():
    model = small_network()
    recipes.train(model, quadrants(), epochs=2, lr=0.05, batch_size=32)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method(network, dataset, tmp_path, method):
    before = copied(network)
    target = None if method == "vbmf" else 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 1 of small layers takes more than their share
        made = decompose_finetune(
            network, dataset, method=method, target=target, example_inputs=torch.zeros(2, 1, 8, 8), **OPTIONS
        )
    assert same_state(before, copied(network)) and len(made.history) == 2
    details = made.report.details["decompose_finetune"]
    assert details["weights"] == sum(NUMEL.values())
    stored = 0
    for name, numel in NUMEL.items():
        layer = made.model.get_submodule(name)
        if made.report[name].skipped:
            assert type(layer) in (nn.Conv2d, nn.Linear)
            stored += numel
            continue
        stored += layer.weight.counted
        if isinstance(layer, FactorizedLinear):
            assert layer.format == "svd"
        elif method in FORMATS:
            kind = FORMATS[method] if isinstance(FORMATS[method], str) else FORMATS[method][0]
            assert isinstance(layer, FactorizedConv2d) and layer.format == kind
            assert layer.weight.counted <= 0.3 * numel or max_rank(layer) == 1
        else:
            assert layer.format == "tucker2"
    assert details["stored"] == stored == round(details["stored_share"] * sum(NUMEL.values()))
    if method == "energy":
        assert stored <= 0.3 * sum(NUMEL.values())
    assert made.report.parameters_after == sum(p.numel() for p in made.model.parameters())
    losses = [entry.loss for entry in made.history]
    assert losses[1] < losses[0]
    tc.save(made.model, tmp_path / "net.safetensors")
    again = tc.load(tmp_path / "net.safetensors", small_network(seed=8))
    x = dataset.normalize(dataset.test_images[:3])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), made.model.eval()(x))


def max_rank(layer):
    return layer.rank if isinstance(layer.rank, int) else max(layer.rank)


def test_tsvd_is_the_best_of_its_rank(network, dataset):
    made = decompose_finetune(
        network, dataset, method="tsvd", target=0.4, exclude=["0", "6"], **{**OPTIONS, "epochs": 0}
    )
    layer, dense = made.model[3], network[3].weight.detach().flatten(1)
    u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    kept = layer.rank
    expected = (u[:, :kept] * s[:kept]) @ vh[:kept]
    assert kept == int(0.4 * 864) // (12 + 72)
    torch.testing.assert_close(layer.weight.to_dense().flatten(1).double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.weight.counted == kept * (12 + 72)


def test_vbmf_ranks(network, dataset):
    made = decompose_finetune(network, dataset, method="vbmf", target=None, **{**OPTIONS, "epochs": 0})
    for entry in made.report.replaced:
        weight = network.get_submodule(entry.name).weight.detach()
        ranks = VBMF().resolve(weight, entry.format)
        assert entry.rank == (ranks if isinstance(ranks, tuple) else (ranks,))


def test_resumed(network, dataset, tmp_path):
    options = {**OPTIONS, "method": "energy", "target": 0.3}
    whole = decompose_finetune(network, dataset, **options, callbacks=[StopAt(-1)])
    checkpoint = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        decompose_finetune(network, dataset, **options, checkpoint=checkpoint, callbacks=[StopAt(7)])
    again = decompose_finetune(network, dataset, **options, checkpoint=checkpoint, callbacks=[StopAt(-1)])
    assert same_state(copied(again.model), copied(whole.model))
    with pytest.raises(ValueError, match="other settings"):
        decompose_finetune(
            network, dataset, **{**options, "target": 0.31}, checkpoint=checkpoint, callbacks=[StopAt(-1)]
        )


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"method": "hosvd"},
            "method must be one of tsvd, cp, tucker, tucker2, tt, tr, energy, vbmf, got 'hosvd'",
        ),
        ({"target": 0.0}, r"target must be in \(0, 1\), got 0.0"),
        ({"method": "vbmf"}, "target must be None with method 'vbmf'"),
        ({"method": "energy", "target": 0.002}, r"decompose_finetune: target must be at least 0\.\d+"),
        ({"epochs": -2}, "decompose_finetune: epochs must be 0 or more, got -2"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"exclude": "*"}, "no convolution or linear layer to compress"),
    ],
)
def test_refused_before_any_work(dataset, monkeypatch, options, message):
    def never(*arguments, **options):
        raise AssertionError("decomposed")

    for place in ("decomposed_at", "compress"):
        monkeypatch.setitem(recipes.decompose_finetune.__globals__, place, never)
    with pytest.raises(ValueError, match=message):
        decompose_finetune(small_network(), dataset, **{"target": 0.3, **OPTIONS, **options})
    with pytest.raises(TypeError, match="target must be a number, got None"):
        decompose_finetune(small_network(), dataset, **OPTIONS, target=None)
    model = small_network()
    model[3].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '3' has NaN or Inf"):
        decompose_finetune(model, dataset, **OPTIONS)
