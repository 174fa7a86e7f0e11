"""Factorized embeddings and embedding bags against the dense layers they replace."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorcomp_ext import tune
from tensorcomp_ext.nn import FactorizedEmbedding, FactorizedEmbeddingBag, from_config
from tensorcomp_ext.nn.embedding import embedding_modes
from tensorcomp_ext.plan import plans_for

FORMATS = {"ttm": 5, "tr_matrix": 3}
every_format = pytest.mark.parametrize("format", FORMATS)
every_plan = pytest.mark.parametrize("plan", [None, "dense", "staged", "fused"])


def layer(format: str = "ttm", **options: Any) -> FactorizedEmbedding:
    return FactorizedEmbedding(47, 12, 3, format=format, rank=FORMATS[format], **options)


def bag(format: str = "ttm", **options: Any) -> FactorizedEmbeddingBag:
    return FactorizedEmbeddingBag(47, 12, 3, format=format, rank=FORMATS[format], **options)


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Random ones, as many as make a rebuild worth it where there are enough; the padding row among them."""
    found = torch.randint(0, 47, shape, dtype=dtype)
    if found.numel():
        found.view(-1)[0] = 3
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    norm = float(expected.detach().double().norm())
    difference = float((found.detach().double() - expected.detach().double()).norm())
    return found.shape == expected.shape and difference <= tolerance * (norm or 1.0)


@every_plan
@every_format
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
def test_is_the_dense_layer(format: str, plan: str | None, integers: torch.dtype) -> None:
    ours = layer(format).eval()
    dense = ours.to_dense()
    assert isinstance(dense, nn.Embedding) and dense.padding_idx == 3 and not dense.training
    ours.plan = plan
    for shape in ((50,), (9, 7), (2, 30, 2)):
        x = indices(*shape, dtype=integers)
        for _ in range(2):
            with torch.no_grad():
                assert close(ours(x), dense(x))
        y = ours(x)
        assert close(y, dense(x)) and (y[x == 3] == 0).all()


@every_format
def test_any_shape(format: str) -> None:
    ours = layer(format)
    dense = ours.to_dense()
    for x in (indices(0), indices(3, 0), torch.tensor(5), indices(1), indices(8, 8).t(), indices(40)[::3]):
        assert close(ours(x), dense(x))
        with torch.no_grad():
            assert close(ours(x), dense(x))


@every_plan
@every_format
def test_gradients(format: str, plan: str | None) -> None:
    ours = layer(format)
    ours.plan = plan
    x = indices(6, 9)
    for _ in range(2):  # the second call is a bound one
        y = ours(x)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, list(ours.weight.factors), dy)
        table = ours.weight.to_dense()
        rows = table[x] * (x != 3)[..., None]
        expected = torch.autograd.grad(rows, list(ours.weight.factors), dy)
        assert all(close(f, e, 1e-4) for f, e in zip(found, expected, strict=True))


def test_few_rows_are_never_worth_a_rebuild_that_is_not_kept() -> None:
    ours, x = layer(), indices(5)
    assert {p.name for p in plans_for(ours)} == {"dense", "staged", "fused"}
    candidates = {c.name: c for c in ours.plans(x, training=True)}
    assert not candidates["dense"].available.ok and "rebuilt at every call" in candidates["dense"].reason
    assert candidates["fused"].macs <= candidates["staged"].macs
    assert {c.name: c for c in ours.plans(indices(40), training=True)}["dense"].available.ok
    assert ours.prefer == "memory"
    assert not {c.name: c for c in ours.plans(x, training=False)}["dense"].available.ok
    ours.prefer = "latency"
    assert {c.name: c for c in ours.plans(x, training=False)}["dense"].available.ok


def test_changed_factors_are_noticed() -> None:
    ours, x = layer().eval(), indices(60)
    for plan in ("dense", "staged", "fused"):
        ours.plan = plan
        with torch.no_grad():
            before = ours(x)
            ours.weight.factors[0].mul_(2)
            assert close(ours(x), 2 * before)


@every_format
def test_persistence(format: str) -> None:
    for ours in (layer(format), bag(format, mode="sum", include_last_offset=True)):
        config = json.loads(json.dumps(ours.config()))
        again = from_config(config)
        again.load_state_dict(ours.state_dict())
        assert again.config() == ours.config() and again.padding_idx == 3
        for other in (again, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other.to_dense().weight, ours.to_dense().weight)
        with pytest.raises(RuntimeError, match="size mismatch"):
            type(ours)(47, 12, format=format, rank=2).load_state_dict(ours.state_dict())


