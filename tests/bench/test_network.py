"""The network suite: cases, schemes and their counts, what becomes of a network, rows."""

import pytest
import torch
from torch import nn

from tensorcomp_ext import models
from tensorcomp_ext.bench import network as network_module
from tensorcomp_ext.bench.device_summary import network_summary, network_table
from tensorcomp_ext.bench.devices import Cpu
from tensorcomp_ext.bench.network import measure_network
from tensorcomp_ext.bench.network_build import (
    build,
    folded,
    inputs,
    like,
    networks,
    parameters,
    staged,
    with_tltorch,
)
from tensorcomp_ext.bench.network_cases import NetworkCase, network_cases, network_from_dict
from tensorcomp_ext.bench.network_schemes import NETWORKS, Target, get_scheme, schemes
from tensorcomp_ext.bench.roofline import Probe
from tensorcomp_ext.bench.timing import Effort
from tensorcomp_ext.nn import FactorizedLayer

OPTIONS = {
    "device": Cpu(),
    "compiled": "never",
    "effort": Effort(budget_s=0.0, min_rounds=2, max_rounds=2, warmup_s=0.0),
    "probe": Probe(),
}


def test_cases_of_the_issue():
    cases = network_cases("cpu")
    assert len(cases) == len(set(cases)) == 11 * 4
    assert {c.batch for c in cases} == {1, 8, 32, 128}
    listed = {(c.network, c.scheme) for c in cases}
    assert {("resnet18", "nrmf"), ("resnet32", "tr10"), ("resnet32", "tr15"), ("mlp", "svd512")} <= listed
    assert all(c.scheme in schemes(c.network) for c in cases)
    assert NetworkCase("resnet32", 8, scheme="tr10").label() == "resnet32 batch 8 tr10"
    assert NetworkCase("resnet32", 8).label() == "resnet32 batch 8 rank 0.3"


def test_scheme_of_a_case():
    assert network_from_dict({"network": "resnet18", "batch": 1}).scheme == "fraction"
    assert network_from_dict({"network": "mlp", "batch": 1}).scheme == "svd128"
    assert network_from_dict({"network": "vit_block", "batch": 1, "scheme": "svd"}).scheme == "svd"
    with pytest.raises(ValueError, match="scheme of vgg16 must be one of fraction, tucker2, got 'tr10'"):
        network_from_dict({"network": "vgg16", "batch": 1, "scheme": "tr10"})


def test_every_scheme_has_layers_to_compress():
    for network in NETWORKS:
        for scheme in schemes(network):
            with torch.device("meta"):
                dense = build(network, scheme)
            choose = get_scheme(network, scheme, 0.5)
            assert any(choose(name, layer) is not None for name, layer in dense.named_modules())


def test_ranks_of_the_nrmf_table():
    """Stored weights of the five layers as the method sheet has them."""
    with torch.device("meta"):
        dense = build("resnet18", "nrmf")
    choose = get_scheme("resnet18", "nrmf", 0.0)
    stored = {}
    for name, layer in dense.named_modules():
        target = choose(name, layer)
        if target is not None:
            (outs, ins), channels = target.rank, (layer.out_channels, layer.in_channels)
            stored[name] = channels[1] * ins + 9 * ins * outs + outs * channels[0]
    assert [stored[name] for name in stored if name.startswith("layer4")] == [
        807_322,
        815_184,
        216_608,
        46_721,
    ]
    assert stored["layer3.1.conv2"] == 255_696 and len(stored) == 16


@pytest.mark.parametrize(
    ("network", "scheme", "dense", "compressed"),
    [
        ("lenet5", "tr10", 429_100, 161 * 100 + 400),
        ("lenet5", "tr15", 429_100, 161 * 225 + 400),
        ("resnet32", "tr10", 466_906, 94_274),
        ("resnet32", "tr15", 466_906, 205_024),
    ],
)
def test_counts_of_the_method_sheet(network, scheme, dense, compressed):
    before, after = networks(network, scheme, 0.3)
    assert (parameters(before), parameters(after)) == (dense, compressed)


class Normed(nn.Module):
    """A network that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        if x.sum() > 1e9:
            raise ValueError("too large")
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize("make", [Normed, lambda: models.build("resnet20"), lambda: models.build("vgg16")])
def test_folded_networks_compute_the_same(make):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -1.0, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        made = folded(model)
        torch.testing.assert_close(made(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_nothing_to_fold_is_said():
    with pytest.raises(ValueError, match="no batch normalisation"):
        folded(models.LeNet5())


def test_stages_and_tltorch_compute_what_the_network_computes():
    _, compressed = networks("resnet20", "tucker2", 0.3)
    x = inputs("resnet20", 2, torch.float32, "cpu")
    with torch.no_grad():
        expected = compressed(x)
        plain = staged(compressed)
        assert not any(isinstance(module, FactorizedLayer) for module in plain.modules())
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)
        pytest.importorskip("tltorch")
        torch.testing.assert_close(with_tltorch(compressed)(x), expected, rtol=1e-4, atol=1e-4)


def test_tltorch_without_such_a_format_says_so():
    pytest.importorskip("tltorch")
    with pytest.raises(ValueError, match="tltorch: no comparison for svd"):
        with_tltorch(nn.Sequential(like(nn.Linear(4, 6), Target("svd", 2))))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_row_of_a_network_without_convolutions(direction):
    case = NetworkCase("vit_block", 1, dtype="float32", scheme="svd")
    row = measure_network(case, direction, 1, **OPTIONS)
    assert row["error"] is None and not row["wrong"]
    assert row["best_dense"] == "dense eager" and row["over_best_dense"] > 0
    assert row["parameters"]["dense"] == 1_774_464
    assert ("ours folded eager" in {c["name"] for c in row["candidates"]}) == (direction == "forward")


def test_scheme_that_cannot_be_built_is_the_rows_error(monkeypatch):
    def broken(*_):
        raise ValueError("no such format")

    monkeypatch.setattr(network_module, "networks", broken)
    row = measure_network(NetworkCase("lenet5", 1, dtype="float32"), "forward", 1, **OPTIONS)
    assert row["error"] == "ValueError: no such format"
    assert network_summary([row]) == {"rows": 1, "measured": 0, "slower": []}
    assert not network_table({"rows": [row]})[1]
