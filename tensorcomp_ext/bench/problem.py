"""The tensors of one benchmark row, and the float64 answer every candidate is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .. import reference
from .cases import DTYPES, LAYOUTS, Case

FORWARD_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "tf32": 2e-3}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2, "tf32": 2e-2}

LIBRARY_SLACK = 4.0
"""Times more for the library's own ways: cuDNN may pick Winograd's algorithm, which loses digits in float32,
and a baseline that is thrown out for that would flatter us."""

OUTPUTS = ("y", "grad x", "grad core", "grad factor_out", "grad factor_in", "grad bias")


class Problem:
    """Input, factors, bias, dense weight and output gradient for one case, dtype and layout.

    Values are of unit scale at every stage; the oracle works on the values after rounding to the dtype.
    """

    def __init__(self, case: Case, *, training: bool, seed: int = 0, device: str = "cpu") -> None:
        if case.dtype is None or case.layout is None:
            raise ValueError("a case to be measured needs its dtype and layout")
        self.case = case
        self.training = training
        self.device = device
        self.dtype_name, self.layout = case.dtype, case.layout
        dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (drawn * scale).to(dtype)

        taps = case.kernel[0] * case.kernel[1]
        self._x = draw(case.N, case.S, case.H, case.W)
        self.factor_in = draw(case.S, case.r_in, scale=case.S**-0.5)
        self.core = draw(case.r_out, case.r_in, *case.kernel, scale=(taps * case.r_in) ** -0.5)
        self.factor_out = draw(case.T, case.r_out, scale=case.r_out**-0.5)
        self.bias = draw(case.T, scale=0.1)
        self._grad = draw(case.N, case.T, *case.output_size)
        self.expected = self._answer()

    def x(self, layout: str) -> Tensor:
        """The input in ``layout``, a leaf that requires its gradient in training."""
        x = self._x.detach().contiguous(memory_format=LAYOUTS[layout])
        return (x.clone() if x is self._x else x).requires_grad_(self.training)

    def grad(self, layout: str) -> Tensor:
        """The gradient of the output, in ``layout``."""
        return self._grad.contiguous(memory_format=LAYOUTS[layout])

    def weights(self) -> list[Tensor]:
        """Fresh copies of core, factor_out, factor_in and bias; leaves."""
        kept = (self.core, self.factor_out, self.factor_in, self.bias)
        return [w.clone().requires_grad_(self.training) for w in kept]

    def dense_weight(self) -> Tensor:
        """``[T, S, kH, kW]``, multiplied in float64 and rounded once."""
        core, factor_out, factor_in = (t.double() for t in (self.core, self.factor_out, self.factor_in))
        inner = torch.einsum("bayx,sa->bsyx", core, factor_in)
        return torch.einsum("tb,bsyx->tsyx", factor_out, inner).to(self.core.dtype).contiguous()

    def errors(self, outputs: Sequence[Tensor]) -> dict[str, float]:
        """Relative L2 distance of each output from the oracle's; outputs come in the order of ``OUTPUTS``."""
        return {
            name: distance(got, want)
            for name, got, want in zip(OUTPUTS, outputs, self.expected, strict=False)
        }

    def fault(self, outputs: Sequence[Tensor], slack: float = 1.0) -> str | None:
        """What is wrong with a candidate's outputs, or None; the limits of its dtype times ``slack`` hold."""
        return exceeded(self.errors(outputs), self.dtype_name, slack)

    def _answer(self) -> list[Tensor]:
        kept = (self._x, self.core, self.factor_out, self.factor_in, self.bias)
        tensors = [t.double().requires_grad_(self.training) for t in kept]
        x, core, factor_out, factor_in, bias = tensors
        y = reference.tucker2_conv2d(x, core, factor_out, factor_in, bias, *self.case.geometry)
        if not self.training:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, tensors, self._grad.double())]


def step(
    forward: Callable[[], Tensor], wanted: Sequence[Tensor], grad: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A training step as a call: the output and the gradients of ``wanted``."""

    def call() -> tuple[Tensor, ...]:
        y = forward()
        return (y.detach(), *torch.autograd.grad(y, wanted, grad))

    return call


def exceeded(errors: Mapping[str, float], dtype: str, slack: float = 1.0) -> str | None:
    """The first error above what its dtype is allowed, in words; "y" is the output, all else gradients."""
    for name, error in errors.items():
        allowed = slack * (FORWARD_TOLERANCE if name == "y" else GRADIENT_TOLERANCE)[dtype]
        if not error <= allowed:
            return f"{name} is {error:.1e} from the oracle (relative L2), allowed {allowed:.0e}"
    return None


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2; infinite where the shape differs."""
    if got.shape != want.shape:
        return float("inf")
    scale = float(want.norm())
    return float((got.double() - want).norm()) / (scale or 1.0)
