"""What measures several plans at once, on the CPU and with a false clock: rows, events, summaries."""

import json
import sys
import types

import pytest
import torch

from tensorcomp_ext import models
from tensorcomp_ext.bench import network as network_module
from tensorcomp_ext.bench import problem as problem_module
from tensorcomp_ext.bench.__main__ import main
from tensorcomp_ext.bench.candidates import Candidate
from tensorcomp_ext.bench.cases import case_from_dict
from tensorcomp_ext.bench.cuda_machine import clocks, precision
from tensorcomp_ext.bench.cuda_timing import Prepared, interleave_events
from tensorcomp_ext.bench.device_summary import (
    device_summary,
    device_table,
    network_summary,
    never_slower_line,
)
from tensorcomp_ext.bench.devices import Cpu, get_device
from tensorcomp_ext.bench.measure import FUSED, STAGED, TUNED, measure_candidates, offer, outcome, slack
from tensorcomp_ext.bench.measure import wrong as wrong_ways
from tensorcomp_ext.bench.network import measure_network, verdict
from tensorcomp_ext.bench.network_cases import NetworkCase, network_from_dict
from tensorcomp_ext.bench.pair import (
    PairCase,
    PairProblem,
    library_ways,
    measure_pair,
    our_ways,
    pair_cases,
    pair_from_dict,
)
from tensorcomp_ext.bench.roofline import Probe, Rate, work
from tensorcomp_ext.bench.suites import suite_cases
from tensorcomp_ext.bench.summary import row_key
from tensorcomp_ext.bench.tables import markdown, row_line
from tensorcomp_ext.bench.timing import Effort
from tensorcomp_ext.bench.tucker2_device import LARGE, large_cases, measure_device_row, pixels

