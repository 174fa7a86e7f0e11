"""l0 rank selection as a whole, MARS, REINFORCE and uniform ranks beside it."""

import math

import pytest
import torch
from gated_networks import LAYERS, dense_network
from stopping import StopAt
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext import recipes
from tensorcomp_ext.models import build
from tensorcomp_ext.nn import FactorizedLayer, FactorizedLinear

OPTIONS = {"format": LAYERS, "layers": list(LAYERS), "rank": 5, "epochs": 2, "batch_size": 16, "lr": 0.01}
METHODS = {
    "l0": (recipes.l0, {"weight": 0.5, "gate_lr": 5.0}),
    "reinforce": (recipes.reinforce, {"samples": 2, "gate_lr": 3.0}),
    "mars": (recipes.mars, {"strength": "soft", "logit": 1.0}),
    "uniform": (recipes.uniform, {}),
}


def run(name, dataset, model=None, **options):
    recipe, own = METHODS[name]
    return recipe(model or dense_network(), dataset, **{**OPTIONS, **own, **options})


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(v, right[k]) for k, v in left.items())


@pytest.mark.parametrize("start", ["random", "decompose"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_leaves_a_plain_factorised_network(dataset, name, start):
    model = dense_network()
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    x = dataset.normalize(dataset.test_images)
    small, report, history = run(name, dataset, model, start=start, example_inputs=x[:2])
    assert all(torch.equal(dense[key], value) for key, value in model.state_dict().items())
    assert not any("gates" in key for key in small.state_dict())
    layers = {n: m for n, m in small.named_modules() if isinstance(m, FactorizedLayer)}
    assert {n: m.format for n, m in layers.items()} == {"0": "tr", "3": "tt"}
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    details = report.details[name]
    assert details["ratio"] == report.model_ratio
    assert len(history) == 2 and all(math.isfinite(e.loss) for e in history)
    for layer in report.replaced:
        assert layer.rank == layers[layer.name].rank
        assert layer.parameters_after == layers[layer.name].weight.numel
        assert layer.relative_error is None
        assert layer.macs_after is not None
        if name != "uniform":
            assert all(
                b >= a >= 1 for b, a in zip(details["ranks_before"][layer.name], layer.rank, strict=True)
            )
    report.to_json()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns_and_repeats_itself(dataset, name):
    options = {"epochs": 4, "lr": 0.02}
    first, second = (run(name, dataset, **options) for _ in range(2))
    assert same(first.model, second.model)
    assert [e.loss for e in first.history] == [e.loss for e in second.history]
    assert recipes.evaluate(first.model, dataset).fraction > (0.3 if name == "reinforce" else 0.7)
    assert not same(first.model, run(name, dataset, seed=1, **options).model)


def test_ranks_fall_under_a_strong_penalty_and_training_goes_on_with_them(dataset):
    gentle = run("l0", dataset, weight=0.0, epochs=6, remove_every=2)
    strong = run("l0", dataset, weight=5.0, gate_lr=20.0, epochs=6, remove_every=2)
    assert gentle.report.model_ratio < 1.05 * gentle.history[0].extra["ratio"]
    assert strong.report.model_ratio > 1.5 * gentle.report.model_ratio
    assert min(min(layer.rank) for layer in strong.report.replaced) >= 1
    assert strong.history[-1].extra["ratio"] == pytest.approx(strong.report.model_ratio)


def test_a_target_is_reached_and_kept(dataset):
    whole = run("uniform", dataset, epochs=0).report.model_ratio
    found = run("l0", dataset, weight=5.0, gate_lr=20.0, epochs=6, target=1.5 * whole)
    frozen = [e.extra["ratio"] for e in found.history if e.extra["frozen"]]
    assert frozen and len(set(frozen)) == 1
    assert frozen[0] == pytest.approx(found.report.model_ratio)
    assert found.report.model_ratio >= 1.5 * whole
    assert found.report.details["l0"]["frozen"]


def test_callbacks_may_come_one_by_one(dataset):
    seen = []

    class Watch(recipes.Callback):
        def on_epoch(self, state):
            seen.append(state.epoch)

    run("l0", dataset, epochs=2, callbacks=(Watch() for _ in range(1)))
    assert seen == [0, 1]


def test_a_target_that_is_missed_or_passed_at_once_is_said(dataset):
    with pytest.warns(UserWarning, match=r"l0: target 1e\+06 was not reached: the network is \d+\.\d times"):
        run("l0", dataset, epochs=1, target=1e6)
    with pytest.warns(UserWarning, match=r"l0: .* times smaller already, target 1\.01: gates are frozen"):
        found = run("l0", dataset, epochs=1, target=1.01)
    assert found.report.details["l0"]["frozen"]


@pytest.mark.parametrize("options", [{}, {"remove_every": 3}, {"strength": "hard"}])
def test_masks_that_begin_shut_do_not_count_until_they_are_cut(dataset, options):
    """MARS has all logits below 0 at first: ranks of 1 before anything is learned."""
    options = {"logit": None, "epochs": 20, "lr": 0.02, "gate_lr": 5.0, **options}
    whole = run("uniform", dataset, epochs=0).report.model_ratio
    free = run("mars", dataset, **options).report
    target = 2.0 * whole
    assert free.model_ratio > 2.0 * target  # on so few images the prior shuts everything
    found = run("mars", dataset, target=target, **options)
    frozen = [e.extra["frozen"] for e in found.history]
    assert not frozen[0] and frozen[-1] and found.report.details["mars"]["frozen"]
    assert target <= found.report.model_ratio < 1.15 * target
    assert any(max(layer.rank) > 1 for layer in found.report.replaced)
    assert {e.extra["ratio"] for e in found.history if e.extra["frozen"]} == {found.report.model_ratio}
    assert recipes.evaluate(found.model, dataset).fraction > 0.5  # what was opened has learned since
    with pytest.warns(UserWarning, match="mars: target .* was not reached"):
        short = run("mars", dataset, target=target, **{**options, "epochs": 1})
    assert not short.report.details["mars"]["frozen"]


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_bit_by_bit(dataset, tmp_path, name):
    options = {"epochs": 4, "lr": 0.02, "remove_every": 3} if name != "uniform" else {"epochs": 4, "lr": 0.02}
    if name == "l0":
        options |= {"weight": 5.0, "gate_lr": 6.0, "target": 12.0}
    whole = run(name, dataset, callbacks=[StopAt()], **options)
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(name, dataset, callbacks=[StopAt(27)], checkpoint=path, **options)
    resumed = run(name, dataset, callbacks=[StopAt()], checkpoint=path, **options)
    assert same(whole.model, resumed.model)
    assert [e.extra for e in whole.history] == [e.extra for e in resumed.history]
    assert whole.report.details == resumed.report.details
    if name == "l0":
        ratios = [e.extra["ratio"] for e in whole.history]
        assert ratios[-1] > ratios[0]
        assert [e.extra["frozen"] for e in whole.history][::3] == [False, True]
    with pytest.raises(ValueError, match="other settings"):
        run(name, dataset, callbacks=[StopAt()], checkpoint=path, **{**options, "start": "decompose"})


def test_ranks_frozen_by_a_removal_alone_are_so_in_a_resumed_run(dataset, tmp_path):
    options = {"epochs": 6, "batch_size": 32, "lr": 0.02, "weight": 5.0, "gate_lr": 3.0}
    options |= {"remove_below": 0.9, "target": 9.0}
    whole = run("l0", dataset, callbacks=[StopAt()], **options)
    ratios = [e.extra["ratio"] for e in whole.history]
    epoch = next(place for place, ratio in enumerate(ratios) if ratio >= 9.0)
    assert 0 < epoch < 5
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run("l0", dataset, callbacks=[StopAt(5 * (epoch + 1))], checkpoint=path, **options)
    resumed = run("l0", dataset, callbacks=[StopAt()], checkpoint=path, **options)
    assert same(whole.model, resumed.model)
    assert [e.extra for e in whole.history] == [e.extra for e in resumed.history]


def test_masks_that_begin_shut_are_frozen_alike_in_a_resumed_run(dataset, tmp_path):
    options = {"logit": None, "epochs": 12, "lr": 0.02, "gate_lr": 5.0, "remove_every": 3, "target": 8.0}
    whole = run("mars", dataset, callbacks=[StopAt()], **options)
    frozen = [e.extra["frozen"] for e in whole.history]
    place = frozen.index(True)
    assert 0 < place < 11
    for epoch in (1, place, place + 1):
        path = tmp_path / f"{epoch}.pt"
        with pytest.raises(KeyboardInterrupt):
            run("mars", dataset, callbacks=[StopAt(10 * epoch + 4)], checkpoint=path, **options)
        resumed = run("mars", dataset, callbacks=[StopAt()], checkpoint=path, **options)
        assert same(whole.model, resumed.model)
        assert [e.extra for e in whole.history] == [e.extra for e in resumed.history]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("l0", {"weight": 20.0, "gate_lr": 30.0}),
        ("reinforce", {"weight": 1.0, "gate_lr": 20.0, "samples": 1}),
        ("mars", {"logit": -3.0, "gate_lr": 10.0}),
    ],
)
def test_ranks_of_layers_that_are_not_trained_are_cut_too(dataset, tmp_path, name, options):
    model = dense_network()
    model[0].weight.requires_grad_(False)
    ranks, path = [], tmp_path / "run.pt"

    class Watch(StopAt):
        def on_step(self, state):
            super().on_step(state)
            ranks.append(state.model[0].weight.rank)

    common = {"format": LAYERS, "layers": list(LAYERS), "rank": 5, "epochs": 4, "batch_size": 32, "lr": 0.02}
    common |= {"start": "decompose", "remove_every": 1, "checkpoint": path, **options}
    with pytest.raises(KeyboardInterrupt):
        getattr(recipes, name)(model, dataset, callbacks=[Watch(17)], **common)
    assert ranks[0] != ranks[-1]
    small = getattr(recipes, name)(model, dataset, callbacks=[Watch()], **common).model
    assert not any(factor.requires_grad for factor in small[0].weight.factors)


