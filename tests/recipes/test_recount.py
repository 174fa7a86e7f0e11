"""Reports after training: errors are those of the trained factors, to the network that was handed over."""

import warnings

import pytest
import torch
from method_networks import small_network
from small_images import quadrants

from tensorcomp_ext import recipes
from tensorcomp_ext.nn import FactorizedLayer

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
RUNS = {
    "posttraining": {"rank": 3, "recalibrate": False},
    "nrmf": {"alpha": 0.05, "p": 0.5, "finetune_epochs": 1},
    "decompose_finetune": {"method": "tucker2", "target": 0.3},
    "progressive": {"target": 0.3},
    "lowrank_sparse": {"method": "lowrank", "fraction": 0.3},
}


@pytest.mark.parametrize("name", RUNS)
def test_errors_after_training(name):
    torch.manual_seed(0)
    model = small_network()
    options = {"epochs": 2, "lr": 0.05, "batch_size": 32, "example_inputs": X, **RUNS[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small ranks of small layers
        made = getattr(recipes, name)(model, quadrants(), **options)
    assert made.report.replaced
    for entry in made.report.replaced:
        layer = made.model.get_submodule(entry.name)
        assert isinstance(layer, FactorizedLayer)
        exact = model.get_submodule(entry.name).weight.detach()
        expected = float((layer.weight.to_dense().detach() - exact).norm() / exact.norm())
        assert entry.relative_error == pytest.approx(expected, rel=1e-4)
        assert entry.rank == ((layer.rank,) if isinstance(layer.rank, int) else tuple(layer.rank))
        assert entry.parameters_after == sum(p.numel() for p in layer.weight.parameters())
    with torch.no_grad():
        before, after = model.eval()(X), made.model.eval()(X)
    assert made.report.output_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)


def test_drawn_factors_have_no_error():
    torch.manual_seed(0)
    made = recipes.uniform(small_network(), quadrants(), rank=3, epochs=1, batch_size=32, example_inputs=X)
    assert made.report.replaced and made.report.output_error is None
    assert all(entry.relative_error is None for entry in made.report.replaced)
