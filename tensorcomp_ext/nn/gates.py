"""Gates on the ranks of factorized layers: attached, drawn at each call, cut and folded away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format, Tucker2
from ..formats.bonds import bond_sizes, narrowed, take
from ..plan.memory_format import applies_channels_last, as_channels_last
from ..ranks.gates import Gate
from .base import FactorizedLayer

Changes = dict[nn.Parameter, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]
"""Of each parameter that a cut replaced the new one, and what narrows a tensor of its old shape."""


class LayerGates(nn.Module):
    """Gates ``z`` on all bonds of a weight: ``diag(z)`` between the factors that a bond joins.

    While the layer is called, one factor of each bond (the smallest) is the product with the bond's gates,
    made once a call; outside of calls factors are what they were, so that optimizers, state dicts and copies
    of the layer know nothing of it. In training mode gates are drawn anew at each call, in evaluation mode
    they are decided, and so they are in training once ``frozen``.

    Args:
        weight: of the layer.
        gate: their distribution; one object may serve many layers.
        generator: for the first locations.

    Attributes:
        location: what is trained, one number a gate, bond after bond.
        drawn: where no gradient passes through gates, those of each training call since the list was emptied,
            which who reads it does, and a change of the mode.
    """

    location: nn.Parameter

    def __init__(self, weight: Format, gate: Gate, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.gate, self.frozen = gate, False
        self.sizes = bond_sizes(weight)
        self.carriers: dict[str, tuple[str, int]] = {
            bond: min(places, key=lambda place: getattr(weight, place[0]).numel())
            for bond, places in weight.bonds().items()
        }
        self.counts = {bond: size - gate.fixed for bond, size in self.sizes.items()}
        factor = weight.factors[0]
        # Steps of bfloat16 locations would round to nothing.
        dtype = factor.dtype if factor.dtype == torch.float64 else torch.float32
        start = gate.start(sum(self.counts.values()), device=factor.device, dtype=dtype, generator=generator)
        self.location = nn.Parameter(start)
        shares = [torch.full((count,), 1.0 / max(count, 1), dtype=dtype) for count in self.counts.values()]
        # No buffers: processes that train together would send them to each other at every call.
        self._shares = torch.cat(shares)
        self._places = self._placed()
        self.drawn: list[Tensor] = []
        self._held: dict[str, Any] = {}
        self._kept: tuple[list[tuple[Tensor, int]], dict[str, Tensor]] | None = None

    def _placed(self) -> Tensor:
        trained = [torch.arange(size) >= self.gate.fixed for size in self.sizes.values()]
        return torch.cat(trained).nonzero().flatten()

    @property
    def places(self) -> Tensor:
        """Of each gate its place among the entries of all bonds."""
        self._places = self._places.to(self.location.device)
        return self._places

    @property
    def shares(self) -> Tensor:
        """Of each gate one over the gates that its bond had when they were attached."""
        self._shares = self._shares.to(self.location.device)
        return self._shares

    # --- values --------------------------------------------------------------------------------------------

    def entries(self, gates: Tensor, fixed: float | bool) -> Tensor:
        """The values of all gates among those of all entries, ``fixed`` for entries without a gate."""
        if not self.gate.fixed:
            return gates
        whole = torch.full((sum(self.sizes.values()),), fixed, dtype=gates.dtype, device=gates.device)
        return whole.index_copy(0, self.places, gates)

    def by_bond(self, entries: Tensor) -> dict[str, Tensor]:
        """Values of all entries, bond by bond."""
        return dict(zip(self.sizes, entries.split(list(self.sizes.values())), strict=True))

    def decided(self) -> dict[str, Tensor]:
        """The gates of evaluation of each bond; of a bond with none above 0 the likeliest is 1."""
        found = self.by_bond(self.entries(self.gate.decided(self.location), 1.0))
        if self.gate.fixed:
            return found
        likely = self.by_bond(self.location.detach())
        for bond, gates in found.items():
            best = likely[bond].argmax()
            # No branch: an accelerator would be waited for at every bond.
            found[bond] = torch.where((gates > 0).any(), gates, gates.index_fill(0, best, 1.0))
        return found

    @torch.no_grad()
    def ranks(self) -> dict[str, int]:
        """The size that evaluation gives each bond: how many gates are above 0."""
        return {bond: int((gates > 0).sum()) for bond, gates in self.decided().items()}

    def draw(self) -> dict[str, Tensor]:
        """Gates of each bond for a call."""
        if not self.training or self.frozen:
            return self.decided()
        gates = self.gate.sample(self.location)
        if not gates.requires_grad:
            self.drawn = [*self.drawn, gates]
        return self.by_bond(self.entries(gates, 1.0))

    def gated(self, factors: Mapping[str, Any]) -> dict[str, Tensor]:
        """The factors that carry gates, times these."""
        found: dict[str, Tensor] = {}
        gates = self.draw()
        for bond, (name, dim) in self.carriers.items():
            factor: Tensor = found.get(name, factors[name])
            shape = [1] * factor.dim()
            shape[dim] = -1
            found[name] = factor * gates[bond].to(factor.dtype).view(shape)
        return found

    # --- calls ---------------------------------------------------------------------------------------------

    def enter(self, layer: nn.Module, args: Any) -> None:
        """Before a call of the layer: gated factors take the places of the factors."""
        table: dict[str, Any] = layer.weight._parameters  # type: ignore[union-attr]
        factors = {name: table[name] for name, _ in self.carriers.values()}
        anew = self.training or torch.is_grad_enabled()
        gated = self.gated(factors) if anew else self._repeated(factors)
        self._held = factors
        table.update(gated)

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        """After a call, also one that raised."""
        layer.weight._parameters.update(self._held)  # type: ignore[union-attr]
        self._held = {}

    def _repeated(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gated factors of evaluation, the same tensors while nothing changes, so that the layer's prepared
        weights last."""
        tensors = [*factors.values(), self.location]
        state = self._kept
        if state is None or any(
            a is not b or a._version != version for a, (b, version) in zip(tensors, state[0], strict=True)
        ):
            with torch.inference_mode(False), torch.no_grad():
                gated = self.gated(factors)
            state = self._kept = [(t, t._version) for t in tensors], gated
        return state[1]

    def clear_cache(self) -> None:
        """Drop the gated factors of evaluation."""
        self._kept = None

    def train(self, mode: bool = True) -> LayerGates:
        self._kept, self.drawn = None, []
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LayerGates:
        self._kept = None  # moved parameters stay the same objects of the same version
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "drawn": []}

    def narrow(self, kept: Mapping[str, Tensor]) -> Changes:
        """Drop the gates of entries that a cut drops; ``kept`` as :func:`..formats.bonds.take` has it."""
        stays = torch.zeros(sum(self.sizes.values()), dtype=torch.bool)
        for bond, flags in self.by_bond(stays).items():
            flags[kept[bond].cpu() if bond in kept else slice(None)] = True
        index = stays[self.places.cpu()].nonzero().flatten().to(self.location.device)
        former = self.location
        self.location = nn.Parameter(former.detach()[index], requires_grad=former.requires_grad)
        self._shares = self.shares[index]
        self.sizes = {bond: int(flags.sum()) for bond, flags in self.by_bond(stays).items()}
        self._places = self._placed()
        self._kept, self.drawn = None, []
        return {former: (self.location, lambda tensor: tensor[index])}

    def extra_repr(self) -> str:
        return f"{type(self.gate).__name__}, {len(self.location)} gates, sizes={self.sizes}"


