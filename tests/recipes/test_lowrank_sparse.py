"""Low-rank + sparse compression as a whole: exact starts, budgets, training, packing, resuming, refusals."""

import copy
import sys

import pytest
import torch
from small_images import quadrants
from stopping import StopAt
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext import recipes
from tensorcomp_ext.formats import LowRankSparse, PackedLowRankSparse
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.recipes import lowrank_sparse, parts_of
from tensorcomp_ext.recipes.lowrank_sparse import layers_of, stored


class Mobile(nn.Sequential):
    """Convolution, depthwise convolutions of 3 x 3 and 5 x 5, pointwise convolution, two linear layers."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Conv2d(16, 24, 1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 5, padding=2, groups=24),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(24 * 16, 48),
            nn.ReLU(),
            nn.Linear(48, 4),
        )


LAYERS = ("0", "3", "4", "6", "9")
NUMEL = {"0": 144, "3": 144, "4": 384, "6": 600, "9": 384 * 48}


@pytest.fixture(scope="module")
def trained():
    model = Mobile()
    recipes.train(model, quadrants(), epochs=3, lr=0.05, batch_size=16)
    return model


def same(a, b):
    return set(a.state_dict()) == set(b.state_dict()) and all(
        torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()
    )


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("mode", ["additive", "masking"])
@pytest.mark.parametrize("init", ["residual", "masking"])
@pytest.mark.parametrize(
    "low_rank", ["tt", "cp", "tucker", "ttm", "svd", "tr", {"conv": "tucker2", "linear": "svd"}], ids=str
)
def test_initial_logits_are_the_teachers(trained, dataset, mode, init, low_rank):
    if low_rank == "tr" and init == "masking":
        pytest.skip("rings have no fit of the observed entries")
    x = dataset.normalize(dataset.test_images)
    options = {"mode": mode, "init": init, "low_rank": low_rank, "fraction": 0.2, "iterations": 5}
    model = parts_of(trained.eval(), **options).model
    assert sorted(layers_of(model)) == sorted(LAYERS)
    with torch.no_grad():
        assert apart(model(x), trained(x)) < 1e-5
    assert all(layer.weight.nnz == NUMEL[name] for name, layer in layers_of(model).items())
    if mode == "additive":
        return
    for layer in layers_of(model).values():
        layer.weight.keep(torch.zeros(layer.weight.shape, dtype=torch.bool))
        low = layer.weight.low_rank_dense()
        expected = torch.zeros(layer.weight.shape) if low is None else low
        torch.testing.assert_close(layer.weight.to_dense(), expected, rtol=1e-5, atol=1e-6)


def test_budgets_and_what_misses_them(trained):
    result = parts_of(trained)
    report = result.report
    for name, layer in layers_of(result.model).items():
        low = layer.weight.low_rank
        assert low is None or low.numel <= 0.1 * NUMEL[name]
    assert report["3"].note == "sparse part only: rank 1 of tt takes 26 weights, 0.1 of the layer is 14"
    assert result.model[3].weight.low_rank is None and result.model[0].weight.low_rank is None
    # 5 x 5 depthwise: 24 + 25 + 1 of 60.
    assert report["6"].note is None and result.model[6].weight.low_rank.numel == 50
    assert report["11"].skipped == "excluded" and type(result.model[11]) is nn.Linear
    pointwise, linear = result.model[4].weight, result.model[9].weight
    assert pointwise.structure["out_modes"] == [4, 6] and pointwise.structure["in_modes"] == [4, 4]
    assert linear.structure["out_modes"] == [6, 8] and linear.structure["in_modes"] == [16, 24]
    assert linear.structure["low_rank"] == "tt" and linear.structure["mode"] == "additive"
    shares = [
        (report[n].relative_error is None) == (layers_of(result.model)[n].weight.low_rank is None)
        for n in LAYERS
    ]
    assert all(shares)
    everything = parts_of(trained, exclude=()).model
    assert isinstance(everything[11], FactorizedLinear)
    some = parts_of(trained, exclude=["0", "*1"]).model
    assert type(some[0]) is nn.Conv2d and isinstance(some[3], FactorizedConv2d)


def test_baselines(trained):
    sparse = parts_of(trained, method="sparse")
    assert all(layer.weight.low_rank is None for layer in layers_of(sparse.model).values())
    assert sorted(layers_of(sparse.model)) == sorted(LAYERS) and sparse.report["3"].note is None
    low = parts_of(trained, method="lowrank", fraction=0.2)
    assert {type(layer.weight).__name__ for layer in layers_of(low.model).values()} == {"TT"}
    assert low.report["3"].skipped == "depthwise convolution"
    tiny = parts_of(trained, method="lowrank", fraction=0.1)
    assert tiny.report["3"].skipped == "left dense: rank 1 of tt takes 26 weights, 0.1 of the layer is 14"


@pytest.mark.parametrize("method", ["lowrank-sparse", "sparse", "lowrank"])
@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_end_to_end(trained, dataset, method, mode, tmp_path):
    if method == "lowrank" and mode == "masking":
        pytest.skip("nothing is masked")
    before = copy.deepcopy(trained)
    x = dataset.normalize(dataset.test_images)
    options = {"method": method, "mode": mode, "epochs": 4, "lr": 0.02, "batch_size": 16}
    result = lowrank_sparse(trained, dataset, storage=0.25, example_inputs=x[:2], **options)
    assert same(before, trained) and len(result.history) == 4
    assert recipes.evaluate(result.model, dataset).fraction > (0.7 if method == "lowrank" else 0.95)
    details = result.report.details["lowrank_sparse"]
    assert details["method"] == method and details["stored"] == details["low_rank"] + details["sparse"]
    assert details == {"method": method, **stored(result.model)}
    dense = sum(NUMEL[name] for name in layers_of(result.model))
    if method == "lowrank":
        assert details["sparsity"] is None and details["stored"] <= 0.25 * dense
        return
    # Exactly what was asked for, whatever the low-rank part takes.
    assert details["stored"] == round(0.25 * dense) and (details["low_rank"] == 0) == (method == "sparse")
    weights = [layer.weight for layer in layers_of(result.model).values()]
    assert all(isinstance(weight, PackedLowRankSparse) for weight in weights)
    entry = result.report["9"]
    assert entry.format == "lowrank_sparse_packed" and entry.parameters_after == weights[-1].numel
    assert entry.bytes_after == weights[-1].stored_bytes > 4 * entry.parameters_after
    assert result.report.parameters_after == sum(p.numel() for p in result.model.parameters())
    tc.save(result.model, tmp_path / "net", report=result.report)
    loaded = tc.load(tmp_path / "net", Mobile(3))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), result.model.eval()(x))
        assert result.report.output_error == pytest.approx(
            apart(result.model(x[:2]), trained.eval()(x[:2])), rel=1e-4
        )


def test_histograms_count_every_weight(trained, dataset):
    report = lowrank_sparse(trained, dataset, epochs=1, lr=0.01, sparsity=0.5).report
    for name, histogram in report.details["histograms"].items():
        assert sum(histogram["before"]) == sum(histogram["after"]) == NUMEL[name]
        limit = trained.get_submodule(name).weight.abs().max().item()
        assert histogram["limit"] == pytest.approx(limit)


def test_equal_storage_means_a_sparsity_higher_by_the_fraction(trained, dataset):
    """The source's comparison: pruning alone at 0.7 against low-rank + sparse at 0.8 with a tenth for L."""
    options = {"epochs": 0, "exclude": ["0", "3", "11"], "low_rank": "svd", "fraction": 0.1}
    pruned = lowrank_sparse(trained, dataset, method="sparse", sparsity=0.7, **options)
    both = lowrank_sparse(trained, dataset, sparsity=0.8, **options)
    counts = [r.report.details["lowrank_sparse"] for r in (pruned, both)]
    assert counts[0]["sparsity"] == pytest.approx(0.7, abs=1e-4)
    assert counts[1]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert 0.95 * counts[0]["stored"] < counts[1]["stored"] <= counts[0]["stored"]


