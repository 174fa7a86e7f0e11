"""Distributions of gates: published figures, frequencies against probabilities, gradients."""

import math

import pytest
import torch

from tensorcomp_ext.ranks.bernoulli_gates import BernoulliGate
from tensorcomp_ext.ranks.concrete_gates import ConcreteGate
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate

DRAWS = 400_000


def phi(u):
    return 0.5 * (1 + math.erf(u / math.sqrt(2)))


def test_published_probability_and_slope():
    location = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    probability = GaussianGate(sigma=0.5).probability(location).sum()
    probability.backward()
    assert probability.item() == pytest.approx(0.991802, abs=5e-7)
    assert float(location.grad) == pytest.approx(0.044789, abs=1e-5)
    assert probability.item() == pytest.approx(phi(2.4), abs=1e-12)


@pytest.mark.parametrize("location", [-1.9, -1.2, -0.7, 0.0, 0.3])
@pytest.mark.parametrize(
    "gate", [GaussianGate(), GaussianGate(0.9), ConcreteGate(), ConcreteGate(temperature=0.7)]
)
def test_frequencies(gate, location):
    drawn = gate.sample(torch.full((DRAWS,), location, dtype=torch.float64))
    probability = float(gate.probability(torch.tensor(location, dtype=torch.float64)))
    error = math.sqrt(probability * (1 - probability) / DRAWS)
    assert abs(float((drawn > 0).double().mean()) - probability) <= 3 * error + 1e-9
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


@pytest.mark.parametrize("location", [-0.2, 0.0, 0.03, 0.55, 1.0, 1.3])
def test_bernoulli_frequencies(location):
    gate = BernoulliGate()
    drawn = gate.sample(torch.full((DRAWS,), location))
    probability = min(max(location, 0.0), 1.0)
    assert set(drawn.tolist()) <= {0.0, 1.0}
    assert float(gate.probability(torch.tensor(location))) == pytest.approx(probability)
    assert abs(float(drawn.mean()) - probability) <= 3 * math.sqrt(probability * (1 - probability) / DRAWS)
    assert not gate.sample(torch.tensor([0.5], requires_grad=True)).requires_grad


def test_decided_gates():
    location = torch.tensor([-3.0, -1.2, -1.0, -0.5, 0.4])
    assert GaussianGate().decided(location).tolist() == pytest.approx([0.0, 0.0, 0.2, 0.7, 1.0])
    assert ConcreteGate().decided(location).tolist() == [0, 0, 0, 0, 1]
    assert BernoulliGate().decided(torch.tensor([-1.0, 0.5, 0.51, 2.0])).tolist() == [0, 0, 1, 1]


def test_gradients_pass_where_the_clamp_lets_them():
    torch.manual_seed(3)
    location = torch.zeros(500, requires_grad=True)
    drawn = GaussianGate().sample(location)
    drawn.sum().backward()
    inside = (drawn > 0) & (drawn < 1)
    assert torch.equal(location.grad, inside.float())
    assert 0 < int(inside.sum()) < 500


def test_log_probability_is_finite_and_has_the_slope_of_the_score():
    gate = BernoulliGate()
    location = torch.tensor([-0.5, 0.3, 0.3, 0.8, 1.7], dtype=torch.float64, requires_grad=True)
    drawn = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    found = gate.log_probability(location, drawn)
    expected = [math.log(1e-6), math.log(0.3), math.log(0.7), math.log(0.2), math.log(1e-6)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    found.sum().backward()
    assert location.grad.tolist() == pytest.approx([0.0, 1 / 0.3, -1 / 0.7, -1 / 0.2, 0.0])


def test_log_prior():
    gate, a = ConcreteGate(), torch.tensor([-1.5, 2.0], dtype=torch.float64)
    p = [1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-2.0))]
    expected = [q * math.log(0.1) + (1 - q) * math.log(0.9) for q in p]
    assert gate.log_prior(a, 0.1).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gate", "mean"), [(GaussianGate(), 0.0), (BernoulliGate(), 0.55), (ConcreteGate(-1.75), -1.75)]
)
def test_first_locations(gate, mean):
    start = gate.start(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(start.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(start.std()) == pytest.approx(0.01, rel=0.05)
    again = gate.start(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(start, again)


def test_refusals():
    with pytest.raises(ValueError, match="GaussianGate: sigma must be above 0 and finite, got 0"):
        GaussianGate(sigma=0.0)
    with pytest.raises(ValueError, match="GaussianGate: spread must be 0 or more and finite, got -1"):
        GaussianGate(spread=-1.0)
    with pytest.raises(ValueError, match="ConcreteGate: temperature must be above 0 and finite, got 0"):
        ConcreteGate(temperature=0.0)