def attach_gates(layer: FactorizedLayer, gate: Gate, generator: torch.Generator | None = None) -> LayerGates:
    """Put gates on all ranks of a layer, as its submodule ``gates``.

    Args:
        gate: their distribution.
        generator: for the first locations.

    Raises:
        ValueError: a layer with gates already, or without inner ranks.
    """
    name = type(layer).__name__
    if gates_of(layer) is not None:
        raise ValueError(f"attach_gates: {name} has gates already")
    if not layer.weight.bonds():
        raise ValueError(
            f"attach_gates: layer must be in a format with inner ranks, {name} is in {layer.format!r}"
        )
    gates = LayerGates(layer.weight, gate, generator).train(layer.training)
    layer.add_module("gates", gates)
    layer.register_forward_pre_hook(gates.enter)
    layer.register_forward_hook(gates.leave, always_call=True)
    return gates


def gates_of(layer: nn.Module) -> LayerGates | None:
    """The gates of a layer, None where it has none."""
    found = layer._modules.get("gates")
    return found if isinstance(found, LayerGates) else None


def cut(layer: FactorizedLayer, kept: Mapping[str, Tensor]) -> Changes:
    """Drop entries of bonds from a layer's factors and gates, which become other parameters.

    The layer plans anew: what was tuned, was so for other ranks.

    Args:
        kept: indices of the entries that stay, by bond; bonds that are not named stay whole. The entry
            without a gate, the first of a bond, has to be among them.

    Returns:
        What changed, as an optimizer has to hear of it.

    Raises:
        ValueError: a bond the weight does not have, one that nothing would be left of, or one that would lose
            the entry without a gate.
    """
    weight, gates = layer.weight, gates_of(layer)
    for bond, indices in kept.items():
        if gates is not None and gates.gate.fixed and not bool((indices == 0).any()):
            raise ValueError(f"cut: entry 0 of bond {bond} has no gate and must stay, got {indices.tolist()}")
    made = take(weight, kept)
    if isinstance(weight, Tucker2) and isinstance(made, Tucker2) and applies_channels_last(weight.core):
        # As the network was converted: a resumed run, which is converted anew, must not round otherwise.
        made.core.data = as_channels_last(made.core.data)
    changes: Changes = {}
    for name, old, new in zip(weight.factor_names, weight.factors, made.factors, strict=True):
        if old.shape != new.shape:
            changes[_parameter(old)] = _parameter(new), _narrowing(name, weight, kept)
        else:
            made._parameters[name] = _parameter(old)
    if gates is not None and changes:
        changes |= gates.narrow(kept)
    if changes:
        layer.tuned = {}
        layer.weight = made
    return changes


