"""Formats of folded weights: entries, forms, gradients, exactness, published counts, initialisation."""

from __future__ import annotations

import math
import string
from typing import Any

import pytest
import torch
from network_cases import CASES, Case, dense_by_entries
from torch import Tensor

from tensorcomp_ext.formats import (
    CP,
    TR,
    TT,
    TTM,
    BottleneckConv,
    Network,
    TapNetwork,
    TRMatrix,
    Tucker,
    get_format,
    two_factor,
)
from tensorcomp_ext.models import CifarResNet, LeNet5

PADDED = 23
"""Rows of a matrix whose folded form has one row of zeros more, which no planted weight has."""
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def matrix_of(network: Network) -> Tensor:
    """The matrix of a network by one sum over all labels."""
    letters = dict(zip(sorted(network.sizes), string.ascii_letters, strict=False))
    terms = ["".join(letters[label] for label in labels) for labels in network.labels]
    result = "".join(letters[label] for label in network.outputs + network.inputs)
    whole = torch.einsum(f"{','.join(terms)}->{result}", *network.cores)
    return whole.reshape(math.prod(network.sizes[label] for label in network.outputs), -1)


def dense_of(form: Any) -> Tensor:
    """The dense weight of a form, by its definition."""
    if isinstance(form, Network):
        return matrix_of(form)
    if isinstance(form, TapNetwork):
        taps = form.taps.flatten(1)
        pixelwise = matrix_of(form.network).unflatten(1, (taps.shape[0], -1))
        return torch.einsum("rk,trs->tsk", taps, pixelwise).unflatten(2, form.taps.shape[1:])
    assert isinstance(form, BottleneckConv)
    core = form.core.flatten(2)
    if form.depthwise:
        dense = torch.einsum("tr,rk,sr->tsk", form.point_out, core[:, 0], form.point_in)
    else:
        after, before = (point.unflatten(1, (form.ring, -1)) for point in (form.point_out, form.point_in))
        dense = torch.einsum("tqb,bak,sqa->tsk", after, core, before)
    return dense.unflatten(2, form.core.shape[2:])


@every_case
def test_entries(case: Case) -> None:
    weight = case.random(dtype=torch.float64)
    assert weight.shape == torch.Size(case.shape)
    expected = dense_by_entries(weight)
    torch.testing.assert_close(weight.to_dense().detach(), expected, rtol=0, atol=1e-12)


@every_case
def test_lowers_to_the_same_weight(case: Case) -> None:
    weight = case.random(dtype=torch.float64)
    found = dense_of(weight.lower())[: case.shape[0]]
    torch.testing.assert_close(found, weight.to_dense(), rtol=0, atol=1e-12)


@every_case
def test_gradients(case: Case) -> None:
    weight = case.random(dtype=torch.float64)
    probe = torch.randn(case.shape, dtype=torch.float64)
    expected = torch.autograd.grad((dense_of(weight.lower())[: case.shape[0]] * probe).sum(), weight.factors)
    found = torch.autograd.grad((weight.to_dense() * probe).sum(), weight.factors)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-11)


@every_case
def test_structure_and_rank_rebuild_it(case: Case) -> None:
    weight = case.random()
    cls = get_format(case.format)
    twin = cls.empty(case.shape, weight.rank, **weight.structure)
    assert twin.structure == weight.structure and twin.rank == weight.rank
    twin.load_state_dict(weight.state_dict())
    assert torch.equal(twin.to_dense(), weight.to_dense())
    shapes = cls.factor_shapes(case.shape, weight.rank, **weight.structure)
    assert [tuple(factor.shape) for factor in weight.factors] == list(shapes)
    assert weight.numel == sum(math.prod(shape) for shape in shapes)


@every_case
def test_two_factors(case: Case) -> None:
    weight = case.random(dtype=torch.float64)
    form = weight.lower()
    if not isinstance(form, Network):
        return
    pair = two_factor(form)
    assert (pair is None) == (case.format in ("ttm", "tr_matrix"))
    if pair is not None:
        torch.testing.assert_close(pair.a @ pair.b, weight.to_dense(), rtol=0, atol=1e-12)


