"""Which modes training keeps, and what recalibration leaves alone."""

import pytest
import torch
from torch import nn

from tensorcomp_ext import recipes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.bn(self.conv(x)))


class Network(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.a, self.b = Block(), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 36, 4)

    def forward(self, x):
        return self.head(self.b(self.a(x)).flatten(1))


def train(model, dataset):
    seen = {}

    class Watch(recipes.Callback):
        def on_batch(self, state):
            seen.update({name: m.training for name, m in state.model.named_modules()})

    recipes.train(model, dataset, epochs=1, batch_size=80, test_each_epoch=True, callbacks=[Watch()])
    return seen


def statistics(norm):
    return [b.clone() for b in norm.buffers()]


def unchanged(before, norm):
    return all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_frozen_in_a_network_in_training_mode_stays_so(dataset, trained):
    model = Network()
    model.a.bn.requires_grad_(trained).eval()
    model.a.drop.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    before = statistics(model.a.bn)
    assert train(model, dataset) == modes == {name: m.training for name, m in model.named_modules()}
    assert unchanged(before, model.a.bn)
    assert model.b.num_batches_tracked == 2
    assert recipes.recalibrate_batchnorm(model, dataset) == 1
    assert unchanged(before, model.a.bn)


def test_a_network_in_evaluation_mode_is_put_into_training_but_for_frozen_norms(dataset):
    model = Network().eval()
    model.a.bn.requires_grad_(False)
    before = statistics(model.a.bn)
    seen = train(model, dataset)
    assert [name for name, training in seen.items() if not training] == ["a.bn"]
    assert unchanged(before, model.a.bn) and model.b.num_batches_tracked == 2
    assert not any(m.training for m in model.modules())
    assert recipes.recalibrate_batchnorm(model, dataset) == 1
    assert unchanged(before, model.a.bn)


def test_norms_without_weights_are_not_frozen(dataset):
    model = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), nn.Linear(64, 4)).eval()
    assert all(train(model, dataset).values())
    assert recipes.recalibrate_batchnorm(model, dataset) == 1


def test_a_forward_pass_that_fails_leaves_the_statistics(dataset):
    model = Network().eval()
    recipes.train(model, dataset, epochs=1, batch_size=80)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.b.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipes.recalibrate_batchnorm(model, dataset)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.a.bn.momentum == 0.1 and not any(m.training for m in model.modules())


class Doubled(recipes.ImageTask):
    """Images that a network reads otherwise than a plain task gives them."""

    def batch(self, indices, generator, device):
        inputs, labels = super().batch(indices, generator, device)
        return recipes.Batch((2 * inputs[0],), labels)


def test_a_task_s_own_batches_are_measured(dataset):
    norm = nn.BatchNorm2d(1)
    task = Doubled(dataset, augment=True)
    assert recipes.recalibrate_batchnorm(nn.Sequential(norm), task, batches=4, batch_size=40) == 1
    mean = 2 * dataset.normalize(dataset.train_images).double().mean()
    torch.testing.assert_close(norm.running_mean.double()[0], mean, rtol=1e-5, atol=1e-5)
    assert task.augment
    small = recipes.posttraining(Network(), task, rank=0.5, exclude="head", recalibrate=True).model
    plain = recipes.posttraining(Network(), dataset, rank=0.5, exclude="head", recalibrate=True).model
    torch.testing.assert_close(small.a.bn.running_var, 4 * plain.a.bn.running_var, rtol=1e-3, atol=1e-6)
    assert not torch.equal(small.b.running_mean, plain.b.running_mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes(dataset, dtype):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)).to(dtype)
    recipes.train(model, dataset, epochs=3, lr=0.02, batch_size=32, test_each_epoch=True)
    assert recipes.evaluate(model, dataset).fraction > 0.5
    assert recipes.recalibrate_batchnorm(model, dataset) == 1
    made = recipes.posttraining(model, dataset, rank=0.6, epochs=1, batch_size=32)
    assert made.report.replaced and {p.dtype for p in made.model.parameters()} == {dtype}
    if dtype == torch.float64:
        gated = recipes.l0(model, dataset, rank=(3, 1), format="tucker2", layers="0", epochs=1, batch_size=32)
        assert {p.dtype for p in gated.model.parameters()} == {dtype}
