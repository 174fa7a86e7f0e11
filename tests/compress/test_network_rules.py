"""Budgets of whole networks: kept, filled, from one energy threshold for all layers."""

import copy

import pytest
import torch
from compress_networks import small_net
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.ranks import rank_layout
from tensorcomp_ext.ranks.budgets import grow
from tensorcomp_ext.ranks.shared_energy import Subject, share_energy


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 40, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 40),
        nn.Linear(40, 10),
    ).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # spectra that fall
                scale = torch.exp(-torch.arange(module.weight.shape[0]) / 6)
                module.weight.mul_(scale.reshape(-1, *(1,) * (module.weight.dim() - 1)))
    return net


X = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))


def count(model):
    return sum(p.numel() for p in model.parameters())


def chain_flops(model, x):
    """Of factors or dense weights, whatever plan runs."""
    total, handles = 0, []

    def add(module, args, output):
        nonlocal total
        if isinstance(module, FactorizedLayer):
            total += 2 * module.macs(args[0].shape)
        else:
            total += 2 * output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, FactorizedLayer)):
            handles.append(module.register_forward_hook(add))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.8])
def test_parameters_of_the_network_are_kept_and_filled(share):
    model = network()
    result = tc.compress(model, rank=tc.ranks.NetworkParams(share))
    assert count(result.model) == result.report.parameters_after
    assert 0.94 * share * count(model) <= count(result.model) <= share * count(model)
    assert result.report.details["network_rule"]["reached"] == count(result.model)
    exact = tc.compress(model, rank=tc.ranks.NetworkParams(int(share * count(model))))
    assert [entry.rank for entry in exact.report] == [entry.rank for entry in result.report]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_operations_of_the_network_are_kept_and_filled(share):
    model = network()
    dense = chain_flops(model, X)
    result = tc.compress(model, rank=f"network-flops:{share}", example_inputs=X)
    reached = chain_flops(result.model, X)
    assert 0.94 * share * dense <= reached <= share * dense
    assert result.report.details["network_rule"]["reached"] == reached


def subjects(model):
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layout = rank_layout(module.weight.detach(), "tucker2" if module.weight.dim() > 2 else "svd")
            found[name] = Subject(layout, layout.params, module.weight.numel())
    return found


def test_the_threshold_is_the_largest_that_fits():
    known = subjects(network())
    whole = sum(subject.dense_cost for subject in known.values())
    budget = 0.3 * whole
    found = share_energy(known, budget)
    rule = tc.ranks.Energy(found.p)
    spent = 0
    for name, subject in known.items():
        at = subject.layout.inner(rule.choose(subject.layout, None))
        price = min(subject.dense_cost, subject.layout.params(at))
        spent += price
        chosen = found.ranks[name]
        assert chosen is None or all(r >= low for r, low in zip(chosen, at, strict=True))
    assert spent <= found.cost <= budget
    for name, ranks in found.ranks.items():  # nothing more fits
        for place in range(len(ranks or ())):
            grown = grow(known[name].layout, ranks, place)
            price = float("inf") if grown is None else min(known[name].cost(grown), known[name].dense_cost)
            assert found.cost - known[name].price(ranks) + price > budget
    above = {name: subject.at(min(1.0, found.p + 1e-9)) for name, subject in known.items()}
    assert sum(known[name].price(ranks) for name, ranks in above.items()) > budget


def test_whole_and_unreachable_budgets():
    model = network()
    with pytest.warns(UserWarning, match="network-params:10 cannot be met: rank 1 everywhere already needs"):
        report = tc.compress(model, rank=tc.ranks.NetworkParams(10)).report
    assert all(set(entry.rank) == {1} for entry in report.replaced)
    with pytest.warns(UserWarning, match="nothing was replaced"):
        assert not tc.compress(model, rank=tc.ranks.NetworkParams(1.0)).report.replaced


def test_excluded_layers_count_and_stay():
    model = network()
    result = tc.compress(model, rank=tc.ranks.NetworkParams(0.5), exclude=("0", "9"))
    assert type(result.model[0]) is nn.Conv2d
    assert count(result.model) <= 0.5 * count(model)


def test_bad_calls():
    model = small_net()
    with pytest.raises(ValueError, match=r"rank=network-flops:0.5 needs example_inputs"):
        tc.compress(model, rank=tc.ranks.NetworkFlops(0.5))
    with pytest.raises(ValueError, match=r"'stem': network-params:0.5 chooses for the whole network"):
        tc.compress(model, rank={"*": tc.ranks.NetworkParams(0.5)})
    with pytest.raises(ValueError, match=r"is left no layer to choose ranks for .*stem: excluded"):
        tc.compress(model, rank=tc.ranks.NetworkParams(0.5), exclude="*")
    with pytest.raises(ValueError, match=r"'stem': cp: rank must be given"):
        tc.compress(model, rank=tc.ranks.NetworkParams(0.5), format={"stem": "cp"})
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
