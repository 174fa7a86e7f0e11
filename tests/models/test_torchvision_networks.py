"""torchvision's networks: published counts where it is installed, errors that say so where not."""

import pytest
import torch

from tensorcomp_ext import models
from tensorcomp_ext.models import registry, torchvision_networks


def test_missing_torchvision_is_named(monkeypatch):
    for module in (registry, torchvision_networks):
        monkeypatch.setattr(module, "installed", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="alexnet needs torchvision: pip install torchvision"):
        models.build("alexnet")
    assert "alexnet" not in models.names() and "resnet18" in models.names()


def test_bad_arguments():
    with pytest.raises(ValueError, match="densenet121 takes images of 3 channels, got 1"):
        models.build("densenet121", in_channels=1)
    with pytest.raises(ValueError, match="name must be one of alexnet, googlenet, densenet121, got 'vgg11'"):
        torchvision_networks.torchvision_network("vgg11")


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("alexnet", 10, 57_044_810),
        ("alexnet", 100, 57_413_540),
        ("googlenet", 10, 5_610_154),
        ("googlenet", 100, 5_702_404),
        ("densenet121", 10, 6_964_106),
        ("densenet121", 100, 7_056_356),
    ],
)
def test_published_counts(name, classes, parameters):
    pytest.importorskip("torchvision", reason="the networks are torchvision's, which is not installed")
    with torch.device("meta"):
        model = models.build(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == parameters
        size = models.image_size(name)
        assert model.eval()(torch.empty(2, 3, size, size)).shape == (2, classes)


def test_resnet18_is_torchvisions():
    torchvision = pytest.importorskip(
        "torchvision", reason="compares with torchvision, which is not installed"
    )
    with torch.device("meta"):
        theirs, ours = torchvision.models.resnet18(), models.build("resnet18", num_classes=1000)
    assert sum(p.numel() for p in theirs.parameters()) == 11_689_512
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == shapes
