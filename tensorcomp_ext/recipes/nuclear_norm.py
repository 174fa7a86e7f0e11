"""The regulariser of NRMF: what it penalises, and what becomes of ranks and spectra under it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensorcomp_ext.decompose import singular_values
from tensorcomp_ext.ranks import rank_layout
from tensorcomp_ext.ranks.layouts import Ranks
from tensorcomp_ext.ranks.shared_energy import kept_energy

from .callbacks import Callback, TrainState
from .decisions import compressible, same_ranks
from .options import check_choice, check_number

Norm = Literal["frobenius", "nuclear"]
NORMS: tuple[Norm, ...] = ("frobenius", "nuclear")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Where spectra are sampled: at these shares of their length."""


def trace_norm(weights: Sequence[Tensor]) -> Tensor:
    """``L_n = 1/(2M) sum_m [tr(W1 W1^T) + tr(W2 W2^T)]``, W1 and W2 the unfoldings of M kernels by channels.

    Both traces are ``||W_m||_F^2``, so this is ``(1/M) sum_m ||W_m||_F^2`` and computed so: the nuclear norm
    of ``W W^T``, and L2 decay with the coefficient 2/M. Differentiable; one multiply-add a weight.

    Args:
        weights: kernels ``[T, S, *k]``.

    Raises:
        ValueError: no weight.

    Source: Exploiting Elasticity in Tensor Ranks for Compressing Neural Networks (NRMF).
    """
    if not weights:
        raise ValueError("trace_norm: weights must hold at least one kernel, got none")
    return torch.stack([weight.square().sum() for weight in weights]).sum() / len(weights)


def true_nuclear(weights: Sequence[Tensor]) -> Tensor:
    """``1/(2M) sum_m [sum sigma(W1) + sum sigma(W2)]``: the sum of the singular values themselves.

    Not in the source, whose norm is :func:`trace_norm`: this one shrinks small singular values as much as
    large ones, which makes ranks smaller and not only weights. Differentiable; costs two SVDs a kernel, about
    ``4 K S T (S + T)`` MACs.

    Args:
        weights: kernels ``[T, S, *k]``.

    Raises:
        ValueError: no weight.

    Source: Fazel 2002 (nuclear norm); ours in this place.
    """
    if not weights:
        raise ValueError("true_nuclear: weights must hold at least one kernel, got none")
    sums = []
    for weight in weights:
        for mode in (0, 1):
            matrix = weight.movedim(mode, 0).flatten(1)
            sums.append(
                torch.linalg.svdvals(matrix if matrix.dtype == torch.float64 else matrix.float()).sum()
            )
    return torch.stack(sums).sum() / (2 * len(weights))


