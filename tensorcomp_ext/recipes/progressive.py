"""Progressive Tucker: dense weights that fade beside factors, whose ranks shrink as they learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tensorcomp_ext.compress.swap import HOOK_TABLES, parent_of
from tensorcomp_ext.data import Dataset
from tensorcomp_ext.nn import FactorizedLayer, FadingDense
from tensorcomp_ext.nn.fading import STARTS, Start

from .adaptive_ranks import cut_to, first_ranks, ranks_of, resize, size_of
from .callbacks import Callback, TrainState
from .decisions import Begun, checked_run, compressible, decomposed_at
from .fades import FADES
from .options import check_choice, check_number
from .recount import recount
from .result import RecipeResult
from .start import NOT_TRAINED, is_trained
from .task import Task
from .train import train


class Progressive(Callback):
    """Fades the dense branches of a network and cuts the ranks of its factors, over a share of the steps.

    At step t of T the gate is ``g(t / (q T))``. Every ``rank_every`` epochs the factors are cut to a budget
    that falls linearly from ``start`` times to once the final one, at t = q T; then the dense branches are
    removed and what is left trains on.

    Args:
        model: with layers in :class:`..nn.FadingDense`.
        budget: weights that all these layers may store in the end, without biases.
        decay: "cosine", "linear" or "sine".
        share: q.
        start: budget at the beginning over that at the end.
        rank_every: epochs between two cuts.

    Raises:
        ValueError, TypeError: options out of range, a model without such a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        *,
        decay: str = "cosine",
        share: float = 0.8,
        start: float = 1.3,
        rank_every: int = 1,
    ) -> None:
        check_fade("Progressive", decay, share, start, rank_every)
        self.branches = {name: m for name, m in model.named_modules() if isinstance(m, FadingDense)}
        if not self.branches:
            raise ValueError("Progressive: the model has no layer with a dense branch that fades")
        if "" in self.branches:
            raise ValueError("Progressive: the model is itself one layer, which cannot be replaced in place")
        self.model, self.budget = model, budget
        self.decay, self.share, self.start, self.rank_every = decay, share, start, rank_every
        self.finished = False
        self.gate = 1.0

    @property
    def layers(self) -> dict[str, FactorizedLayer]:
        """The factorized layers by name."""
        return {name: branch.layer for name, branch in self.branches.items()}

    def on_batch(self, state: TrainState) -> None:
        if self.finished:
            return
        self.gate = FADES[self.decay](state.step, self.share * state.steps)
        for branch in self.branches.values():
            branch.fade(self.gate)

    def on_step(self, state: TrainState) -> None:
        # The next step would have g = 0.
        if not self.finished and state.step + 1 >= self.share * state.steps:
            self.finish(state)

    def on_epoch(self, state: TrainState) -> None:
        if self.finished or (state.epoch + 1) % self.rank_every:
            return
        done = min(1.0, state.step / (self.share * state.steps))
        factor = self.start + (1.0 - self.start) * done
        if cut_to(self.model, self.layers, int(factor * self.budget), state.optimizer):
            state.networks_changed()

    def finish(self, state: TrainState | None = None) -> None:
        """Cut to the final budget and remove the dense branches; once only."""
        if self.finished:
            return
        cut_to(self.model, self.layers, self.budget, None if state is None else state.optimizer)
        self._remove()
        if state is not None:
            state.networks_changed()

    def _remove(self) -> None:
        for name, branch in self.branches.items():
            parent, child = parent_of(self.model, name)
            setattr(parent, child, branch.finalize())
        self.finished, self.gate = True, 0.0

    def log(self) -> dict[str, Any]:
        ranks = {name: list(ranks_of(layer.weight)) for name, layer in self.layers.items()}
        stored = size_of(self.layers)
        return {"progressive": {"gate": self.gate, "stored": stored, "ranks": ranks}}

    def settings(self) -> dict[str, Any]:
        names = ("budget", "decay", "share", "start", "rank_every")
        return {**{name: getattr(self, name) for name in names}, "layers": list(self.branches)}

    def state_dict(self) -> dict[str, Any]:
        ranks = {name: list(ranks_of(layer.weight)) for name, layer in self.layers.items()}
        return {"ranks": ranks, "finished": self.finished, "gate": self.gate}

    def reshape(self, state: TrainState, saved: Mapping[str, Any]) -> None:
        for name, ranks in saved["ranks"].items():
            resize(self.layers[name], ranks, state.optimizer)
        if saved["finished"] and not self.finished:
            self._remove()
        state.networks_changed()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gate = float(state["gate"])


