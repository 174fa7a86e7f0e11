"""What the Tucker-2 convolution refuses, in the same words with and without native code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tucker2_bad_calls import BAD_CALLS, NO_INTS, everything, raised
from tucker2_problems import Arguments, Case

from tensorcomp_ext.ops import tucker2_conv2d

OP = torch.ops.tensorcomp.tucker2_conv2d

SERVES = """
import json, sys
import torch
import tensorcomp_ext as tc
from tucker2_bad_calls import everything
from tucker2_problems import Case, oracle, oracle_gradients, relative

errors = {"status": list(tc._native.status()), "forward": 0.0, "backward": 0.0, "forms": []}
for case in (Case(), Case(padding="same", kernel=(2, 4), layout="channels_last"), Case(stride=2, n=0)):
    arguments = case.make()
    y = torch.ops.tensorcomp.tucker2_conv2d(*arguments.leaves().explicit())
    errors["forms"].append(y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(arguments.x)))
    errors["forward"] = max(errors["forward"], relative(y, oracle(arguments)))
    leaves, expected = arguments.leaves(), oracle_gradients(arguments, y)
    for call in (torch.ops.tensorcomp.tucker2_conv2d(*leaves.explicit()), tc.ops.tucker2_conv2d(*leaves)):
        for found, right in zip(torch.autograd.grad(call, leaves.tensors, y), expected.values()):
            errors["backward"] = max(errors["backward"], relative(found, right))
    compiled = torch.compile(tc.ops.tucker2_conv2d, fullgraph=True, backend="aot_eager")
    errors["forward"] = max(errors["forward"], relative(compiled(*arguments), oracle(arguments)))
refused = {}
x, core, factor_out, factor_in = arguments.tensors[:4]
for name, call in {
    "pack": lambda: torch.ops.tensorcomp.tucker2_conv2d_pack(core, factor_out, factor_in),
    "packed": lambda: torch.ops.tensorcomp.tucker2_conv2d_packed(x, x, None, [0] * 14),
    "native": lambda: tc.ops.tucker2_conv2d(*arguments, backend="native"),
}.items():
    try:
        call()
    except (RuntimeError, ValueError) as error:
        refused[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"errors": errors, "refused": refused, "bad": everything()}))
