"""Dense weights and merged parts of float32 factors: one call of our kernel where it serves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from network_cases import CASES, Case
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from tensorcomp_ext import _native
from tensorcomp_ext.formats import BottleneckConv, Format, get_format

native = pytest.mark.skipif(not _native.status().ok, reason="the kernel is not built")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
LARGE = [
    Case("tr", (64, 64, 3, 3), 10, {"out_modes": (4, 4, 4), "in_modes": (4, 4, 4)}),
    Case("tr", (16, 33, 3, 3), 1, {"out_modes": (4, 4), "in_modes": (3, 11)}),
    Case("tt", (96, 130), (7, 17, 5), {"out_modes": (8, 12), "in_modes": (10, 13), "input_order": (1, 0)}),
    Case("ttm", (90, 128), (16, 8), {"out_modes": (5, 9, 2), "in_modes": (4, 8, 4)}),
    Case("tr_matrix", (64, 64), 6),
    Case("tucker", (40, 31, 3, 3), (17, 9, 2, 3)),
]
RING = LARGE[0]


class Calls(TorchDispatchMode):
    """The names of all ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def native(self) -> int:
        return sum(name.startswith("contract.") for name in self.names)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def exact(weight: Format) -> Any:
    """The same weight in float64, which torch's products rebuild."""
    return copy.deepcopy(weight).double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def check(weight: Format, found: Tensor) -> None:
    """Entries and gradients of a dense weight against float64."""
    other = exact(weight)
    expected = other.to_dense()
    assert found.shape == expected.shape and relative(found, expected) <= 1e-5
    probe = torch.randn(found.shape)
    ours = torch.autograd.grad(found, list(weight.factors), probe)
    theirs = torch.autograd.grad(expected, list(other.factors), probe.double())
    assert max(map(relative, ours, theirs)) <= 1e-4


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_dense_weight(case: Case) -> None:
    weight = case.random()
    with Calls() as calls:
        found = weight.to_dense()
    served = case.format != "cp" or len(weight.factors) == 2  # elsewhere the rank is in three of them
    assert weight.rebuilds_natively() == (served and _native.status().ok)
    assert calls.native == weight.rebuilds_natively()
    assert "bmm.default" not in calls.names or not calls.native
    check(weight, found)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(weight.to_dense(), found.detach())


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_merged_parts(case: Case) -> None:
    weight = case.random()
    form, expected = weight.lower(), exact(weight).lower()
    if not isinstance(form, BottleneckConv):
        return
    for name in ("point_in", "core", "point_out"):
        ours, theirs = getattr(form, name), getattr(expected, name)
        assert ours.shape == theirs.shape and relative(ours, theirs) <= 1e-5, name


@native
def test_frozen_factors_have_no_gradient() -> None:
    weight = RING.random()
    first, *rest = weight.factors
    first.requires_grad_(False)
    weight.to_dense().square().sum().backward()
    assert first.grad is None and all(factor.grad is not None for factor in rest)
    for factor in rest:
        factor.requires_grad_(False)
    assert not weight.to_dense().requires_grad


@native
def test_factors_of_other_layouts() -> None:
    weight = RING.random()
    for name in weight.factor_names:
        factor = getattr(weight, name)
        setattr(weight, name, nn.Parameter(factor.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)))
    assert not weight.core_0.is_contiguous()
    check(weight, weight.to_dense())


class Halved(nn.Module):
    def forward(self, factor: Tensor) -> Tensor:
        return factor / 2


class Marked(torch.Tensor):
    """A tensor of another type."""


def test_what_is_no_plain_parameter() -> None:
    weight = CASES[1].random()
    before = weight.to_dense()
    parametrize.register_parametrization(weight, weight.factor_names[0], Halved())
    assert relative(weight.to_dense(), before.double() / 2) <= 1e-6
    marked = CASES[1].random()
    with Calls() as calls:
        name = marked.factor_names[0]
        swapped = {name: getattr(marked, name).detach().as_subclass(Marked)}
        found = functional_call(marked, swapped, ())
    assert isinstance(found, Marked) and relative(found.as_subclass(Tensor), before.double()) <= 1e-6
    assert calls.native == 0


def test_other_dtypes_and_autocast() -> None:
    weight = RING.random()
    expected = exact(weight).to_dense()
    with Calls() as calls:
        low = copy.deepcopy(weight).bfloat16()
        assert not low.rebuilds_natively() and low.to_dense().dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative(weight.to_dense(), expected) <= 3e-2
    assert calls.native == 0


@native
def test_second_derivatives() -> None:
    weight = CASES[4].random()

    def second(weight: Any) -> Any:
        first = torch.autograd.grad(weight.to_dense().square().sum(), weight.factors[0], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), weight.factors[1:])

    assert max(map(relative, second(weight), second(exact(weight)))) <= 1e-4


def test_transforms() -> None:
    weight = CASES[5].random()
    name, *_ = weight.factor_names
    factor = getattr(weight, name).detach()

    def of(value: Tensor) -> Tensor:
        return functional_call(weight, {name: value}, ()).square().sum()

    found = vmap(grad(of))(torch.stack([factor, 2 * factor]))
    expected = torch.autograd.grad(weight.to_dense().square().sum(), getattr(weight, name))[0]
    assert relative(found[0], expected.double()) <= 1e-4
    assert relative(found[1], 2 * expected.double()) <= 1e-4


@native
def test_a_compiled_graph_sees_torch() -> None:
    """It can fuse and move what it sees; the kernel would be a wall."""
    weight = CASES[4].random()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    found = torch.compile(weight, fullgraph=True, backend=backend)()
    assert relative(found, exact(weight).to_dense()) <= 1e-5
    assert len(graphs) == 1 and "contract" not in graphs[0].code
    torch.compiler.reset()


@every_case
def test_a_copy_rebuilds_alike(case: Case) -> None:
    weight = case.random()
    for twin in (
        copy.deepcopy(weight),
        get_format(case.format).empty(case.shape, weight.rank, **weight.structure),
    ):
        twin.load_state_dict(weight.state_dict())
        assert torch.equal(twin.to_dense(), weight.to_dense())


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_kernels_are_rebuilt_channels_last(case: Case) -> None:
    """The same values and gradients; pixels outside channels in memory where the format is a network."""
    weight = case.random()
    dense = weight.to_dense_channels_last()
    assert dense.movedim(1, -1).is_contiguous()
    check(weight, dense)


@pytest.mark.parametrize("name", ["tucker2", "lowrank_sparse"])
def test_other_formats_leave_the_layout_to_the_library(name: str) -> None:
    weight = get_format(name).from_dense(torch.randn(6, 8, 3, 3), 3)
    assert torch.equal(weight.to_dense_channels_last(), weight.to_dense())
