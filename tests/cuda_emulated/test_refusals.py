"""What the emulated CUDA ops refuse, naming the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_problems import DEPTHWISE, PLAIN, RING, BottleneckCase
from cuda_problems import Problem, convolution
from emulated_problems import backward, forward, geometry, pair_problem, random_grad
from pair_problems import PairCase
from torch import Tensor

t = torch.randn
NAMES = ("x", "core", "factor_out", "factor_in", "bias", "stride", "padding", "dilation", "ring", "depthwise")
# PLAIN: x [2, 5, 7, 6], core [4, 3, 3, 3], factors [6, 4] and [5, 3].
# Of each: the form, what is changed, what the message says.
BAD_CONVOLUTIONS: list[tuple[BottleneckCase, dict[str, Any], str]] = [
    (PLAIN, {"x": t(5, 7, 6)}, r"x must be \[N, 5, H, W\], got \[5, 7, 6\]"),
    (PLAIN, {"x": t(2, 4, 7, 6)}, r"x must be \[N, 5, H, W\], got \[2, 4, 7, 6\]"),
    (PLAIN, {"x": t(2, 5, 7, 6).half()}, "x and the weights must have one dtype"),
    (PLAIN, {"core": t(4, 3, 3)}, r"core must be .*, got \[4, 3, 3\]"),
    (PLAIN, {"core": t(4, 3, 0, 3)}, r"core must be .* no empty mode, got \[4, 3, 0, 3\]"),
    (PLAIN, {"core": t(0, 3, 3, 3), "factor_out": t(6, 0)}, r"core must be .* no empty mode"),
    (PLAIN, {"core": t(4, 3, 3, 3).half()}, "core and factors must have one dtype"),
    (PLAIN, {"factor_out": t(6, 5)}, r"factor_out must be \[C_out, 4\], got \[6, 5\]"),
    (PLAIN, {"factor_out": t(6)}, r"factor_out must be \[C_out, 4\], got \[6\]"),
    (PLAIN, {"factor_out": t(6, 4).bfloat16()}, "core and factors must have one dtype"),
    (PLAIN, {"factor_in": t(5, 4)}, r"factor_in must be \[C_in, 3\], got \[5, 4\]"),
    (PLAIN, {"factor_in": t(6, 3)}, r"x must be \[N, 6, H, W\]"),
    (PLAIN, {"factor_in": t(5, 3, 1)}, r"factor_in must be \[C_in, 3\], got \[5, 3, 1\]"),
    (PLAIN, {"factor_in": t(5, 3).double()}, "core and factors must have one dtype"),
    (PLAIN, {"stride": [0, 1]}, "stride and dilation must be >= 1, got 0"),
    (PLAIN, {"stride": [1, -1]}, "stride and dilation must be >= 1, got -1"),
    (PLAIN, {"stride": [1, 1, 1]}, "stride must be an int or a pair"),
    (PLAIN, {"dilation": [1, 0]}, "stride and dilation must be >= 1, got 0"),
    (PLAIN, {"dilation": [1, 1, 1]}, "dilation must be an int or a pair"),
    (PLAIN, {"dilation": [5, 1]}, "smaller than the dilated kernel"),
    (PLAIN, {"padding": [-1, 0]}, "padding must be >= 0, got -1"),
    (PLAIN, {"padding": [0, 0, 0, -2]}, "padding must be >= 0, got -2"),
    (PLAIN, {"padding": [1, 1, 1]}, "padding must be an int or a pair"),
    (PLAIN, {"dilation": [2**40, 1]}, "dilated kernel"),
    (PLAIN, {"x": t(2, 5, 1, 6), "padding": [0, 0]}, "smaller than the dilated kernel"),
    (RING, {"ring": 2}, r"factor_out must be \[C_out, 8\], got \[6, 12\]"),
    (RING, {"ring": 0}, "ring must be >= 1"),
    (RING, {"ring": -3}, "ring must be >= 1"),
    (RING, {"depthwise": True}, "ring must be >= 1, and 1 with a depthwise core"),
    (PLAIN, {"depthwise": True}, r"depthwise core \[R, 1, kH, kW\]"),
    (DEPTHWISE, {"ring": 2}, "ring must be >= 1, and 1 with a depthwise core"),
    (DEPTHWISE, {"depthwise": False}, r"factor_in must be \[C_in, 1\], got \[5, 3\]"),
]
BAD_BIASES = [
    (t(5), r"bias must be .*6.*, got \[5\]"),
    (t(6, 1), r"bias must be .*6.*, got \[6, 1\]"),
    (t(6).half(), "bias must be .* in the dtype and on the device of x"),
]
BAD_GRADS = [t(2, 6, 7, 5), t(2, 5, 7, 6), t(1, 6, 7, 6), t(6, 7, 6), t(2, 6, 7, 6).half()]
forms = pytest.mark.parametrize("op", ["tucker2_conv2d", "bottleneck_conv2d"])


def changed(problem: Problem, changes: dict[str, Any]) -> Problem:
    """The problem with other tensors or options, by name; a Tucker-2 one has no form."""
    values = dict(zip(NAMES, (*problem.tensors, *problem.rest), strict=False)) | changes
    tensors, window = list(values.values())[:5], list(values.values())[5:8]
    form = list(values.values())[8:]
    return Problem(
        problem.op,
        problem.mode,
        problem.names,
        tuple(tensors),
        (*window, *form),
        lambda mask: (*window, mask, *form),
        problem.module,
        problem.reference,
    )


@pytest.mark.parametrize(("form", "changes", "message"), BAD_CONVOLUTIONS)
def test_convolutions(emulated: Any, form: BottleneckCase, changes: dict[str, Any], message: str) -> None:
    ops = ["bottleneck_conv2d"]
    if form is PLAIN and "depthwise" not in changes:
        ops.append("tucker2_conv2d")
    for op in ops:
        good = convolution(form, "float32", "cpu", op=op)
        bad = changed(good, changes)
        with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
            forward(emulated, bad)
        if message.startswith("x and the weights"):
            continue  # in backward it is the gradient that has not the dtype of x
        with pytest.raises(RuntimeError, match=f"{op}_backward: .*{message}"):
            backward(emulated, bad, random_grad(good))


@forms
@pytest.mark.parametrize(("bias", "message"), BAD_BIASES)
def test_biases(emulated: Any, bias: Tensor, message: str, op: str) -> None:
    problem = changed(convolution(PLAIN, "float32", "cpu", op=op), {"bias": bias})
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        forward(emulated, problem)


@forms
@pytest.mark.parametrize("grad", BAD_GRADS, ids=lambda g: f"{list(g.shape)}-{g.dtype}")
def test_gradients(emulated: Any, grad: Tensor, op: str) -> None:
    problem = convolution(PLAIN, "float32", "cpu", op=op)
    with pytest.raises(RuntimeError, match=f"{op}_backward: grad must have the shape, dtype and device"):
        backward(emulated, problem, grad)


PAIR = PairCase(rows=(2, 3))  # x [2, 3, 12], a [9, 5], b [5, 12]
BAD_PAIRS: list[tuple[dict[str, Tensor], str]] = [
    ({"x": t(2, 3, 11)}, r"x must be \[..., 12\], got \[2, 3, 11\]"),
    ({"x": t(())}, r"x must be \[..., 12\], got \[\]"),
    ({"x": t(2, 3, 12).half()}, "x and the factors must have one dtype"),
    ({"a": t(9)}, r"a must be \[out, R\] and b \[R, in\], got \[9\] and \[5, 12\]"),
    ({"a": t(9, 4)}, r"a must be \[out, R\] and b \[R, in\], got \[9, 4\] and \[5, 12\]"),
    ({"b": t(5, 12, 1)}, r"b \[R, in\], got \[9, 5\] and \[5, 12, 1\]"),
    ({"b": t(5, 13)}, r"x must be \[..., 13\], got \[2, 3, 12\]"),
    ({"b": t(5, 12).bfloat16()}, "a and b must have one dtype"),
    ({"bias": t(8)}, r"bias must be .*9.*, got \[8\]"),
    ({"bias": t(9, 1)}, r"bias must be .*9.*, got \[9, 1\]"),
    ({"bias": t(9).half()}, "bias must be .* in the dtype"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_PAIRS)
def test_pairs(emulated: Any, changes: dict[str, Tensor], message: str) -> None:
    good = pair_problem(PAIR, "float32")
    bad = good.but([changes.get(name, tensor) for name, tensor in good.given.items()])
    with pytest.raises(RuntimeError, match=f"two_factor_linear: .*{message}"):
        forward(emulated, bad)
    if "bias" not in changes and "x and the factors" not in message:
        with pytest.raises(RuntimeError, match=f"two_factor_linear.*: .*{message}"):
            backward(emulated, bad, random_grad(good))


@pytest.mark.parametrize(
    "grad",
    [t(2, 3, 8), t(3, 3, 9), t(9), t(2, 3, 9).half()],
    ids=["features", "rows", "dimensions", "dtype"],
)
def test_gradients_of_pairs(emulated: Any, grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"two_factor_linear.*: grad must "):
        backward(emulated, pair_problem(PAIR, "float32"), grad)


# --- packed weights ---


@pytest.mark.parametrize("op", ["tucker2_conv2d_packed", "tucker2_conv2d_tail"])
def test_packed_convolutions(emulated: Any, op: str) -> None:
    problem = convolution(PLAIN, "float32", "cpu")
    weights = emulated.tucker2_conv2d_pack(*problem.tensors[1:4])
    channels = PLAIN.c_in if op.endswith("packed") else PLAIN.rank_in
    x, ints = t(2, channels, *PLAIN.size), geometry(problem, False)
    call = getattr(emulated, op)
    assert call(x, weights, None, ints).shape == (2, PLAIN.c_out, *PLAIN.size)

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
            call(*arguments)

    for length in (0, 6, 13, 16):
        refused(f"geometry must hold 14 or 15 ints, got {length}", x, weights, None, [*ints, 0, 0][:length])
    for at in range(6):
        refused("geometry must hold sizes >= 1, got 0", x, weights, None, [*ints[:at], 0, *ints[at + 1 :]])
    for at, message in ((6, "stride"), (8, "padding must be >= 0, got -1"), (13, "dilation")):
        refused(message, x, weights, None, [*ints[:at], -1, *ints[at + 1 :]])
    refused("x must be", t(2, channels + 1, 7, 6), weights, None, ints)
    refused("x must be", t(channels, 7, 6), weights, None, ints)
    refused("x must be float32, float16 or bfloat16", x.double(), weights, None, ints)
    refused("x must have pixels", x[:, :, :0], weights, None, [*ints[:8], 2, 2, 2, 2, *ints[12:]])
    refused("bias must be", x, weights, t(5), ints)
    refused("bias must be", x, weights, t(6).half(), ints)
    for other in (weights[:-1], weights[::2], weights.float(), x):
        refused("packed", x, other, None, ints)
    refused("packed for other sizes, another dtype", x.half(), weights, None, ints)
    wider = emulated.tucker2_conv2d_pack(t(17, 3, 3, 3), t(6, 17), t(5, 3))
    refused("packed for other sizes", x, wider, None, ints)


def test_packed_pairs(emulated: Any) -> None:
    x, a, b, _ = pair_problem(PAIR, "float32").tensors
    assert x is not None and a is not None and b is not None
    weights = emulated.two_factor_linear_pack(a, b)
    sizes = [9, 5, 12, 0]
    assert emulated.two_factor_linear_packed(x, weights, None, sizes).shape == (2, 3, 9)

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=f"two_factor_linear.*: .*{message}"):
            emulated.two_factor_linear_packed(*arguments)

    for bad in ([], sizes[:3], [*sizes, 0]):
        refused(f"sizes must hold 4 ints, got {len(bad)}", x, weights, None, bad)
    refused("rank must be ", x, weights, None, [9, 0, 12, 0])
    refused("features and rank must be ", x, weights, None, [-9, 5, 12, 0])
    refused("x must be", x[..., 1:], weights, None, sizes)
    refused("x must be", torch.tensor(1.0), weights, None, sizes)
    refused("x must be float32, float16 or bfloat16", x.double(), weights, None, sizes)
    refused("bias must be", x, weights, t(8), sizes)
    refused("bias must be", x, weights, t(9).half(), sizes)
    for other in (weights[:-1], weights[::2], weights.float()):
        refused("packed for other sizes", x, other, None, sizes)
    refused("packed for other sizes, another dtype", x.half(), weights, None, sizes)
    refused("packed for other sizes", x, emulated.two_factor_linear_pack(t(9, 17), t(17, 12)), None, sizes)


def test_packing(emulated: Any) -> None:
    core, factor_out, factor_in = (w for w in PLAIN.make().tensors[1:4] if w is not None)
    for bad, message in (
        ((core[0], factor_out, factor_in), "core must be"),
        ((core, factor_out.t(), factor_in), "factor_out must be"),
        ((core, factor_out, factor_in[:, 1:]), "factor_in must be"),
        ((core, factor_out.half(), factor_in), "one dtype"),
        ((core.double(), factor_out.double(), factor_in.double()), "float32, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"tucker2_conv2d_pack: .*{message}"):
            emulated.tucker2_conv2d_pack(*bad)
    a, b = t(9, 5), t(5, 12)
    for pair, message in (
        ((a, b[1:]), "a must be"),
        ((a[0], b), "a must be"),
        ((a, b.half()), "one dtype"),
        ((a.double(), b.double()), "float32, float16 or bfloat16"),
        ((a[:0], b), "features and rank must be "),
    ):
        with pytest.raises(RuntimeError, match=f"two_factor_linear.*: .*{message}"):
            emulated.two_factor_linear_pack(*pair)


@pytest.mark.parametrize(
    ("padding", "dilation"),
    [([0, 2**33, 0, 0], [1, 1]), ([0, 0, 0, 2**33], [1, 1]), ([0, 0], [2**62, 1])],
)
def test_sizes_beyond_31_bits(emulated: Any, padding: list[int], dilation: list[int]) -> None:
    one = torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="must be at most"):
        emulated.tucker2_conv2d(
            torch.ones(1, 1, 9, 9), torch.ones(1, 1, 4, 4), one, one, None, [1, 1], padding, dilation
        )
