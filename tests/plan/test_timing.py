"""Clocks, interleaving and CUDA graphs, with fakes where a machine without CUDA has nothing to time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.plan import Timing, clock, graphs, time_interleaved, timing, tune, tuner
from tensorcomp_ext.plan.clock import CpuClock, CudaClock, clock_for
from tensorcomp_ext.plan.graphs import captured


class Scripted:
    """A clock that knows beforehand what each call takes."""

    def __init__(self, shortest: float, spent: dict[str, float]) -> None:
        self.shortest, self.spent = shortest, spent
        self.taken: list[tuple[str, int]] = []

    def sample(self, call: Callable[[], object], repeats: int = 1) -> float:
        name = str(call())
        self.taken.append((name, repeats))
        return self.spent[name]


def named(*names: str) -> dict[str, Callable[[], object]]:
    return {name: lambda name=name: name for name in names}


def test_turns_are_interleaved_on_any_clock() -> None:
    fake = Scripted(0.0, {"a": 1e-3, "b": 2e-3})
    found = time_interleaved(named("a", "b"), 0.02, clock=fake)
    rounds = found["a"].rounds
    assert rounds == 20 and found["b"] == Timing(2e-3, 2e-3, 2e-3, rounds)
    assert [name for name, _ in fake.taken[6:]] == ["a", "b"] * rounds
    assert {repeats for _, repeats in fake.taken} == {1}


def test_short_calls_are_repeated_up_to_the_shortest_sample() -> None:
    fake = Scripted(5e-5, {"a": 1e-5, "b": 2e-3})
    time_interleaved(named("a", "b"), 1e-3, clock=fake)
    assert set(fake.taken[6:]) == {("a", 5), ("b", 1)}


def test_hopeless_calls_get_few_rounds() -> None:
    fake = Scripted(0.0, {"a": 1e-3, "b": 6e-3})
    found = time_interleaved(named("a", "b"), 0.02, clock=fake)
    assert (found["a"].rounds, found["b"].rounds) == (20, 3)


def test_clock_of_the_cpu() -> None:
    calls: list[int] = []
    found = clock_for("cpu", queued=True)
    assert isinstance(found, CpuClock)
    assert 0 < found.sample(lambda: calls.append(1), 7) < 1 and len(calls) == 7


@pytest.mark.parametrize("queued", [False, True])
def test_samples_on_cuda_start_with_a_cold_cache(queued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("event")

        def synchronize(self) -> None:
            events.append("wait for event")

        def elapsed_time(self, end: Event) -> float:
            return 6.0

    size = 3 << 25
    fake = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=size),
        "Event": Event,
        "synchronize": lambda: events.append("wait"),
        "device": lambda device: nullcontext(),
    }
    for name, value in fake.items():
        monkeypatch.setattr(clock.torch.cuda, name, value)
    taker = CudaClock("cpu", queued)
    assert taker._sweep.nbytes == 2 * size
    taker._sweep = SimpleNamespace(zero_=lambda: events.append("sweep"))  # type: ignore[assignment]
    assert taker.sample(lambda: events.append("call"), 2) == pytest.approx(3e-3)
    waited = [] if queued else ["wait"]
    assert events == ["sweep", *waited, "event", "call", "call", "event", "wait for event"]


def refusing(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A capture that takes every call but those that fail."""
    call()
    return lambda: ("replay", call())


def broken() -> object:
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_capture_errors_are_reasons() -> None:
    replays, refused = captured({"a": lambda: 1, "b": broken}, torch.device("cuda"), refusing)
    assert list(replays) == ["a"] and replays["a"]() == ("replay", 1)
    assert refused == {"b": "cannot be captured in a CUDA graph: operation not permitted"}

    def mistaken() -> object:
        raise TypeError("a fault of ours")

    with pytest.raises(TypeError, match="a fault of ours"):
        captured({"a": mistaken}, torch.device("cuda"), refusing)


def test_graphs_are_refused_on_the_cpu() -> None:
    ran: list[object] = []
    layer = FactorizedLinear(4, 4, rank=2)
    layer.register_forward_pre_hook(lambda *a: ran.append(a))
    with pytest.raises(ValueError, match=r"tune: cuda_graphs=True needs .*, the layer is on cpu"):
        tune(layer, torch.randn(2, 4), cuda_graphs=True)
    with pytest.raises(ValueError, match=r"CUDA device, layer '0' is on cpu"):
        tune(torch.nn.Sequential(layer), torch.randn(2, 4), cuda_graphs=True)
    assert not ran and not layer.tuned