@pytest.mark.parametrize("name", METHODS)
def test_a_random_start_draws_factors_and_leaves_the_rest(dataset, name):
    model = dense_network()
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    small = run(name, dataset, model, epochs=0).model
    assert not small[0].bias.any() and not small[3].bias.any()
    assert same(small[5], model[5])
    variance = small[3].weight.to_dense().var().item()
    assert 0.1 < variance / (2 / 384) < 10
    whole = run(
        name, dataset, model, epochs=0, start="decompose", rank=(6, 6, 6), layers="0", format="tr"
    ).model
    assert torch.equal(whole[0].bias, model[0].bias)
    assert isinstance(whole[3], nn.Linear) and not isinstance(whole[3], FactorizedLinear)


@pytest.mark.parametrize("name", METHODS)
def test_a_random_start_leaves_what_is_not_trained(dataset, name):
    """Drawn factors without gradients would stay noise, and a bias of 0 stays 0."""
    model = dense_network()
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False).fill_(3.0)
    small, report, _ = run(name, dataset, model)
    assert type(small[0]) is nn.Conv2d and torch.equal(small[0].weight, model[0].weight)
    assert report["0"].skipped == "not trained: its weight does not require gradients"
    assert report["5"].skipped == "not among the layers asked for"
    assert small[3].format == "tt" and torch.equal(small[3].bias, model[3].bias)
    model[3].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=f"{name}: start='random' is for weights that are trained, those of"):
        run(name, dataset, model)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("format", ["lowrank_sparse", {"0": "tr", "3": ("lowrank_sparse", {})}])
