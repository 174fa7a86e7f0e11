"""What plans do for CUDA, as far as a machine without it can tell: CPU tensors under a case of CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorcomp_ext.nn import FactorizedConv1d, FactorizedConv2d, FactorizedConv3d, FactorizedLinear
from tensorcomp_ext.ops import Support
from tensorcomp_ext.plan import (
    Case,
    Partial,
    PlannedLayer,
    channels_last,
    cost,
    fused_pair,
    get_plan,
    partial,
    parts,
    rates,
    select,
    state,
)
from tensorcomp_ext.plan import layer as layer_module
from tensorcomp_ext.plan.fused_pair import FusedPair
from tensorcomp_ext.plan.precision import Tf32, tf32_state
from tensorcomp_ext.plan.select import choose, traced_plan


def on_cuda(layer: PlannedLayer, x: Tensor, training: bool = False, tf32: bool = False) -> Case:
    return layer.case(x, training)._replace(device="cuda", tf32=tf32)


def images(*shape: int) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    return torch.randn(*shape).contiguous(memory_format=last)


@pytest.fixture
def torch_precision() -> Any:
    """TF32 settings as a test leaves them are put back."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("torch_precision")
@pytest.mark.parametrize("allowed", [(False, False), (True, False), (False, True), (True, True)])
def test_tf32_is_read_from_torch(allowed: tuple[bool, bool]) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
    assert tf32_state("cuda") == allowed
    assert tf32_state("cpu") == tf32_state("meta") == (False, False)


@pytest.mark.usefixtures("torch_precision")
def test_a_change_of_tf32_is_another_kind_of_call_on_cuda_only() -> None:
    class Fake(SimpleNamespace):
        shape, dtype, is_cpu = torch.Size((2, 3)), torch.float32, False

        def stride(self) -> tuple[int, ...]:
            return 3, 1

    seen = {"cuda": set(), "cpu": set()}
    for convolutions in (False, True):
        for products in (False, True):
            torch.backends.cudnn.allow_tf32 = convolutions
            torch.backends.cuda.matmul.allow_tf32 = products
            for _ in range(2):
                seen["cuda"].add(layer_module._kind(Fake(device=torch.device("cuda"))))  # type: ignore[arg-type]
                seen["cpu"].add(layer_module._kind(torch.ones(2, 3)))
    assert len(seen["cuda"]) == 4 and len(seen["cpu"]) == 1


def test_a_change_of_tf32_binds_again(monkeypatch: pytest.MonkeyPatch) -> None:
    state, bound = {"allowed": Tf32(True, True)}, []
    real = layer_module._kind
    layer, x = FactorizedConv2d(4, 6, 3, rank=(2, 3)), torch.randn(1, 4, 5, 5)
    layer.plan = "staged"
    staged = get_plan("staged")

    def bind(layer: PlannedLayer, case: Case) -> Any:
        bound.append(case.tf32)
        return type(staged).bind(staged, layer, case)

    monkeypatch.setattr(layer_module, "tf32_state", lambda device: state["allowed"])
    monkeypatch.setattr(layer_module, "_kind", lambda x: (*real(x), layer_module.tf32_state("cuda")))
    monkeypatch.setattr(staged, "bind", bind)
    with torch.no_grad():
        for allowed in (Tf32(True, True), Tf32(False, True), Tf32(False, True), Tf32(True, True)):
            state["allowed"] = allowed
            layer(x)
    assert bound == [True, False]


def test_case_names_the_precision_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    image, matrix = FactorizedConv2d(4, 6, 3, rank=(2, 3)), FactorizedLinear(4, 4, rank=2)
    x, rows = torch.randn(1, 4, 5, 5), torch.randn(2, 4)
    for allowed in (Tf32(True, False), Tf32(False, True)):
        monkeypatch.setattr(layer_module, "tf32_state", lambda device, allowed=allowed: allowed)
        assert image.case(x).tf32 == allowed.convolutions and matrix.case(rows).tf32 == allowed.products
        assert not image.case(x.bfloat16()).tf32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not image.case(x).tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_packed_convolutions_take_tf32_on_cuda_only(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "pack_tucker2", lambda *factors: factors[0])
    layer = FactorizedConv2d(5, 7, (3, 2), stride=(1, 2), padding=(2, 1), rank=(4, 3))
    x = torch.randn(1, 5, 6, 6)
    with torch.no_grad():
        numbers = [4, 3, 3, 2, 5, 7, 1, 2, 2, 2, 1, 1, 1, 1]
        assert parts.packed_conv(layer, layer.case(x))[1] == numbers
        assert parts.packed_conv(layer, on_cuda(layer, x, tf32=tf32))[1] == [*numbers, int(tf32)]


