"""The part of a factorized layer that decides how a call is executed, and does it with little overhead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import is_tensor_like

from ..formats import Format
from ..formats.base import PLAIN as _PLAIN
from ..ops._transforms import transformed
from .base import Plan, get_plan, plans_for
from .case import Case, autocast_dtype
from .geometry import Bound, Geometry
from .memory_format import CHANNELS_LAST, memory_layout
from .precision import autocast_off, tf32_state
from .state import Prepared
from .training import Trained

if TYPE_CHECKING:
    from .candidates import CandidateList
    from .networks import Found

_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled
_get_autocast_dtype = torch.get_autocast_dtype
_get_num_threads = torch.get_num_threads
_TRAINED_LIMIT = 256


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What a call must share with another one to be run by the same bound function."""
    if x.is_cpu:
        low = _get_autocast_dtype("cpu") if _is_autocast_enabled("cpu") else None
        return x.shape, x.stride(), x.dtype, _get_num_threads(), low
    device = x.device
    kind = device.type
    return (
        x.shape,
        x.stride(),
        x.dtype,
        _get_num_threads(),
        autocast_dtype(kind),
        device,
        tf32_state(kind),
    )


class PlannedLayer(nn.Module, ABC):
    """A layer whose weight is a format and whose execution is a plan.

    Calls go through bound functions kept per kind of input. Without gradients these have weights prepared
    once, and a change of the factors is noticed by their version counters; with gradients they read the
    factors at each call. Under torch.compile, in torch.func transforms and forward-mode AD, or with tensor
    subclasses the plan's functional form runs and nothing is kept.

    A CUDA graph reads weights prepared before its capture where they lie: after a change of the factors,
    ``train()``, ``eval()``, ``to()`` or ``clear_cache()`` it must be captured again. Without such weights it
    prepares its own at every replay.
    """

    weight: Format
    bias: nn.Parameter | None
    geometry: Geometry

    def __init__(self) -> None:
        super().__init__()
        self._forced: str | None = None
        self._prefer = "latency"
        self.channels_last = False
        """Whether a convolution answers in channels-last whatever its input, as torch.nn's do after
        ``.to(memory_format=torch.channels_last)``."""
        self.tuned: dict[str, dict[str, Any]] = {}
        """Measured choices: ``{str(case): {"plan": name, "seconds": {name: median}}}``, in JSON types."""
        self._forget()

    # --- what users set ------------------------------------------------------------------------------------

    @property
    def plan(self) -> str | None:
        """Name of the plan that every call must use, or None: chosen by measurement or cost model."""
        return self._forced

    @plan.setter
    def plan(self, name: str | None) -> None:
        known = [plan.name for plan in plans_for(self)]
        if name is not None and name not in known:
            raise ValueError(f"{type(self).__name__}: plan must be None or one of {known}, got {name!r}")
        self._forced = name
        self._forget()

    @property
    def prefer(self) -> str:
        """ "latency", or "memory": never keep a dense copy of the weight."""
        return self._prefer

    @prefer.setter
    def prefer(self, policy: Literal["latency", "memory"]) -> None:
        if policy not in ("latency", "memory"):
            raise ValueError(f"{type(self).__name__}: prefer must be 'latency' or 'memory', got {policy!r}")
        self._prefer = policy
        self._forget()

    def plans(self, x: Tensor, *, training: bool | None = None) -> CandidateList:
        """The candidates for an input like ``x``, with predicted and measured seconds, the chosen one marked.

        A list, the chosen one first; printed, a table.

        Args:
            training: list for calls with gradients; None: as a call now would be.

        Raises:
            ValueError, TypeError: an input that the layer does not take.
        """
        from .select import candidates

        batched = self.as_batch(x)
        self.check_input(batched)
        return candidates(self, self.case(batched, training))

    def clear_cache(self) -> None:
        """Drop prepared weights; needed after a write through ``Tensor.data`` between inference calls."""
        self._prepared: Prepared | None = None
        self._chosen: dict[tuple[Any, ...], Plan] = {}
        self._trained: dict[tuple[Any, ...], Trained] = {}

    def choices_changed(self) -> None:
        """Take notice of a change of ``tuned``."""
        self._forget()

    # --- the call ------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        x = input  # named as in torch.nn, for calls by keyword
        # Every microsecond here is paid by every call: one key, one look-up, one check of the factors.
        if not _is_compiling() and type(x) in _PLAIN and not transformed() and _tracing_state() is None:
            if _is_grad_enabled():
                trained = self._trained.get(_kind(x))
                if trained is not None and trained.fits(self, x):
                    return trained.call(self, x)
            elif (prepared := self._prepared) is not None:
                bound = prepared.bound.get(_kind(x))
                if (
                    bound is not None
                    and "bias" in self._parameters
                    and prepared.fresh(self._modules["weight"])
                ):
                    return bound(x, self._parameters["bias"])
        return self._dispatch(x)

    def _dispatch(self, x: Tensor) -> Tensor:
        if not is_tensor_like(x):  # which subclasses are, and what traces for torch.fx
            name = type(self).__name__
            raise TypeError(f"{name}: x must be a tensor {self.input_form}, got {type(x).__name__}")
        traces = _is_compiling() or _tracing_state() is not None
        if traces or type(x) not in _PLAIN or x.device.type == "meta" or transformed():
            return self._traced(x)
        batched = self.as_batch(x)
        if batched is not x:
            y = self.forward(batched)
            return y if batched.dim() == x.dim() else y.squeeze(0)
        self.check_input(x)
        key = _kind(x)
        if self._needs_gradients(x):
            plan = self._choose(x, (*key, True))
            y = plan.run(self, x)
            self._keep_trained(key, plan, x)
            return y
        prepared = self._renewed()
        if prepared is None:
            return self._choose(x, (*key, False)).run(self, x)
        bound = prepared.bound.get(key)
        if bound is None:
            bound = self.executor(self._choose(x, (*key, False)), x)
            prepared.keep(key, bound)
        return bound(x, self.bias)

    def _traced(self, x: Tensor) -> Tensor:
        """The functional form: for torch.compile, export, jit.trace, function transforms and subclasses."""
        batched = self.as_batch(x)
        if _tracing_state() is None:
            y = get_plan(self._traced_plans[int(_is_grad_enabled())]).run(self, batched)
        else:
            # jit.trace records ops, which have gradients of their own; the functions around them it cannot.
            with torch.no_grad():
                y = get_plan(self._traced_plans[0]).run(self, batched)
        return y if batched is x or batched.dim() == x.dim() else y.squeeze(0)

    def _keep_trained(self, key: tuple[Any, ...], plan: Plan, x: Tensor) -> None:
        """Bind the training call that just went through, where every parameter is a plain one."""
        tensors = (table.get(name) for table, names in self.weight.tables() for name in names)
        if "bias" not in self._parameters or any(type(t) not in _PLAIN for t in tensors):
            return
        if len(self._trained) >= _TRAINED_LIMIT:
            self._trained.clear()
        self._trained[key] = Trained(plan.bind_training(self, self.case(x, training=True)), self)

    def _choose(self, x: Tensor, key: tuple[Any, ...]) -> Plan:
        plan = self._chosen.get(key)
        if plan is None:
            from .select import choose

            plan = choose(self, self.case(x, key[-1]))
            if len(self._chosen) >= 1024:
                self._chosen.clear()
            self._chosen[key] = plan
        return plan

    def executor(self, plan: Plan, x: Tensor) -> Bound:
        """The bound inference call of ``plan`` for inputs like ``x``."""
        case = self.case(x, training=False)
        bound = plan.bind(self, case)
        dtype = case.torch_dtype
        if not _is_autocast_enabled(x.device.type) or not x.is_floating_point():
            return bound
        # Under autocast x may have the computing dtype already, from a layer before, and the bias another.
        return lambda x, bias: bound(x.to(dtype), None if bias is None else bias.to(dtype))

    def case(self, x: Tensor, training: bool | None = None) -> Case:
        """The kind of call that ``x`` makes."""
        dtype, device = x.dtype, x.device.type
        if not dtype.is_floating_point:
            dtype = self.weight.factors[0].dtype  # of the rows that indices stand for; autocast leaves it
        elif dtype != torch.float64:
            dtype = autocast_dtype(device) or dtype
        allowed = tf32_state(device)
        return Case(
            tuple(x.shape),
            str(dtype).removeprefix("torch."),
            memory_layout(x),
            device,
            self._needs_gradients(x) if training is None else training,
            _get_num_threads(),
            self._prefer,
            dtype == torch.float32 and (allowed.convolutions if self.geometry.spatial else allowed.products),
        )

    def prepared(
        self, plan: str, dtype: torch.dtype, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Weights of a plan, made once a state of the factors.

        Made at every call where states look alike, or where a CUDA graph captures them.
        """
        state = self._renewed()
        if state is None:
            with torch.no_grad(), autocast_off(self.weight.factors[0].device.type):
                return make()
        return state.prepare(plan, dtype, make)

    # --- for subclasses ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def input_form(self) -> str:
        """Sizes of an input as messages name them, such as "[N, 3, H, W]"."""

    @abstractmethod
    def check_input(self, x: Tensor) -> None:
        """Raise ``ValueError`` or ``TypeError`` naming what was expected of ``x``."""

    def as_batch(self, x: Tensor) -> Tensor:
        """``x`` with a batch dimension, in the memory format of the layer."""
        return x

    # --- state ---------------------------------------------------------------------------------------------

    def _needs_gradients(self, x: Tensor) -> bool:
        if not _is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad for p in self.parameters())

    def _renewed(self) -> Prepared | None:
        """The prepared state of the factors as they are now; None where a change could not be noticed."""
        state = self._prepared
        if state is not None and state.fresh(self.weight):
            return state
        self._prepared, self._chosen = Prepared.of(self.weight), {}
        return self._prepared

    def _forget(self) -> None:
        """Drop everything derived from factors, tuned choices and settings."""
        self.clear_cache()
        self._traced_plans: tuple[str, ...] = ()
        self.traced_found: Found | None = None
        if "weight" in self._modules:
            from .networks import traced_found
            from .select import traced_plan

            self.traced_found = traced_found(self)
            self._traced_plans = traced_plan(self, training=False), traced_plan(self, training=True)

    def train(self, mode: bool = True) -> PlannedLayer:
        self.clear_cache()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PlannedLayer:
        super()._apply(fn, recurse)
        self._forget()
        self.channels_last = self._converted(fn)
        return self

    def _converted(self, fn: Callable[..., Any]) -> bool:
        """Whether the layer is channels-last after ``fn``, as ``.to(memory_format=…)`` applies to parameters.

        Factors need not have the dense weight's dimensions; a tensor that does shows what becomes of it.
        """
        last = CHANNELS_LAST.get(self.geometry.spatial + 2) if self.geometry.spatial else None
        if last is None:
            return False
        shape = (2,) * (self.geometry.spatial + 2)
        factor = self.weight.factors[0]
        probe = torch.empty(shape, dtype=factor.dtype, device=factor.device)
        if self.channels_last:
            probe = probe.contiguous(memory_format=last)
        probe = fn(probe)
        return isinstance(probe, Tensor) and probe.is_contiguous(memory_format=last)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_chosen": {}, "_trained": {}}

    def _replicate_for_data_parallel(self) -> PlannedLayer:
        replica = super()._replicate_for_data_parallel()
        replica.clear_cache()
        return replica