@every_format
def test_compile_export_autocast_and_dtypes(format: str) -> None:
    torch.compiler.reset()
    ours, x = layer(format), indices(6, 4)
    y = ours(x)
    assert close(torch.compile(ours, backend="aot_eager", fullgraph=True)(x), y)
    program = torch.export.export(ours, (x,))
    assert close(program.module()(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.float32 and close(ours(x), y)
        with torch.no_grad():
            assert ours(x).dtype == torch.float32 and close(ours(x), y)
    low = copy.deepcopy(ours).bfloat16()
    assert low(x).dtype == torch.bfloat16 and close(low(x), low.to_dense().float()(x), 2e-2)


def test_tunes() -> None:
    ours = nn.Sequential(layer()).eval()
    x = indices(9, 9)
    for training in (False, True):
        result = tune(ours, x, training=training, min_seconds=1e-3)
        assert {"dense", "staged", "fused"} == set(result.layers[0].timings)
    assert close(ours(x), ours[0].to_dense()(x))


def test_modes() -> None:
    assert embedding_modes((17200, 256)) == {"in_modes": (4, 8, 8), "out_modes": (26, 26, 26)}
    ours = FactorizedEmbedding(
        32768, 512, format="tr_matrix", rank=32, out_modes=(32,) * 3, in_modes=(8,) * 3
    )
    assert ours.weight.numel == 786_432
    ours = FactorizedEmbedding(
        32768, 512, format="tr_matrix", rank=27, out_modes=(32,) * 3, in_modes=(8,) * 3
    )
    assert ours.weight.numel == 559_872
    assert layer(in_modes=(3, 4)).weight.structure["out_modes"] == [7, 7]
    assert layer().macs((10,)) > 0 and layer().dense_macs((10,)) == 0


def test_the_table_starts_with_the_variance_of_glorot() -> None:
    table = FactorizedEmbedding(4000, 60, rank=16).weight.to_dense()
    assert 0.7 < float(table.detach().var()) / (2 / 4060) < 1.4


@every_format
def test_from_dense(format: str) -> None:
    dense = nn.Embedding(47, 12, padding_idx=3, dtype=torch.float64).eval().requires_grad_(False)
    ours = FactorizedEmbedding.from_embedding(
        dense, format=format, rank=200 if format == "ttm" else (3, 3, 3)
    )
    assert ours.padding_idx == 3 and not ours.training
    assert all(not p.requires_grad and p.dtype == torch.float64 for p in ours.parameters())
    if format == "ttm":
        x = indices(50)
        assert close(ours(x), dense(x), 1e-10)
        dense_bag = nn.EmbeddingBag(47, 12, mode="sum", padding_idx=3, include_last_offset=True)
        our_bag = FactorizedEmbeddingBag.from_embedding_bag(dense_bag, rank=200)
        offsets = torch.tensor([0, 4, 4, 50])
        assert close(our_bag(x, offsets), dense_bag(x, offsets))


def test_what_has_no_factorized_form() -> None:
    def said(**options: Any) -> str:
        with pytest.raises(ValueError) as caught:
            FactorizedEmbedding.from_embedding(nn.Embedding(9, 4, **options), rank=2)
        return str(caught.value)

    assert "from_embedding: max_norm=1.0 writes into rows" in said(max_norm=1.0)
    assert "scale_grad_by_freq" in said(scale_grad_by_freq=True) and "sparse=True" in said(sparse=True)
    filled = nn.Embedding(9, 4, padding_idx=2)
    nn.init.ones_(filled.weight)
    with pytest.raises(ValueError, match="the row of padding_idx=2 is not zero"):
        FactorizedEmbedding.from_embedding(filled, rank=2)
    with pytest.raises(ValueError, match="mode 'max' is not linear"):
        FactorizedEmbeddingBag.from_embedding_bag(nn.EmbeddingBag(9, 4, mode="max"), rank=2)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Embedding, got Linear"):
        FactorizedEmbedding.from_embedding(nn.Linear(2, 2), rank=2)
    with pytest.raises(ValueError, match="rank is needed"):
        FactorizedEmbedding.from_embedding(nn.Embedding(9, 4))
    with pytest.raises(TypeError, match="unknown option 'input_order'"):
        FactorizedEmbedding.from_embedding(nn.Embedding(9, 4), rank=2, input_order=(0, 1))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="num_embeddings must be an int >= 1, got 0"):
        FactorizedEmbedding(0, 4, rank=2)
    with pytest.raises(ValueError, match=r"padding_idx must be an int in \[-9, 9\) or None, got 9"):
        FactorizedEmbedding(9, 4, 9, rank=2)
    with pytest.raises(ValueError, match="mode must be 'sum' or 'mean', got 'max'"):
        FactorizedEmbeddingBag(9, 4, mode="max", rank=2)
    with pytest.raises(ValueError, match="for embedding layers"):
        FactorizedEmbedding(9, 4, format="svd", rank=2)
    ours = layer()
    with pytest.raises(TypeError, match=r"x must be a tensor of indices, int64 or int32, got torch\.float32"):
        ours(torch.ones(3))
    with pytest.raises(TypeError, match="x must be a tensor of indices"):
        ours([1, 2])
    for plan in (None, "fused"):
        ours.plan = plan
        with pytest.raises(IndexError, match=r"\[0, 47\), got 47"):
            ours(torch.tensor([1, 47]))


@every_plan
@pytest.mark.parametrize("mode", ["sum", "mean"])
@every_format
def test_bags(format: str, mode: str, plan: str | None) -> None:
    ours = bag(format, mode=mode)
    ours.plan = plan
    dense = ours.to_dense()
    assert isinstance(dense, nn.EmbeddingBag) and dense.mode == mode
    x, offsets = indices(60), torch.tensor([0, 4, 4, 30])
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            assert close(ours(x, offsets), dense(x, offsets))
            assert close(ours(x.reshape(12, 5)), dense(x.reshape(12, 5)))
            if mode == "sum":
                weights = torch.randn(60)
                assert close(ours(x, offsets, weights), dense(x, offsets, weights))
    dy = torch.randn(4, 12)
    found = torch.autograd.grad(ours(x, offsets), list(ours.weight.factors), dy)
    table = ours.geometry.prepare(ours.weight.to_dense())
    y = nn.functional.embedding_bag(x, table, offsets, mode=mode, padding_idx=3)
    for f, e in zip(found, torch.autograd.grad(y, list(ours.weight.factors), dy), strict=True):
        assert close(f, e, 1e-4)


def test_bags_compile() -> None:
    torch.compiler.reset()
    ours, x, offsets = bag(), indices(30), torch.tensor([0, 4, 4])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert close(compiled(x, offsets), ours(x, offsets))
