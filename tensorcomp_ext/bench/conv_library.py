"""What torch does with CP and tensor-ring convolutions without us: stages, rebuild, dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import Candidate, Group, compile_call
from .cases import LAYOUTS
from .conv_problem import ConvProblem


class Stages(nn.Module, ABC):
    """Pointwise, spatial core, pointwise with the bias, as library convolutions.

    The kernels of the stages are made of the factors: once for inference, at every call in training.
    """

    def __init__(self, problem: ConvProblem, layout: str) -> None:
        super().__init__()
        case = problem.case
        self.kernel, self.rank = case.window.kernel, case.rank
        self.window: tuple[Any, Any, Any] = (case.stride, case.padding, case.dilation)
        *factors, bias = (w.detach() for w in problem.weights())
        self.training_step = problem.training
        if not problem.training:
            factors = [w.contiguous(memory_format=LAYOUTS[layout]) for w in self.kernels(factors)]
        self.held = nn.ParameterList(nn.Parameter(w) for w in factors)
        self.bias = nn.Parameter(bias)

    @abstractmethod
    def kernels(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The kernels of the stages."""

    @abstractmethod
    def run(self, x: Tensor, first: Tensor, core: Sequence[Tensor], last: Tensor) -> Tensor:
        """The stages themselves."""

    def forward(self, x: Tensor) -> Tensor:
        held = self.kernels(list(self.held)) if self.training_step else list(self.held)
        first, *core, last = held
        return self.run(x, first, core, last)


class _Ring(Stages):
    def kernels(self, factors: Sequence[Tensor]) -> list[Tensor]:
        core_in, core_spatial, core_out = factors
        channels = core_in.shape[1]
        first = core_in.permute(0, 2, 1).reshape(-1, channels, 1, 1)  # [R0 Ra, S, 1, 1]
        core = core_spatial.permute(2, 0, 1).unflatten(2, self.kernel)  # [Rb, Ra, kH, kW]
        last = core_out.permute(1, 2, 0).reshape(core_out.shape[1], -1, 1, 1)  # [T, R0 Rb, 1, 1]
        return [first, self.spatial(core), last]

    def spatial(self, core: Tensor) -> Tensor:
        return core


class FoldedRing(_Ring):
    """The ring index folded into the batch for the spatial stage."""

    def run(self, x: Tensor, first: Tensor, core: Sequence[Tensor], last: Tensor) -> Tensor:
        images, rank = x.shape[0], self.rank
        z = torch.conv2d(x, first)
        z = z.reshape(images * rank, rank, *z.shape[2:])
        v = torch.conv2d(z, core[0], None, *self.window)
        return torch.conv2d(v.reshape(images, rank * rank, *v.shape[2:]), last, self.bias)


class GroupedRing(_Ring):
    """The spatial stage as a grouped convolution, its core repeated for every ring index."""

    def spatial(self, core: Tensor) -> Tensor:
        return core.repeat(self.rank, 1, 1, 1)

    def run(self, x: Tensor, first: Tensor, core: Sequence[Tensor], last: Tensor) -> Tensor:
        v = torch.conv2d(torch.conv2d(x, first), core[0], None, *self.window, groups=self.rank)
        return torch.conv2d(v, last, self.bias)


class Depthwise(Stages):
    """CP with the factors of the window merged to one depthwise kernel."""

    def kernels(self, factors: Sequence[Tensor]) -> list[Tensor]:
        out, channels, rows, columns = factors
        core = torch.einsum("yr,xr->ryx", rows, columns).unsqueeze(1)
        return [channels.t()[:, :, None, None], core, out[:, :, None, None]]

    def run(self, x: Tensor, first: Tensor, core: Sequence[Tensor], last: Tensor) -> Tensor:
        v = torch.conv2d(torch.conv2d(x, first), core[0], None, *self.window, groups=self.rank)
        return torch.conv2d(v, last, self.bias)


