"""The suites by name: their cases, how a case is read, and how a row is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .cases import Case, case_from_dict, development_cases, expand, quick_cases, read_cases
from .chain import measure_chain
from .chain_cases import chain_cases, chain_from_dict, expand_dtypes, quick_chains
from .conv import measure_conv
from .conv_cases import conv_cases, conv_from_dict, quick_convs
from .devices import Device
from .embedding import measure_embedding
from .embedding_cases import embedding_cases, embedding_from_dict, quick_embeddings
from .network import measure_network
from .network_cases import expand_networks, network_cases, network_from_dict, quick_networks
from .pair import LARGE as LARGE_ROWS
from .pair import expand_pairs, measure_pair, pair_cases, pair_from_dict, quick_pairs
from .roofline import Probe
from .sparse import measure_sparse
from .sparse_cases import LARGE as LARGE_WEIGHT
from .sparse_cases import quick_sparse, sparse_cases, sparse_from_dict
from .timing import Effort
from .tucker2_device import LARGE, large_cases, measure_device_row, pixels


class AnyCase(Protocol):
    """What every suite's case has."""

    @property
    def dtype(self) -> str | None: ...

    @property
    def layout(self) -> str | None: ...

    def label(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


class Measure(Protocol):
    """Measures one row."""

    def __call__(
        self,
        case: Any,
        direction: str,
        threads: int,
        *,
        device: Device,
        compiled: str,
        effort: Effort,
        probe: Probe,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Suite:
    """One kind of row."""

    development: Callable[[str], Sequence[Any]]
    """The cases a device is measured on."""
    quick: Callable[[], Sequence[Any]]
    read: Callable[[Mapping[str, Any], str], Any]
    expand: Callable[[Sequence[Any], Sequence[str], Sequence[str]], Sequence[Any]]
    """Each case once for every dtype and layout it leaves open."""
    measure: Measure
    large: Callable[[Any], bool]
    """Whether a case fills a large GPU."""
    keys: str
    """For the help text."""


def _convolutions(device: str) -> list[Case]:
    return (large_cases() if device == "cuda" else []) + development_cases()


SUITES: dict[str, Suite] = {
    "tucker2": Suite(
        _convolutions,
        quick_cases,
        case_from_dict,
        expand,
        measure_device_row,
        lambda case: pixels(case) >= LARGE,
        "N,S,T,H,W,k,stride,padding,dilation,r_in,r_out,layout,dtype (S and H required)",
    ),
    "pair": Suite(
        pair_cases,
        quick_pairs,
        pair_from_dict,
        lambda cases, dtypes, layouts: expand_pairs(cases, dtypes),
        measure_pair,
        lambda case: case.rows >= LARGE_ROWS,
        "rows,in,out,rank,dtype",
    ),
    "chain": Suite(
        chain_cases,
        quick_chains,
        chain_from_dict,
        lambda cases, dtypes, layouts: expand_dtypes(cases, dtypes),
        measure_chain,
        lambda case: True,
        "format,in,out,in_modes,out_modes,rank,rows,dtype",
    ),
    "embedding": Suite(
        embedding_cases,
        quick_embeddings,
        embedding_from_dict,
        lambda cases, dtypes, layouts: expand_dtypes(cases, dtypes),
        measure_embedding,
        lambda case: True,
        "format,vocab,dim,vocab_modes,dim_modes,rank,rows,dtype",
    ),
    "conv": Suite(
        conv_cases,
        quick_convs,
        conv_from_dict,
        expand,
        measure_conv,
        lambda case: True,
        "format,rank,N,S,T,H,W,k,stride,padding,dilation,layout,dtype (format, rank, S and H required)",
    ),
    "lowrank_sparse": Suite(
        sparse_cases,
        quick_sparse,
        sparse_from_dict,
        lambda cases, dtypes, layouts: expand_dtypes(cases, dtypes),
        measure_sparse,
        lambda case: case.c_out * case.c_in >= LARGE_WEIGHT,
        "out,in,rank,rows,sparsity,mode,dtype (out and in required; without rows the weight alone)",
    ),
    "network": Suite(
        network_cases,
        quick_networks,
        network_from_dict,
        lambda cases, dtypes, layouts: expand_networks(cases, dtypes),
        measure_network,
        lambda case: True,
        "network,batch,scheme,rank,dtype",
    ),
}


def suite_cases(suite: str, device: str, *, quick: bool = False, path: Path | None = None) -> Sequence[Any]:
    """The cases of a run: those of a file, else the quick or the development ones.

    Raises:
        ValueError: unknown suite; a bad file or case.
        OSError: the file cannot be read.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be of {', '.join(SUITES)}, got {suite!r}")
    chosen = SUITES[suite]
    if path is not None:
        return read_cases(path, chosen.read)
    return chosen.quick() if quick else chosen.development(device)
