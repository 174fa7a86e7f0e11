"""The norm of NRMF: its definition by traces, its identity, gradients, ranks and spectra, and refusals."""

import math

import pytest
import torch
from method_networks import small_network
from torch import nn

from tensorcomp_ext.ranks import Energy, rank_layout
from tensorcomp_ext.recipes import NuclearNorm, TrainState, trace_norm, true_nuclear
from tensorcomp_ext.recipes.nuclear_norm import QUANTILES, rank_at, summary

SHAPES = [(5, 3, 3, 3), (1, 1, 2), (4, 7, 1, 3), (6, 2, 2, 2, 3), (8, 8, 5, 5)]


def kernels(dtype=torch.float64):
    torch.manual_seed(2)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]


def by_traces(weights):
    """1/(2M) sum of tr(W1 W1^T) + tr(W2 W2^T), W1 being S x T K and W2 T x S K."""
    total = 0.0
    for weight in weights:
        first = weight.movedim(1, 0).reshape(weight.shape[1], -1)
        second = weight.reshape(weight.shape[0], -1)
        total = total + torch.trace(first @ first.T) + torch.trace(second @ second.T)
    return total / (2 * len(weights))


def test_the_norm_is_the_mean_squared_frobenius_norm():
    weights = kernels()
    expected = sum(weight.square().sum() for weight in weights) / len(weights)
    assert trace_norm(weights).item() == pytest.approx(by_traces(weights).item(), rel=1e-12)
    assert trace_norm(weights).item() == pytest.approx(expected.item(), rel=1e-12)
    values = [torch.linalg.svdvals(w.flatten(1)).square().sum() for w in weights]
    assert trace_norm(weights).item() == pytest.approx((sum(values) / len(values)).item(), rel=1e-12)


def test_its_gradient_is_decay():
    weights = kernels()
    found = torch.autograd.grad(trace_norm(weights), weights)
    for weight, gradient in zip(weights, found, strict=True):
        torch.testing.assert_close(gradient, 2 / len(weights) * weight, rtol=1e-12, atol=0)


def test_the_sum_of_singular_values():
    weights = kernels()
    expected = 0.0
    for weight in weights:
        for matrix in (weight.movedim(1, 0).flatten(1), weight.flatten(1)):
            expected += matrix.detach().norm(p="nuc").item()
    assert true_nuclear(weights).item() == pytest.approx(expected / (2 * len(weights)), rel=1e-12)
    assert torch.autograd.gradcheck(lambda *ws: true_nuclear(ws), weights[:3])
    # It is not the norm of the source: that of 2 W is twice as large, not four times.
    doubled = [2 * weight for weight in weights]
    assert true_nuclear(doubled).item() == pytest.approx(2 * true_nuclear(weights).item(), rel=1e-12)
    assert trace_norm(doubled).item() == pytest.approx(4 * trace_norm(weights).item(), rel=1e-12)
    zeros = [torch.zeros(3, 2, 3, 3, requires_grad=True)]
    true_nuclear(zeros).backward()
    assert torch.isfinite(zeros[0].grad).all()