FULL: list[tuple[type[Any], tuple[int, ...], Any, dict[str, Any]]] = [
    (TT, (6, 8), 99, {"out_modes": (2, 3), "in_modes": (4, 2), "input_order": (1, 0)}),
    (TT, (6, 8, 3, 2), 99, {"out_modes": (2, 3)}),
    (TTM, (6, 8), 99, {"out_modes": (2, 3), "in_modes": (4, 2), "input_order": (1, 0)}),
    (TTM, (5, 8), 99, {"out_modes": (2, 3), "in_modes": (4, 2)}),
    (TTM, (6, 8, 3), 99, {"out_modes": (2, 3), "in_modes": (4, 2)}),
    (TR, (6, 8), (1, 2, 6, 2), {"out_modes": (2, 3), "in_modes": (4, 2), "input_order": (1, 0)}),
    (TR, (4, 5, 3, 2), (1, 5, 4), {}),
    (TRMatrix, (6, 8), (1, 8), {"out_modes": (2, 3), "in_modes": (4, 2), "input_order": (1, 0)}),
    (Tucker, (6, 8), 99, {"out_modes": (2, 3), "in_modes": (4, 2), "input_order": (1, 0)}),
    (Tucker, (6, 8, 3, 2), 99, {"out_modes": (2, 3)}),
]


@pytest.mark.filterwarnings("ignore:.*clipped to")
@pytest.mark.parametrize("cls,shape,rank,options", FULL)
def test_full_rank_is_exact(
    cls: type[Any], shape: tuple[int, ...], rank: Any, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    dense = torch.randn(shape, dtype=torch.float64)
    made = cls.from_dense(dense, rank, **options)
    assert (made.to_dense() - dense).norm() <= 1e-12 * dense.norm()


@pytest.mark.filterwarnings("ignore:.*clipped to")
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.format in ("cp", "tr", "tr_matrix") and c.shape[0] != PADDED],
    ids=str,
)
def test_planted_ranks_are_recovered(case: Case) -> None:
    """Formats whose fits have local minima: from a planted weight, to the accuracy of the iteration."""
    dense = case.random(dtype=torch.float64).to_dense().detach()
    made = get_format(case.format).from_dense(dense, case.rank, **case.options)
    assert (made.to_dense() - dense).norm() <= 0.05 * dense.norm()


def tr_count(layer: tuple[int, ...], rank: int, out_modes: Any, in_modes: Any) -> int:
    return TR.empty(layer, rank, out_modes=out_modes, in_modes=in_modes, device="meta").numel


@pytest.mark.parametrize("rank", [5, 10, 15, 20, 25])
def test_lenet_counts(rank: int) -> None:
    layers = [
        ((20, 1, 5, 5), (4, 5), (1,)),
        ((50, 20, 5, 5), (5, 10), (4, 5)),
        ((320, 1250), (5, 8, 8), (5, 5, 5, 10)),
        ((10, 320), (10,), (5, 8, 8)),
    ]
    stored = sum(tr_count(shape, rank, outs, ins) for shape, outs, ins in layers)
    biases = sum(shape[0] for shape, _, _ in layers)
    assert stored + biases == 161 * rank**2 + 400
    dense = sum(p.numel() for p in LeNet5().parameters())
    assert dense == 429_100
    published = {5: 96.97, 10: 26.01, 15: 11.716, 20: 6.622, 25: 4.247}
    assert dense / (stored + biases) == pytest.approx(published[rank], rel=5e-4)


@pytest.mark.parametrize("rank,total,ratio", [(10, 94_274, 4.953), (15, 205_024, 2.277)])
def test_resnet32_counts(rank: int, total: int, ratio: float) -> None:
    modes = {3: (3,), 16: (4, 2, 2), 32: (4, 4, 2), 64: (4, 4, 4)}
    net = CifarResNet(32, option="B")
    rings = stored = 0
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            t, s = module.out_channels, module.in_channels
            stored += tr_count((t, s, 3, 3), rank, modes[t], modes[s]) - module.weight.numel()
            rings += 1
    dense = sum(p.numel() for p in net.parameters())
    assert rings == 31 and dense == 466_906
    assert dense + stored == total and dense / total == pytest.approx(ratio, abs=5e-4)


