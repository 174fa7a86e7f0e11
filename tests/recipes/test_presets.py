"""Published layouts: which layers in which modes, and the counts that follow."""

import pytest
import torch
from torch import nn

from tensorcomp_ext.models import build
from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.recipes.presets import layout
from tensorcomp_ext.recipes.start import factorized


def count(model, preset, rank):
    report = factorized("test", model, preset=preset, rank=rank).report
    return report.parameters_before, report.parameters_after


@pytest.mark.parametrize(("rank", "stored"), [(10, 94_274), (15, 205_024)])
def test_resnet_32(rank, stored):
    model = build("resnet32", option="B")
    assert count(model, "resnet-tr", rank) == (466_906, stored)
    formats, layers = layout("resnet-tr", model)
    assert len(layers) == 31
    assert not any("shortcut" in name or name == "linear" for name in layers)
    assert formats["conv1"] == ("tr", {"in_modes": (3,), "out_modes": (4, 2, 2)})


@pytest.mark.parametrize(("rank", "ratio"), [(10, 5.30), (9, 6.49)])
def test_resnet_110(rank, ratio):
    before, after = count(build("resnet110", option="B"), "resnet-tr", rank)
    assert before == 1_730_714
    assert before / after == pytest.approx(ratio, abs=6e-3)


def test_lenet_reads_the_image_row_by_row():
    """The in modes of the first linear layer index height, width and channels, in this order."""
    small = factorized("test", build("lenet5"), preset="lenet5-tr", rank=3).model
    cores = [core.detach() for core in small.fc1.weight.factors]
    image = torch.randn(50, 5, 5)
    outs = cores[:3]
    tensor = torch.einsum("apb,bqc,crd,dhe,ewf,fxg,gya->pqrhwxy", *outs, *cores[3:])
    expected = (tensor.reshape(320, -1) @ image.permute(1, 2, 0).reshape(-1)) + small.fc1.bias
    torch.testing.assert_close(small.fc1(image.reshape(1, -1))[0], expected, rtol=1e-4, atol=1e-5)


def test_mlp_counts_of_mars():
    model = build("mlp")
    report = factorized("test", model, preset="mlp-ttm", rank=20).report
    first, second = (entry.name for entry in report.replaced)
    ranks = {first: (5, 5, 3), second: (8,)}
    report = factorized("test", model, preset="mlp-ttm", rank=ranks).report
    assert report[first].ratio == pytest.approx(388.9, abs=0.05)
    assert report[second].ratio == pytest.approx(4.464, abs=5e-4)
    # Published without biases.
    weights = [layer.parameters_after for layer in report.replaced]
    assert (784 * 625 + 6250 + 635) / (sum(weights) + 635) == pytest.approx(150.80, abs=5e-3)


@pytest.mark.parametrize(
    ("preset", "table", "rank", "stored"),
    [
        ("sst-ttm", (17_200, 256), 16, 24_128),
        ("iwslt-tr", (32_768, 512), 32, 786_432),
        ("iwslt-tr", (32_768, 512), 27, 559_872),
    ],
)
def test_embeddings(preset, table, rank, stored):
    model = nn.Sequential(nn.Embedding(*table), nn.Linear(4, 4))
    result = factorized("test", model, preset=preset, rank=rank)
    assert result.report["0"].parameters_after == stored
    assert type(result.model[1]) is nn.Linear


def test_refusals():
    with pytest.raises(ValueError, match=r"preset must be one of lenet5-tr, .*, got 'alexnet'"):
        layout("alexnet", build("lenet5"))
    with pytest.raises(ValueError, match=r"preset must be one of lenet5-tr, .*, got \['lenet5-tr'\]"):
        layout(["lenet5-tr"], build("lenet5"))
    with pytest.raises(ValueError, match=r"'fc1' must have a weight \[320, 1250\], got Linear \[320, 800\]"):
        layout("lenet5-tr", build("lenet5", input_size=24))
    with pytest.raises(
        ValueError, match=r"layer 'conv1' must have a weight \[20, 1, 5, 5\], got none of that name"
    ):
        layout("lenet5-tr", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="network must have 3x3 convolutions, got none"):
        layout("resnet-tr", build("lenet5"))
    with pytest.raises(ValueError, match="layer '0' must have channels among"):
        layout("resnet-tr", nn.Sequential(nn.Conv2d(8, 16, 3)))
    with pytest.raises(ValueError, match=r"must be \[\[625, 784\], \[10, 625\]\], got \[\[3, 2\]\]"):
        layout("mlp-ttm", nn.Linear(2, 3))
    with pytest.raises(ValueError, match="layer '0' must be at most 18000 x 256, got Embedding"):
        layout("sst-ttm", nn.Sequential(nn.Embedding(20_000, 256)))
    with pytest.raises(ValueError, match="network must have embeddings, got none"):
        layout("iwslt-tr", nn.Linear(2, 3))
    already = nn.Sequential(FactorizedLinear(4, 4, rank=2))
    with pytest.raises(ValueError, match="network must have embeddings"):
        layout("sst-ttm", already)