"""


@pytest.fixture(scope="module")
def without_native(repository: Path) -> dict:
    """What a process without native code finds."""
    path = os.pathsep.join([str(Path(__file__).parent), str(repository), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", SERVES],
        capture_output=True,
        text=True,
        env={**os.environ, "TENSORCOMP_NATIVE": "0", "PYTHONPATH": path},
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    call, kind, text = BAD_CALLS[name]
    assert raised(call) == (kind.__name__, f"tucker2_conv2d: {text}")


@pytest.mark.parametrize("name", BAD_CALLS)
def test_same_text_without_native_code(name: str, without_native: dict) -> None:
    assert without_native["bad"][name] == list(everything()[name])


@pytest.mark.parametrize("name", NO_INTS)
def test_windows_that_are_no_ints(name: str, without_native: dict) -> None:
    kind, text = raised(NO_INTS[name])
    assert kind in ("TypeError", "ValueError")
    assert text.startswith("tucker2_conv2d: ") and ("padding" in text or "stride" in text)
    assert without_native["bad"][name] == [kind, text]


def test_ops_serve_without_native_code(without_native: dict) -> None:
    errors = without_native["errors"]
    assert errors["status"] == [False, "native code is switched off by TENSORCOMP_NATIVE=0"]
    assert errors["forward"] <= 1e-6 and errors["backward"] <= 1e-6
    assert all(errors["forms"])


def test_native_forms_say_why_they_cannot_serve(without_native: dict) -> None:
    reason = "native code is switched off by TENSORCOMP_NATIVE=0"
    assert without_native["refused"] == {
        "pack": f"RuntimeError: tucker2_conv2d_pack: {reason}",
        "packed": f"RuntimeError: tucker2_conv2d_packed: {reason}",
        "native": f"ValueError: tucker2_conv2d: backend='native' cannot serve: {reason}",
    }


RAW: dict[str, tuple[Callable[[Arguments], object], str]] = {
    "x": (lambda a: OP(a.x[0], *a[1:5]), r"x must be \[N, C_in, H, W\], got \[5, 7, 6\]"),
    "channels": (lambda a: OP(a.x[:, 1:], *a[1:5]), r"factor_in must be .* with C_in = 4, got \[5, 3\]"),
    "core": (lambda a: OP(a.x, a.core[0], *a[2:5]), r"core must be \[R_out, R_in, kH, kW\], got \[3, 3, 3\]"),
    "empty": (lambda a: OP(a.x, a.core[:0], *a[2:5]), "no empty mode"),
    "out": (lambda a: OP(a.x, a.core, a.factor_out.t(), *a[3:5]), r"with R_out = 4, got \[4, 6\]"),
    "in": (lambda a: OP(*a[:3], a.factor_in.t(), a.bias), r"with R_in = 3, got \[3, 5\]"),
    "dtype": (lambda a: OP(a.x, a.core.bfloat16(), *a[2:5]), "must have one dtype"),
    "x dtype": (lambda a: OP(a.x.bfloat16(), *a[1:5]), "dtype of the weights"),
    "bias": (lambda a: OP(*a[:4], a.bias[1:]), r"bias must be \[C_out\] with C_out = 6, got \[5\]"),
    "bias dtype": (
        lambda a: OP(*a[:4], a.bias.bfloat16()),
        "bias must lie on the CPU and have the dtype of x",
    ),
    "stride": (lambda a: OP(*a[:5], [0]), "stride and dilation must be >= 1"),
    "strides": (lambda a: OP(*a[:5], [1, 1, 1]), "stride must be an int or a pair"),
    "paddings": (lambda a: OP(*a[:5], [1], [1, 1, 1]), "padding must be an int, a pair or"),
    "padding": (lambda a: OP(*a[:5], [1], [0, -2]), "padding must be >= 0, got -2"),
    "dilation": (lambda a: OP(*a[:5], [1], [0], [4]), "smaller than the dilated kernel"),
}


@pytest.mark.native
@pytest.mark.parametrize("name", RAW)
def test_the_dispatcher_refuses_too(name: str) -> None:
    """Also whoever calls ``torch.ops`` past the Python checks gets an error, never a crash."""
    call, text = RAW[name]
    with pytest.raises(RuntimeError, match=text):
        call(Case().make())


@pytest.mark.native
def test_backward_refuses_a_gradient_of_another_form() -> None:
    a = Case().make()
    y = tucker2_conv2d(*a)
    for grad in (y[1:], y[:, 1:], y[..., 1:], y[0], y.bfloat16(), y.double()):
        with pytest.raises(RuntimeError, match="grad must have the shape, dtype and device of the output"):
            torch.ops.tensorcomp.tucker2_conv2d_backward(grad, *a[:4], [1], [1], [1], 31)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_empty_batch(backend: str | None, layout: str) -> None:
    leaves = Case(n=0, layout=layout).make().leaves()
    y = tucker2_conv2d(*leaves, backend=backend)
    assert y.shape == (0, 6, 7, 6)
    given: list[Tensor] = [t for t in leaves.tensors if t is not None]
    for tensor, gradient in zip(given, torch.autograd.grad(y.sum(), given), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


EMPTY = [Case(c_in=0), Case(c_out=0), Case(size=(0, 6), padding=2), Case(size=(7, 0), padding=(1, 3))]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_modes_leave_the_bias(case: Case) -> None:
    arguments = case.make()
    y = tucker2_conv2d(*arguments)
    assert arguments.bias is not None
    assert torch.equal(y, arguments.bias[:, None, None].expand(y.shape))


@pytest.mark.native
@pytest.mark.parametrize("case", [case for case in EMPTY if case.c_out], ids=str)
def test_empty_modes_leave_the_gradient_of_the_bias(case: Case) -> None:
    leaves = case.make().leaves()
    y = tucker2_conv2d(*leaves)
    *others, bias = torch.autograd.grad(y.sum(), [t for t in leaves.tensors if t is not None])
    assert not any(g.any() for g in others)
    assert torch.equal(bias, torch.full_like(bias, y.numel() / case.c_out))
