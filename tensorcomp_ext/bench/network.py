"""The suite of whole networks: is the compressed one ever slower than the dense one?"""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..nn import FactorizedConv2d
from ..plan import PlannedLayer, tune
from .candidates import Candidate, Group, compile_call
from .cases import DTYPES, check_keys
from .devices import Device
from .measure import STAGED, TUNED, measure_candidates, wrong
from .problem import distance
from .roofline import Probe
from .timing import Effort

LAYOUT = "nhwc"
TOLERANCE = {"float32": 1e-3, "tf32": 5e-2, "float16": 5e-2, "bfloat16": 1.5e-1}
"""Relative L2 distance of the logits from the same network in float64, rounding of every layer together."""

DENSE = "dense"
TIE = 1.02
"""Noise that tuning itself calls a tie."""

_KEYS = ("network", "batch", "rank", "dtype")
_SIZES = {"resnet18": 224, "lenet5": 28}
_CHANNELS = {"lenet5": 1}
_CLASSES = {"resnet18": 1000}
_BATCHES = {"cpu": (1, 8, 32, 128), "cuda": (1, 8, 32, 128, 512)}
_TUNE_S = 0.01


@dataclass(frozen=True)
class NetworkCase:
    """A network, a batch, and the rank rule of its compression; ``dtype`` None: each one the run asks for."""

    network: str
    batch: int
    rank: float = 0.3
    dtype: str | None = None
    layout: str = LAYOUT

    def label(self) -> str:
        """Such as ``resnet32 batch 128 rank 0.3``."""
        return f"{self.network} batch {self.batch} rank {self.rank:g}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def network_from_dict(row: Mapping[str, Any], where: str = "case") -> NetworkCase:
    """Build a case from the JSON keys network, batch, rank, dtype; the first two are required.

    Raises:
        ValueError: unknown or missing keys, values out of range; the text names the case and the key.
    """
    check_keys(row, _KEYS, where)
    network, batch, rank = row.get("network"), row.get("batch"), row.get("rank", 0.3)
    if network not in models.names():
        raise ValueError(f"{where}: network must be one of {', '.join(models.names())}, got {network!r}")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"{where}: batch must be an int >= 1, got {batch!r}")
    if not isinstance(rank, float) or not 0 < rank <= 1:
        raise ValueError(f"{where}: rank must be a number in (0, 1], got {rank!r}")
    dtype = row.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return NetworkCase(network, batch, rank, dtype)


def network_cases(device: str) -> list[NetworkCase]:
    """ResNet-32 on 32x32 images and ResNet-18 on 224x224 ones, 0.3 of each layer's parameters kept."""
    return [NetworkCase(name, batch) for name in ("resnet32", "resnet18") for batch in _BATCHES[device]]


def quick_networks() -> list[NetworkCase]:
    return [NetworkCase("resnet20", 1), NetworkCase("lenet5", 3)]


def expand_networks(cases: Iterable[NetworkCase], dtypes: Sequence[str]) -> list[NetworkCase]:
    """Each case once for every dtype it leaves open."""
    return [
        replace(case, dtype=dtype) for case in cases for dtype in ([case.dtype] if case.dtype else dtypes)
    ]


@functools.lru_cache(maxsize=4)
def networks(name: str, rank: float) -> tuple[nn.Module, nn.Module]:
    """The dense network with random weights, and the same compressed; float32 on the CPU, channels-last.

    Batch normalisation has the statistics of one random batch, so that values stay of unit scale.
    """
    # Under inference mode the weights would be inference tensors, which no layer can prepare once.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = models.build(name, num_classes=_CLASSES.get(name, 10))
        for layer in _convolutions(dense):
            _decay(dense.get_submodule(layer).weight)  # type: ignore[arg-type]
        x = _images(name, 4, torch.float32, "cpu")
        for module in dense.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            dense.train()(x)
        dense.eval()
        compressed = copy.deepcopy(dense)
        for layer in _convolutions(dense):
            # One pass of SVDs: how good the approximation of random weights is does not matter here.
            found = FactorizedConv2d.from_conv(dense.get_submodule(layer), rank=rank, method="hosvd")
            compressed.set_submodule(layer, found)
        return dense, compressed.eval()


@torch.no_grad()
def _decay(weight: Tensor) -> None:
    """Give a random ``[T, S, kH, kW]`` the falling spectrum of a trained one: of noise alone, the
    decomposition looks long for the best subspace."""
    for mode in (0, 1):
        shape = [-1 if d == mode else 1 for d in range(weight.dim())]
        weight.div_(torch.arange(1.0, weight.shape[mode] + 1).reshape(shape))


def _convolutions(model: nn.Module) -> list[str]:
    """The convolutions beyond 1x1 and beyond the first: where Tucker-2 has something to save."""
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 and min(m.in_channels, m.out_channels) >= 6
    ]


