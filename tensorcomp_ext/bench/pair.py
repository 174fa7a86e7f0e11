"""The suite of two-factor linear layers: a pair of products with a small rank between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import FactorizedLinear
from ..plan import plans_for, tune
from .candidates import Candidate, Group, compile_call
from .cases import DTYPES, check_keys
from .devices import Device
from .measure import FUSED, OP, STAGED, TUNED, measure_ways, offer, row_head
from .problem import distance, exceeded, step
from .roofline import Probe
from .timing import Effort

LAYOUT = "rows"
LARGE = 4096
"""Rows from which a case counts as large in the summary."""

OUTPUTS = ("y", "grad x", "grad a", "grad b", "grad bias")
_KEYS = ("rows", "in", "out", "rank", "dtype")
_PLANS = {"fused": FUSED, "staged": STAGED}
_TUNE_S = 0.02


@dataclass(frozen=True)
class PairCase:
    """``y = (x b^T) a^T + bias`` with x ``[rows, c_in]``, b ``[rank, c_in]``, a ``[c_out, rank]``.

    ``dtype`` None stands for each one the run asks for.
    """

    rows: int
    c_in: int
    c_out: int
    rank: int
    dtype: str | None = None
    layout: str = LAYOUT

    def macs(self) -> int:
        """``rows rank (c_in + c_out)``."""
        return self.rows * self.rank * (self.c_in + self.c_out)

    def dense_macs(self) -> int:
        """``rows c_in c_out``."""
        return self.rows * self.c_in * self.c_out

    def elements(self) -> tuple[int, int, int]:
        """Elements of the input, of the output, and of weights and bias."""
        weights = self.rank * (self.c_in + self.c_out) + self.c_out
        return self.rows * self.c_in, self.rows * self.c_out, weights

    def label(self) -> str:
        """Such as ``4096x768>3072 r64``."""
        return f"{self.rows}x{self.c_in}>{self.c_out} r{self.rank}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pair_from_dict(row: Mapping[str, Any], where: str = "case") -> PairCase:
    """Build a case from the JSON keys rows, in, out, rank, dtype; all but dtype are required.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    check_keys(row, _KEYS, where)
    for key in _KEYS[:4]:
        value = row.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} must be an int >= 1, got {value!r}")
    if row["rank"] > min(row["in"], row["out"]):
        raise ValueError(f"{where}: rank must be at most {min(row['in'], row['out'])}, got {row['rank']}")
    dtype = row.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return PairCase(row["rows"], row["in"], row["out"], row["rank"], dtype)


_CUDA_CASES = (
    # rows, in, out, ranks: projections of language models and vision transformers, and thin layers
    (1, 4096, 11008, (64, 256)),
    (16, 4096, 11008, (64, 256)),
    (4096, 4096, 11008, (64, 256)),
    (197 * 32, 768, 3072, (32, 64, 128)),
    (197 * 32, 3072, 768, (64,)),
    (197 * 32, 768, 768, (31, 64)),
    (4096, 4096, 4096, (32, 64, 128, 256)),
    (65536, 256, 256, (16, 32)),
    (100352, 64, 256, (16,)),
    (100352, 256, 64, (16,)),
    (16384, 1024, 4096, (64, 128)),
    (16384, 4096, 1024, (64,)),
)
_CPU_CASES = (
    (1, 4096, 4096, (64,)),
    (16, 1024, 4096, (64,)),
    (197, 768, 3072, (31, 64)),
    (197, 768, 768, (31, 64)),
    (1024, 256, 256, (16, 32)),
    (4096, 64, 256, (16,)),
)


def pair_cases(device: str) -> list[PairCase]:
    """The development cases of a kind of device."""
    listed = _CUDA_CASES if device == "cuda" else _CPU_CASES
    return [PairCase(rows, c_in, c_out, rank) for rows, c_in, c_out, ranks in listed for rank in ranks]


def quick_pairs() -> list[PairCase]:
    return [PairCase(1, 64, 96, 8), PairCase(33, 48, 31, 7), PairCase(200, 64, 64, 16)]


def expand_pairs(cases: Iterable[PairCase], dtypes: Sequence[str]) -> list[PairCase]:
    """Each case once for every dtype it leaves open."""
    return [
        replace(case, dtype=dtype) for case in cases for dtype in ([case.dtype] if case.dtype else dtypes)
    ]


class PairProblem:
    """Tensors of one row, of unit scale at every stage, and the float64 answer."""

    def __init__(self, case: PairCase, *, training: bool, device: str = "cpu", seed: int = 0) -> None:
        dtype = DTYPES[case.dtype or "float32"]
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            return (drawn * scale).to(dtype)

        self.case, self.training, self.device = case, training, device
        self._x = draw(case.rows, case.c_in)
        self.a = draw(case.c_out, case.rank, scale=case.rank**-0.5)
        self.b = draw(case.rank, case.c_in, scale=case.c_in**-0.5)
        self.bias = draw(case.c_out, scale=0.1)
        self.grad = draw(case.rows, case.c_out)
        self.expected = self._answer()

    def x(self) -> Tensor:
        return self._x.detach().clone().requires_grad_(self.training)

    def weights(self) -> list[Tensor]:
        """Fresh copies of a, b and bias; leaves."""
        return [w.clone().requires_grad_(self.training) for w in (self.a, self.b, self.bias)]

    def dense_weight(self) -> Tensor:
        """``[c_out, c_in]``, multiplied in float64 and rounded once."""
        return (self.a.double() @ self.b.double()).to(self.a.dtype)

    def fault(self, outputs: Sequence[Tensor], slack: float = 1.0) -> str | None:
        """What is wrong with a candidate's outputs, or None; they come in the order of ``OUTPUTS``."""
        errors = {
            name: distance(got, want)
            for name, got, want in zip(OUTPUTS, outputs, self.expected, strict=False)
        }
        return exceeded(errors, self.case.dtype or "float32", slack)

    def call(self, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> Any:
        """A call on the input: the output alone, or a training step."""
        x = self.x()
        if not self.training:
            return lambda: (forward(x),)
        return step(lambda: forward(x), [x, *parameters], self.grad)

    def _answer(self) -> list[Tensor]:
        kept = (self._x, self.a, self.b, self.bias)
        tensors = [t.double().requires_grad_(self.training) for t in kept]
        x, a, b, bias = tensors
        y = (x @ b.t()) @ a.t() + bias
        if not self.training:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, tensors, self.grad.double())]


