"""Calls as replays of CUDA graphs, to be timed as a network served under graphs runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]

_WARM_UP = 3


def capture(call: Call, device: torch.device) -> Call:
    """The replay of a CUDA graph that holds one ``call``.

    Raises:
        RuntimeError: the call does what a graph cannot hold, such as waiting for the device.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # Round the capture too: where that fails, torch.cuda.graph leaves its stream the current one.
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):  # what libraries set up at their first calls must not be captured
                call()
            with torch.cuda.graph(graph, stream=side):  # begins with the device idle
                result = call()
        torch.cuda.current_stream().wait_stream(side)

    # The graph knows addresses only: the call holds what it reads, the result what it writes.
    held = call, result

    def replay() -> object:
        graph.replay()
        return held[1]

    return replay


def captured(
    calls: Mapping[str, Call], device: torch.device, capture: Callable[[Call, torch.device], Call] = capture
) -> tuple[dict[str, Call], dict[str, str]]:
    """Replays of those calls that can be captured, and for each other one the reason."""
    replays: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name, call in calls.items():
        try:
            replays[name] = capture(call, device)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            refused[name] = f"cannot be captured in a CUDA graph: {reason}"
    return replays, refused


def check_graphs(devices: Mapping[str, torch.device]) -> None:
    """Raise ``ValueError`` naming the first of ``{layer: device}`` that has no CUDA graphs."""
    for name, device in devices.items():
        if device.type != "cuda":
            layer = f"layer {name!r}" if name else "the layer"
            raise ValueError(f"tune: cuda_graphs=True needs layers on a CUDA device, {layer} is on {device}")
