"""Surgery on unusual layers and dtypes, and what it says of wrong arguments."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from compress_networks import same_state, small_net, state
from torch import Tensor, nn
from torch.nn.utils import prune

from tensorcomp_ext.compress import compress
from tensorcomp_ext.nn import FactorizedConv1d, FactorizedConv3d
from tensorcomp_ext.ranks import Ratio

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to", "ignore:.*deprecated")

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach().double()).norm() / expected.detach().norm())


def test_convolutions_of_one_and_three_dimensions():
    net = nn.ModuleDict({"one": nn.Conv1d(12, 16, 5), "three": nn.Conv3d(12, 16, 3)})
    model = compress(net, rank=4).model
    assert type(model["one"]) is FactorizedConv1d and type(model["three"]) is FactorizedConv3d
    assert model["one"](torch.randn(2, 12, 9)).shape == (2, 16, 5)
    assert model["three"](torch.randn(2, 12, 5, 6, 7)).shape == (2, 16, 3, 4, 5)


def test_zero_weight_is_handled():
    net = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(net[0].weight)
    model, report = compress(net, rank=2)
    assert report["0"].relative_error == 0.0 and torch.equal(model[0].weight.to_dense(), net[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype):
    net = nn.Sequential(nn.Linear(32, 32, dtype=dtype))
    model = compress(net, rank=8).model
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_compressing_twice_skips_what_is_factorised():
    first = compress(small_net(), rank=4, layers="stem").model
    second = compress(first, rank=4)
    assert second.report["stem"].skipped == "already factorised"
    assert {layer.name for layer in second.report.replaced} == {"body.1", "head"}


def test_model_that_cannot_be_copied_says_what_helps():
    net = small_net()
    net.lock = threading.Lock()
    with pytest.raises(ValueError, match="inplace=True"):
        compress(net, rank=2)
    compress(net, rank=2, inplace=True)


def test_progress_and_gradients():
    ticks: list[tuple[int, int, str]] = []
    model = compress(small_net(), rank=4, progress=lambda *tick: ticks.append(tick)).model
    assert ticks[0] == (0, 3, "stem") and ticks[-1] == (3, 3, "")
    model(X).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert same_state(state(model), copy.deepcopy(model).state_dict())


def test_tensors_that_hooks_compute_are_copied():
    net = nn.Sequential(prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    model = compress(net, rank=8, layers="1", example_inputs=x).model
    assert relative(model(x), net(x)) < 1e-5


def test_wrong_types():
    with pytest.raises(TypeError, match="Module"):
        compress("net", rank=2)
    with pytest.raises(TypeError, match="format"):
        compress(small_net(), format=3, rank=2)
    with pytest.raises(TypeError, match="layers"):
        compress(small_net(), rank=2, layers=[nn.Conv2d])


def test_ranks_as_text():
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    text = compress(network, rank={"0": "4,3", "1": "ratio:0.5"}).report
    rules = compress(network, rank={"0": (4, 3), "1": Ratio(0.5)}).report
    assert [layer.rank for layer in text] == [layer.rank for layer in rules]
    with pytest.raises(ValueError, match=r"known rules: .*vbmf"):
        compress(network, rank="some")


def test_clipped_ranks_are_one_warning_at_the_caller():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.warns(UserWarning) as heard:
        compress(network, rank=1000)
    assert len(heard) == 1 and heard[0].filename == __file__
    assert "clipped in 2 layers, e.g. 0: " in str(heard[0].message)


def test_errors_name_a_layer_once():
    with pytest.raises(ValueError, match=r"^compress: layer '0': tucker2: .* at least 1"):
        compress(nn.Sequential(nn.Conv2d(8, 8, 3)), rank=0)


@pytest.mark.parametrize("rank", [0, (1, 2, 3)])
def test_errors_name_the_layer_once(rank):
    with pytest.raises(ValueError) as caught:
        compress(nn.Sequential(nn.Conv2d(3, 4, 3)), rank=rank)
    assert "0: " not in str(caught.value).replace("layer '0': ", "", 1)