def test_replays_are_timed_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def capture(calls: dict[str, Any], device: torch.device) -> Any:
        return captured({**calls, "staged": broken}, device, refusing)

    def timed(calls: dict[str, Any], seconds: float, device: object, clock: object) -> dict[str, Timing]:
        assert all(call()[0] == "replay" for call in calls.values())
        assert clock == "clock"
        return {name: Timing(1e-5, 1e-5, 1e-5, 5) for name in calls}

    monkeypatch.setattr(tuner, "check_graphs", asked.append)
    monkeypatch.setattr(tuner, "captured", capture)
    monkeypatch.setattr(tuner, "clock_for", lambda device, queued: asked.append(queued) or "clock")
    monkeypatch.setattr(tuner, "time_interleaved", timed)
    layer = FactorizedConv2d(4, 6, 3, rank=(2, 2))
    for training in (False, True):
        (entry,) = tune(layer, torch.randn(1, 4, 8, 8), training=training, cuda_graphs=True).layers
        assert entry.choice == "dense" and "staged" not in entry.timings
        assert entry.unavailable["staged"].startswith("cannot be captured in a CUDA graph: ")
        assert "partial" in entry.unavailable
    assert asked == [{"": torch.device("cpu")}, True] * 2


def test_a_capture_is_warmed_up_on_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    fake = {
        "Stream": Stream,
        "current_stream": lambda: Stream("current"),
        "stream": lambda stream: nullcontext(events.append(stream.name)),
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: nullcontext(events.append("capture")),
        "device": lambda device: nullcontext(),
    }
    for name, value in fake.items():
        monkeypatch.setattr(graphs.torch.cuda, name, value)
    replay = graphs.capture(lambda: events.append("call") or "result", torch.device("cuda"))
    begun = ["side waits for current", "side", "call", "call", "call"]
    assert events == [*begun, "capture", "call", "current waits for side"]
    assert replay() == "result" and events[-1] == "replay" and events.count("call") == 4


def test_a_replay_holds_what_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        pass

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, stream: nullcontext(),
        "device": lambda device: nullcontext(),
    }
    for name, value in fake.items():
        monkeypatch.setattr(graphs.torch.cuda, name, value)

    def bound(weights: Weights) -> Callable[[], object]:
        return lambda: weights is not None

    weights = Weights()
    seen = weakref.ref(weights)
    replay = graphs.capture(bound(weights), torch.device("cuda"))
    del weights
    assert seen() is not None
    del replay
    assert seen() is None


def test_a_failed_capture_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda.graph`` makes its stream the current one and keeps it where the capture cannot end."""
    current = ["default"]

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    @contextmanager
    def chosen(stream: object) -> Iterator[None]:
        before = current[:]
        current[:] = ["side"]
        try:
            yield
        finally:
            current[:] = before

    class Graph:
        def __init__(self, graph: object, stream: object) -> None: ...

        def __enter__(self) -> None:
            current[:] = ["side"]

        def __exit__(self, *error: object) -> None:
            broken()

    fake = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": chosen,
        "CUDAGraph": object,
        "graph": Graph,
        "device": lambda device: nullcontext(),
    }
    for name, value in fake.items():
        monkeypatch.setattr(graphs.torch.cuda, name, value)
    assert list(captured({"a": lambda: 1}, torch.device("cuda"))[1]) == ["a"]
    assert current == ["default"]


def test_cold_samples_sweep_the_caches_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cold = CpuClock(cold=True)
    assert cold.shortest == 0.0 and CpuClock().shortest > 0.0
    swept, seen = cold._sweep, []
    assert swept is not None and swept.numel() * swept.element_size() >= 1 << 21
    for _ in range(2):
        cold.sample(lambda: seen.append(int(swept[0])))
    assert seen == [1, 2]
    asked = []
    monkeypatch.setattr(timing, "clock_for", lambda device, **how: asked.append(how) or cold)
    time_interleaved({"a": lambda: None}, 1e-4)
    assert asked == [{"cold": True}]