@pytest.mark.parametrize("tf32", [False, True])
def test_packed_pair(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(fused_pair, "pack_two_factor", lambda a, b: a.detach() @ b.detach())
    monkeypatch.setattr(fused_pair, "bind_packed_pair", lambda *given: made.append(given))
    layer = FactorizedLinear(6, 5, rank=3)
    with torch.no_grad():
        get_plan("fused").bind(layer, on_cuda(layer, torch.randn(2, 6), tf32=tf32))
    ((packed, sizes),) = made
    assert sizes == [5, 3, 6, int(tf32)] and packed.shape == (5, 6)


def test_fused_pair_trains_through_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedPair, "support", lambda *_: Support(True))
    layer, x = FactorizedLinear(6, 5, rank=3), torch.randn(2, 4, 6)
    layer.plan = "fused"
    dense = layer.to_dense()
    for _ in range(2):  # checked, then bound
        layer.zero_grad()
        layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.a.grad, dense.weight.grad @ layer.weight.b.detach().t())
    torch.testing.assert_close(layer.weight.b.grad, layer.weight.a.detach().t() @ dense.weight.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            y = layer(x)
            assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), dense(x), atol=0.05, rtol=0.05)


def test_captures_are_looked_for_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(state.torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(
        state.torch.cuda, "is_current_stream_capturing", lambda: bool(asked.append("stream")) or True
    )
    assert not state.capturing(torch.device("cpu")) and not asked
    # The current stream is the one of the device that the call works on.
    assert state.capturing(torch.device("cuda:1")) and asked == [torch.device("cuda:1"), "stream"]


LAYERS: list[tuple[Callable[[], PlannedLayer], Callable[[], Tensor]]] = [
    (lambda: FactorizedConv2d(6, 9, 3, padding=1, stride=2, rank=(5, 3)), lambda: images(2, 6, 7, 8)),
    (lambda: FactorizedConv2d(6, 9, 3, rank=(5, 3), bias=False), lambda: torch.randn(2, 6, 7, 8)),
    (lambda: FactorizedConv3d(4, 5, 2, rank=(3, 2)), lambda: images(1, 4, 5, 4, 3)),
    (lambda: FactorizedConv1d(4, 5, 3, rank=(3, 2)), lambda: torch.randn(2, 4, 9)),
    (lambda: FactorizedLinear(4, 5, rank=2), lambda: torch.randn(3, 4)),
]


@pytest.mark.parametrize("allowed", [Tf32(False, False), Tf32(True, False)])
@pytest.mark.parametrize("name", ["dense", "staged"])
@pytest.mark.parametrize(("make", "sample"), LAYERS)
def test_library_plans_bound_for_cuda(
    make: Callable[[], PlannedLayer],
    sample: Callable[[], Tensor],
    name: str,
    allowed: Tf32,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels_last, "tf32_state", lambda device: allowed)
    layer, x = make(), sample()
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.normal_()
        y = get_plan(name).bind(layer, on_cuda(layer, x))(x, layer.bias)
        torch.testing.assert_close(y, layer.to_dense()(x))  # type: ignore[attr-defined]
        if x.dim() == 4:
            assert y.is_contiguous(memory_format=torch.channels_last) == (not x.is_contiguous())
        if x.dim() > 3:
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            (weights,) = layer._prepared.weights.values()  # type: ignore[union-attr]
            core = weights[0 if name == "dense" else 1]
            assert core.is_contiguous(memory_format=last) == x.is_contiguous(memory_format=last)


def test_pointwise_stages_are_products_where_precision_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = FactorizedConv2d(6, 9, 3, rank=(5, 3)), images(2, 6, 7, 8)
    case = on_cuda(layer, x)
    for allowed, served in ((Tf32(False, False), True), (Tf32(True, False), False), (Tf32(True, True), True)):
        monkeypatch.setattr(channels_last, "tf32_state", lambda device, allowed=allowed: allowed)
        assert channels_last.takes_products(case) == served
        assert channels_last.takes_products(case._replace(dtype="bfloat16"))
        assert not channels_last.takes_products(case._replace(layout="contiguous"))
        assert not channels_last.takes_products(case._replace(device="cpu"))


@pytest.mark.parametrize("allowed", [Tf32(False, False), Tf32(True, False)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rank_in", [3, 8])
def test_partial_hands_on_rank_space(
    rank_in: int, layout: str, allowed: Tf32, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = FactorizedConv2d(10, 9, 3, padding=1, stride=2, rank=(5, rank_in))
    x = images(2, 10, 7, 8) if layout == "channels_last" else torch.randn(2, 10, 7, 8)
    given: list[Tensor] = []

    def tail(z: Tensor, bias: Tensor | None) -> Tensor:
        given.append(z)
        v = nn.functional.conv2d(z, layer.weight.core, None, 2, 1)
        return nn.functional.conv2d(v, layer.weight.factor_out[:, :, None, None], bias)

    monkeypatch.setattr(channels_last, "tf32_state", lambda device: allowed)
    monkeypatch.setattr(partial, "packed_conv", lambda *_: (torch.empty(0), []))
    monkeypatch.setattr(partial, "bind_tail", lambda *_: tail)
    with torch.no_grad():
        layer.bias.normal_()
        y = get_plan("partial").bind(layer, on_cuda(layer, x))(x, layer.bias)
        torch.testing.assert_close(y, layer.to_dense()(x))
    (z,) = given
    assert z.shape == (2, rank_in, 7, 8)
    if layout == "channels_last":
        assert z.stride() == (56 * 8, 1, 8 * 8, 8)  # each pixel begins at a multiple of eight entries


def test_partial_is_for_inference_on_cuda() -> None:
    layer, x = FactorizedConv2d(6, 9, 3, rank=(5, 3)), torch.randn(1, 6, 5, 5)
    plan = get_plan("partial")
    assert "for inference only" in plan.support(layer, on_cuda(layer, x, training=True)).reason
    assert plan.support(layer, on_cuda(layer, x)) == get_plan("fused").support(layer, on_cuda(layer, x))


def test_partial_runs_the_library_where_others_look_on() -> None:
    layer, x = FactorizedConv2d(6, 9, 3, rank=(5, 3)), torch.randn(1, 6, 5, 5)
    layer.plan = "partial"
    assert layer._traced_plans == ("partial", "partial")
    y = (
        torch.func.functional_call(torch.func.vmap and layer, dict(layer.named_parameters()), (x,))
        if 0
        else None
    )
    assert y is None
    tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    expected = nn.functional.conv2d(torch.ones_like(x), layer.weight.to_dense())
    torch.testing.assert_close(tangent, expected)


def rates_of(**speeds: float) -> rates.Rates:
    return rates.Rates({kind: {16: speed} for kind, speed in speeds.items()}, 1e15, 1e-9)


@pytest.mark.parametrize("best", ["fused", "partial", "dense"])
def test_the_cost_model_knows_the_kinds_of_cuda(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = FactorizedConv2d(64, 64, 3, padding=1, rank=(48, 48)), torch.empty(8, 64, 28, 28)
    speeds = dict.fromkeys(("conv", "pointwise", "linear", "fused", "partial"), 1e10)
    speeds["conv" if best == "dense" else best] = 1e12
    monkeypatch.setattr(cost, "rates", lambda *_: rates_of(**speeds))
    monkeypatch.setattr(select, "TRIED_DEVICES", ("cpu", "cuda"))
    for cls in (Partial, type(get_plan("fused"))):
        monkeypatch.setattr(cls, "support", lambda *_: Support(True))
    assert choose(layer, on_cuda(layer, x)).name == best
    first, second = get_plan("partial").stages(layer, on_cuda(layer, x))
    whole = get_plan("fused").stages(layer, on_cuda(layer, x))[0]
    assert (first.kind, second.kind) == ("pointwise", "partial")
    assert first.macs + second.macs == whole.macs
    assert first.elements + second.elements == whole.elements + 2 * 8 * 28 * 28 * 48


def test_pair_is_one_pass() -> None:
    layer = FactorizedLinear(100, 60, rank=20)
    (stage,) = get_plan("fused").stages(layer, on_cuda(layer, torch.empty(5, 10, 100)))
    assert stage[:4] == ("pair", 50 * 20 * 160, 20, 50 * 160 + 20 * 160) and stage.calls == 1


def test_pairs_are_traced_as_library_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedPair, "support", lambda *_: Support(True))
    layer = FactorizedLinear(100, 60, rank=20)
    assert traced_plan(layer, training=False) == "staged"
    layer.tuned = {str(layer.case(torch.empty(5, 100), False)): {"plan": "fused", "seconds": {}}}
    assert traced_plan(layer, training=False) == "fused"
