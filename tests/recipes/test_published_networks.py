"""Networks of the publication as low-rank + sparse: exact starts, what stays sparse, a step, packing."""

import pytest
import torch
from small_images import quadrants
from torch import nn

from tensorcomp_ext import models
from tensorcomp_ext.formats import PackedLowRankSparse
from tensorcomp_ext.recipes import lowrank_sparse, parts_of
from tensorcomp_ext.recipes.lowrank_sparse import layers_of

# Linear layers and convolutions; of these, depthwise ones of 3 x 3, whose rank 1 takes more than a tenth.
COUNTS = {
    "mobilenet_v3_small": (54, 3),
    "mobilenet_v3_large": (64, 9),
    "efficientnet_b0": (82, 7),
    "deit_small": (50, 0),
}
CASES = [*list(COUNTS)[:3], pytest.param("deit_small", marks=pytest.mark.slow)]


def fresh(name):
    """The network with statistics of a batch, so that values are of unit scale down to the logits."""
    torch.manual_seed(0)
    model = models.build(name, num_classes=1000)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model.eval()


def depthwise(model):
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.groups > 1 and m.kernel_size == (3, 3)
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_starts_as_the_teacher(name, mode):
    model = fresh(name)
    result = parts_of(model, mode=mode, init="residual")
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, found = model(x), result.model(x)
    assert ((found - expected).norm() / (expected - expected.mean()).norm()).item() < 1e-5
    layers = layers_of(result.model)
    total, small = COUNTS[name]
    assert len(layers) == total - 1 and len(depthwise(model)) == small
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    assert type(result.model.get_submodule(last)) is nn.Linear
    assert result.report[last].skipped == "excluded"
    for layer_name, layer in layers.items():
        low, note = layer.weight.low_rank, result.report[layer_name].note
        assert layer.weight.nnz == layer.weight.shape.numel()
        assert (low is None) == (note is not None)
        if low is None:
            assert note.startswith("sparse part only: rank 1 of tt takes ")
        else:
            assert low.numel <= 0.1 * layer.weight.shape.numel()
    assert all(layers[n].weight.low_rank is None for n in depthwise(model))


@pytest.mark.parametrize("name", CASES)
def test_trains_a_step_and_packs(name):
    model = fresh(name)
    images = quadrants(train=2, test=2, channels=3, size=224)
    result = lowrank_sparse(model, images, epochs=1, lr=1e-3, batch_size=2, sparsity=0.9)
    details = result.report.details["lowrank_sparse"]
    weights = [layer.weight for layer in layers_of(result.model).values()]
    assert all(isinstance(weight, PackedLowRankSparse) for weight in weights)
    entries = sum(weight.shape.numel() for weight in weights)
    assert details["weights"] == entries and details["sparse"] == entries - round(0.9 * entries)
    assert details["stored_bytes"] <= 0.25 * 4 * entries
    assert torch.isfinite(torch.tensor(result.history[0].loss))
    with torch.no_grad():
        assert bool(torch.isfinite(result.model.eval()(torch.randn(1, 3, 224, 224))).all())
