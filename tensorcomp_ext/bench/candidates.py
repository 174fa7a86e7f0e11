"""What is measured against what: ours, and the strongest ways torch alone has to compute the same
convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .cases import LAYOUTS, Case
from .problem import Problem, step

Group = Literal["ours", "stages", "rebuild", "dense", "part"]
"""Who computes a row; a part of it, which is compared with nothing, shows what bounds the others."""
Call = Callable[[], tuple[Tensor, ...]]

COMPILED = ("best", "never", "always")


@dataclass
class Candidate:
    """One way to compute the row: the output, in training also the gradients of input and weights.

    ``layout`` is that of the input it is handed, ready in memory: no candidate pays for a conversion.
    """

    name: str
    group: Group
    layout: str
    call: Call
    compiled: bool = False
    graph: bool = True
    """Whether CUDA measures it captured in a graph; False: as a user's program calls it."""
    note: str | None = None
    """The plan it runs, where that was chosen."""
    macs: int | None = None
    """Multiply-adds of that plan."""
    to_factors: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda outputs: outputs
    """Brings what ``call`` returns into the order of ``problem.OUTPUTS``, outside the timed part."""


class Stages(nn.Module):
    """The three library convolutions: pointwise, spatial core, pointwise with the bias."""

    def __init__(self, problem: Problem, layout: str) -> None:
        super().__init__()
        case = problem.case
        core, factor_out, factor_in, bias = (w.detach() for w in problem.weights())
        form = LAYOUTS[layout]
        self.first = nn.Parameter(factor_in.t()[:, :, None, None].contiguous(memory_format=form))
        self.core = nn.Parameter(core.contiguous(memory_format=form))
        self.last = nn.Parameter(factor_out[:, :, None, None].contiguous(memory_format=form))
        self.bias = nn.Parameter(bias)
        self.window = _window(case)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.conv2d(x, self.first)  # [N, R_in, H, W]
        v = torch.conv2d(z, self.core, None, *self.window)  # [N, R_out, H', W']
        return torch.conv2d(v, self.last, self.bias)  # [N, T, H', W']


class MatmulStages(Stages):
    """The same with the pointwise stages as matrix products over channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x.permute(0, 2, 3, 1), self.first[:, :, 0, 0])  # [N, H, W, R_in]
        v = torch.conv2d(z.permute(0, 3, 1, 2), self.core, None, *self.window)
        y = nn.functional.linear(v.permute(0, 2, 3, 1), self.last[:, :, 0, 0], self.bias)
        return y.permute(0, 3, 1, 2)


class Dense(nn.Module):
    """The convolution that was decomposed, its weight held dense."""

    def __init__(self, problem: Problem, layout: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.dense_weight().contiguous(memory_format=LAYOUTS[layout]))
        self.bias = nn.Parameter(problem.bias.clone())
        self.window = _window(problem.case)

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, self.bias, *self.window)


class Rebuild(nn.Module):
    """The dense weight multiplied out from the factors at every call, then one dense convolution."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        core, factor_out, factor_in, bias = (w.detach() for w in problem.weights())
        self.core, self.factor_out = nn.Parameter(core), nn.Parameter(factor_out)
        self.factor_in, self.bias = nn.Parameter(factor_in), nn.Parameter(bias)
        self.window = _window(problem.case)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.einsum("bayx,sa->bsyx", self.core, self.factor_in)
        weight = torch.einsum("tb,bsyx->tsyx", self.factor_out, inner)
        return torch.conv2d(x, weight, self.bias, *self.window)


def _window(case: Case) -> tuple[Any, Any, Any]:
    return case.stride, case.padding, case.dilation


def _layouts(problem: Problem) -> tuple[str, ...]:
    """The given layout, and channels-last, which torch's CPU convolutions like best."""
    return (problem.layout,) if problem.layout == "nhwc" else (problem.layout, "nhwc")


def _call(
    module: nn.Module, problem: Problem, layout: str, run: Callable[[Tensor], Tensor] | None = None
) -> Call:
    """A call on the problem's input: the output alone, or a training step."""
    forward = run or module.forward
    x = problem.x(layout)
    if not problem.training:
        module.requires_grad_(False)
        return lambda: (forward(x),)
    return step(lambda: forward(x), [x, *module.parameters()], problem.grad(layout))


def _stage_gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if len(outputs) == 1:
        return outputs
    y, x, first, core, last, bias = outputs
    return y, x, core, last[:, :, 0, 0], first[:, :, 0, 0].t(), bias


def _dense_gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of a dense weight is computed, as its training needs it, and compared with nothing."""
    return outputs[:2]


def _candidate(
    name: str, group: Group, module: nn.Module, problem: Problem, layout: str, *, frozen: bool | None = None
) -> Candidate:
    run = None if frozen is None else compile_call(module, frozen=frozen)
    translate = {"stages": _stage_gradients, "dense": _dense_gradients}
    found = Candidate(
        f"{name} {layout}", group, layout, _call(module, problem, layout, run), frozen is not None
    )
    if group in translate:
        found.to_factors = translate[group]
    return found


def compile_call(module: nn.Module, *, frozen: bool) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` with static shapes; ``frozen`` folds the weights in and prepacks them (inference
    only)."""
    # Imported here: it takes a second and pulls in the compiler, which `--compiled never` has no use for.
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    compiled = torch.compile(module, dynamic=False)

    def first(x: Tensor) -> Tensor:
        # The thread count is written into the code, but is no part of the caches' key.
        with (
            inductor.patch({"freezing": frozen, "fx_graph_cache": False}),
            functorch.patch({"enable_autograd_cache": False}),
        ):
            return compiled(x)

    return _FirstCall(first, compiled)


class _FirstCall:
    """Calls ``first`` once and ``later`` from then on."""

    def __init__(self, first: Callable[[Tensor], Tensor], later: Callable[[Tensor], Tensor]) -> None:
        self._call, self._later = first, later

    def __call__(self, x: Tensor) -> Tensor:
        y = self._call(x)
        self._call = self._later
        return y


def library_candidates(problem: Problem) -> list[Candidate]:
    """Everything torch does without us and without the compiler."""
    found = []
    for layout in _layouts(problem):
        found.append(_candidate("stages eager", "stages", Stages(problem, layout), problem, layout))
        found.append(_candidate("dense eager", "dense", Dense(problem, layout), problem, layout))
    found.append(_candidate("stages matmul", "stages", MatmulStages(problem, "nhwc"), problem, "nhwc"))
    found.append(_candidate("rebuild eager", "rebuild", Rebuild(problem), problem, problem.layout))
    return found


def compiled_candidates(
    problem: Problem, stage_layouts: list[str], dense_layouts: list[str]
) -> list[Candidate]:
    """The compiled ones, not yet compiled: that happens at the first call.

    For inference the stages are compiled plainly and frozen; the dense convolution, one library call either
    way, frozen only.
    """
    found = []
    for layout in stage_layouts:
        for frozen in (False,) if problem.training else (False, True):
            name = "stages frozen" if frozen else "stages compiled"
            found.append(_candidate(name, "stages", Stages(problem, layout), problem, layout, frozen=frozen))
    for layout in dense_layouts:
        name = "dense compiled" if problem.training else "dense frozen"
        module = Dense(problem, layout)
        found.append(_candidate(name, "dense", module, problem, layout, frozen=not problem.training))
    return found
