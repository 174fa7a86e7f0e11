"""What a plan is, and the registry of plans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from ..ops import Support
from .case import Case
from .geometry import Bound, FoldedBound
from .training import TrainingCall

if TYPE_CHECKING:
    from .layer import PlannedLayer

_PLANS: dict[str, Plan] = {}


class Stage(NamedTuple):
    """One pass of a plan over the data, for the cost model."""

    kind: str
    """Which measured rate applies: "conv", "depthwise", "pointwise", "linear", or of our kernels "fused",
    "pair" (a two-factor product), "chain" (other chains of products), "sparse" (a packed sparse matrix) or
    "partial" (a convolution from rank space on)."""
    macs: int
    width: int
    """The narrower of the two channel counts the pass works on."""
    elements: int
    """Numbers read and written."""
    calls: int = 1
    """Calls it takes: 0 where the kernel of the stage before goes on."""
    inner: int = 0
    """Numbers read and written that never leave the cache."""


class Plan(ABC):
    """One way of executing a factorized layer. Plans are stateless; what they cache lies with the layer."""

    name: ClassVar[str]
    own_kernels: ClassVar[bool] = False
    """Whether kernels of this package run in it, not the library's alone."""

    @abstractmethod
    def serves(self, layer: PlannedLayer) -> bool:
        """Whether the plan is a candidate for this type of layer and format at all."""

    def support(self, layer: PlannedLayer, case: Case) -> Support:
        """Whether it can run this case here, and why not."""
        return Support(True)

    def same_as(self, layer: PlannedLayer, case: Case) -> str:
        """Why this plan would only repeat an earlier one for this case; empty where it does not.

        Such a plan is not offered, though it runs where it is forced.
        """
        return ""

    def program(self, layer: PlannedLayer, case: Case) -> str:
        """What it does with this case, for people, where the name alone does not say: "x·G5·(G3 G4)"."""
        return ""

    @abstractmethod
    def stages(self, layer: PlannedLayer, case: Case) -> list[Stage]:
        """The passes of one forward call."""

    @abstractmethod
    def run(self, layer: PlannedLayer, x: Tensor) -> Tensor:
        """The layer's output, differentiable, nothing cached; torch.compile traces this."""

    @abstractmethod
    def bind(self, layer: PlannedLayer, case: Case) -> Bound:
        """The layer for inference, weights prepared (through ``layer.prepared``) in the dtype of ``case``."""

    def bind_folded(self, layer: PlannedLayer, case: Case, relu: bool) -> FoldedBound | None:
        """:meth:`bind` with a second tensor added and the sum rectified as it is stored.

        None where the plan has no kernel that does so.
        """
        return None

    def bind_training(self, layer: PlannedLayer, case: Case) -> TrainingCall:
        """:meth:`run` for checked inputs like ``case``; it reads the layer's factors at each call."""
        return self.run

    def backward_factor(self, layer: PlannedLayer) -> float:
        """Time of forward and backward over that of forward alone."""
        return 3.0


PlanClass = TypeVar("PlanClass", bound=type[Plan])


def register_plan(name: str) -> Callable[[PlanClass], PlanClass]:
    """Class decorator that makes a plan known under ``name``."""

    def register(cls: PlanClass) -> PlanClass:
        if name in _PLANS:
            raise ValueError(f"register_plan: {name!r} is taken by {type(_PLANS[name]).__qualname__}")
        cls.name = name
        _PLANS[name] = cls()
        return cls

    return register


def get_plan(name: str) -> Plan:
    """The plan registered under ``name``.

    Raises:
        ValueError: unknown name, with the names there are.
    """
    if name not in _PLANS:
        raise ValueError(f"plan must be one of {sorted(_PLANS)}, got {name!r}")
    return _PLANS[name]


def offered(plan: Plan, layer: PlannedLayer, case: Case) -> Support:
    """Whether a plan is worth a choice for this case: it can run it, and no earlier plan does the same."""
    support = plan.support(layer, case)
    reason = plan.same_as(layer, case) if support.ok else ""
    return Support(False, reason) if reason else support


def plans_for(layer: PlannedLayer) -> list[Plan]:
    """The plans that are candidates for a layer, dense first."""
    return [plan for plan in _PLANS.values() if plan.serves(layer)]


@dataclass(frozen=True)
class Candidate:
    """One plan for one layer and one kind of input."""

    name: str
    macs: int
    """Multiply-adds of one forward call under this plan."""
    bytes: int
    """Bytes read and written by one forward call, intermediates included."""
    predicted: float
    """Seconds by the cost model (forward, or forward and backward when training)."""
    measured: float | None
    """Median seconds measured by ``tune``; None where it was not measured."""
    available: Support
    chosen: bool
    reason: str
    """Why it was chosen, or why it lost."""
    program: str = ""
    """The order of products: "x·G5·(G3 G4)" for an input that meets core 5, then cores 3 and 4 merged."""

    def to_dict(self) -> dict[str, Any]:
        """The candidate in JSON types."""
        return {**asdict(self), "available": self.available.ok, "reason": self.reason}
