"""The rows of the network suite: a network, how it is compressed, and a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .cases import DTYPES, check_keys
from .network_schemes import FRACTION, NETWORKS, schemes

LAYOUT = "nhwc"
_KEYS = ("network", "scheme", "batch", "rank", "dtype")
_BATCHES = {"cpu": (1, 8, 32, 128), "cuda": (1, 8, 32, 128, 512)}


@dataclass(frozen=True)
class NetworkCase:
    """A network, a batch and a scheme of compression; ``dtype`` None: each one the run asks for.

    ``rank`` is the share of the parameters of each convolution that the scheme "fraction" keeps.
    """

    network: str
    batch: int
    rank: float = 0.3
    dtype: str | None = None
    layout: str = LAYOUT
    scheme: str = FRACTION

    def label(self) -> str:
        """Such as ``resnet32 batch 128 rank 0.3`` or ``resnet32 batch 128 tr10``."""
        text = f"rank {self.rank:g}" if self.scheme == FRACTION else self.scheme
        return f"{self.network} batch {self.batch} {text}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def network_from_dict(row: Mapping[str, Any], where: str = "case") -> NetworkCase:
    """Build a case from the JSON keys network, scheme, batch, rank, dtype; network and batch are required.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    check_keys(row, _KEYS, where)
    network, batch, rank = row.get("network"), row.get("batch"), row.get("rank", 0.3)
    if network not in NETWORKS:
        raise ValueError(f"{where}: network must be one of {', '.join(NETWORKS)}, got {network!r}")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"{where}: batch must be an int >= 1, got {batch!r}")
    if not isinstance(rank, float) or not 0 < rank <= 1:
        raise ValueError(f"{where}: rank must be a number in (0, 1], got {rank!r}")
    known = schemes(network)
    scheme = row.get("scheme", known[0])
    if scheme not in known:
        raise ValueError(f"{where}: scheme of {network} must be one of {', '.join(known)}, got {scheme!r}")
    dtype = row.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return NetworkCase(network, batch, rank, dtype, scheme=scheme)


_LISTED = (
    ("resnet18", ("nrmf",)),
    ("resnet32", ("tr10", "tr15", "tucker2")),
    ("vgg16", ("tucker2",)),
    ("lenet5", ("tr10",)),
    ("vit_block", ("tt", "svd")),
    ("mlp", ("svd128", "svd256", "svd512")),
)


def network_cases(device: str) -> list[NetworkCase]:
    """On the CPU every network of the experiments in each of its schemes; on CUDA ResNet-32 on 32x32 images
    and ResNet-18 on 224x224 ones, 0.3 of each layer's parameters kept."""
    if device == "cuda":
        return [NetworkCase(name, batch) for name in ("resnet32", "resnet18") for batch in _BATCHES[device]]
    return [
        NetworkCase(name, batch, scheme=scheme)
        for name, listed in _LISTED
        for scheme in listed
        for batch in _BATCHES[device]
    ]


def quick_networks() -> list[NetworkCase]:
    return [NetworkCase("resnet20", 1), NetworkCase("lenet5", 3)]


def expand_networks(cases: Iterable[NetworkCase], dtypes: Sequence[str]) -> list[NetworkCase]:
    """Each case once for every dtype it leaves open."""
    return [
        replace(case, dtype=dtype) for case in cases for dtype in ([case.dtype] if case.dtype else dtypes)
    ]