class Products(nn.Module):
    """Two library products, the bias in the second."""

    def __init__(self, problem: PairProblem) -> None:
        super().__init__()
        self.a, self.b, self.bias = (nn.Parameter(w.detach().clone()) for w in problem.weights())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.b), self.a, self.bias)


class RebuiltPair(Products):
    """The weight multiplied out at every call, then one product."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.a @ self.b, self.bias)


class DenseLinear(nn.Module):
    """The layer that was decomposed: one product with a kept weight, which is also the merged pair."""

    def __init__(self, problem: PairProblem) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.dense_weight())
        self.bias = nn.Parameter(problem.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def library_ways(problem: PairProblem, compiled: str) -> list[Candidate]:
    """What torch does without us; compiled ones last."""
    ways: list[tuple[str, Group, type[nn.Module]]] = [
        ("stages eager", "stages", Products),
        ("rebuild eager", "rebuild", RebuiltPair),
        ("dense eager", "dense", DenseLinear),
    ]
    found = []
    for name, group, kind in ways:
        found.append(_library(name, group, kind(problem), problem, None))
    if compiled != "never":
        for name, group, kind in (ways[0], ways[2]):
            label = name.replace("eager", "compiled")
            found.append(_library(label, group, kind(problem), problem, False))
    return found


def _library(
    name: str, group: Group, module: nn.Module, problem: PairProblem, frozen: bool | None
) -> Candidate:
    module.requires_grad_(problem.training)
    forward = module if frozen is None else compile_call(module, frozen=frozen)
    call = problem.call(forward, list(module.parameters()))
    found = Candidate(name, group, LAYOUT, call, frozen is not None)
    if group == "dense":
        found.to_factors = lambda outputs: outputs[:2]
    return found


def build_linear(problem: PairProblem, plan: str | None) -> FactorizedLinear:
    """A ``FactorizedLinear`` holding the problem's factors, held to ``plan``; None lets it choose."""
    case = problem.case
    # Weights born under inference mode have no version and would be prepared again at every call.
    with torch.inference_mode(False), torch.no_grad():
        layer = FactorizedLinear(
            case.c_in,
            case.c_out,
            device=torch.device(problem.device),
            dtype=problem.a.dtype,
            format="svd",
            rank=case.rank,
        )
        parameters = dict(layer.named_parameters())
        for name, value in zip(("weight.a", "weight.b", "bias"), problem.weights(), strict=True):
            parameters[name].copy_(value)
    layer.plan = plan
    layer.train(problem.training)
    layer.requires_grad_(problem.training)
    return layer


def our_ways(problem: PairProblem) -> list[Candidate]:
    """The layer on each plan there is, the functional op where there is one, and the layer after ``tune``."""
    names = [plan.name for plan in plans_for(build_linear(problem, None))]

    def held(label: str, plan: str) -> Candidate:
        layer = build_linear(problem, plan)
        return Candidate(label, "ours", LAYOUT, problem.call(layer, _parameters(layer)))

    def tuned() -> Candidate:
        layer = build_linear(problem, None)
        with torch.inference_mode(False):
            example = problem.x().detach().clone()
            options = {"training": problem.training, "cuda_graphs": problem.device == "cuda"}
            result = tune(layer, example, min_seconds=_TUNE_S, **options)  # type: ignore[arg-type]
        found = Candidate(TUNED, "ours", LAYOUT, problem.call(layer, _parameters(layer)))
        found.note = result.layers[0].choice if result.layers else None
        return found

    found = [
        offer(label, "ours", LAYOUT, lambda label=label, plan=plan: held(label, plan))  # type: ignore[misc]
        for plan, label in _PLANS.items()
        if plan in names
    ]
    op = getattr(ops, "two_factor_linear", None)
    if op is not None:
        a, b, bias = problem.weights()
        call = problem.call(lambda x: op(x, a, b, bias), [a, b, bias])
        found.append(Candidate(OP, "ours", LAYOUT, call))
    found.append(offer(TUNED, "ours", LAYOUT, tuned))
    return found


def _parameters(layer: FactorizedLinear) -> list[Tensor]:
    named = dict(layer.named_parameters())
    return [named[name] for name in ("weight.a", "weight.b", "bias")]


def measure_pair(
    case: PairCase,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types, with everything :func:`measure.outcome` gives."""
    problem = PairProblem(case, training=direction == "backward", device=device.name)
    return measure_ways(
        problem,
        lambda: our_ways(problem) + library_ways(problem, compiled),
        row_head(case, direction, threads, device, large=case.rows >= LARGE),
        device=device,
        effort=effort,
        probe=probe,
    )