EFFORT = Effort(budget_s=0.0, min_rounds=2, max_rounds=2, warmup_s=0.0)
TINY = {"N": 2, "S": 5, "T": 7, "H": 6, "W": 5, "r_in": 3, "r_out": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORCOMP_CACHE_DIR", str(tmp_path))


class FixedProbe(Probe):
    def peak(self, dtype, threads):
        return Rate(1e9, "fixed")

    def bandwidth(self, working_set, threads):
        return Rate(1e6, "fixed")


OPTIONS = {"device": Cpu(), "compiled": "never", "effort": EFFORT, "probe": FixedProbe()}


class FalseClock:
    """A GPU whose calls take the time they add to it."""

    def __init__(self):
        self.now, self.flushed, self.waits = 0.0, 0, 0

    def flush(self):
        self.flushed += 1
        self.now += 1000.0

    def mark(self):
        return self.now

    def elapsed_us(self, begin, end):
        return end - begin

    def synchronize(self):
        self.waits += 1


def test_events_time_single_calls_in_turn_with_the_cache_flushed():
    clock, order = FalseClock(), []

    def call(name, spent):
        def run():
            order.append(name)
            clock.now += spent

        return run

    calls = {"a": call("a", 10.0), "b": call("b", 30.0), "slow": call("slow", 500.0)}
    effort = Effort(budget_s=1e9, min_rounds=3, max_rounds=5)
    timed = interleave_events(calls, effort, clock)
    assert {n: t.median_us for n, t in timed.items()} == {"a": 10.0, "b": 30.0, "slow": 500.0}
    assert [timed[n].samples for n in calls] == [5, 5, 3]  # ten times the fastest: the least rounds only
    assert clock.flushed == len(order) and clock.waits == 3 + 5
    assert order[9:18] == ["a", "b", "slow", "b", "slow", "a", "slow", "a", "b"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_convolution_row_has_every_way(direction, layout):
    case = case_from_dict(TINY | {"dtype": "float32", "layout": layout})
    row = measure_device_row(case, direction, 1, **OPTIONS)
    assert row["error"] is None and row["headline"] == TUNED and not row["large"]
    by_name = {c["name"]: c for c in row["candidates"]}
    assert {TUNED, STAGED, "ours op", f"stages eager {layout}", "dense eager nhwc"} <= set(by_name)
    assert by_name[TUNED]["plan"] in {"dense", "staged", "fused", "partial"}
    for name, found in row["ours"].items():
        assert found["over_stages"] == pytest.approx(
            by_name[row["best_stages"]]["median_us"] / by_name[name]["median_us"]
        )
    assert row["over_dense_here"] == pytest.approx(
        by_name[f"dense eager {layout}"]["median_us"] / by_name[TUNED]["median_us"]
    )
    assert ("memory" in row) == (direction == "backward")
    assert TUNED in row_line(row) and json.dumps(row)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_way_of_a_pair_agrees_with_the_oracle(training, dtype):
    problem = PairProblem(PairCase(9, 17, 13, 5, dtype), training=training)
    with torch.inference_mode(not training):
        ways = our_ways(problem) + library_ways(problem, "never")
        refused = {}
        for way in ways:
            try:
                outputs = way.to_factors(way.call())
            except ValueError as error:
                refused[way.name] = str(error)
                continue
            assert problem.fault(outputs) is None, way.name
            assert len(outputs) == (1 if not training else 2 if way.group == "dense" else 5)
    assert set(refused) <= {FUSED}, refused
    assert {"stages eager", "rebuild eager", "dense eager", TUNED, STAGED} <= {way.name for way in ways}


def test_pair_row_and_its_roofline_by_hand():
    case = PairCase(8, 6, 4, 2, "float32")
    assert (case.macs(), case.dense_macs()) == (8 * 2 * 10, 8 * 24)
    assert work(case, "forward") == (320, 4 * (48 + 32 + 20 + 4))
    row = measure_pair(case, "forward", 1, **OPTIONS)
    assert row["error"] is None and row["roofline"]["flops"] == 320
    assert row_key(row) == row_key(json.loads(json.dumps(row)))
    assert "pair" not in row_line(row) and "8x6>4 r2" in row_line(row)


def test_network_row_compares_whole_networks():
    row = measure_network(NetworkCase("lenet5", 2, 0.3, "float32"), "forward", 1, **OPTIONS)
    errors = {c["name"]: c["error"] for c in row["candidates"]}
    ours = {"ours untuned eager", "ours tuned eager", "ours folded eager"}
    assert {name for name, error in errors.items() if error is None} >= {"dense eager", "stages eager"} | ours
    assert "no batch normalisation" in errors["dense folded eager"]
    assert row["parameters"]["compressed"] < row["parameters"]["dense"] == 429_100
    trained = measure_network(NetworkCase("lenet5", 2, 0.3, "float32"), "backward", 1, **OPTIONS)
    assert trained["error"] is None and trained["over_dense"]["eager"] > 0


def test_networks_are_the_packages_own():
    assert {case.network for case in suite_cases("network", "cuda")} <= set(models.names())


def test_wrong_logits_are_noticed(monkeypatch):
    monkeypatch.setattr(network_module, "TOLERANCE", {"float32": 1e-12})
    row = measure_network(NetworkCase("lenet5", 2, 0.3, "float32"), "forward", 1, **OPTIONS)
    assert "from float64" in row["error"]


def test_verdict_compares_like_with_like():
    medians = {"dense eager": 10.0, "ours tuned eager": 8.0, "dense graph": 4.0, "ours tuned graph": 5.0}
    found = verdict([], medians)
    assert found["over_dense"] == {"eager": 1.25, "graph": 0.8} and not found["never_slower"]
    assert found["ours_us"] == 5.0
    assert verdict([{"name": "x", "error": "broken"}], {})["error"] == "x: broken"
    row = {"label": "net", "case": {"dtype": "float16"}, "direction": "forward", **found}
    text = never_slower_line({"summary": {"network": network_summary([row])}})
    assert "0 of 1 rows" in text and "net (1.25 eager, 0.80 graph)" in text


def test_what_cannot_serve_is_recorded_and_not_timed():
    def wrong():
        return (torch.zeros(1),)

    def broken():
        raise ValueError("plan 'fused' cannot serve: no CUDA")

    good = Candidate("good", "stages", "rows", lambda: (torch.ones(1),))
    late = Candidate("late", "stages", "rows", lambda: (torch.ones(1),), compiled=True)
    found = [
        good,
        Candidate("wrong", "ours", "rows", wrong),
        offer("refused", "ours", "rows", broken),
        late,
    ]
    records, timed = measure_candidates(
        found,
        lambda c, outputs: None if outputs[0] == 1 else "y is off",
        Cpu(),
        EFFORT,
        compile_s=-1.0,
    )
    assert set(timed) == {"good"}
    assert wrong_ways(records) == ["wrong: y is off"]  # a refusal is no mistake
    errors = {r["name"]: r["error"] for r in records}
    assert errors["good"] is None and errors["wrong"] == "y is off"
    assert "cannot serve" in errors["refused"] and "left out" in errors["late"]


def test_limits_are_those_of_the_tests_and_wider_for_the_library():
    assert problem_module.FORWARD_TOLERANCE["float32"] == 1e-5
    assert problem_module.GRADIENT_TOLERANCE["float32"] == 1e-4
    problem = PairProblem(PairCase(9, 17, 13, 5, "float32"), training=False)
    off = (problem.expected[0] * (1 + 2e-5),)
    assert "allowed 1e-05" in problem.fault(off)
    assert problem.fault(off, slack(Candidate("a", "stages", "rows", lambda: off))) is None
    assert slack(Candidate("a", "ours", "rows", lambda: off)) == 1.0


def test_failed_capture_is_timed_eager_and_marked():
    class Stubborn(Cpu):
        def prepare(self, call, graph):
            return Prepared(call, "eager", "RuntimeError: no capture") if graph else Prepared(call, "eager")

    candidate = Candidate("a", "ours", "rows", lambda: (torch.ones(1),))
    (record,), timed = measure_candidates([candidate], lambda c, o: None, Stubborn(), EFFORT)
    assert record["how"] == "eager" and record["capture_error"] == "RuntimeError: no capture"
    assert "a" in timed


def test_replay_that_differs_is_a_fault():
    class Forgetful(Cpu):
        def prepare(self, call, graph):
            return Prepared(lambda: (torch.zeros(1),), "graph")

    candidate = Candidate("a", "ours", "rows", lambda: (torch.ones(1),))
    (record,), timed = measure_candidates(
        [candidate], lambda c, o: None if o[0] == 1 else "y is off", Forgetful(), EFFORT
    )
    assert record["error"] == "replayed: y is off" and not timed


def make_row(label, large, tuned, fused, dense, stages, macs=10, dense_macs=40):
    medians = {TUNED: tuned, FUSED: fused, "dense eager nchw": dense, "stages eager nchw": stages}
    groups = {TUNED: "ours", FUSED: "ours", "dense eager nchw": "dense", "stages eager nchw": "stages"}
    row = {
        "case": {"dtype": "float16", "layout": "nchw"},
        "label": label,
        "direction": "forward",
        "large": large,
        "macs": macs,
        "dense_macs": dense_macs,
        "roofline": {"time_us": 1.0},
        "candidates": [{"name": n, "group": g, "layout": "nchw", "error": None} for n, g in groups.items()],
    }

    class Fixed:
        def __init__(self, value):
            self.median_us = value

    return row | outcome(row, {name: Fixed(value) for name, value in medians.items()})


def test_summary_by_hand():
    rows = [
        make_row("a", True, tuned=2.0, fused=2.0, dense=8.0, stages=4.0),
        make_row("b", True, tuned=4.0, fused=8.0, dense=4.0, stages=32.0),
        make_row("small", False, tuned=2.0, fused=4.0, dense=1.0, stages=9.0),
        make_row("few saved", False, tuned=2.0, fused=4.0, dense=1.0, stages=9.0, dense_macs=20),
    ]
    (group,) = device_summary(rows)
    assert group["large_rows"] == 2 and group["rows"] == 4
    assert group["large"][TUNED]["over_stages"] == pytest.approx((2.0 * 8.0) ** 0.5)
    assert group["large"][FUSED]["over_any"] == pytest.approx((2.0 * 0.5) ** 0.5)
    assert group["large"][FUSED]["roofline_share_min"] == pytest.approx(1 / 8)
    assert [r["label"] for r in group["below_one"]] == ["small", "few saved"]
    assert [r["label"] for r in group["saving_and_slower"]] == ["small"]
    assert "| 4.00 (2.00) |" in markdown(device_table({"summary": {"device": [group]}}))


def test_headline_falls_back_to_the_fastest_of_ours():
    row = {
        "case": {"layout": "rows"},
        "macs": 1,
        "dense_macs": 2,
        "roofline": {"time_us": 1.0},
        "candidates": [
            {"name": TUNED, "group": "ours", "layout": "rows", "error": "y is off"},
            {"name": FUSED, "group": "ours", "layout": "rows", "error": None},
        ],
    }
    timing = type("Timing", (), {"median_us": 4.0})()
    found = outcome(row, {FUSED: timing})
    assert found["headline"] == FUSED and found["roofline_share"] == 0.25 and found["over_dense"] is None
    assert "y is off" in outcome(row, {})["error"]


def test_cases_of_a_gpu_fill_it():
    assert all(pixels(case) >= LARGE for case in large_cases())
    assert len(set(large_cases())) == len(large_cases())
    assert len(suite_cases("tucker2", "cuda")) == 14 + len(large_cases())
    assert len(suite_cases("tucker2", "cpu")) == 14
    assert {c.rank for c in pair_cases("cuda") if (c.rows, c.c_in) == (4096, 4096)} >= {32, 64, 128, 256}
    assert {c.batch for c in suite_cases("network", "cuda")} == {1, 8, 32, 128, 512}


@pytest.mark.parametrize(
    ("read", "row", "text"),
    [
        (pair_from_dict, {"rows": 1, "in": 4, "out": 4}, "rank must be an int >= 1, got None"),
        (pair_from_dict, {"rows": 1, "in": 4, "out": 3, "rank": 4}, "rank must be at most 3"),
        (pair_from_dict, {"row": 1}, "unknown key 'row'"),
        (pair_from_dict, {"rows": 1, "in": 4, "out": 4, "rank": 1, "dtype": "int8"}, "dtype must be"),
        (pair_from_dict, 3, "expected an object"),
        (network_from_dict, {"network": "alexnet", "batch": 1}, "network must be one of"),
        (network_from_dict, {"network": "resnet20"}, "batch must be an int"),
        (network_from_dict, {"network": "resnet20", "batch": 1, "rank": 2.0}, "rank must be a number"),
    ],
)
def test_bad_case_is_named(read, row, text):
    with pytest.raises(ValueError, match="case 2.*" + text):
        read(row, "case 2")


def test_module_runs_a_suite_without_the_command_line(tmp_path, capsys):
    cases, out = tmp_path / "cases.json", tmp_path / "out.json"
    cases.write_text(json.dumps([{"rows": 3, "in": 8, "out": 6, "rank": 2}]))
    common = ["--suite", "pair", "--cases", str(cases), "--quick", "--json", str(out)]
    assert main(common) == 0
    data = json.loads(out.read_text())
    assert data["complete"] and len(data["rows"]) == 2 and data["summary"]["device"]
    assert main([*common, "--limit", "-1"]) == 0
    assert json.loads(out.read_text())["rows_left_out"] == 2 and "left out 2 rows" in capsys.readouterr().out
    assert main(["--suite", "pair", "--dtype", "tf32"]) == 2
    assert "dtype must be of float32, bfloat16, float16, got 'tf32'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_a_device_is_said():
    with pytest.raises(ValueError, match="sees no CUDA device here"):
        get_device("cuda")


class FalseNvml(types.ModuleType):
    """NVML's module on a machine whose clocks cannot be read."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, refuses):
        super().__init__("pynvml")
        self.refuses, self.open = refuses, 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetClockInfo(self, handle, kind):
        if self.refuses:
            raise self.NVMLError("not supported")
        return 1000 * kind

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo


@pytest.mark.parametrize("refuses", [False, True])
def test_clocks_where_nvml_tells_them(monkeypatch, refuses):
    nvml = FalseNvml(refuses)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = clocks()
    assert nvml.open == 0
    assert found is None if refuses else found["sm_mhz"] == 1000 and found["memory_max_mhz"] == 2000


def test_precision_is_put_back():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    for dtype in ("tf32", "float32", "float16"):
        with pytest.raises(KeyError), precision(dtype):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (dtype == "tf32",) * 2 and cudnn.benchmark
            raise KeyError
        assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == before
