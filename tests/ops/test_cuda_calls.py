"""What calls with CUDA tensors hand to the ops, seen through fake tensors: no device is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tensorcomp_ext import _native
from tensorcomp_ext.ops import _cuda, bottleneck_conv, tucker2_conv, tucker2_packed
from tensorcomp_ext.ops._tucker2_conv_autograd import differentiable_conv2d
from tensorcomp_ext.ops.bottleneck_conv import differentiable_bottleneck
from tensorcomp_ext.ops.tucker2_conv import bind_packed, bind_tail, pack_tucker2, packed_geometry
from tensorcomp_ext.ops.two_factor_linear import (
    bind_packed_pair,
    differentiable_two_factor,
    two_factor_linear,
)
from tensorcomp_ext.ops.two_factor_linear import native_support as pair_support

OPS = torch.ops.tensorcomp
GEOMETRY = ((1, 1), (0, 0, 0, 0), (1, 1))
CONV, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


class Recorder(TorchDispatchMode):
    """The package's ops that were called, with their arguments written out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tensorcomp":
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            self.calls[func._schema.name.removeprefix("tensorcomp::")] = defaults | given | (kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """TF32 as it was before, whatever a test sets."""
    before = CONV.allow_tf32, MATMUL.allow_tf32
    yield
    CONV.allow_tf32, MATMUL.allow_tf32 = before


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the CUDA library is loaded and takes every size."""
    monkeypatch.setattr(_native, "cuda_status", lambda: _native.Support(True))
    monkeypatch.setattr(_cuda, "fits_bottleneck", lambda *sizes: _native.Support(True))
    monkeypatch.setattr(_cuda, "fits_two_factor", lambda *sizes: _native.Support(True))


@pytest.fixture
def fake() -> Iterator[Callable[..., Tensor]]:
    """Makes CUDA tensors that hold nothing."""
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.float32: torch.empty(shape, device="cuda", dtype=dtype)


Fake = Callable[..., Tensor]


def conv_tensors(fake: Fake, dtype: torch.dtype = torch.float32, ring: int = 1) -> list[Tensor]:
    shapes = ((2, 5, 7, 6), (4, 3, 3, 3), (6, 4 * ring), (5, 3 * ring), (6,))
    return [fake(*shape, dtype=dtype) for shape in shapes]


def pair_tensors(fake: Fake, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [fake(*shape, dtype=dtype) for shape in ((7, 5), (6, 3), (3, 5), (6,))]


def conv(tensors: list[Tensor]) -> Tensor:
    return tucker2_conv.tucker2_conv2d(*tensors, stride=2, padding="valid", backend="native")


def ring(tensors: list[Tensor]) -> Tensor:
    return bottleneck_conv.bottleneck_conv2d(*tensors, ring=2, padding=1, backend="native")


def pair(tensors: list[Tensor]) -> Tensor:
    return two_factor_linear(*tensors, backend="native")


WAYS: dict[str, tuple[Any, Callable[[list[Tensor]], Tensor], Any]] = {
    "tucker2_conv2d": (conv_tensors, conv, CONV),
    "bottleneck_conv2d": (lambda *a: conv_tensors(*a, ring=2), ring, CONV),
    "two_factor_linear": (pair_tensors, pair, MATMUL),
}
every_op = pytest.mark.parametrize("name", WAYS)


@pytest.mark.usefixtures("library")
@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tf32_is_as_torch_allows_it(name: str, dtype: torch.dtype, fake: Fake) -> None:
    tensors_of, call, setting = WAYS[name]
    other = MATMUL if setting is CONV else CONV
    for allowed in (True, False):
        setting.allow_tf32, other.allow_tf32 = allowed, not allowed
        with Recorder() as recorder:
            y = call(tensors_of(fake, dtype))
        assert y.dtype == dtype and y.is_cuda
        assert recorder.calls[name]["allow_tf32"] is (allowed and dtype == torch.float32)


CPU_CALLS: dict[str, Callable[[list[Tensor], bool], Tensor]] = {
    "tucker2_conv2d": lambda t, tf32: differentiable_conv2d(*t, GEOMETRY, (tf32,)),
    "bottleneck_conv2d": lambda t, tf32: differentiable_bottleneck(*t, GEOMETRY, (2, False, tf32)),
    "two_factor_linear": lambda t, tf32: differentiable_two_factor(*t, tf32),
}


@every_op
@pytest.mark.parametrize("allowed", [True, False])
def test_backward_has_what_forward_had(name: str, allowed: bool) -> None:
    """On the CPU, whose kernels take the argument and let it be."""

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    tensors = WAYS[name][0](made)
    tensors[1].requires_grad_()
    with Recorder() as recorder:
        y = CPU_CALLS[name](tensors, allowed)
        torch.autograd.grad(y.sum(), tensors[1])
    forward, backward = recorder.calls[name], recorder.calls[f"{name}_backward"]
    assert forward["allow_tf32"] is backward["allow_tf32"] is allowed
    assert backward["output_mask"] == 0b10
    for option in ("ring", "depthwise"):
        assert forward.get(option) == backward.get(option)
    exact = CPU_CALLS[name]([t.detach() for t in tensors], not allowed)
    assert torch.equal(exact, y)


@pytest.mark.usefixtures("library")
@every_op
def test_autocast_of_the_inputs_device(name: str, fake: Fake) -> None:
    """CUDA's autocast reaches CUDA calls, the CPU's does not."""
    tensors_of, call, _ = WAYS[name]
    tensors = tensors_of(fake)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(tensors).dtype == torch.float32
    with Recorder() as recorder, _cuda_autocast():
        assert call(tensors).dtype == torch.float16
    assert recorder.calls[name]["x"].dtype == torch.float16


class _cuda_autocast:
    """``torch.autocast("cuda")`` without its look for a device."""

    def __enter__(self) -> None:
        self.before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.float16)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled("cuda", self.before[0])
        torch.set_autocast_dtype("cuda", self.before[1])
        torch.clear_autocast_cache()


@pytest.mark.parametrize("bind", [bind_packed, bind_tail])
def test_packed_forms_follow_torch_at_every_call(bind: Callable[..., Any], fake: Fake) -> None:
    z, packed, numbers = fake(2, 3, 7, 6), fake(64, dtype=torch.uint8), [4, 3, 3, 3, 3, 6, *[1] * 8]
    name = "tucker2_conv2d_packed" if bind is bind_packed else "tucker2_conv2d_tail"
    call, fixed = bind(packed, numbers), bind(packed, [*numbers, 1])
    for allowed in (True, False, True):
        CONV.allow_tf32 = allowed
        for each, x, expected in (
            (call, z, int(allowed)),
            (call, z.half(), 0),
            (fixed, z, 1),
        ):
            with Recorder() as recorder:
                y = each(x, None)
            assert y.shape == (2, 6, 7, 6) and y.dtype == x.dtype
            assert recorder.calls[name]["geometry"] == [*numbers, expected]
    assert len(numbers) == 14


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_tails_output_lies_as_its_input(layout: torch.memory_format, fake: Fake) -> None:
    z = torch.empty((2, 3, 7, 6), device="cuda", memory_format=layout)
    y = bind_tail(fake(64, dtype=torch.uint8), [4, 3, 3, 2, 5, 6, 2, 1, 1, 0, 2, 1, 1, 1])(z, None)
    assert y.shape == (2, 6, 3, 8) and y.is_contiguous(memory_format=layout)


def test_packed_pairs_follow_torch_at_every_call(fake: Fake) -> None:
    x, packed = fake(7, 5), fake(64, dtype=torch.uint8)
    follows = bind_packed_pair(packed, [6, 3, 5])
    fixed = bind_packed_pair(packed, [6, 3, 5, 1])
    for allowed in (True, False):
        MATMUL.allow_tf32 = allowed
        for call, given, expected in ((follows, x, int(allowed)), (follows, x.half(), 0), (fixed, x, 1)):
            with Recorder() as recorder:
                assert call(given, None).shape == (7, 6)
            assert recorder.calls["two_factor_linear_packed"]["sizes"] == [6, 3, 5, expected]


def test_on_the_cpu_packed_geometry_keeps_fourteen_numbers() -> None:
    geometry = tucker2_conv.resolve_geometry((3, 3), 1, 1, 1)
    assert packed_geometry((4, 3, 3, 3), 5, 6, geometry) == [4, 3, 3, 3, 5, 6, *[1] * 8]
    assert packed_geometry((4, 3, 3, 3), 5, 6, geometry, True) == [4, 3, 3, 3, 5, 6, *[1] * 8, 1]


def test_native_support_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    missing = _native.Support(False, "the CUDA library is on holiday")
    monkeypatch.setattr(_native, "cuda_status", lambda: missing)
    tensors, factors = conv_tensors(fake), pair_tensors(fake)
    assert tucker2_conv.native_support(*tensors) == missing
    assert bottleneck_conv.native_support(*conv_tensors(fake, ring=2), ring=2) == missing
    assert pair_support(*factors) == missing
    monkeypatch.setattr(_native, "cuda_status", lambda: _native.Support(True))
    for refused in (
        tucker2_conv.native_support(*(t.double() for t in tensors)),
        bottleneck_conv.native_support(*(t.double() for t in tensors), ring=2),
        pair_support(*(t.double() for t in factors)),
    ):
        assert refused == (
            False,
            "the native CUDA kernels take float32, float16 and bfloat16, not torch.float64",
        )


def test_sizes_are_asked_for(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    asked: list[tuple[Any, ...]] = []

    def refuse(device: torch.device, *sizes: Any) -> _native.Support:
        assert device.type == "cuda"
        asked.append(sizes)
        return _native.Support(False, "too large")

    monkeypatch.setattr(_native, "cuda_status", lambda: _native.Support(True))
    monkeypatch.setattr(_cuda, "fits_bottleneck", refuse)
    monkeypatch.setattr(_cuda, "fits_two_factor", refuse)
    tucker2_conv.native_support(*conv_tensors(fake, torch.float16), stride=2, dilation=(1, 2))
    bottleneck_conv.native_support(*conv_tensors(fake, ring=2), ring=2)
    depthwise = [fake(2, 5, 7, 6), fake(4, 1, 3, 2), fake(6, 4), fake(5, 4)]
    bottleneck_conv.native_support(*depthwise, depthwise=True)
    pair_support(*pair_tensors(fake))
    plain = [tuple(s) if isinstance(s, (list, tuple)) else s for sizes in asked for s in sizes]
    assert plain == [
        *(3, 4, 1, (3, 3), (2, 2), (1, 2), 2, False),
        *(3, 4, 2, (3, 3), (1, 1), (1, 1), 4, False),
        *(4, 4, 1, (3, 2), (1, 1), (1, 1), 4, True),
        *(3, 4),
    ]
    with pytest.raises(ValueError, match="backend='native' cannot serve: too large"):
        conv(conv_tensors(fake))


def test_ranks_beyond_shared_memory_are_named() -> None:
    device = torch.device("cuda", 0)
    sizes = ((3, 3), (1, 1), (1, 1))
    assert _cuda.fits_bottleneck(device, 64, 64, 1, *sizes, 2, False).ok
    assert _cuda.fits_bottleneck(device, 300, 300, 1, *sizes, 2, False).ok
    too_large = _cuda.fits_bottleneck(device, 40_000, 3, 1, *sizes, 2, False)
    assert not too_large.ok and "ranks (3, 40000) with kernel [3, 3]" in too_large.reason
    assert not _cuda.fits_bottleneck(device, 512, 512, 64, *sizes, 4, False).ok
    assert _cuda.fits_bottleneck(device, 100, 100, 1, *sizes, 4, True).ok
    assert _cuda.fits_two_factor(device, 512, 2).ok
    assert "rank 100000" in _cuda.fits_two_factor(device, 100_000, 4).reason


def test_mixed_settings_of_torch() -> None:
    """The settings by operation, where torch's own ``allow_tf32`` refuses to answer."""
    before = CONV.conv.fp32_precision, MATMUL.fp32_precision
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    try:
        for precision in ("tf32", "ieee"):
            CONV.conv.fp32_precision = MATMUL.fp32_precision = precision
            assert _cuda.convolution_tf32(x) is _cuda.matmul_tf32(x) is (precision == "tf32")
    finally:
        CONV.conv.fp32_precision, MATMUL.fp32_precision = before


def test_cpu_tensors_never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_precision_of", None)
    assert _cuda.convolution_tf32(torch.zeros(1)) is False and _cuda.matmul_tf32(torch.zeros(1)) is False


def test_what_cannot_be_packed_says_why(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    monkeypatch.setattr(_native, "cuda_status", lambda: _native.Support(False, "no such library"))
    _, core, factor_out, factor_in, _ = conv_tensors(fake)
    with pytest.raises(RuntimeError, match="tucker2_conv2d_pack: no such library"):
        tucker2_packed._pack_without_native(core, factor_out, factor_in)
    with pytest.raises(RuntimeError, match="tucker2_conv2d_tail: no such library"):
        tucker2_packed._tail_without_native(core, core, None, [])


def test_the_tail_is_for_cuda() -> None:
    z = torch.zeros(2, 3, 7, 6)
    refused = r"tucker2_conv2d_tail: for CUDA tensors only, got device 'cpu'"
    with pytest.raises(RuntimeError, match=refused):
        bind_tail(z, [4, 3, 3, 3, 3, 6, *[1] * 8])(z, None)
    with pytest.raises(RuntimeError, match=r"for inference only; .* use tucker2_conv2d"):
        torch.func.jvp(lambda z: OPS.tucker2_conv2d_tail(z, z, None, [1] * 14), (z,), (z,))
    with pytest.raises(
        RuntimeError, match="tucker2_conv2d_pack: packed weights are for CPU and CUDA tensors"
    ):
        pack_tucker2(*(torch.zeros(s, device="meta") for s in ((4, 3, 3, 3), (6, 4), (5, 3))))