def test_formats_of_more_than_factors_are_refused_before_any_work(dataset, monkeypatch, name, format):
    monkeypatch.setattr("tensorcomp_ext.recipes.start.compress", lambda *a, **o: pytest.fail("decomposed"))
    place = "0" if isinstance(format, str) else "3"
    message = f"{name}: format 'lowrank_sparse' of layer '{place}' is not .* formats that are: .*svd, .*ttm"
    with pytest.raises(ValueError, match=message):
        run(name, dataset, format=format)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_does_not_go_on_with_factors_that_stand_for_other_weights(dataset, tmp_path, name):
    """Of equal shapes, as modes of equal sizes in another order have."""

    def go(*order, epochs=2, format="tr"):
        modes = {"in_modes": (4, 4, 24), "out_modes": (4, 4), **({"input_order": order} if order else {})}
        chosen = {"3": (format, modes)}
        options = {"format": chosen, "layers": "3", "rank": 2, "checkpoint": tmp_path / "run.pt"}
        return run(name, dataset, epochs=epochs, **options)

    found = go(1, 2, 0)
    assert same(found.model, go(1, 2, 0).model)
    for other in ((), (1, 0, 2), (0, 2, 1)):
        with pytest.raises(ValueError, match="other settings"):
            go(*other)


BAD = [
    ("l0", {"weight": -1.0}, r"l0: weight must be in \[0, inf\), got -1.0"),
    ("l0", {"sigma": 0.0}, r"l0: sigma must be in \(0, inf\), got 0.0"),
    ("l0", {"reduction": "max"}, "l0: reduction must be one of mean, sum, got 'max'"),
    ("l0", {"target": 1.0}, r"l0: target must be in \(1, inf\), got 1.0"),
    ("l0", {"gate_lr": -1.0}, r"l0: gate_lr must be in \[0, inf\), got -1.0"),
    ("l0", {"remove_below": 1.0}, r"l0: remove_below must be in \[0, 1\), got 1.0"),
    ("l0", {"remove_every": 1.5}, "l0: remove_every must be an int >= 0, got 1.5"),
    ("l0", {"start": "zero"}, "l0: start must be 'random' or 'decompose', got 'zero'"),
    ("l0", {"epochs": -1}, "l0: epochs must be 0 or more, got -1"),
    ("l0", {"schedule": "up"}, "schedule must be one of"),
    ("l0", {"preset": "lenet5-tr"}, "l0: preset='lenet5-tr' says formats and layers itself"),
    ("reinforce", {"samples": 0}, "reinforce: samples must be an int >= 1, got 0"),
    ("mars", {"strength": "firm"}, "mars: strength must be one of soft, hard, got 'firm'"),
    ("mars", {"prior": 1.0}, r"mars: prior must be in \(0, 1\), got 1.0"),
    ("mars", {"logit": math.nan}, r"mars: logit must be in \(-inf, inf\), got nan"),
    ("mars", {"logit": -math.inf}, r"mars: logit must be in \(-inf, inf\), got -inf"),
    ("mars", {"logit": None, "target": 3.0, "remove_below": 0.0}, "mars: remove_below must be above 0 for a"),
    ("uniform", {"start": "zero"}, "uniform: start must be 'random' or 'decompose', got 'zero'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: str(value)[:30])
def test_refusals_come_before_any_work(dataset, monkeypatch, name, options, message):
    monkeypatch.setattr("tensorcomp_ext.recipes.start.compress", lambda *a, **o: pytest.fail("decomposed"))
    with pytest.raises(ValueError, match=message):
        run(name, dataset, **options)


def test_first_logits_are_a_number(dataset, monkeypatch):
    monkeypatch.setattr("tensorcomp_ext.recipes.start.compress", lambda *a, **o: pytest.fail("decomposed"))
    with pytest.raises(TypeError, match="mars: logit must be a number, got 'x'"):
        run("mars", dataset, logit="x")


def test_published_layouts_of_tensor_ring_networks(dataset):
    for rank, ratio in ((5, 96.97), (10, 26.01), (15, 11.716), (20, 6.622), (25, 4.247)):
        report = recipes.uniform(build("lenet5"), dataset, preset="lenet5-tr", rank=rank, epochs=0).report
        assert report.parameters_after == 161 * rank**2 + 400
        assert report.model_ratio == pytest.approx(ratio, rel=2e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_network_may_have_layers_that_it_does_not_call(dataset, name):
    model = dense_network()
    model.append(nn.Identity())
    model[6].idle = nn.Linear(16, 16)
    formats = {**LAYERS, "6.idle": ("svd", {})}
    _, report, history = run(name, dataset, model, format=formats, layers=list(formats))
    assert report["6.idle"].skipped is None and len(history) == 2


def test_embeddings_are_selected_too(dataset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(64, 4))

    class Words(recipes.ImageTask):
        def batch(self, indices, generator, device):
            words = (indices[:, None] * 7 + torch.arange(8)) % 30
            return recipes.Batch((words,), self.dataset.train_labels[indices])

    small = recipes.l0(
        model, Words(dataset), format={"0": "ttm"}, layers="0", rank=4, weight=5.0, gate_lr=20.0, lr=0.01,
        epochs=5, batch_size=16, target=None,
    ).model  # fmt: skip
    assert isinstance(small[0], tc.nn.FactorizedEmbedding)
    assert math.prod(small[0].rank) < 16


@pytest.mark.parametrize("name", METHODS)
def test_layers_compressed_before_keep_their_ranks(dataset, name):
    """Gates go on layers that were asked for, and on no others."""
    model = tc.compress(dense_network(), rank=3, layers="3").model
    own = {"weight": 20.0, "gate_lr": 50.0} if name == "l0" else {}
    made = run(name, dataset, model, format="tr", layers="0", **own)
    assert made.model[3].rank == 3 and "gates" not in made.model[3]._modules
    assert [entry.name for entry in made.report.replaced] == ["0"]
    if name == "l0":
        assert math.prod(made.model[0].rank) < 5**3


@pytest.mark.parametrize("name", METHODS)
def test_a_network_with_nothing_to_factorize_is_refused(dataset, name):
    model = nn.Sequential(nn.Flatten(), FactorizedLinear(64, 4, rank=2, format="svd"))
    with pytest.raises(ValueError, match=f"{name}: no layer was put into factors"):
        run(name, dataset, model, format=None, layers=None)


@pytest.mark.parametrize("name", ["l0", "reinforce"])
def test_a_run_that_cut_nothing_says_so(dataset, name):
    with pytest.warns(UserWarning, match=rf"{name}: no rank was cut in 1 epochs: .* here 1e-06; more epochs"):
        run(name, dataset, epochs=1, lr=1e-6, gate_lr=1.0, weight=0.0)
