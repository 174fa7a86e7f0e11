"""Small factorised networks with gates, and a state as the training loop shows it."""

import torch
from torch import nn

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate
from tensorcomp_ext.recipes import GatedNetwork, ImageTask, TrainState

DENSE = 6 * 9 + 6 + 384 * 16 + 16 + 16 * 4 + 4


def network(seed=1):
    """A convolution as a tensor ring, a linear layer as a tensor train, and a dense one."""
    torch.manual_seed(seed)
    return nn.Sequential(
        FactorizedConv2d(1, 6, 3, padding=1, format="tr", rank=(2, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        FactorizedLinear(384, 16, format="tt", rank=5, in_modes=(24, 16), out_modes=(4, 4)),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def dense_network(seed=1):
    """What :func:`network` stands for."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


LAYERS = {"0": ("tr", {}), "3": ("tt", {"in_modes": (24, 16), "out_modes": (4, 4)})}
"""Formats of :func:`dense_network`."""


def gated(gate=None, model=None):
    return GatedNetwork(model or network(), gate or GaussianGate(), DENSE)


def state_of(gated_network, dataset, lr=0.1, optimizer=torch.optim.SGD, **options):
    """A state between two steps, with a batch in it."""
    model = gated_network.model
    state = TrainState(model, optimizer(model.parameters(), lr=lr, **options), ImageTask(dataset), 1, 10)
    state.inputs = (dataset.normalize(dataset.train_images[:32]),)
    state.labels = dataset.train_labels[:32]
    return state


def step(state, method):
    """One step of the loop with one method."""
    state.optimizer.zero_grad(set_to_none=True)
    method.on_batch(state)
    method.on_loss(state, state.forward()).backward()
    state.optimizer.step()
    method.on_step(state)
    state.step += 1


def set_open(gated_network, shares, low=-3.0):
    """Shut all gates but the first ``share`` of each bond's, layer by layer."""
    with torch.no_grad():
        for gates, share in zip(gated_network.gates, shares, strict=True):
            start = 0
            for count in gates.counts.values():
                part = gates.location[start : start + count]
                part[round(share * count) :] = low
                start += count
