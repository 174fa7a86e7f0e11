"""Pruning the sparse parts of all layers by one order of magnitudes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensorcomp_ext.formats import LowRankSparse

from .callbacks import Callback, TrainState
from .sparsity import SPARSITY_SCHEDULES

Criterion = Literal["magnitude", "difference"]
CRITERIA: tuple[Criterion, ...] = ("magnitude", "difference")


class GlobalPruner:
    """Masks the smallest entries of the sparse parts of a network, all layers against each other.

    What is masked stays so, but for masks loaded from a state. Of several processes the first of ``group``
    decides, and the others take its masks. Costs a few passes over all sparse parts, and for a moment some
    seven times the memory that they take.

    Args:
        model: with layers whose weights are in format "lowrank_sparse"; a wrapper such as
            DistributedDataParallel may be round it.
        criterion: what is small: "magnitude", ``|S|``, or "difference", ``|S - L|``, by which a weight in
            mode "masking" changes where it is masked.
        group: of processes; None for all.

    Raises:
        ValueError: a model without such a layer, another criterion, or "difference" where S is added to L
            instead of taking its place.

    Source: Hawkins et al. 2021 (low-rank + sparse tensor compression).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: Criterion = "magnitude",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        found = {name: m for name, m in model.named_modules() if isinstance(m, LowRankSparse)}
        if not found:
            raise ValueError("GlobalPruner: the model has no weight in format 'lowrank_sparse'")
        if criterion not in CRITERIA:
            raise ValueError(
                f"GlobalPruner: criterion must be 'magnitude' or 'difference', got {criterion!r}"
            )
        additive = [n for n, w in found.items() if w.mode == "additive" and w.low_rank is not None]
        if criterion == "difference" and additive:
            raise ValueError(
                f"GlobalPruner: criterion 'difference' is for mode 'masking', {additive[0]} is additive"
            )
        self.weights: dict[str, LowRankSparse] = found
        self.criterion, self.group = criterion, group

    @property
    def numel(self) -> int:
        """Entries of all sparse parts, masked ones included."""
        return sum(math.prod(weight.shape) for weight in self.weights.values())

    @property
    def masked(self) -> int:
        """How many of them are masked."""
        return self.numel - sum(weight.nnz for weight in self.weights.values())

    @property
    def sparsity(self) -> float:
        """Their share."""
        return self.masked / self.numel

    @torch.no_grad()
    def prune(self, sparsity: float) -> int:
        """Mask further entries until ``round(sparsity numel)`` are.

        The smallest come first, of equal ones the first. Where so many are masked already nothing happens.

        Returns:
            How many are masked now.

        Raises:
            ValueError: a sparsity outside [0, 1], or NaN or Inf among the entries that are left; of several
                processes in all.
            RuntimeError: another error of the process that decides, in the others.
        """
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"GlobalPruner: sparsity must be in [0, 1], got {sparsity}")
        wanted = round(sparsity * self.numel)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1
        if several:
            self._mask_together(wanted)
        else:
            self._mask(wanted)
        return self.masked

    def _mask_together(self, wanted: int) -> None:
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        failure: Exception | None = None
        if dist.get_rank(self.group) == 0:
            try:
                self._mask(wanted)
            except Exception as error:  # noqa: BLE001 - raised below, once the others have heard of it
                failure = error
        first = next(iter(self.weights.values())).mask
        # The others must hear of it, or they would wait for masks that never come.
        kind = 0 if failure is None else 1 if isinstance(failure, ValueError) else 2
        failed = torch.tensor([kind], dtype=torch.uint8, device=first.device)
        dist.broadcast(failed, source, self.group)
        if failure is not None:
            raise failure
        if int(failed) == 1:
            raise ValueError("GlobalPruner: the process that decides has NaN or Inf in a sparse part")
        if int(failed):
            raise RuntimeError("GlobalPruner: the process that decides failed; its own message says why")
        for weight in self.weights.values():
            bits = weight.mask.clone()
            dist.broadcast(bits, source, self.group)
            # A copy, which tells layers that their mask has changed.
            weight.mask.copy_(bits)

    def _mask(self, wanted: int) -> None:
        place = next(iter(self.weights.values())).mask.device
        kept = torch.cat([weight.kept.flatten().to(place) for weight in self.weights.values()])
        more = wanted - (kept.numel() - int(kept.sum()))
        if more <= 0:
            return
        scores = torch.cat([self._scores(name).flatten() for name in self.weights])
        limit = torch.kthvalue(scores[kept], more).values
        dropped = kept & (scores < limit)
        equal = (kept & (scores == limit)).nonzero().flatten()
        dropped[equal[: more - int(dropped.sum())]] = True
        kept &= ~dropped
        sizes = [math.prod(weight.shape) for weight in self.weights.values()]
        for weight, part in zip(self.weights.values(), kept.split(sizes), strict=True):
            weight.keep(part.reshape(weight.shape).to(weight.mask.device))

    def _scores(self, name: str) -> Tensor:
        """What is small of a weight is masked first; on the device of the first one."""
        weight = self.weights[name]
        place = next(iter(self.weights.values())).mask.device
        score = weight.sparse.detach().reshape(weight.shape)
        low = weight.low_rank_dense() if self.criterion == "difference" else None
        score = (score if low is None else score - low).abs()
        score = score.to(place, torch.float64 if score.dtype == torch.float64 else torch.float32)
        if not bool(torch.isfinite(score[weight.kept.to(place)]).all()):
            raise ValueError(f"GlobalPruner: the sparse part of {name} has NaN or Inf")
        return score

    def state_dict(self) -> dict[str, Any]:
        """The masks by name, one bit an entry."""
        return {"masks": {name: weight.mask.clone() for name, weight in self.weights.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the masks of :meth:`state_dict`, whatever is masked now.

        Raises:
            ValueError: masks of another network, or none; nothing is changed.
        """
        masks = state.get("masks") if isinstance(state, Mapping) else None
        wanted = {name: (weight.mask.shape, torch.uint8) for name, weight in self.weights.items()}
        given = masks if isinstance(masks, Mapping) else {}
        found = {name: (getattr(m, "shape", None), getattr(m, "dtype", None)) for name, m in given.items()}
        if found != wanted:
            raise ValueError("GlobalPruner: the masks are of another network, or not uint8 as they should be")
        for name, weight in self.weights.items():
            weight.mask.copy_(given[name])


class GradualPruning(Callback):
    """Prunes before every epoch: before epoch t to the sparsity that a schedule has at t, the first being 1.

    Args:
        pruner: of the network that is trained.
        final: sparsity after ``epochs``.
        epochs: epochs over which it grows.
        schedule: "slow-start" or "zhu-gupta"; see :mod:`.sparsity`.

    Raises:
        ValueError: another schedule, epochs below 1, a sparsity outside [0, 1].
    """

    def __init__(
        self, pruner: GlobalPruner, final: float, epochs: int, *, schedule: str = "slow-start"
    ) -> None:
        if schedule not in SPARSITY_SCHEDULES:
            names = ", ".join(SPARSITY_SCHEDULES)
            raise ValueError(f"GradualPruning: schedule must be one of {names}, got {schedule!r}")
        if epochs < 1:
            raise ValueError(f"GradualPruning: epochs must be at least 1, got {epochs}")
        if not 0.0 <= final <= 1.0:
            raise ValueError(f"GradualPruning: final must be in [0, 1], got {final}")
        self.pruner, self.final, self.epochs, self.schedule = pruner, final, epochs, schedule
        self._begun = 0

    def sparsity(self, epoch: int) -> float:
        """That of epoch ``epoch``, from 1."""
        return SPARSITY_SCHEDULES[self.schedule](min(epoch, self.epochs), self.epochs, self.final)

    def on_start(self, state: TrainState) -> None:
        if self._begun == 0 and state.epochs > 0:
            self._begin(1)

    def on_epoch(self, state: TrainState) -> None:
        if state.epoch + 1 < state.epochs:
            self._begin(state.epoch + 2)

    def _begin(self, epoch: int) -> None:
        self.pruner.prune(self.sparsity(epoch))
        self._begun = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun, "settings": self.settings(), **self.pruner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: of another schedule, or of another network.
        """
        if state.get("settings") != self.settings():
            raise ValueError(
                f"GradualPruning: the state is of {state.get('settings')}, this one is {self.settings()}"
            )
        self.pruner.load_state_dict(state)
        self._begun = int(state["begun"])

    def settings(self) -> dict[str, Any]:
        weights = self.pruner.weights.items()
        return {
            "final": self.final,
            "epochs": self.epochs,
            "schedule": self.schedule,
            "criterion": self.pruner.criterion,
            # One state dict fits both modes, in which S means different things.
            "modes": {name: weight.mode for name, weight in weights},
        }
