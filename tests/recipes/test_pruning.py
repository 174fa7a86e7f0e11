"""Pruning: exact counts, one order over all layers, masks that only shrink."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from pruned_networks import masks, pruned_by_sorting, sparse_network, weights
from stopping import StopAt
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.recipes import GlobalPruner, GradualPruning, slow_start, zhu_gupta
from tensorcomp_ext.recipes.checkpoint import read_checkpoint, write_checkpoint

NUMEL = 54 + 54 + 384 * 16


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- schedules ------------------------------------------------------------------------------------------


def test_method_sheet_numbers():
    assert slow_start(25, 50, 0.9) == pytest.approx(0.1125) and zhu_gupta(25, 50, 0.9) == pytest.approx(
        0.7875
    )


@pytest.mark.parametrize("schedule", [slow_start, zhu_gupta])
def test_schedules_rise_to_the_final_sparsity(schedule):
    found = [schedule(t, 20, 0.9) for t in range(26)]
    assert found[0] == pytest.approx(0.0) and found[20:] == pytest.approx([0.9] * 6)
    assert all(a < b for a, b in pairwise(found[:21]))


def test_schedules_by_their_definitions():
    for t in range(8):
        assert slow_start(t, 7, 0.6) == pytest.approx(float(Fraction(6, 10) * Fraction(t, 7) ** 3))
        left = (1 - max(Fraction(t - 2), Fraction(0)) / (3 * 2)) ** 3
        found = zhu_gupta(t, 3, 0.6, initial=0.1, begin=2, every=2)
        assert found == pytest.approx(float(Fraction(6, 10) - Fraction(1, 2) * left))
    assert zhu_gupta(1, 3, 0.6, initial=0.1, begin=2) == pytest.approx(0.1)


@pytest.mark.parametrize("arguments", [(-1, 5, 0.5), (0, 0, 0.5), (0, 5, 1.5), (0, 5, float("nan"))])
@pytest.mark.parametrize("schedule", [slow_start, zhu_gupta])
def test_bad_schedules(schedule, arguments):
    with pytest.raises(ValueError, match=rf"{schedule.__name__}: (t|n|final) must be"):
        schedule(*arguments)


# --- pruning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode,criterion", [("additive", "magnitude"), ("masking", "magnitude"), ("masking", "difference")]
)
def test_the_smallest_of_all_layers_go_first(mode, criterion):
    model = sparse_network(mode)
    pruner = GlobalPruner(model, criterion=criterion)
    assert pruner.numel == NUMEL and pruner.masked == 0
    before = masks(model)
    for sparsity in (0.0, 1 / NUMEL, 0.1234, 0.5, 0.499, 0.9, 1.0):
        expected = pruned_by_sorting(model, sparsity, criterion) if sparsity != 0.499 else masks(model)
        count = pruner.prune(sparsity)
        assert same(masks(model), expected)
        assert (
            count == pruner.masked == max(round(sparsity * NUMEL), NUMEL - sum(int(m.sum()) for m in before))
        )
        assert all(bool((b | ~a).all()) for a, b in zip(masks(model), before, strict=True))  # only shrink
        before = masks(model)
    assert pruner.sparsity == 1.0


def test_masks_only_shrink_whatever_happens_to_the_weights():
    """Hidden entries grow, kept ones fall to zero: what is masked stays masked, and the total is exact."""
    model = sparse_network()
    pruner = GlobalPruner(model)
    for step in range(1, 8):
        sparsity, before = slow_start(step, 7, 0.9), masks(model)
        with torch.no_grad():
            for weight in weights(model):
                weight.sparse.normal_()
                weight.sparse.view(weight.shape)[~weight.kept] = 1e6
        assert pruner.prune(sparsity) == round(sparsity * NUMEL)
        assert all(bool((b | ~a).all()) for a, b in zip(masks(model), before, strict=True))
    assert pruner.masked == round(0.9 * NUMEL)


def test_ties_go_by_index():
    model = sparse_network()
    with torch.no_grad():
        for weight in weights(model):
            weight.sparse.copy_(weight.sparse.sign())
    GlobalPruner(model).prune(100 / NUMEL)
    kept = torch.cat([m.flatten() for m in masks(model)])
    assert not kept[:100].any() and kept[100:].all()


def test_hidden_numbers_do_not_matter():
    model = sparse_network()
    pruner = GlobalPruner(model)
    pruner.prune(0.3)
    expected = pruned_by_sorting(model, 0.6)
    with torch.no_grad():
        for weight in weights(model):
            weight.sparse.view(weight.shape)[~weight.kept] = float("nan")
    pruner.prune(0.6)
    assert same(masks(model), expected)
    with torch.no_grad():
        weights(model)[2].sparse.view(weights(model)[2].shape)[weights(model)[2].kept] = float("inf")
    with pytest.raises(ValueError, match=r"sparse part of 4\.weight has NaN or Inf"):
        pruner.prune(0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = sparse_network().to(dtype)
    expected = pruned_by_sorting(model, 0.7)
    GlobalPruner(model).prune(0.7)
    assert same(masks(model), expected)


@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_at_full_sparsity_the_low_rank_part_is_left(mode):
    layer = FactorizedLinear.from_linear(nn.Linear(12, 10), "lowrank_sparse", 3, mode=mode)
    x = torch.randn(4, 12)
    GlobalPruner(layer).prune(1.0)
    low = layer.weight.low_rank.to_dense()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, low, layer.bias))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="no weight in format 'lowrank_sparse'"):
        GlobalPruner(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="criterion must be 'magnitude' or 'difference', got 'x'"):
        GlobalPruner(sparse_network(), criterion="x")
    with pytest.raises(ValueError, match=r"'difference' is for mode 'masking', 0\.weight is additive"):
        GlobalPruner(sparse_network(), criterion="difference")
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.1"):
        GlobalPruner(sparse_network()).prune(1.1)
    pruner = GlobalPruner(sparse_network())
    with pytest.raises(ValueError, match="schedule must be one of slow-start, zhu-gupta, got 'x'"):
        GradualPruning(pruner, 0.9, 5, schedule="x")
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        GradualPruning(pruner, 0.9, 0)
    with pytest.raises(ValueError, match=r"final must be in \[0, 1\], got 2"):
        GradualPruning(pruner, 2, 5)


# --- state ----------------------------------------------------------------------------------------------


def test_state_round_trip(tmp_path):
    model = sparse_network()
    pruner = GlobalPruner(model)
    pruner.prune(0.4)
    write_checkpoint(tmp_path / "state", pruner.state_dict())
    other = sparse_network(seed=2)
    taken = GlobalPruner(other)
    taken.load_state_dict(read_checkpoint(tmp_path / "state"))
    assert same(masks(model), masks(other)) and taken.masked == pruner.masked
    small = GlobalPruner(FactorizedLinear(6, 5, format="lowrank_sparse", rank=1))
    for state in (pruner.state_dict(), {}, {"masks": {"weight": torch.zeros(1)}}):
        with pytest.raises(ValueError, match="masks are of another network"):
            small.load_state_dict(state)


def trained(dataset, path=None, stop=None, **options):
    model = sparse_network()
    pruning = GradualPruning(GlobalPruner(model), 0.9, 4, **options)
    callbacks = [pruning, StopAt(stop)]
    recipes.train(model, dataset, epochs=5, lr=0.02, batch_size=32, callbacks=callbacks, checkpoint=path)
    return model


@pytest.mark.parametrize("schedule", ["slow-start", "zhu-gupta"])
@pytest.mark.parametrize("stop", [2, 7, 14, 22])
def test_resume_gives_the_same_masks(dataset, tmp_path, stop, schedule):
    whole = trained(dataset, schedule=schedule)
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(dataset, path, stop, schedule=schedule)
    resumed = trained(dataset, path, schedule=schedule)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert sum(int((~m).sum()) for m in masks(whole)) == round(0.9 * NUMEL)


def test_state_of_another_schedule_is_refused(dataset, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(dataset, path, 7)
    with pytest.raises(ValueError, match=r"other settings: callbacks: .*slow-start.*zhu-gupta"):
        trained(dataset, path, schedule="zhu-gupta")
    pruner = GlobalPruner(sparse_network())
    state = GradualPruning(pruner, 0.8, 4).state_dict()
    with pytest.raises(ValueError, match=r"GradualPruning: the state is of .*slow-start.*zhu-gupta"):
        GradualPruning(pruner, 0.8, 4, schedule="zhu-gupta").load_state_dict(state)


def test_sparsity_grows_before_every_epoch(dataset):
    model, seen = sparse_network(), []
    pruner = GlobalPruner(model)

    class Watch(recipes.Callback):
        def on_step(self, state):
            if state.step % 5 == 0:
                seen.append((state.epoch + 1, pruner.masked))

    recipes.train(
        model, dataset, epochs=5, batch_size=32, callbacks=[GradualPruning(pruner, 0.8, 4), Watch()]
    )
    assert seen == [(t, round(0.8 * min(1.0, t / 4) ** 3 * NUMEL)) for t in range(1, 6)]


@pytest.mark.parametrize("mask", [3.7, None], ids=["dtype", "shape"])
def test_masks_of_another_kind_change_nothing(mask):
    model = sparse_network()
    pruner = GlobalPruner(model)
    state = pruner.state_dict()
    name = next(iter(state["masks"]))
    shape = state["masks"][name].shape
    state["masks"][name] = torch.zeros(3, dtype=torch.uint8) if mask is None else torch.full(shape, mask)
    before = masks(model)
    for broken in (state, {}, [state], {"masks": None}):
        with pytest.raises(ValueError, match="GlobalPruner: the masks are of another network, or not uint8"):
            pruner.load_state_dict(broken)
    assert same(masks(model), before)


@pytest.mark.parametrize("change", ["mode", "final"])
def test_a_refused_checkpoint_changes_nothing(dataset, tmp_path, change):
    path = tmp_path / "run.ckpt"
    options = {"epochs": 1, "batch_size": 32, "checkpoint": path}
    model = sparse_network("additive")
    recipes.train(model, dataset, callbacks=[GradualPruning(GlobalPruner(model), 0.8, 1)], **options)
    other = sparse_network("masking" if change == "mode" else "additive", seed=2)
    kept = {key: value.clone() for key, value in other.state_dict().items()}
    pruning = GradualPruning(GlobalPruner(other), 0.5 if change == "final" else 0.8, 1)
    with pytest.raises(ValueError, match=f"other settings: callbacks: .*{change}"):
        recipes.train(other, dataset, callbacks=[pruning], **options)
    assert all(torch.equal(value, kept[key]) for key, value in other.state_dict().items())
