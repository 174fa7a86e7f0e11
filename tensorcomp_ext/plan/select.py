"""Which plan runs a case: what was forced, else what was measured, else what the cost model says."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from ..ops import Support
from .agree import TRIED_DEVICES
from .base import Candidate, Plan, get_plan, offered, plans_for
from .candidates import CandidateList
from .case import Case
from .cost import predict
from .embedding import lookup
from .networks import is_network

if TYPE_CHECKING:
    from .layer import PlannedLayer


def tuned_entry(layer: PlannedLayer, case: Case) -> tuple[str, bool] | None:
    """The tuned plan for a case and whether it was measured for exactly this case.

    A batch that was never tuned takes the choice of the nearest tuned batch of the same sizes.
    """
    exact = layer.tuned.get(str(case))
    if exact is not None:
        return exact["plan"], True
    nearest: tuple[float, str] | None = None
    for text, entry in layer.tuned.items():
        distance = case.distance(Case.parse(text), layer.geometry.spatial)
        if distance is not None and (nearest is None or distance < nearest[0]):
            nearest = distance, entry["plan"]
    return None if nearest is None else (nearest[1], False)


def choose(layer: PlannedLayer, case: Case) -> Plan:
    """The plan a call runs.

    Raises:
        ValueError: the forced plan cannot serve this case, with the reason.
    """
    if layer.plan is not None:
        plan = get_plan(layer.plan)
        support = plan.support(layer, case)
        if not support.ok:
            raise ValueError(f"{type(layer).__name__}: plan {plan.name!r} cannot serve: {support.reason}")
        return plan
    able = [plan for plan in plans_for(layer) if offered(plan, layer, case).ok]
    tuned = tuned_entry(layer, case)
    if tuned is not None:
        for plan in able:
            if plan.name == tuned[0]:
                return plan
    tried = [plan for plan in able if not _untried(plan, case.device)]
    return min(tried, key=lambda plan: predict(plan, layer, case))


def _untried(plan: Plan, device: str) -> bool:
    """Whether a plan's kernels have yet to be compared with the library on a type of device."""
    return plan.own_kernels and device not in TRIED_DEVICES


def candidates(layer: PlannedLayer, case: Case) -> CandidateList:
    """Every candidate for a case, fastest known first."""
    plans = plans_for(layer)
    forced = layer.plan
    supports = {
        p.name: p.support(layer, case) if p.name == forced else offered(p, layer, case) for p in plans
    }
    chosen = forced if forced is not None and not supports[forced].ok else choose(layer, case).name
    tuned = tuned_entry(layer, case)
    medians: dict[str, float] = layer.tuned.get(str(case), {}).get("seconds", {})
    predicted = {plan.name: predict(plan, layer, case) for plan in plans}
    size = torch.empty((), dtype=case.torch_dtype).element_size()
    found = []
    for plan in plans:
        stages = plan.stages(layer, case)
        name = plan.name
        found.append(
            Candidate(
                name=name,
                macs=sum(stage.macs for stage in stages),
                bytes=size * sum(stage.elements for stage in stages),
                predicted=predicted[name],
                measured=medians.get(name),
                available=supports[name],
                chosen=name == chosen,
                reason=_reason(name, chosen, forced, tuned, supports[name], medians, predicted)
                if name in medians
                or forced is not None
                or not supports[name].ok
                or not _untried(plan, case.device)
                else "tune compares its results with the library's before it is chosen here",
                program=plan.program(layer, case),
            )
        )
    return CandidateList(
        sorted(found, key=lambda c: (not c.chosen, not c.available.ok, c.measured or c.predicted))
    )


def _reason(
    name: str,
    chosen: str,
    forced: str | None,
    tuned: tuple[str, bool] | None,
    support: Support,
    medians: dict[str, float],
    predicted: dict[str, float],
) -> str:
    if not support.ok:
        return support.reason
    if forced is not None:
        return "set by the user" if name == chosen else f"the user set plan = {chosen!r}"
    if name in medians and chosen in medians:
        if name == chosen:
            fastest = medians[chosen] <= min(medians.values())
            return "measured fastest" if fastest else "measured about as fast as the fastest"
        return f"measured {medians[name] / medians[chosen]:.2f}x the time of {chosen}"
    if chosen in medians:
        return f"not measured; {chosen} was measured fastest"
    if tuned is not None and tuned[0] == chosen and not tuned[1]:
        return "tuned at another batch" if name == chosen else f"{chosen} was tuned at another batch"
    if tuned is not None and tuned[0] == chosen:
        return "tuned" if name == chosen else f"{chosen} was tuned"
    if name == chosen:
        return "predicted fastest"
    return f"predicted {predicted[name] / predicted[chosen]:.2f}x the time of {chosen}"


def traced_plan(layer: PlannedLayer, training: bool) -> str:
    """The plan torch.compile and torch.export trace: one for all shapes, so that a graph may be dynamic."""
    if layer.plan is not None:
        return layer.plan
    plans = plans_for(layer)
    names = [plan.name for plan in plans]
    tuned = Counter(e["plan"] for key, e in layer.tuned.items() if Case.parse(key).training == training)
    for name, _ in tuned.most_common():
        if name in names:
            return name
    weight = layer.weight
    device = weight.factors[0].device.type
    if lookup(layer) is not None:
        # The op serves every device, and no size of a table is worth a rebuild in a graph.
        return "staged" if _untried(get_plan("fused"), device) else "fused"
    if "staged" not in names:
        # Weights with a sparse part: what rebuilds them at each call must save little to be taken.
        saves = "fused" in names and 2 * weight.macs(1, 1) <= weight.dense_macs(1)
        return "fused" if saves and _serves_traced("fused", layer, training) else "dense"
    found = layer.traced_found
    if found is not None and not layer.geometry.spatial:
        macs = found.chain.program.macs()
    else:
        macs = weight.macs(1, 1)
    if macs >= weight.dense_macs(1) or (is_network(layer) and found is None):
        return "dense"
    # Of two large products the library's are hard to beat; without a shape nothing tells how large they are.
    if layer.geometry.spatial and "fused" in names and _serves_traced("fused", layer, training):
        return "fused"
    return "staged"


def _serves_traced(name: str, layer: PlannedLayer, training: bool) -> bool:
    """Whether a plan of the package's own kernels has run on the layer's device and takes the layer."""
    plan, weight = get_plan(name), layer.weight
    device, dtype = weight.factors[0].device.type, weight.factors[0].dtype
    sizes = (0, weight.shape[1], *(1,) * layer.geometry.spatial)
    layout = "channels_last" if layer.channels_last else "contiguous"
    case = Case(sizes, str(dtype).removeprefix("torch."), layout, device, training, 1, layer.prefer)
    return not _untried(plan, device) and plan.support(layer, case).ok