@pytest.mark.parametrize("function", [trace_norm, true_nuclear])
def test_no_weights(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: weights must hold at least one"):
        function([])


@pytest.mark.parametrize("p", [0.3, 0.8, 0.95, 0.999, 1.0])
def test_ranks_are_those_of_the_energy_rule(p):
    for weight in kernels():
        for spectrum in rank_layout(weight.detach(), "tucker2").spectra():
            assert rank_at(spectrum.values, p) == Energy(p)._rank(spectrum.values)
    assert rank_at(torch.zeros(4), p) == 1


def test_energy_bounds_the_error():
    """Ranks that keep p of both unfoldings leave Tucker-2 an error of at most sqrt(2 (1 - p))."""
    from tensorcomp_ext.formats import Tucker2

    for weight in kernels()[:3]:
        for p in (0.5, 0.95):
            ranks = [rank_at(s.values, p) for s in rank_layout(weight.detach(), "tucker2").spectra()]
            low = Tucker2.from_dense(weight.detach(), tuple(ranks)).to_dense()
            error = (low - weight).norm() / weight.norm()
            assert error.item() <= math.sqrt(2 * (1 - p)) + 1e-12


def test_summaries_of_spectra():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    found = summary(values)
    shares = [0.5, 0.25, 0.125, 0.125]
    assert found["effective"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in shares)))
    assert (found["largest"], found["sum"]) == (4.0, 8.0)
    assert found["spectrum"] == [1.0, 0.5, 0.25, 0.25, 0.25] and len(QUANTILES) == 5
    flat = summary(torch.ones(7, dtype=torch.float64))
    assert flat["effective"] == pytest.approx(7.0)
    assert summary(torch.tensor([3.0, 0.0, 0.0]))["effective"] == pytest.approx(1.0)
    assert summary(torch.zeros(3)) == {"largest": 0.0, "sum": 0.0, "effective": 0.0, "spectrum": [0.0] * 5}


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
def test_the_callback(norm):
    model = small_network()
    callback = NuclearNorm(model, 0.3, norm=norm)
    assert list(callback.layers) == ["0", "3"]
    kernel = (model[0].weight, model[3].weight)
    state = TrainState(model, None, None, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = callback.on_loss(state, torch.tensor(2.0))
    expected = by_traces(kernel) if norm == "frobenius" else true_nuclear(kernel)
    assert found.item() == pytest.approx(2.0 + 0.3 * expected.item(), rel=1e-6)
    found.backward()
    assert model[0].weight.grad is not None and model[6].weight.grad is None
    callback.on_epoch(state)
    logged = callback.log()["nuclear_norm"]
    assert logged["value"] == pytest.approx(expected.item(), rel=1e-6)
    for name, weight in zip(("0", "3"), kernel, strict=True):
        figures = logged["layers"][name]
        for side, matrix in (("out", weight.flatten(1)), ("in", weight.movedim(1, 0).flatten(1))):
            values = torch.linalg.svdvals(matrix.detach().double())
            assert figures[f"largest_{side}"] == pytest.approx(values[0].item(), rel=1e-6)
            assert figures[f"sum_{side}"] == pytest.approx(values.sum().item(), rel=1e-6)
            kept = values.square().cumsum(0) / values.square().sum()
            assert figures[f"rank_{side}"] == 1 + int((kept < 0.95).sum())
    ranks = callback.ranks()
    sizes = (figures["rank_out"], figures["rank_in"])
    assert ranks["3"] is None or ranks["3"] == sizes


def test_without_alpha_the_loss_is_left_alone():
    loss = torch.tensor(1.0)
    assert NuclearNorm(small_network(), 0.0).on_loss(None, loss) is loss


def test_refusals():
    model = small_network()
    for options, message in (
        ({"alpha": -1.0}, r"alpha must be in \[0, inf\), got -1.0"),
        ({"alpha": float("nan")}, "alpha must be in"),
        ({"p": 0.0}, r"p must be in \(0, 1\], got 0.0"),
        ({"p": 1.5}, "p must be in"),
        ({"norm": "trace"}, "norm must be one of frobenius, nuclear, got 'trace'"),
        ({"exclude": "nothing"}, "exclude pattern 'nothing' matches no"),
        ({"exclude": ["0", "3"]}, "the model has no convolution with a window"),
    ):
        with pytest.raises(ValueError, match=message):
            NuclearNorm(model, **options)
    with pytest.raises(TypeError, match="alpha must be a number, got '1'"):
        NuclearNorm(model, "1")
    with pytest.raises(ValueError, match="no convolution with a window"):
        NuclearNorm(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, 1)))
    model[3].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="weight of layer '3' has NaN or Inf"):
        NuclearNorm(model)