class Separable(Stages):
    """CP with a vertical and a horizontal depthwise convolution."""

    def kernels(self, factors: Sequence[Tensor]) -> list[Tensor]:
        out, channels, rows, columns = factors
        vertical, horizontal = rows.t()[:, None, :, None], columns.t()[:, None, None, :]
        return [channels.t()[:, :, None, None], vertical, horizontal, out[:, :, None, None]]

    def run(self, x: Tensor, first: Tensor, core: Sequence[Tensor], last: Tensor) -> Tensor:
        z = torch.conv2d(x, first)
        for axis, kernel in enumerate(core):
            z = torch.conv2d(z, kernel, None, *_along(axis, *self.window), groups=self.rank)
        return torch.conv2d(z, last, self.bias)


def _along(axis: int, stride: Any, padding: Any, dilation: Any) -> tuple[Any, Any, Any]:
    """A window's options for one of its axes alone."""

    def only(value: Any, neutral: int) -> Any:
        if isinstance(value, str):
            return value
        pair = (value, value) if isinstance(value, int) else value
        return (pair[0], neutral) if axis == 0 else (neutral, pair[1])

    return only(stride, 1), only(padding, 0), only(dilation, 1)


class Rebuild(nn.Module):
    """The dense weight multiplied out from the factors at every call, then one dense convolution."""

    def __init__(self, problem: ConvProblem, layout: str) -> None:
        super().__init__()
        *factors, bias = (nn.Parameter(w.detach()) for w in problem.weights())
        self.held, self.bias = nn.ParameterList(factors), bias
        self.multiply = problem.multiply
        case = problem.case
        self.window: tuple[Any, Any, Any] = (case.stride, case.padding, case.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.multiply(list(self.held)), self.bias, *self.window)


class Dense(nn.Module):
    """The convolution that was decomposed."""

    def __init__(self, problem: ConvProblem, layout: str) -> None:
        super().__init__()
        self.held = nn.Parameter(problem.dense_weight().contiguous(memory_format=LAYOUTS[layout]))
        self.bias = nn.Parameter(problem.bias.clone())
        case = problem.case
        self.window: tuple[Any, Any, Any] = (case.stride, case.padding, case.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.held, self.bias, *self.window)


_STAGES: dict[str, dict[str, type[Stages]]] = {
    "tr": {"stages folded": FoldedRing, "stages grouped": GroupedRing},
    "cp": {"stages depthwise": Depthwise, "stages separable": Separable},
}


def library_ways(problem: ConvProblem, compiled: str) -> list[Candidate]:
    """Everything torch does without us; compiled ones last, in channels-last and, with "always", as given."""
    layouts = [problem.layout] if problem.layout == "nhwc" else [problem.layout, "nhwc"]
    stages = _STAGES[problem.case.format]
    found = []
    for layout in layouts:
        for name, kind in stages.items():
            found.append(_candidate(f"{name} {layout}", "stages", kind(problem, layout), problem, layout))
        found.append(_candidate(f"dense eager {layout}", "dense", Dense(problem, layout), problem, layout))
    layout = problem.layout
    found.append(_candidate("rebuild eager", "rebuild", Rebuild(problem, layout), problem, layout))
    if compiled == "never":
        return found
    for layout in layouts if compiled == "always" else ["nhwc"]:
        frozen = not problem.training
        text = "frozen" if frozen else "compiled"
        for name, kind in stages.items():
            module = kind(problem, layout)
            found.append(_candidate(f"{name} {text} {layout}", "stages", module, problem, layout, frozen))
        dense = Dense(problem, layout)
        found.append(_candidate(f"dense {text} {layout}", "dense", dense, problem, layout, frozen))
    return found


def _candidate(
    name: str,
    group: Group,
    module: nn.Module,
    problem: ConvProblem,
    layout: str,
    frozen: bool | None = None,
) -> Candidate:
    module.requires_grad_(problem.training)
    forward = module if frozen is None else compile_call(module, frozen=frozen)
    named = dict(module.named_parameters())
    bias = named.pop("bias")
    call = problem.call(layout, forward, [*named.values(), bias])
    found = Candidate(name, group, layout, call, frozen is not None)
    if group == "dense":
        found.to_factors = lambda outputs: outputs[:2]
    return found