def progressive(
    model: nn.Module,
    dataset: Dataset | Task,
    *,
    target: float = 0.1,
    init: Start = "residual",
    decay: str = "cosine",
    share: float = 0.8,
    rank_every: int = 1,
    start: float = 1.3,
    epochs: int = 20,
    lr: float = 0.01,
    schedule: str = "cosine",
    weight_decay: float = 1e-4,
    exclude: str | Iterable[str] = (),
    example_inputs: Any = None,
    callbacks: Iterable[Callback] = (),
    **training: Any,
) -> RecipeResult:
    """Train Tucker-2 factors beside the frozen dense weights, which fade out, with ranks that adapt.

    ``y = g(t) conv(x; W0 - L0) + tucker2(x; factors) + b``, linear layers alike with SVD. g falls from 1 to 0
    over the first ``share`` of the steps; then the dense weights are removed, and the factors train on alone.
    The first ranks are those at one energy threshold for all layers with ``start`` times the target size.
    Every ``rank_every`` epochs the spectra of the factors as they are then decide again, at a size that falls
    to the target's as the dense weights fade. Factors, biases, normalisation and layers that stay dense
    learn.

    Only after the fade do the factors learn alone. Runs of few epochs at small targets leave them little time
    at a learning rate that has fallen already: a smaller ``share``, ``decay="sine"`` or a schedule that falls
    late gives them more.

    Args:
        model: trained; it is not changed.
        dataset: to train on.
        target: share of the weights of all layers that can be compressed, biases not counted, that is stored
            in the end. Layers that would not get smaller at the threshold stay dense and count so.
        init: "residual": the factors are those of the decomposition, L0 their dense form. "lora": the
            factor that is applied last is zero, and L0 with it. Both begin with the outputs of ``model``.
        decay: of g: "cosine", "linear" or "sine" (1 - sin).
        share: of the steps, in which g falls.
        rank_every: epochs between two cuts of ranks.
        start: first size over the target's; 1 chooses ranks once, from the dense weights.
        exclude: patterns of layers to leave dense; they do not count, nor do layers whose weights do not
            require gradients, which stay dense, too.
        example_inputs: as ``compress`` takes them.
        epochs, lr, schedule, weight_decay, callbacks, training: as :func:`.train` takes them; with
            ``checkpoint`` a killed run goes on where it was.

    Returns:
        ``report.details["progressive"]`` has the options, ``weights`` of the compressible layers, ``stored``
        of them in the end, their share, and the ranks; every epoch's line in the history gate and ranks.

    Raises:
        ValueError, TypeError: options out of range, a network without a layer to compress, a target that
            rank 1 exceeds, NaN or Inf in a weight, and as ``train``; all before any work.

    Source: Progressive Model Compression with Adaptive Rank Selection in Tucker Decomposition; what it does
    not say is ours: schedules of gate, size and cuts, and how ranks are shared out.
    """
    name = "progressive"
    check_target(name, target)
    check_choice(name, "init", init, STARTS)
    check_fade(name, decay, share, start, rank_every)
    options = {"lr": lr, "schedule": schedule, "weight_decay": weight_decay, **training}
    begun = Begun({"recipe": name, "target": target, "init": init})
    fade: dict[str, Any] = {"decay": decay, "share": share, "start": start, "rank_every": rank_every}
    known = [(Begun, begun.settings()), (Progressive, fade)]
    callbacks = checked_run(name, dataset, epochs, options, model=model, callbacks=callbacks, known=known)
    found = compressible(name, model, exclude, example_inputs=example_inputs)
    layers = {place: layer for place, layer in found.items() if is_trained(layer)}
    if not layers:
        raise ValueError(
            f"{name}: the factors of no layer would be trained: no weight of {', '.join([*found][:8])} "
            "requires gradients"
        )
    if "" in layers:
        raise ValueError(f"{name}: the model is itself one layer, which cannot be replaced in place")
    weights: dict[str, Any] = {place: layer.weight for place, layer in layers.items()}
    ranks, budget = first_ranks(name, model, weights, target, start)
    small, report = decomposed_at(
        model, ranks, exclude=exclude, example_inputs=example_inputs, others="not called, or not compressible"
    )
    for place in found.keys() - layers.keys():
        report[place].skipped = NOT_TRAINED
    for entry in report.replaced:
        _add_branch(small, entry.name, weights[entry.name], init)
    callback = Progressive(small, budget, **fade)
    history = train(small, dataset, epochs=epochs, callbacks=[callback, begun, *callbacks], **options).history
    callback.finish()
    for layer in callback.layers.values():
        layer.train(layer.training)  # also of factors made while the network was trained
    recount(report, small, example_inputs, model)
    total = sum(weight.numel() for weight in weights.values())
    stays = sum(weights[place].numel() for place in weights if place not in callback.branches)
    stored = stays + size_of(callback.layers)
    report.details[name] = {
        **{"target": target, "init": init, **fade},
        **{"weights": total, "stored": stored, "stored_share": stored / total},
        "ranks": {place: list(ranks_of(layer.weight)) for place, layer in callback.layers.items()},
    }
    return RecipeResult(small, report, history)


def check_target(name: str, target: float) -> None:
    """ValueError or TypeError for what cannot be, naming it."""
    check_number(name, "target", target, 0.0, 1.0, "(0, 1)")


def check_fade(name: str, decay: str, share: float, start: float, rank_every: int) -> None:
    """ValueError or TypeError for what cannot be, naming it."""
    check_choice(name, "decay", decay, FADES)
    check_number(name, "share", share, 0.0, 1.0, "(0, 1]")
    check_number(name, "start", start, 1.0, float("inf"), "[1, inf)")
    if type(rank_every) is not int:
        raise TypeError(f"{name}: rank_every must be an int, got {rank_every!r}")
    if rank_every < 1:
        raise ValueError(f"{name}: rank_every must be at least 1, got {rank_every}")


def _add_branch(model: nn.Module, name: str, dense: nn.Parameter, init: Start) -> None:
    """Put a layer beside its dense weight, hooks included, in its place."""
    parent, child = parent_of(model, name)
    layer = parent.get_submodule(child)
    assert isinstance(layer, FactorizedLayer)
    branch = FadingDense.of(layer, dense, init)
    for table in HOOK_TABLES:
        if table in layer.__dict__:
            setattr(branch, table, layer.__dict__[table])
    setattr(parent, child, branch)
