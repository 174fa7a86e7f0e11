"""Cutting ranks in training: budgets, errors, what the optimizer forgets, and the schedules of the gate."""

import math

import pytest
import torch
from torch import nn

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.ranks import Orthogonal
from tensorcomp_ext.recipes.adaptive_ranks import cut_to, first_ranks, ranks_of, resize, size_of
from tensorcomp_ext.recipes.fades import FADES


def network():
    torch.manual_seed(4)
    kernel, matrix = nn.Conv2d(6, 10, 3, padding=1), nn.Linear(40, 12)
    with torch.no_grad():  # spectra that fall
        kernel.weight.mul_(torch.logspace(0, -2, 10)[:, None, None, None])
        matrix.weight.mul_(torch.logspace(0, -3, 40))
    model = nn.Sequential(
        FactorizedConv2d.from_conv(kernel, rank=(8, 6)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        FactorizedLinear.from_linear(matrix, rank=9),
    )
    return model, {name: model.get_submodule(name) for name in ("0", "3")}


def stepped(model, kind):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    model(torch.randn(4, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_cuts_meet_the_budget_and_their_bound(kind):
    model, layers = network()
    optimizer = stepped(model, kind)
    before = {name: (layer.weight, layer.weight.to_dense().detach()) for name, layer in layers.items()}
    order = [id(p) for p in model.parameters()]
    assert size_of(layers) == 8 * 10 + 6 * 6 + 8 * 6 * 9 + 9 * 52
    assert cut_to(model, layers, 600, optimizer) == ["0", "3"]
    assert size_of(layers) <= 600
    for name, layer in layers.items():
        weight, dense = before[name]
        lost = sum(
            float(values[rank:].square().sum())
            for values, rank in zip(Orthogonal(weight).spectra, ranks_of(layer.weight), strict=True)
        )
        assert float((layer.weight.to_dense().detach() - dense).square().sum()) <= lost * (1 + 1e-4) + 1e-10
    held = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()] != order
    # Moments of what was cut begin anew; biases keep theirs.
    assert {id(p) for p in optimizer.state} == {id(layers[name].bias) for name in layers}
    model(torch.randn(4, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    assert cut_to(model, layers, 600, optimizer) == []
    with pytest.raises(ValueError, match="budget must be at least"):
        cut_to(model, layers, 50, optimizer)


def test_layers_that_keep_their_ranks_are_left_as_they_are():
    model, layers = network()
    with torch.no_grad():  # a flat spectrum at its ranks: the other layer loses less
        u, v = torch.linalg.qr(torch.randn(12, 9))[0], torch.linalg.qr(torch.randn(40, 9))[0]
        layers["3"].weight.a.copy_(u)
        layers["3"].weight.b.copy_(v.T)
    optimizer = stepped(model, torch.optim.SGD)
    kept = [layers["3"].weight, *layers["3"].parameters()]
    assert cut_to(model, layers, size_of(layers) - 150, optimizer) == ["0"]
    now = [layers["3"].weight, *layers["3"].parameters()]
    assert all(a is b for a, b in zip(kept, now, strict=True))
    assert all(p in optimizer.state for p in layers["3"].parameters())


def test_frozen_and_channels_last_factors_stay_so():
    model, layers = network()
    model.to(memory_format=torch.channels_last)
    layers["3"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    cut_to(model, layers, 500, optimizer)
    assert not layers["3"].weight.a.requires_grad and layers["0"].weight.core.requires_grad
    assert layers["0"].weight.core.is_contiguous(memory_format=torch.channels_last)
    assert len(optimizer.param_groups[0]["params"]) == 5


def test_resize_for_loading():
    model, layers = network()
    other, cut = network()
    cut_to(other, cut, 500)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name, layer in layers.items():
        resize(layer, ranks_of(cut[name].weight), optimizer)
    model.load_state_dict(other.state_dict())
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(model(x), other(x))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_fades():
    for name, fade in FADES.items():
        assert fade(0, 7) == 1.0 and fade(7, 7) == pytest.approx(0.0, abs=1e-15), name
        assert fade(9, 7) == fade(7, 7)
        values = [fade(step, 7) for step in range(8)]
        assert values == sorted(values, reverse=True)
    assert FADES["cosine"](2, 8) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert FADES["linear"](2, 8) == 0.75
    assert FADES["sine"](2, 6) == pytest.approx(0.5)


def test_no_layer_gets_larger_than_its_dense_weight():
    torch.manual_seed(5)
    # Flat spectra and room for all ranks: nothing but the ceiling holds the small layer back.
    weights = {"wide": torch.randn(64, 64), "narrow": torch.randn(10, 128)}
    model = nn.Sequential(nn.Linear(64, 64))
    ranks, budget = first_ranks("test", model, weights, 0.8, 10.0)
    assert ranks == {"wide": (31,), "narrow": (9,)}
    assert budget == int(0.8 * (64 * 64 + 1280))
    layers = {
        "wide": FactorizedLinear.from_linear(nn.Linear(64, 64), rank=31),
        "narrow": FactorizedLinear.from_linear(nn.Linear(128, 10), rank=10),
    }
    assert layers["narrow"].weight.numel > 1280
    assert cut_to(model, layers, size_of(layers) - 1) == ["narrow"]
    assert ranks_of(layers["narrow"].weight) == (9,)
