"""What the methods of rank selection minimise: the estimates of REINFORCE, the loss of MARS."""

import itertools
import math

import pytest
import torch
from gated_networks import gated, state_of, step
from torch import nn

from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.ranks.bernoulli_gates import BernoulliGate
from tensorcomp_ext.ranks.concrete_gates import ConcreteGate
from tensorcomp_ext.recipes import Mars, Reinforce


class Pair(nn.Module):
    """A layer with two gates: rank 3, of which one entry has none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = FactorizedLinear(64, 4, format="svd", rank=3)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_reinforce_has_the_exact_gradient_in_the_mean(dataset, monkeypatch):
    """With two gates both expectations are sums over four states."""
    weight, probabilities = 0.2, torch.tensor([0.3, 0.6], dtype=torch.float64)
    found = gated(BernoulliGate(), Pair().double())
    (gates,) = found.gates
    with torch.no_grad():
        gates.location.copy_(probabilities)
    state = state_of(found, dataset)
    state.inputs = (state.inputs[0].double(),)
    method = Reinforce(found, weight=weight, samples=1)

    pi = probabilities.clone().requires_grad_()
    factors = [factor.detach().clone().requires_grad_() for factor in found.model.layer.weight.factors]
    x, labels, bias = state.inputs[0].flatten(1), state.labels, found.model.layer.bias.detach()
    expected = surrogate = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=2):
        z = torch.tensor([1.0, *bits], dtype=torch.float64)
        logits = x @ (factors[0] * z @ factors[1]).t() + bias
        cost = nn.functional.cross_entropy(logits, labels) + weight * sum(bits)
        chance = torch.where(z[1:] > 0, pi, 1 - pi).prod()
        expected = expected + chance * cost
        monkeypatch.setattr(found.gate, "sample", lambda location, z=z: z[1:].clone())
        method.on_batch(state)
        surrogate = surrogate + chance.detach() * method.on_loss(state, state.forward())
    expected.backward()
    surrogate.backward()
    torch.testing.assert_close(gates.location.grad, pi.grad, rtol=1e-6, atol=0)
    for factor, exact in zip(found.model.layer.weight.factors, factors, strict=True):
        torch.testing.assert_close(factor.grad, exact.grad, rtol=1e-6, atol=1e-12)


def test_reinforce_takes_layers_that_are_not_called(dataset):
    """The loss does not depend on them, the number of their open gates has an exact gradient."""

    class Idle(Pair):
        def __init__(self):
            super().__init__()
            self.idle = FactorizedLinear(64, 4, format="svd", rank=4)

    found = gated(BernoulliGate(), Idle())
    state = state_of(found, dataset)
    method = Reinforce(found, weight=0.3, samples=2)
    torch.manual_seed(4)
    method.on_batch(state)
    method.on_loss(state, state.forward()).backward()
    called, idle = (gates.location.grad for gates in found.gates)
    torch.testing.assert_close(idle, torch.full((3,), 0.3))

    alone = gated(BernoulliGate(), Pair())
    with torch.no_grad():
        alone.locations[0].copy_(found.locations[0])
    state = state_of(alone, dataset)
    torch.manual_seed(4)
    Reinforce(alone, weight=0.3, samples=2).on_loss(state, state.forward()).backward()
    torch.testing.assert_close(called, alone.locations[0].grad)


def test_reinforce_is_the_mean_of_its_samples(dataset):
    found = gated(BernoulliGate())
    state = state_of(found, dataset)
    method = Reinforce(found, weight=0.3, samples=3)
    torch.manual_seed(4)
    total = method.on_loss(state, state.forward())
    torch.manual_seed(4)
    expected = 0.0
    for _ in range(3):
        loss = state.forward()
        drawn = [(g.drawn.pop(), g.location) for g in found.gates]
        score = sum(torch.where(z > 0, location, 1 - location).log().sum() for z, location in drawn)
        count = sum(z.sum() for z, _ in drawn)
        expected = expected + (score * (loss.detach() + 0.3 * count) + loss) / 3
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_reinforce_scores_all_draws_of_a_layer_that_is_called_twice(dataset):
    """As an embedding of source and target is: the score of the last draw alone is biased."""

    class Twice(Pair):
        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(0))

    found = gated(BernoulliGate(), Twice())
    (gates,) = found.gates
    state = state_of(found, dataset)
    method = Reinforce(found, weight=0.3, samples=1)
    state.model(*state.inputs)  # not of the batch
    method.on_batch(state)
    loss = state.forward()
    drawn = torch.stack(gates.drawn)
    assert drawn.shape == (2, len(gates.location))
    score = torch.where(drawn > 0, gates.location, 1 - gates.location).log().sum()
    expected = score * (loss.detach() + 0.3 * drawn.sum() / 2) + loss
    assert method.on_loss(state, loss).item() == pytest.approx(expected.item(), rel=1e-5)
    assert gates.drawn == []


def test_the_answers_that_are_counted_are_those_of_the_first_sample(dataset):
    found = gated(BernoulliGate())
    state = state_of(found, dataset)
    loss = state.forward()
    first = state.outputs
    Reinforce(found, samples=3).on_loss(state, loss)
    assert state.outputs is first


def test_the_loss_of_mars_written_out(dataset):
    found = gated(ConcreteGate(mean=-1.5, spread=0.3))
    state = state_of(found, dataset)
    method = Mars(found, prior=0.1)
    loss = torch.tensor(2.0)
    phi = torch.cat([torch.sigmoid(location.detach()).double() for location in found.locations])
    cores = sum(f.detach().double().square().sum() for g in found.layers.values() for f in g.weight.factors)
    prior = (phi * math.log(0.1) + (1 - phi) * math.log(0.9)).sum()
    expected = 2.0 - (prior - 0.5 * 0.01 * cores) / 160
    assert method.on_loss(state, loss).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_temperature_of_mars_falls_to_its_floor(dataset):
    found = gated(ConcreteGate())
    state, method = state_of(found, dataset), Mars(found)
    seen = []
    for epoch in (0, 1, 10, 229, 400):
        state.epoch = epoch
        step(state, method)
        seen.append(found.gate.temperature)
    assert seen == pytest.approx([0.1, 0.099, 0.1 * 0.99**10, 0.1 * 0.99**229, 0.01])
    assert min(seen) == 0.01


def test_other_distributions_are_refused():
    with pytest.raises(ValueError, match="Reinforce: gates must be of BernoulliGate, got GaussianGate"):
        Reinforce(gated())
    with pytest.raises(ValueError, match="Mars: gates must be of ConcreteGate, got GaussianGate"):
        Mars(gated())