class NuclearNorm(Callback):
    """Adds ``alpha L_n`` over the convolutions with a window to the loss, and follows their ranks.

    After every epoch :meth:`log` has of each layer, for its outputs and its inputs, the rank that keeps the
    share p of the energy, the largest singular value, the sum of all, the spectrum over the largest at
    :data:`QUANTILES` of its length, and the effective rank ``exp(-sum q ln q)``, ``q = sigma / sum sigma``.

    Args:
        model: with dense convolutions; grouped ones and those that cannot be factorized are left out.
        alpha: weight of the norm.
        norm: "frobenius", the :func:`trace_norm` of the source, or "nuclear", :func:`true_nuclear`.
        p: share of energy that ranks keep.
        exclude: patterns of layers to leave out.

    Cost: of an epoch two spectra a kernel, in float64 by eigenvalues of the Gram matrices where these are
    large, ``K S T (S + T) / 2`` MACs and ``O(S^3 + T^3)``; of a step that of the norm.

    Raises:
        ValueError, TypeError: options out of range, no such convolution, NaN or Inf in a weight.

    Source: Exploiting Elasticity in Tensor Ranks for Compressing Neural Networks (NRMF); the effective rank
    is that of Roy and Vetterli 2007.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 1e-2,
        *,
        norm: Norm = "frobenius",
        p: float = 0.95,
        exclude: str | Iterable[str] = (),
    ) -> None:
        check_number("NuclearNorm", "alpha", alpha, 0.0, float("inf"), "[0, inf)")
        check_number("NuclearNorm", "p", p, 0.0, 1.0, "(0, 1]")
        check_choice("NuclearNorm", "norm", norm, NORMS)
        found = compressible("NuclearNorm", model, exclude, windows=True)
        self.layers: dict[str, Any] = found
        self.alpha, self.norm, self.p = alpha, norm, p
        self._model = model
        self._figures: dict[str, Any] = {}

    @property
    def weights(self) -> list[nn.Parameter]:
        """What is regularised."""
        return [layer.weight for layer in self.layers.values()]

    def penalty(self) -> Tensor:
        """L_n now, differentiable."""
        weights = self.weights
        # In the precision of the weights, whatever the network computes in.
        with torch.autocast(weights[0].device.type, enabled=False):
            return trace_norm(weights) if self.norm == "frobenius" else true_nuclear(weights)

    def on_loss(self, state: TrainState, loss: Tensor) -> Tensor:
        return loss + self.alpha * self.penalty() if self.alpha else loss

    def on_epoch(self, state: TrainState) -> None:
        with torch.no_grad():
            value = float(self.penalty())
        self._figures = {"value": value, "layers": {name: self.figures(name) for name in self.layers}}

    def figures(self, name: str) -> dict[str, Any]:
        """Ranks and spectra of a layer now, in JSON types; all zero and rank 1 for a weight of zeros."""
        found: dict[str, Any] = {}
        for mode, side in ((0, "out"), (1, "in")):
            values = singular_values(self.layers[name].weight, mode)
            found[f"rank_{side}"] = rank_at(values, self.p)
            found |= {f"{key}_{side}": value for key, value in summary(values).items()}
        return found

    def ranks(self) -> dict[str, Ranks | None]:
        """``(R_out, R_in)`` of every layer at the energy p, None where factors would not be smaller.

        The same in all processes: those of the first.
        """

        def choose() -> dict[str, Ranks | None]:
            return {name: _ranks(layer.weight.detach(), self.p) for name, layer in self.layers.items()}

        return same_ranks(self._model, choose, dict.fromkeys(self.layers, 2))

    def log(self) -> dict[str, Any]:
        return {"nuclear_norm": self._figures}

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "norm": self.norm, "p": self.p, "layers": list(self.layers)}


def rank_at(values: Tensor, p: float) -> int:
    """The smallest rank that keeps a share p of the energy of a spectrum, descending; 1 of zeros."""
    # Rounding must not add ranks at p = 1: values under 1e-8 of the largest carry no energy.
    return min(1 + int((kept_energy(values)[1:] < p * (1 - 1e-15)).sum()), len(values))


def summary(values: Tensor) -> dict[str, Any]:
    """A spectrum, descending, in few numbers."""
    largest, total = float(values[0]), float(values.sum())
    if largest == 0.0:
        return {"largest": 0.0, "sum": 0.0, "effective": 0.0, "spectrum": [0.0] * len(QUANTILES)}
    shares = values / total
    entropy = -float(torch.xlogy(shares, shares).sum())
    places = [round(quantile * (len(values) - 1)) for quantile in QUANTILES]
    return {
        "largest": largest,
        "sum": total,
        "effective": float(torch.tensor(entropy, dtype=torch.float64).exp()),
        "spectrum": [float(values[place]) / largest for place in places],
    }


def _ranks(weight: Tensor, p: float) -> Ranks | None:
    layout = rank_layout(weight, "tucker2")
    ranks = tuple(rank_at(spectrum.values, p) for spectrum in layout.spectra())
    return ranks if layout.params(ranks) < layout.numel else None