def _parameter(factor: Tensor) -> nn.Parameter:
    assert isinstance(factor, nn.Parameter)
    return factor


def _narrowing(name: str, weight: Format, kept: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: narrowed(tensor, name, weight, kept)


@torch.no_grad()
def fold_gates(layer: FactorizedLayer) -> Changes:
    """Multiply the gates of evaluation into the factors, drop what they shut, and take the gates away.

    The outputs of evaluation stay as they were, to rounding. Of the moments an optimizer has of the factors
    only those of what stays mean anything.

    Returns:
        What changed of the factors; the locations of the gates are gone.

    Raises:
        ValueError: a layer without gates.
    """
    gates = gates_of(layer)
    if gates is None:
        raise ValueError(f"fold_gates: {type(layer).__name__} has no gates")
    decided = gates.decided()
    for bond, (name, dim) in gates.carriers.items():
        factor = getattr(layer.weight, name)
        shape = [1] * factor.dim()
        shape[dim] = -1
        factor.mul_(decided[bond].to(factor.dtype).view(shape))
    for table in (layer._forward_pre_hooks, layer._forward_hooks):
        for key, hook in list(table.items()):
            if getattr(hook, "__self__", None) is gates:
                del table[key]
                layer._forward_hooks_always_called.pop(key, None)
    del layer._modules["gates"]
    kept = {bond: (values > 0).nonzero().flatten() for bond, values in decided.items()}
    return cut(layer, {bond: index for bond, index in kept.items() if len(index) < len(decided[bond])})
