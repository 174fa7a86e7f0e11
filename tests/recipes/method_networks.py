"""Small networks and helpers for the tests of NRMF and progressive Tucker."""

import torch
from torch import nn


def small_network(seed=0, bias=True):
    """Convolutions with windows, a pointwise and a depthwise one, and two linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.Conv2d(12, 16, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 4),
    )


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(value, b[key]) for key, value in a.items())


def copied(model):
    return {key: value.clone() for key, value in model.state_dict().items()}
