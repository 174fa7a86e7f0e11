"""The inference form of the Tucker-2 convolution, with weights packed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from tucker2_problems import DTYPES, GEOMETRIES, LAYOUTS, SIZES, Arguments, Case

from tensorcomp_ext import _native
from tensorcomp_ext.ops import tucker2_conv2d
from tensorcomp_ext.ops.tucker2_conv import pack_tucker2, packed_geometry, tucker2_conv2d_packed

pytestmark = pytest.mark.native

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
REPACK = "pack them again"


def pack(arguments: Arguments) -> Tensor:
    return pack_tucker2(arguments.core, arguments.factor_out, arguments.factor_in)


def run(arguments: Arguments, packed: Tensor) -> Tensor:
    shape, c_out = arguments.core.shape, arguments.factor_out.shape[0]
    return tucker2_conv2d_packed(arguments.x, packed, shape, c_out, arguments.bias, *arguments[5:])


@dtypes
@pytest.mark.parametrize(
    "case", [*SIZES, *GEOMETRIES, *(Case(layout=name, c_in=9, rank_in=17) for name in LAYOUTS)], ids=str
)
def test_equals_the_functional_op(isa: str, case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    y = run(arguments, pack(arguments))
    expected = tucker2_conv2d(*arguments, backend="native")
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


@dtypes
def test_packed_once_serves_every_input(isa: str, dtype: torch.dtype) -> None:
    first = Case(layout="channels_last").make(dtype)
    packed = pack(first)
    kept = packed.clone()
    for other in (
        Case(n=1, size=(20, 31)),
        Case(layout="every_other", stride=2, padding=0),
        Case(bias=False),
    ):
        arguments = other.make(dtype)
        arguments = arguments.with_tensors((arguments.x, *first.tensors[1:4], arguments.bias))
        assert torch.equal(run(arguments, packed), tucker2_conv2d(*arguments, backend="native"))
    assert torch.equal(packed, kept)


def test_is_opaque_and_detached() -> None:
    arguments = Case().make().leaves()
    packed = pack(arguments)
    assert packed.dim() == 1 and not packed.requires_grad
    assert not run(arguments, packed).requires_grad


@dtypes
def test_opcheck(isa: str, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last", "pixel_slice"):
        arguments = Case(layout=layout, stride=2).make(dtype)
        geometry = packed_geometry(arguments.core.shape, 5, 6, arguments.geometry)
        torch.library.opcheck(
            torch.ops.tensorcomp.tucker2_conv2d_packed.default,
            (arguments.x, pack(arguments), arguments.bias, geometry),
        )


def test_compiles_whole() -> None:
    arguments = Case(layout="channels_last").make()
    packed = pack(arguments)
    compiled = torch.compile(
        lambda x: run(arguments._replace(x=x), packed), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(arguments.x), run(arguments, packed))
    torch.compiler.reset()


def test_refuses_transforms() -> None:
    """Derivatives would be lost in silence; mapping is served one by one."""
    arguments = Case().make()
    packed = pack(arguments)
    geometry = packed_geometry(arguments.core.shape, 5, 6, arguments.geometry)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch.ops.tensorcomp.tucker2_conv2d_packed(x, packed, arguments.bias, geometry),
        lambda x: run(arguments._replace(x=x), packed),
    ]
    x, refused = arguments.x, "tucker2_conv2d_packed: for inference only; .* use tucker2_conv2d"
    for call in calls:
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode, pytest.raises(RuntimeError, match=refused):
                torch.func.jvp(call, (x,), (x,))
            with mode, forward_ad.dual_level(), pytest.raises(RuntimeError, match=refused):
                call(forward_ad.make_dual(x, x))
        with pytest.raises(RuntimeError, match=refused):
            torch.func.grad(lambda x: call(x).sum())(x)  # noqa: B023
        assert torch.equal(call(x), run(arguments, packed))
        assert not call(x.clone().requires_grad_()).requires_grad
    assert torch.equal(torch.func.vmap(calls[0])(torch.stack([x, x]))[1], calls[0](x))


OTHERS: dict[str, Callable[[Arguments], Arguments]] = {
    "dtype": lambda a: a._replace(x=a.x.bfloat16(), bias=None),
    "c_in": lambda a: a._replace(x=a.x[:, 1:]),
    "c_out": lambda a: a._replace(factor_out=a.factor_out[1:], bias=None),
    "rank_in": lambda a: a._replace(core=a.core[:, 1:]),
    "rank_out": lambda a: a._replace(core=a.core[1:]),
    "kernel": lambda a: a._replace(core=a.core[:, :, 1:]),
    "kernel_turned": lambda a: a._replace(core=a.core.transpose(2, 3)),
    "ranks_swapped": lambda a: a._replace(core=a.core.transpose(0, 1)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_weights_of_another_problem(what: str) -> None:
    arguments = Case(kernel=(3, 2)).make()
    with pytest.raises(RuntimeError, match=REPACK):
        run(OTHERS[what](arguments), pack(arguments))


def test_weights_of_another_instruction_set(isa: str) -> None:
    from tensorcomp_ext import _C as native

    arguments = Case().make()
    packed = pack(arguments)
    others = [name for name in native.isa_available() if name != isa]
    for other in others:
        native.set_isa_cap(other)
        with pytest.raises(RuntimeError, match=REPACK):
            run(arguments, packed)
    native.set_isa_cap(isa)
    run(arguments, packed)


def test_damaged_weights() -> None:
    arguments = Case().make()
    packed = pack(arguments)
    with pytest.raises(RuntimeError, match="packed is truncated"):
        run(arguments, packed[:-1])
    with pytest.raises(RuntimeError, match="packed is truncated"):
        run(arguments, torch.cat([packed, packed[:4]]))
    foreign = [packed[:63], packed[:0], packed.float(), torch.stack([packed, packed], 1)[:, 0]]
    for wrong in foreign:
        with pytest.raises(RuntimeError, match="packed must come from tucker2_conv2d_pack"):
            run(arguments, wrong)
    changed = packed.clone()
    changed[0] += 1
    with pytest.raises(RuntimeError, match=REPACK):
        run(arguments, changed)


def test_wrong_arguments() -> None:
    arguments = Case().make()
    packed, op = pack(arguments), torch.ops.tensorcomp.tucker2_conv2d_packed
    geometry = packed_geometry(arguments.core.shape, 5, 6, arguments.geometry)
    assert len(geometry) == 14
    for wrong in (geometry[:-1], [*geometry, 1], []):
        with pytest.raises(RuntimeError, match=f"geometry must hold 14 ints, got {len(wrong)}"):
            op(arguments.x, packed, None, wrong)
    for index, value, message in (
        (6, 0, "stride"),
        (12, 0, "dilation"),
        (8, -1, "padding must be >= 0, got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(arguments.x, packed, None, [*geometry[:index], value, *geometry[index + 1 :]])
    with pytest.raises(RuntimeError, match=r"bias must be \[C_out\] with C_out = 6, got \[5\]"):
        op(arguments.x, packed, torch.zeros(5), geometry)
    with pytest.raises(RuntimeError, match="smaller than the dilated kernel"):
        op(arguments.x[:, :, :, :1], packed, None, [*geometry[:10], 0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        op(arguments.x.double(), packed, None, geometry)
    with pytest.raises(ValueError, match="stride must be an int or a pair of ints >= 1, got 0"):
        tucker2_conv2d_packed(arguments.x, packed, arguments.core.shape, 6, stride=0)
    with pytest.raises(RuntimeError, match="weights must be float32 or bfloat16"):
        pack(arguments.double())
    with pytest.raises(ValueError, match=r"factor_in must be \[C_in, R_in\] with R_in = 3, got \[5, 2\]"):
        pack(arguments._replace(factor_in=arguments.factor_in[:, 1:]))


def test_the_cap_selects_the_instruction_set(isa: str) -> None:
    from tensorcomp_ext import _C as native

    assert _native.status().ok and native.isa() == isa
