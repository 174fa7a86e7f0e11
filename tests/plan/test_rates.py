"""How rates are measured and kept for each kind of device; CUDA by fakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tensorcomp_ext import _native
from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.plan import cache, cost, get_plan, rates, workload
from tensorcomp_ext.plan.precision import Tf32
from tensorcomp_ext.plan.workload import Workload


class Scripted:
    """A clock that reads the seconds of a call from the call."""

    shortest = 0.0

    def __init__(self, launch: float) -> None:
        self.launch = launch

    def sample(self, call: Callable[[], object], repeats: int = 1) -> float:
        return float(call()) + self.launch  # type: ignore[arg-type]


@pytest.mark.parametrize("host", [False, True])
def test_rates_from_the_seconds_of_the_work(host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(
        host=host,
        widths=(4, 8),
        calls=lambda width: {"conv": (width * 1000, lambda: 1e-3), "pair": (width * 10, lambda: 0.0)},
        tiny=lambda: 1e-6,
        copy=lambda: 1e-3 - 2e-6,
        copied=1 << 20,
        copy_near=lambda: 1e-5 - 2e-6,
        copied_near=1 << 17,
    )
    monkeypatch.setattr(rates, "workload", lambda *_: work)
    monkeypatch.setattr(workload, "_SECONDS", 0.0)
    monkeypatch.setattr(rates, "clock_for", lambda d, queued=False: Scripted(2e-6 if queued else 9e-6))
    found = rates.measure(torch.float16, "cuda")
    assert found.overhead == pytest.approx(1e-5)  # launch included
    spared = 1e-5 if host else 3e-6
    assert found.bandwidth == pytest.approx((1 << 20) / 1e-3)
    near = 1e-5 - spared / 2  # the clock adds a launch of 2 µs, half of what is spared is taken off
    assert found.cached == pytest.approx((1 << 17) / near)
    assert found.macs["conv"][8] == pytest.approx(8000 / (1e-3 + 2e-6 - spared))
    assert found.macs["pair"][4] == pytest.approx(40 / 1e-6)  # lighter than a call: half its time counts


def test_a_sample_of_work_is_taken_three_times_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "_SECONDS", 0.0)
    spent = iter([9.0, 3.0, 1.0, 2.0])
    assert workload.seconds_of(lambda: next(spent), Scripted(0.0)) == 1.0


def test_the_work_of_a_gpu_is_counted_right() -> None:
    """On the CPU, with fewer images: calls that have a kernel here run, and MACs follow the output."""
    options = {"dtype": torch.float32, "device": "cpu"}
    calls = workload._batch_calls(options, 16, entries=4 * 28 * 28 * 16)
    pixels = 4 * 28 * 28
    taps = {"conv": 9 * 16, "pointwise": 16, "linear": 16}
    for kind, each in taps.items():
        count, call = calls[kind]
        y = call()
        assert isinstance(y, torch.Tensor) and y.numel() == pixels * 16 and count == y.numel() * each
    if "fused" in calls:
        count, call = calls["fused"]
        assert call().shape == (2, 32, 28, 28)  # type: ignore[attr-defined]
        outer = 2 * 28 * 28 * 16 * 32
        assert count == 2 * 28 * 28 * 16 * 16 * 9 + 2 * outer
        assert calls["partial"][0] == count - outer


@pytest.fixture
def fake_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Two CUDA devices of which only names can be asked; the calls of ``measure``."""
    measured: list[tuple[object, ...]] = []
    names = {"cuda": "Big", "cuda:0": "Big", "cuda:1": "Small"}
    monkeypatch.setenv("TENSORCOMP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(rates, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(rates, "measure", lambda *a: measured.append(a) or rates.Rates())
    return measured


def test_equal_devices_share_their_rates(fake_cuda: list[tuple[object, ...]]) -> None:
    assert cache.hardware("cuda:1") == "Small" and cache.machine("cuda").startswith("Big, torch ")
    assert cache.hardware() == cache.hardware("cpu") != "Big"
    for device, threads in (("cuda", 1), ("cuda:0", 2), ("cuda:1", 1), ("cuda:1", 2)):
        rates.rates(torch.float16, device, threads)
    assert fake_cuda == [(torch.float16, "cuda"), (torch.float16, "cuda:1")]


def test_rates_of_float32_are_those_of_the_precision_set(
    fake_cuda: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, times in ((torch.float32, 4), (torch.bfloat16, 1)):
        fake_cuda.clear()
        for allowed in (Tf32(), Tf32(True), Tf32(False, True), Tf32(True, True)):
            monkeypatch.setattr(rates, "tf32_state", lambda device, allowed=allowed: allowed)
            rates.rates(dtype, "cuda", 1)
        assert len(fake_cuda) == times


def test_rates_are_measured_again_when_kernels_came_with_a_rebuild(
    fake_cuda: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for ok in (False, True, False):
        monkeypatch.setattr(_native, "_CUDA", _native.Support(ok))
        rates.rates(torch.float16, "cuda", 1)
    assert len(fake_cuda) == 2


def test_guesses_serve_until_it_can_be_measured(
    fake_cuda: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, capturing = rates.measure, [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert rates.rates(torch.float16, "cuda", 1) == rates.Rates() and not fake_cuda

    def full(*_: object) -> rates.Rates:
        raise torch.OutOfMemoryError("CUDA out of memory")

    capturing[0] = False
    monkeypatch.setattr(rates, "measure", full)
    assert rates.rates(torch.float16, "cuda", 1) == rates.Rates()
    monkeypatch.setattr(rates, "measure", real)
    rates.rates(torch.float16, "cuda", 1)
    assert len(fake_cuda) == 1


def test_the_cost_of_a_layer_is_that_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cost, "rates", lambda dtype, device, threads: asked.append(device) or rates.Rates())
    layer = FactorizedLinear(6, 5, rank=2)
    case = layer.case(torch.ones(1, 6), False)
    cost.predict(get_plan("staged"), layer, case)

    class There:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(type(layer.weight), "factors", [There()])
    cost.predict(get_plan("staged"), layer, case._replace(device="cuda"))
    cost.predict(get_plan("staged"), layer, case)
    assert asked == ["cpu", "cuda:1", "cpu"]


SOUND = {"conv": {8: 2e10, 32: 7e10, 128: 1e11}, "linear": {8: 6e9, 32: 5e10, 128: 5e10}}


@pytest.mark.parametrize(
    ("kind", "width", "rate"), [("conv", 32, 1e7), ("linear", 8, 1e7), ("conv", 128, 1e10), (None, 0, 0.0)]
)
def test_rates_that_do_not_fit_are_measured_again(
    kind: str | None, width: int, rate: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other work slowed one call down; what was stored so before is not believed either."""
    tables = {name: dict(table) for name, table in SOUND.items()}
    if kind is not None:
        tables[kind][width] = rate
    first, later = rates.Rates(tables, 2e10, 2e-5, 1e11), rates.Rates(SOUND, 1e10, 1e-5, 2e11)
    assert first.disturbed == (kind is not None) and not later.disturbed
    made = [first, later, later]
    monkeypatch.setattr(rates, "measure", lambda dtype, device: made.pop(0))
    monkeypatch.setattr(rates, "_known", {})
    monkeypatch.setenv("TENSORCOMP_CACHE_DIR", str(tmp_path))
    path = cache.cache_directory() / "rates.json"
    cache.store(path, rates._key(torch.float32, "cpu", 1), first.to_dict())
    found = rates.rates(torch.float32, "cpu", 1)
    if kind is None:
        assert found == first and len(made) == 3
        return
    assert found == rates.Rates(SOUND, 2e10, 1e-5, 2e11) and len(made) == 1
    assert rates.Rates.from_dict(cache.load(path)[rates._key(torch.float32, "cpu", 1)]) == found


def test_rates_that_never_fit_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = rates.Rates({"conv": {8: 1e10, 32: 1e7}}, 1e10, 1e-5, 1e11)
    monkeypatch.setattr(rates, "measure", lambda dtype, device: broken)
    monkeypatch.setattr(rates, "_known", {})
    monkeypatch.setenv("TENSORCOMP_CACHE_DIR", str(tmp_path))
    assert rates.rates(torch.float32, "cpu", 1) == broken
    assert not (cache.cache_directory() / "rates.json").exists()
