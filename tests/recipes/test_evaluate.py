"""Accuracy and batch-normalisation statistics against direct computation."""

import pytest
import torch
from torch import nn

from tensorcomp_ext import models, recipes


class Answers(nn.Module):
    """Logits that answer `label` for every image whose mean brightness is above zero."""

    def __init__(self, label):
        super().__init__()
        self.label = label

    def forward(self, x):
        return torch.eye(4)[self.label].expand(len(x), 4)


@pytest.mark.parametrize("batch_size", [1, 7, 80, 1000])
@pytest.mark.parametrize("label", [0, 3])
def test_counts(dataset, batch_size, label):
    accuracy = recipes.evaluate(Answers(label), dataset, batch_size=batch_size)
    assert accuracy == (20, 80)
    assert accuracy.fraction == 0.25
    assert str(accuracy) == "25.00 % (20 of 80)"


def test_train_split_and_bad_arguments(dataset):
    assert recipes.evaluate(Answers(0), dataset.first(train=9), "train") == (3, 9)
    with pytest.raises(ValueError, match='"train" or "test"'):
        recipes.evaluate(Answers(0), dataset, "validation")
    with pytest.raises(ValueError, match="batch_size"):
        recipes.evaluate(Answers(0), dataset, batch_size=0)


def test_layout_does_not_change_answers_and_modes_are_restored(dataset):
    torch.manual_seed(0)
    model = models.build("resnet20", num_classes=4, in_channels=1).train()
    model.bn1.eval()  # frozen by the user
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = recipes.evaluate(model, dataset)
    assert plain == recipes.evaluate(model, dataset, channels_last=True)
    assert model.training and not model.bn1.training and model.layer1[0].bn1.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_recalibration_measures_the_images(dataset):
    """One normalisation behind a fixed convolution: its statistics must be those of all convolved images."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 5, 3)
    norm = nn.BatchNorm2d(5, momentum=0.3)
    model = nn.Sequential(conv, nn.Dropout(0.5), norm, nn.Flatten())
    model.eval()
    norm.running_mean.fill_(7.0)
    assert recipes.recalibrate_batchnorm(model, dataset, batches=1, batch_size=160) == 1
    maps = conv(dataset.normalize(dataset.train_images)).double()
    assert torch.allclose(norm.running_mean.double(), maps.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var.double(), maps.var((0, 2, 3)), rtol=1e-4)
    assert norm.momentum == 0.3 and not model.training and not norm.training


def test_recalibration_averages_batches_equally(dataset):
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm)
    recipes.recalibrate_batchnorm(model, dataset, batches=100, batch_size=40)
    mean = dataset.normalize(dataset.train_images).double().mean()
    assert norm.num_batches_tracked == 4
    assert torch.allclose(norm.running_mean.double(), mean, atol=1e-5)


def test_recalibration_leaves_weights_alone_and_repeats(dataset):
    torch.manual_seed(0)
    model = models.build("resnet20", num_classes=4, in_channels=1)
    weights = [p.clone() for p in model.parameters()]
    recipes.recalibrate_batchnorm(model, dataset, batches=2, batch_size=32, seed=5)
    first = model.layer3[2].bn2.running_var.clone()
    recipes.recalibrate_batchnorm(model, dataset, batches=2, batch_size=32, seed=5)
    assert torch.equal(first, model.layer3[2].bn2.running_var)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert recipes.recalibrate_batchnorm(nn.Linear(2, 2), dataset) == 0
    with pytest.raises(ValueError, match="at least 1"):
        recipes.recalibrate_batchnorm(model, dataset, batches=0)
    with pytest.raises(ValueError, match="no training images"):
        recipes.recalibrate_batchnorm(model, dataset.without_training())
