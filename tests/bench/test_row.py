from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench import row as row_module
from tensorcomp_ext.bench.candidates import compiled_candidates, library_candidates
from tensorcomp_ext.bench.cases import case_from_dict
from tensorcomp_ext.bench.memory import peak_bytes
from tensorcomp_ext.bench.ours import LAYER, our_candidates
from tensorcomp_ext.bench.problem import Problem
from tensorcomp_ext.bench.roofline import Probe, Rate, work
from tensorcomp_ext.bench.row import conclusions, measure_row
from tensorcomp_ext.bench.timing import Effort

TINY = {"N": 2, "S": 5, "T": 7, "H": 6, "W": 5, "r_in": 3, "r_out": 2}
EFFORT = Effort(budget_s=0.0, min_rounds=2, max_rounds=2, warmup_s=0.0)


class FixedProbe(Probe):
    """Rates that need no measuring."""

    def peak(self, dtype, threads):
        return Rate(1e9 * threads, "fixed")

    def bandwidth(self, working_set, threads):
        return Rate(1e6, "fixed")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    "window", [{}, {"stride": 2, "k": [3, 2], "padding": [1, 0]}, {"padding": "same", "k": 2}]
)
def test_every_eager_candidate_agrees_with_the_oracle(training, dtype, layout, window):
    problem = Problem(case_from_dict(TINY | window | {"dtype": dtype, "layout": layout}), training=training)
    with torch.inference_mode(not training):
        for candidate in our_candidates(problem) + library_candidates(problem):
            outputs = candidate.to_factors(candidate.call())
            assert problem.fault(outputs) is None, candidate.name
            assert len(outputs) == (1 if not training else 2 if candidate.group == "dense" else 6)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_candidates_agree_with_the_oracle(training):
    pytest.importorskip("torch._inductor")
    problem = Problem(case_from_dict(TINY | {"dtype": "float32", "layout": "nhwc"}), training=training)
    with torch.inference_mode(not training):
        found = compiled_candidates(problem, ["nhwc"], ["nhwc"])
        faults = {c.name: row_module._fault(c, problem) for c in found}
    torch.compiler.reset()
    assert len(found) == (2 if training else 3)
    if any(fault and "InvalidCxxCompiler" in fault for fault in faults.values()):
        pytest.skip("torch.compile has no C++ compiler here")
    assert set(faults.values()) == {None}, faults


def test_wrong_results_are_noticed():
    problem = Problem(case_from_dict(TINY | {"dtype": "float32", "layout": "nchw"}), training=True)
    good = problem.expected
    assert problem.fault(good) is None
    off = [t * (1 + 2e-5) for t in good]
    assert "y is 2.0e-05 from the oracle" in problem.fault(off)
    assert "grad core" in problem.fault([good[0], good[1], good[2] * 1.01, *good[3:]])
    assert problem.fault([good[0][:1]]) is not None
    assert problem.fault([torch.full_like(good[0], torch.nan)]) is not None


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_row_has_everything(direction):
    case = case_from_dict(TINY | {"dtype": "float32", "layout": "nchw"})
    threads = torch.get_num_threads()
    row = measure_row(case, direction, 1, compiled="never", effort=EFFORT, probe=FixedProbe())
    assert torch.get_num_threads() == threads
    assert row["error"] is None
    medians = {c["name"]: c["median_us"] for c in row["candidates"]}
    stages = [v for k, v in medians.items() if k.startswith("stages")]
    assert len(stages) == 3
    assert row["over_stages"] == pytest.approx(min(stages) / medians[LAYER])
    others = [v for k, v in medians.items() if not k.startswith("ours")]
    assert row["over_any"] == pytest.approx(min(others) / medians[LAYER])
    assert row["roofline_share"] == pytest.approx(row["roofline"]["time_us"] / medians[LAYER])
    assert ("memory" in row) == (direction == "backward")


def test_candidate_that_is_wrong_is_left_out(monkeypatch):
    def broken(problem):
        found = library_candidates(problem)
        right = found[0].call
        found[0].call = lambda: (right()[0] + 1,)
        found[1].call = lambda: torch.zeros(2) @ torch.zeros(3)
        return found

    monkeypatch.setattr(row_module, "library_candidates", broken)
    case = case_from_dict(TINY | {"dtype": "float32", "layout": "nhwc"})
    row = measure_row(case, "forward", 1, compiled="never", effort=EFFORT, probe=FixedProbe())
    by_name = {c["name"]: c for c in row["candidates"]}
    assert "from the oracle" in by_name["stages eager nhwc"]["error"]
    assert by_name["dense eager nhwc"]["error"].startswith("RuntimeError")
    assert "median_us" not in by_name["stages eager nhwc"]
    assert row["best_stages"] == "stages matmul nhwc" and row["best_dense"] is None and row["saved"] is None


def test_row_fails_when_ours_is_wrong():
    row = {"candidates": [{"name": LAYER, "group": "ours", "error": "y is off"}], "macs": 1, "dense_macs": 2}
    assert conclusions(row, {}) == {"error": f"{LAYER}: y is off"}


def test_conclusions_by_hand():
    names = {
        LAYER: "ours",
        "stages eager nchw": "stages",
        "rebuild eager nchw": "rebuild",
        "dense eager nchw": "dense",
    }
    row = {
        "candidates": [{"name": n, "group": g, "error": None} for n, g in names.items()],
        "macs": 10,
        "dense_macs": 40,
        "roofline": {"time_us": 2.0},
    }
    medians = dict(zip(names, (4.0, 8.0, 5.0, 12.0), strict=True))
    found = conclusions(row, medians)
    assert (found["over_stages"], found["over_any"]) == (2.0, 1.25)
    assert (found["roofline_share"], found["saved"]) == (0.5, 0.75)
    assert found["best_library"] == "rebuild eager nchw"


def test_roofline_by_hand():
    case = case_from_dict(TINY | {"dtype": "bfloat16", "layout": "nchw"})
    inputs, outputs, weights = 2 * 5 * 30, 2 * 7 * 30, 5 * 3 + 9 * 6 + 7 * 2 + 7
    assert work(case, "forward") == (2 * case.macs(), 2 * (inputs + outputs + weights))
    assert work(case, "backward") == (6 * case.macs(), 2 * (3 * inputs + 2 * outputs + 3 * weights))
    roof = FixedProbe().roofline(replace(case, dtype="float32"), "forward", 2)
    assert roof.bound == "memory" and roof.seconds == pytest.approx(4 * (inputs + outputs + weights) / 1e6)
    assert roof.working_set == 4 * (inputs + outputs)


def test_probe_measures_both_rates():
    probe = Probe(seconds=0.005)
    assert probe.peak("float32", 1).value > 1e7
    assert probe.bandwidth(30_000, 2) is probe.bandwidth(32_000, 2)
    assert probe.bandwidth(30_000, 2).value > 1e6
    assert {rate["working_set"] for rate in probe.to_dict()["copy_bandwidth"]} == {32768}


def test_peak_counts_what_lives_together():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(2000, dtype=torch.uint8)
        del first
        return second, torch.empty(500, dtype=torch.uint8)

    assert peak_bytes(call) == 3000
