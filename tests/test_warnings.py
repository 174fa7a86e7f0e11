"""Warnings point at the line that called into the package, however deep their cause lies."""

import pytest
import torch
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext import recipes
from tensorcomp_ext.data import Dataset


def images(size=28):
    pixels = torch.zeros(8, 1, size, size, dtype=torch.uint8)
    labels = torch.arange(8) % 2
    return Dataset("blank", pixels, labels, pixels, labels, (0.5,), (0.5,), ("a", "b"))


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda: tc.compress(nn.Sequential(nn.Linear(8, 6)), rank=20),
        lambda: tc.nn.FactorizedLinear.from_linear(nn.Linear(8, 6), rank=20),
        lambda: tc.decompose.truncated_svd(torch.randn(8, 6), 20),
        lambda: recipes.uniform(network(), images(), rank=9, epochs=0, format="svd"),
        lambda: recipes.posttraining(network(), images(), rank=9, epochs=0),
    ],
    ids=["compress", "layer", "decompose", "uniform", "posttraining"],
)
def test_clipped_ranks_are_said_of_the_callers_line(call):
    with pytest.warns(UserWarning, match="clipped") as record:
        call()
    assert {entry.filename for entry in record} == {__file__}