def _images(name: str, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    size = _SIZES.get(name, 32)
    x = torch.randn(batch, _CHANNELS.get(name, 3), size, size, generator=torch.Generator().manual_seed(batch))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def measure_network(
    case: NetworkCase,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types: dense, ours staged and ours tuned; eager, and for inference on CUDA as graphs.

    A training step is forward, cross entropy, backward and an SGD step with momentum (of rate zero, so that
    every call meets the same weights). Logits are compared with the network's own in float64; gradients are
    not, where one flipped ReLU outweighs all rounding.
    """
    training = direction == "backward"
    row: dict[str, Any] = {
        "case": case.to_dict(),
        "label": case.label(),
        "direction": direction,
        "threads": threads,
        "device": device.name,
        "error": None,
    }
    torch.set_num_threads(max(threads, os.cpu_count() or 1))  # decomposing takes minutes on one core
    try:
        dense, compressed = networks(case.network, case.rank)
    finally:
        torch.set_num_threads(threads)
    with device.settings(case.dtype or "float32"), torch.set_grad_enabled(training):
        return row | _measure(case, training, device, compiled, effort, dense, compressed)


class _Built:
    """One network in the dtype and on the device of a row, and its float64 answer."""

    def __init__(
        self,
        model: nn.Module,
        case: NetworkCase,
        training: bool,
        device: Device,
        expected: Tensor | None = None,
    ) -> None:
        dtype = DTYPES[case.dtype or "float32"]
        self.case, self.training, self.device = case, training, device
        self.x = _images(case.network, case.batch, dtype, device.name)
        self.model = self._copy(model, dtype)
        self.expected = self._answer() if expected is None else expected
        self.target = torch.zeros(case.batch, dtype=torch.long, device=device.name)

    def _answer(self) -> Tensor:
        # Where cuDNN measures every algorithm it has, it does so for float64 too, for minutes.
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, False
        try:
            with torch.no_grad():
                return self._copy(self.model, torch.float64)(self.x.double())
        finally:
            cudnn.benchmark = before

    def _copy(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        with torch.inference_mode(False):
            made = copy.deepcopy(model).to(self.device.name, dtype)
            made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return made.train(self.training).requires_grad_(self.training)

    def fault(self, outputs: tuple[Tensor, ...]) -> str | None:
        error, allowed = distance(outputs[0], self.expected), TOLERANCE[self.case.dtype or "float32"]
        if not error <= allowed:
            return f"logits are {error:.1e} from float64 (relative L2), allowed {allowed:.0e}"
        return None

    def tune(self, graph: bool) -> str:
        """Tune the compressed network for its input; how many layers run which plan."""
        with torch.inference_mode(False):
            found = tune(self.model, self.x, training=self.training, min_seconds=_TUNE_S, cuda_graphs=graph)
        choices = Counter(entry.choice for entry in found.layers)
        return ", ".join(f"{count} {plan}" for plan, count in sorted(choices.items()))

    def call(self, run: Callable[[Tensor], Tensor] | None = None) -> Callable[[], tuple[Tensor, ...]]:
        forward, x = run or self.model, self.x
        if not self.training:

            def infer() -> tuple[Tensor, ...]:
                with torch.inference_mode():
                    return (forward(x),)

            return infer
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

        def train() -> tuple[Tensor, ...]:
            optimizer.zero_grad(set_to_none=True)
            y = forward(x)
            nn.functional.cross_entropy(y.float(), self.target).backward()
            optimizer.step()
            return (y.detach(),)

        return train


def _measure(
    case: NetworkCase,
    training: bool,
    device: Device,
    compiled: str,
    effort: Effort,
    dense: nn.Module,
    compressed: nn.Module,
) -> dict[str, Any]:
    faults: dict[str, Callable[[tuple[Tensor, ...]], str | None]] = {}
    candidates: list[Candidate] = []
    graphs = (False, True) if device.name == "cuda" and not training else (False,)

    def add(name: str, group: Group, built: _Built, graphs: Sequence[bool], note: str | None = None) -> None:
        for graph in graphs:
            label = f"{name} graph" if graph else f"{name} eager"
            candidates.append(Candidate(label, group, LAYOUT, built.call(), graph=graph, note=note))
            faults[label] = built.fault

    plain = _Built(dense, case, training, device)
    add(DENSE, "dense", plain, graphs)
    if compiled != "never":
        run = compile_call(plain.model, frozen=False)
        label = "dense compiled"
        candidates.append(Candidate(label, "dense", LAYOUT, plain.call(run), True, graph=False))
        faults[label] = plain.fault
    staged = _Built(compressed, case, training, device)
    for module in staged.model.modules():
        if isinstance(module, PlannedLayer):
            module.plan = "staged"
    add(STAGED, "ours", staged, graphs)
    for graph in graphs:  # the choice differs: launches cost nothing under a graph
        tuned = _Built(compressed, case, training, device, staged.expected)
        add(TUNED, "ours", tuned, (graph,), tuned.tune(graph))

    def fault(candidate: Candidate, outputs: tuple[Tensor, ...]) -> str | None:
        return faults[candidate.name](outputs)

    records, timed = measure_candidates(candidates, fault, device, effort)
    found = {"candidates": records, "wrong": wrong(records)}
    return found | verdict(records, {name: t.median_us for name, t in timed.items()})


def verdict(records: Sequence[Mapping[str, Any]], medians: Mapping[str, float]) -> dict[str, Any]:
    """Dense time over tuned time for each way of calling (eager, graph), and what a reader looks for first.

    ``ours_us`` is the tuned network in its fastest way; ``never_slower``: in no way is it more than 2 %
    behind the dense network called the same way.
    """
    ratios = {
        mode: medians[f"{DENSE} {mode}"] / medians[f"{TUNED} {mode}"]
        for mode in ("eager", "graph")
        if {f"{DENSE} {mode}", f"{TUNED} {mode}"} <= set(medians)
    }
    if not ratios:
        errors = {r["name"]: r["error"] for r in records if r["error"]}
        return {"error": "; ".join(f"{name}: {text}" for name, text in errors.items()) or "not measured"}
    return {
        "error": None,
        "ours_us": min(medians[f"{TUNED} {mode}"] for mode in ratios),
        "over_dense": ratios,
        "never_slower": min(ratios.values()) >= 1 / TIE,
    }