def test_mars_counts() -> None:
    first = TTM.empty(
        (625, 784), (5, 5, 3), out_modes=(5, 5, 5, 5), in_modes=(7, 4, 7, 4), device="meta"
    ).numel
    second = TTM.empty((10, 625), 8, out_modes=(5, 2), in_modes=(25, 25), device="meta").numel
    assert 784 * 625 / first == pytest.approx(388.9, abs=0.05)
    assert 625 * 10 / second == pytest.approx(4.464, abs=5e-4)
    biases = 625 + 10
    assert (784 * 625 + 6250 + biases) / (first + second + biases) == pytest.approx(150.80, abs=0.005)


def test_embedding_counts() -> None:
    sst = TTM.empty((17_200, 256), 16, out_modes=(10, 10, 12, 15), in_modes=(4, 4, 4, 4), device="meta")
    assert sst.numel == 24_128
    for rank, stored in ((32, 786_432), (27, 559_872)):
        modes = {"out_modes": (32, 32, 32), "in_modes": (8, 8, 8)}
        assert TRMatrix.empty((32_768, 512), rank, **modes, device="meta").numel == stored


def test_macs() -> None:
    """The formulas of the formats, at positions before and after a stride."""
    before, after = 30 * 28, 15 * 14
    ring = TR.empty((6, 8, 3, 3), (2, 3, 4), device="meta")
    assert ring.macs(before, after) == before * 8 * 2 * 3 + after * 2 * 4 * (9 * 3 + 6)
    train = TT.empty((6, 8, 3, 3), (3, 4), device="meta")
    assert train.macs(before, after) == before * 8 * 3 + after * 4 * (9 * 3 + 6)
    assert train.flops(before, after) == 2 * train.macs(before, after)
    cp = CP.empty((6, 8, 3, 3), 5, device="meta")
    assert cp.macs(before, after) == 5 * (before * 8 + after * (9 + 6))
    tucker = Tucker.empty((6, 8, 3, 3), (4, 5, 2, 2), device="meta")
    assert tucker.macs(before, after) == before * 8 * 5 + after * (9 * 5 * 4 + 4 * 6)
    pixelwise = TTM.empty((6, 8, 3, 3), (2, 3), out_modes=(2, 3), in_modes=(4, 2), device="meta")
    sweep = 2 * 4 * 2 * 3 * 2 + 2 * 3 * 2 * 3
    assert pixelwise.macs(before, after) == after * (8 * 9 * 2 + sweep)
    matrix = TTM.empty((4096, 4096), 16, device="meta")
    assert matrix.macs(1, 1) == 256 * 4096 + 4096 * 4096 + 256 * 4096
    assert TT.empty((4096, 4096), 16, device="meta").macs(3, 3) == 3 * 16 * 8192
    lenet = {"out_modes": (5, 8, 8), "in_modes": (5, 5, 5, 10)}
    assert TR.empty((320, 1250), 10, **lenet, device="meta").macs(1, 1) == 100 * (320 + 1250)


@pytest.mark.parametrize(
    "case,modes",
    [
        (Case("tt", (64, 64), 9), {}),
        (Case("tr", (64, 64), 4), {}),
        (Case("tr", (50, 20, 5, 5), 8), {"out_modes": (5, 10), "in_modes": (4, 5)}),
        (Case("ttm", (64, 64), 9), {}),
        (Case("tr_matrix", (64, 64), 6), {}),
        (Case("cp", (64, 64), 40), {}),
        (Case("tucker", (64, 64), 6), {}),
    ],
    ids=str,
)
def test_random_variance(case: Case, modes: dict[str, Any]) -> None:
    cls = get_format(case.format)
    generator = torch.Generator().manual_seed(0)
    for variance in (None, 1e-4):
        drawn = [
            cls.random(case.shape, case.rank, variance, dtype=torch.float64, generator=generator, **modes)
            for _ in range(150)
        ]
        found = torch.stack([weight.to_dense().detach().square().mean() for weight in drawn]).mean()
        wanted = variance or 2 / math.prod(case.shape[1:])
        assert found.item() == pytest.approx(wanted, rel=0.2)


@every_case
def test_rebuild_costs_no_more_than_one_sum(case: Case) -> None:
    """A term of the sum over all ranks is a product of as many entries as there are factors."""
    weight = case.random()
    products = len(weight.factors) - 1
    assert 0 < weight.rebuild_macs() <= products * math.prod(weight.sizes.values())
