"""Spectra of a weight that is in factors already, and its truncation, without the dense weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..decompose.svd import thin_svd
from ..decompose.unfolding import unfold
from ..formats import SVD, Format, Tucker2
from .layouts import RankLayout, Ranks, Spectrum, SVDLayout, Tucker2Layout


class Orthogonal:
    """A weight in format "tucker2" or "svd" as orthonormal bases of its outputs and inputs, and a core.

    ``factor = Q R`` for each factor, every R absorbed by the core: the unfoldings of the core then have the
    singular values of the dense weight's. In float64 on the CPU, where the factors are copied.

    Args:
        weight: ``[T, S, *k]`` at ranks ``(R_out, R_in)``, or ``[M, N]`` at rank R.

    Cost: ``T R_out^2 + S R_in^2 + 2 K R_out R_in (R_out + R_in)`` MACs, up to small factors; the spectra of
    the dense weight take ``K S T min(S, T)``.

    Raises:
        TypeError: another format. ValueError: NaN or Inf in the factors.
        DecompositionError: no driver of the SVD converges.

    Source: Tucker 1966; De Lathauwer et al. 2000 (HOSVD).
    """

    def __init__(self, weight: Format) -> None:
        if not isinstance(weight, (Tucker2, SVD)):
            raise TypeError(f"Orthogonal: weight must be in format tucker2 or svd, got {weight.name!r}")
        if not all(bool(torch.isfinite(factor).all()) for factor in weight.factors):
            raise ValueError(f"Orthogonal: the factors of {weight.name} must be finite, got NaN or Inf")
        self.weight = weight
        if isinstance(weight, Tucker2):
            core, out, into = (factor.detach().cpu().double() for factor in weight.factors)
            core = core.flatten(2)
        else:
            out, into = (factor.detach().cpu().double() for factor in (weight.a, weight.b.T))
            core = torch.eye(weight.rank, dtype=torch.float64).unsqueeze(2)
        (self.out, left), (self.into, right) = torch.linalg.qr(out), torch.linalg.qr(into)
        self.core = torch.einsum("ab,bck,dc->adk", left, core, right).contiguous()  # [R_out, R_in, K]
        self._modes = [_left_vectors(unfold(self.core, mode)) for mode in (0, 1)]

    @property
    def spectra(self) -> list[Tensor]:
        """The singular values that decide each rank, float64 descending, in the order of ``weight.rank``."""
        values = [found for _, found in self._modes]
        return values[:1] if isinstance(self.weight, SVD) else values

    @property
    def layout(self) -> RankLayout:
        """What rank selection asks of a weight, answered for these factors; no rank is above that of now."""
        made: RankLayout = _FactoredSVD(self) if isinstance(self.weight, SVD) else _FactoredTucker2(self)
        return made

    @torch.no_grad()
    def truncated(self, ranks: Sequence[int]) -> Format:
        """The weight at smaller ranks: the leading singular vectors of the core's unfoldings (HOSVD).

        Its squared distance is at most the sum of the squared singular values left out, of all modes; of a
        matrix it is the best there is. Factors come in the dtype and on the device of the weight, bases
        orthonormal.

        Raises:
            ValueError: ranks that are not in [1, rank].
        """
        spectra = self.spectra
        fits = len(ranks) == len(spectra) and all(
            1 <= rank <= len(values) for rank, values in zip(ranks, spectra, strict=True)
        )
        if not fits:
            largest = [len(values) for values in spectra]
            raise ValueError(f"Orthogonal: ranks must be from 1 to {largest} each, got {list(ranks)}")
        like = self.weight.factors[0]
        if isinstance(self.weight, SVD):
            u, s, vh = thin_svd(self.core.squeeze(2))
            kept = ranks[0]
            a, b = self.out @ (u[:, :kept] * s[:kept]), vh[:kept] @ self.into.T
            return SVD(a.to(like).contiguous(), b.to(like).contiguous())
        out, into = (vectors[:, :rank] for (vectors, _), rank in zip(self._modes, ranks, strict=True))
        core = torch.einsum("ab,ack,cd->bdk", out, self.core, into).unflatten(2, self.weight.shape[2:])
        factors = (core, self.out @ out, self.into @ into)
        return Tucker2(*(factor.to(like).contiguous() for factor in factors))


class _Factored(RankLayout):
    """A layout whose spectra are those of factors."""

    def __init__(self, found: Orthogonal) -> None:
        super().__init__(torch.empty(found.weight.shape, device="meta"))
        self.found = found

    @property
    def limits(self) -> Ranks:
        return tuple(len(values) for values in self.found.spectra)

    def spectra(self) -> list[Spectrum]:
        return [
            Spectrum(values, (size, self.numel // size))
            for values, size in zip(self.found.spectra, self.shape, strict=False)
        ]


class _FactoredTucker2(_Factored, Tucker2Layout):
    pass


class _FactoredSVD(_Factored, SVDLayout):
    pass


def _left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of a matrix."""
    if (
        matrix.shape[1] > matrix.shape[0]
    ):  # right vectors, which nobody asked for, would take most of the time
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    u, s, _ = thin_svd(matrix.contiguous())
    return u, s.clamp_min(0.0)
