"""Rank selection by gates in training: what all distributions of gates share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensorcomp_ext.compress.surgery import count_parameters
from tensorcomp_ext.formats.bonds import bond_sizes, stored_at
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.nn.gates import Changes, LayerGates, attach_gates, cut, fold_gates, gates_of
from tensorcomp_ext.ranks.gates import Gate

from . import processes
from .callbacks import Callback, TrainState
from .exchange import exchange

Sizes = dict[str, dict[str, int]]
"""Of each layer the sizes of its bonds."""
Values = dict[str, dict[str, Tensor]]
"""Of each layer something about the entries of its bonds."""


class GatedNetwork:
    """Gates on all ranks of the factorised layers of a network.

    Args:
        model: with layers in formats that have inner ranks.
        gate: distribution of the gates.
        dense: parameters of the network that the ratio compares with.
        layers: names of those that get gates; None for all in formats with inner ranks.
        seed: of the first locations.

    Raises:
        ValueError: a model without such layers.
    """

    def __init__(
        self,
        model: nn.Module,
        gate: Gate,
        dense: int,
        *,
        layers: Iterable[str] | None = None,
        seed: int = 0,
    ) -> None:
        wanted = None if layers is None else set(layers)
        self.layers: dict[str, FactorizedLayer] = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, FactorizedLayer) and m.weight.bonds() and (wanted is None or name in wanted)
        }
        if not self.layers:
            raise ValueError("GatedNetwork: the model has no factorised layer with inner ranks")
        self.model, self.gate, self.dense = model, gate, dense
        self.rest = count_parameters(model) - sum(layer.weight.numel for layer in self.layers.values())
        generator = torch.Generator().manual_seed(seed)
        self._gates = {name: attach_gates(layer, gate, generator) for name, layer in self.layers.items()}
        self.frozen = False
        self._stored: tuple[Tensor, int] | None = None

    @property
    def gates(self) -> list[LayerGates]:
        """The gates of each layer."""
        return list(self._gates.values())

    @property
    def locations(self) -> list[nn.Parameter]:
        """What is trained of the gates; other parameters after every cut."""
        return [gates.location for gates in self.gates]

    @property
    def sizes(self) -> Sizes:
        """The ranks that the factors have now."""
        return {name: bond_sizes(layer.weight) for name, layer in self.layers.items()}

    @torch.no_grad()
    def ranks(self) -> Sizes:
        """The ranks that evaluation leaves, and the cut in the end."""
        return self._counted(self._stay())

    def _stay(self) -> Tensor:
        """Of all entries whether evaluation leaves them, on the CPU: waits for an accelerator just once."""
        return (torch.cat([torch.cat([*g.decided().values()]) for g in self.gates]) > 0).cpu()

    def _counted(self, stays: Tensor) -> Sizes:
        flags, place = stays.tolist(), 0
        found: Sizes = {}
        for name, gates in self._gates.items():
            found[name] = {}
            for bond, size in gates.sizes.items():
                found[name][bond] = sum(flags[place : place + size])
                place += size
        return found

    @torch.no_grad()
    def stored(self) -> int:
        """Parameters of the network at those ranks, gates not included."""
        stays = self._stay()
        # Asked at every step, and seldom another one; entries only ever go.
        if self._stored is None or not torch.equal(self._stored[0], stays):
            self._stored = stays, self._stored_at(self._counted(stays))
        return self._stored[1]

    def _stored_at(self, sizes: Sizes) -> int:
        inner = sum(stored_at(layer.weight, sizes[name]) for name, layer in self.layers.items())
        return self.rest + inner

    def ratio(self) -> float:
        """Dense parameters / stored ones, biases and normalisation in both."""
        return self.dense / self.stored()

    def has_reached(self, ratio: float) -> bool:
        """Whether the network is so many times smaller than the dense one; the first process decides.

        Gates that begin open count as evaluation decides them. Of others that would find all shut before the
        first step: what has been cut counts.
        """
        if not self.gate.begins_open:  # of all processes the same entries were cut
            return self.dense / self._stored_at(self.sizes) >= ratio
        return processes.told(self.locations[0].device, processes.place() == 0 and self.ratio() >= ratio)

    def count_gates(self) -> int:
        """Gates that are trained, at those ranks."""
        fixed = self.gate.fixed
        return sum(size - fixed for sizes in self.ranks().values() for size in sizes.values())

    @torch.no_grad()
    def open_all(self) -> None:
        """Open all gates that there are."""
        for location in self.locations:
            location.fill_(self.gate.open_at)

    def freeze(self) -> None:
        """Decide all gates: no noise, and no gradient, with which an optimizer does not touch them either."""
        self.frozen = True
        for gates in self.gates:
            gates.frozen = True
            gates.location.requires_grad_(False).grad = None

    @torch.no_grad()
    def agree(self) -> None:
        """Of several processes, take the locations of the first: what they cut must be the same."""
        if processes.count() == 1:
            return
        own = torch.cat([location.detach() for location in self.locations])
        every = own.clone()
        dist.broadcast(every, 0)
        if torch.equal(every, own):
            return
        parts = every.split([len(location) for location in self.locations])
        for location, part in zip(self.locations, parts, strict=True):
            location.copy_(part)

    @torch.no_grad()
    def remove(self, below: float, ratio: float | None = None) -> Changes:
        """Cut entries whose gates open with a probability of at most ``below``; once frozen the shut ones.

        Of a bond without any other the likeliest entry stays.

        Args:
            ratio: dense parameters / stored ones, at which the likeliest of the others stay, too.
        """
        self.agree()
        limit = 0.0 if self.frozen else below
        chances: Values = {}
        stays: Values = {}
        for name, gates in self._gates.items():
            if self.frozen:
                chances[name] = gates.decided()
            else:
                opens = self.gate.probability(gates.location)
                chances[name] = gates.by_bond(gates.entries(opens, 1.0))
            # NaN stays, for the loop to complain of.
            stays[name] = {bond: ~(chance <= limit) for bond, chance in chances[name].items()}
            for bond, chance in chances[name].items():
                stays[name][bond][chance.argmax()] = True
        if ratio is not None:
            self._spare(stays, chances, ratio)
        changes: Changes = {}
        for name, layer in self.layers.items():
            kept = {bond: s.nonzero().flatten() for bond, s in stays[name].items() if not bool(s.all())}
            changes |= cut(layer, kept) if kept else {}
        return changes

    def _spare(self, stays: Values, chances: Values, ratio: float) -> None:
        """Let the likeliest entries stay of those that need not go for a ratio."""
        going: list[tuple[float, str, str, int]] = []
        for name, bonds in stays.items():
            for bond, flags in bonds.items():
                values = chances[name][bond].tolist()
                going += [
                    (values[place], name, bond, place) for place in (~flags).nonzero().flatten().tolist()
                ]
        going.sort()

        def reached(count: int) -> bool:
            sizes = self.sizes
            for _, name, bond, _ in going[:count]:
                sizes[name][bond] -= 1
            return self.dense / self._stored_at(sizes) >= ratio

        for _, name, bond, place in going[bisect_left(range(len(going)), True, key=reached) :]:
            stays[name][bond][place] = True

    @torch.no_grad()
    def narrow(self, sizes: Mapping[str, Mapping[str, int]]) -> Changes:
        """Cut bonds to these sizes, whichever entries that leaves: values are loaded from elsewhere.

        Raises:
            ValueError: layers or bonds that are not this network's, or sizes that are not within theirs.
        """
        own = self.sizes
        if {n: set(s) for n, s in sizes.items()} != {n: set(s) for n, s in own.items()}:
            raise ValueError("GatedNetwork: the ranks are of another network")
        for name, bonds in sizes.items():
            for bond, size in bonds.items():
                if not isinstance(size, int) or not 1 <= size <= own[name][bond]:
                    raise ValueError(
                        f"GatedNetwork: rank {bond} of {name} must be in [1, {own[name][bond]}], got {size!r}"
                    )
        changes: Changes = {}
        for name, layer in self.layers.items():
            less = {bond: n for bond, n in sizes[name].items() if n < own[name][bond]}
            changes |= cut(layer, {bond: torch.arange(n) for bond, n in less.items()}) if less else {}
        return changes

    def fold(self) -> None:
        """Multiply the decided gates into the factors, cut what they shut, and take all gates away."""
        self.agree()
        for layer in self.layers.values():
            if gates_of(layer) is not None:
                fold_gates(layer)


class RankSelection(Callback):
    """Trains gates: removes entries that hardly ever open, and freezes the ranks at a target.

    Removed entries make the steps that follow cheaper; their moments go with them.

    Args:
        network: with gates.
        remove_below: entries are removed that open with at most this probability.
        remove_every: steps after which that is looked at, beside the end of every epoch; 0 for epochs alone.
        target: ratio at which ranks are frozen and training goes on without noise; None for never. Where
            gates begin shut it is that of what has been cut, no more is cut then, and all others are opened.
        start: what a run began with, in JSON types: a checkpoint of another start is refused.
    """

    def __init__(
        self,
        network: GatedNetwork,
        *,
        remove_below: float = 0.05,
        remove_every: int = 0,
        target: float | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.target = network, target
        self.remove_below, self.remove_every = remove_below, remove_every
        self._settings = {
            "gate": network.gate.settings(),
            "ranks": network.sizes,
            "remove_below": remove_below,
            "remove_every": remove_every,
            "target": target,
            **(start or {}),
        }

    def penalty(self) -> Tensor | None:
        """What the loss has of the gates now; None where there is no such term."""
        return None

    def on_start(self, state: TrainState) -> None:
        self._freeze_at_target(state)

    def on_step(self, state: TrainState) -> None:
        if self.remove_every and (state.step + 1) % self.remove_every == 0:
            self.remove(state)
        self._freeze_at_target(state)

    def on_epoch(self, state: TrainState) -> None:
        self.remove(state)
        # Removal alone may reach the target, and a resumed run, which looks before its first step, must not
        # freeze a step earlier than one that was never stopped.
        self._freeze_at_target(state)

    def _freeze_at_target(self, state: TrainState) -> None:
        if self.target is None or self.network.frozen:
            return
        if self.network.has_reached(self.target):
            self.network.agree()
            if not self.network.gate.begins_open:
                self.network.open_all()
            self.network.freeze()
            self.remove(state)
            state.networks_changed()

    def remove(self, state: TrainState) -> None:
        """Cut what hardly ever opens, in the network and in the optimizer."""
        least = not self.network.frozen and not self.network.gate.begins_open
        changes = self.network.remove(self.remove_below, self.target if least else None)
        if changes:
            _tell(state.optimizer, changes)
            state.networks_changed()

    @torch.no_grad()
    def log(self) -> dict[str, Any]:
        network, penalty = self.network, self.penalty()
        stored = network.stored()
        found: dict[str, Any] = {
            "ranks": {name: list(sizes.values()) for name, sizes in network.ranks().items()},
            "ratio": network.dense / stored,
            "ratio_with_gates": network.dense / (stored + network.count_gates()),
            "frozen": network.frozen,
        }
        return found if penalty is None else {**found, "penalty": float(penalty)}

    def settings(self) -> dict[str, Any]:
        return self._settings

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": self.network.sizes, "frozen": self.network.frozen}

    def reshape(self, state: TrainState, saved: Mapping[str, Any]) -> None:
        _tell(state.optimizer, self.network.narrow(saved["sizes"]))
        if saved["frozen"]:
            self.network.freeze()


def _tell(optimizer: torch.optim.Optimizer, changes: Changes) -> None:
    """Let an optimizer have what a cut made of its parameters; it has none of layers that are not trained."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    exchange(optimizer, {old: change for old, change in changes.items() if id(old) in held})