def dense_bytes(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.parametrize("mode", ["additive", "masking"])
@pytest.mark.parametrize("low_rank", ["tt", "svd"])
def test_file_of_a_network_at_ninety_percent(dataset, mode, low_rank, tmp_path):
    """A quarter of the dense one at most: 0.1 in values, 0.1 in factors, 1 / 32 in a bit an entry."""
    torch.manual_seed(0)
    hidden = [nn.Linear(64, 640), nn.ReLU(), nn.Linear(640, 512), nn.ReLU()]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 4))
    options = {"mode": mode, "low_rank": low_rank, "epochs": 0, "sparsity": 0.9}
    result = lowrank_sparse(model, dataset, **options)
    details = result.report.details["lowrank_sparse"]
    assert details["sparsity"] == pytest.approx(0.9, abs=1e-5)
    path = tmp_path / "small.safetensors"
    tc.save(result.model, path)
    size = path.stat().st_size
    assert size <= 0.25 * dense_bytes(model)
    # All that is in the file is counted, but for its header and what stays dense.
    rest = sum(p.numel() * 4 for n, p in model.named_parameters() if n.startswith("5.") or n.endswith("bias"))
    assert 0 < size - details["stored_bytes"] - rest < 8192
    weights = [layer.weight for layer in layers_of(result.model).values()]
    expected = 0
    for weight in weights:
        rows, columns = weight.shape
        expected += 4 * (weight.numel + rows + 1) + min(rows * ((columns + 7) // 8), 2 * weight.nnz)
    assert details["stored_bytes"] == expected


def test_few_entries_are_numbered(dataset):
    """Below one entry in sixteen two bytes for each are less than a bit for all; both counts are reported."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4))
    result = lowrank_sparse(model, dataset, epochs=0, sparsity=0.97, low_rank="svd")
    weight = result.model[1].weight
    assert weight.nnz == 6144 - round(0.97 * 6144) and weight.structure["positions"] == "columns"
    stored = 4 * weight.numel + 2 * weight.nnz + 4 * 97
    assert weight.stored_bytes == stored == result.report["1"].bytes_after
    text = f"{weight.numel:,} weights without indices, 24,576 → {stored:,} bytes with them"
    assert text in str(result.report)
    assert "without indices" not in str(parts_of(model, method="lowrank").report)


@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_same_seed_same_network_and_resuming_too(trained, dataset, mode, tmp_path):
    options = {"mode": mode, "epochs": 4, "lr": 0.02, "batch_size": 40, "sparsity": 0.9}

    def run(stop=None, path=None):
        return lowrank_sparse(trained, dataset, callbacks=[StopAt(stop)], checkpoint=path, **options).model

    whole = run()
    assert same(whole, run())
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(9, path)
    assert same(whole, run(None, path))


@pytest.mark.parametrize(
    "change",
    [{"init": "masking"}, {"low_rank": "cp"}, {"fraction": 0.2}, {"iterations": 7}, "model"],
    ids=str,
)
def test_checkpoints_of_another_start_are_refused(trained, dataset, change, tmp_path):
    path = tmp_path / "run.pt"
    options = {"epochs": 1, "lr": 0.02, "batch_size": 40, "checkpoint": path}
    lowrank_sparse(trained, dataset, **options)
    before, model = path.read_bytes(), copy.deepcopy(trained)
    if change == "model":
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] += 1e-3
        change = {}
    with pytest.raises(ValueError, match=r"run\.pt is of a run with other settings: callbacks"):
        lowrank_sparse(model, dataset, **{**options, **change})
    assert path.read_bytes() == before


def test_the_layer_called_last_stays_dense(dataset):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(24, 16), nn.Linear(16, 24)

        def forward(self, x):
            return self.head(self.body(x).relu())

    model, x = Turned(), torch.randn(3, 16)
    options = {"fraction": 0.3, "low_rank": "svd"}
    assert sorted(layers_of(parts_of(model, example_inputs=x, **options).model)) == ["body"]
    assert sorted(layers_of(parts_of(model, **options).model)) == ["head"]


@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_a_share_for_outliers_of_all_but_nothing(mode):
    """Something is left to fit, however few entries a layer has."""
    weight = torch.randn(6, 5)
    made = LowRankSparse.from_dense(weight, 1, low_rank="svd", mode=mode, init="masking", outliers=1 - 1e-6)
    torch.testing.assert_close(made.to_dense(), weight)


def test_frozen_and_other_options(trained, dataset):
    model = copy.deepcopy(trained)
    result = lowrank_sparse(
        model, dataset, epochs=3, lr=0.01, prune_epochs=2, sparsity=0.6, sparsity_schedule="zhu-gupta",
        mode="masking", criterion="difference", direction="student-teacher", alpha=0.5, temperature=2.0,
        schedule="cosine", weight_decay=1e-4,
    )  # fmt: skip
    assert result.report.details["lowrank_sparse"]["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert model[0].weight.requires_grad and model.training == trained.training
    assert recipes.finalize(result.model) is result.model


def test_low_rank_training_has_no_pruner(trained, dataset):
    model = lowrank_sparse(trained, dataset, method="lowrank", fraction=0.3, epochs=1, lr=0.01).model
    assert not any(isinstance(m, (LowRankSparse, PackedLowRankSparse)) for m in model.modules())


def test_bad_options_are_named(trained, dataset):
    with pytest.raises(
        ValueError, match="method must be one of lowrank-sparse, sparse, lowrank, got 'dense'"
    ):
        parts_of(trained, method="dense")
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        parts_of(trained, fraction=0)
    with pytest.raises(ValueError, match="there is no layer to compress; excluded are "):
        parts_of(trained, exclude="*")
    with pytest.raises(ValueError, match=r"low_rank must be a format .* got 'nothing'; low_rank=\{'conv'"):
        parts_of(trained, low_rank="nothing")
    for data, epochs, text in (
        (torch.zeros(3), 1, "dataset must be a .*Dataset"),
        (dataset, 1.5, "epochs must"),
    ):
        with pytest.raises(TypeError, match=f"lowrank_sparse: {text}"):
            lowrank_sparse(trained, data, epochs=epochs)
        with pytest.raises(TypeError, match=f"train: {text}"):
            recipes.train(trained, data, epochs=epochs)
    with pytest.raises(ValueError, match="mode must be 'additive' or 'masking'"):
        parts_of(trained, mode="sum")
    with pytest.raises(ValueError, match=r"storage must be in \(0, 1\], got 2"):
        lowrank_sparse(trained, dataset, storage=2)
    with pytest.raises(ValueError, match=r"storage must be at least 0\.0\d+, which the low-rank parts take"):
        lowrank_sparse(trained, dataset, storage=0.01, epochs=1)
    with pytest.raises(ValueError, match="there is no layer"):
        parts_of(nn.ReLU())
    for low_rank in ({"conv": "tt"}, None, 3):
        with pytest.raises(TypeError, match="parts_of: low_rank must be the name of a format, or a mapping"):
            parts_of(trained, low_rank=low_rank)


@pytest.mark.parametrize(
    "options,text",
    [
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\), got 1.5"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), got nan"),
        ({"epochs": -1}, "epochs must be 0 or more, got -1"),
        ({"epochs": 2, "prune_epochs": 3}, r"prune_epochs must be in \[1, epochs\] = \[1, 2\], got 3"),
        ({"epochs": 2, "prune_epochs": 0}, r"prune_epochs must be in \[1, epochs\] = \[1, 2\], got 0"),
        ({"sparsity_schedule": "linear"}, "sparsity_schedule must be one of slow-start, zhu-gupta"),
        ({"criterion": "size"}, "criterion must be one of magnitude, difference, got 'size'"),
        ({"init": "masking", "sparsity": 0.0, "method": "lowrank-sparse"}, r"\(0, 1\), got 1 from sparsity"),
        (
            {"init": "masking", "storage": 0.1, "method": "lowrank-sparse"},
            r"init='masking' .* in \(0, 1\), got 0 from storage",
        ),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2"),
    ],
)
def test_bad_options_are_refused_before_any_work(trained, dataset, monkeypatch, options, text):
    monkeypatch.delattr(sys.modules[stored.__module__], "parts_of")
    with pytest.raises(ValueError, match=text):
        lowrank_sparse(trained, dataset, **{"method": "lowrank", **options})


def test_a_storage_that_is_too_small_is_refused_before_decomposition(trained, dataset, monkeypatch):
    monkeypatch.setattr(sys.modules[parts_of.__module__], "compress", None)
    with pytest.raises(ValueError, match=r"storage must be at least 0\.0\d+, which the low-rank parts take"):
        lowrank_sparse(trained, dataset, storage=0.01, epochs=1)
