import json
import math
from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench import suite as suite_module
from tensorcomp_ext.bench import timing as timing_module
from tensorcomp_ext.bench.cases import case_from_dict
from tensorcomp_ext.bench.suite import Settings, read_results, run_suite, write_json
from tensorcomp_ext.bench.suites import SUITES, suite_cases
from tensorcomp_ext.bench.summary import compare, geometric_mean, summarise_rows
from tensorcomp_ext.bench.tables import markdown, noisy, row_line, summary_table
from tensorcomp_ext.bench.timing import Effort, _rounds, interleave, percentile

SETTINGS = Settings(
    cases=[case_from_dict({"S": 5, "H": 4, "r_in": 2, "r_out": 3})],
    directions=["forward"],
    layouts=["nchw", "nhwc"],
    threads=[1],
    compiled="never",
    effort=Effort(budget_s=0.0, min_rounds=2, max_rounds=2, warmup_s=0.0),
    overhead=False,
)


def make_row(label, *, dtype="float32", layout="nchw", ours=10.0, ratio=2.0, error=None, **case):
    sizes = dict.fromkeys(("N", "S", "T", "H", "W", "k", "stride", "padding", "dilation", "r_in", "r_out"), 1)
    row = {
        "case": sizes | case | {"dtype": dtype, "layout": layout},
        "label": label,
        "direction": "forward",
        "threads": 2,
        "error": error,
    }
    if error is None:
        row |= {
            "ours_us": ours,
            "over_stages": ratio,
            "over_any": ratio,
            "roofline_share": 0.5,
            "saved": None,
        }
    return row


def test_run_writes_after_every_row(tmp_path):
    path, seen = tmp_path / "deep" / "out.json", []

    def report(done, count, row):
        on_disk = read_results(path)
        seen.append((done, count, len(on_disk["rows"]), on_disk["complete"]))
        assert row_line(row).startswith("float32 n")

    results = run_suite(SETTINGS, path, report=report)
    assert seen == [(1, 2, 1, False), (2, 2, 2, False)]
    assert read_results(path) == json.loads(json.dumps(results))
    assert results["complete"] and results["rates"]["peak_flops"][0]["threads"] == 1
    assert results["versions"]["torch"] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_interrupt_keeps_what_there_is(tmp_path, monkeypatch):
    measure, calls = suite_module.measure_row, []

    def stop_at_second(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(suite_module, "measure_row", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run_suite(SETTINGS, tmp_path / "out.json")
    kept = read_results(tmp_path / "out.json")
    assert len(kept["rows"]) == 1 and not kept["complete"] and kept["summary"]["groups"]


def test_write_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"suite": "nothing"}, "suite must be of tucker2, pair, chain"),
        ({"dtypes": ["float64"]}, "dtype must be of"),
        ({"directions": []}, "direction must be of"),
        ({"device": "tpu"}, "device must be of cpu, cuda"),
        ({"dtypes": ["tf32"]}, "dtype must be of float32, bfloat16, float16, got"),
        ({"cases": [case_from_dict({"S": 4, "H": 4, "dtype": "tf32"})]}, "dtype must be of"),
        ({"compiled": "maybe"}, "compiled must be of"),
        ({"threads": [0]}, "threads must be 1 to"),
        ({"threads": [100_000]}, "threads must be 1 to"),
    ],
)
def test_bad_settings(wrong, text):
    with pytest.raises(ValueError, match=text):
        Settings(**wrong)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [], "format": 99}'])
def test_foreign_results_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_results(tmp_path / "x.json")


def test_summary_by_hand():
    rows = [
        make_row("a", ratio=2.0),
        make_row("b", ratio=0.5, N=2),
        make_row("c", error="wrong", N=3),
        make_row("a", layout="nhwc", ratio=8.0),
        make_row("a", dtype="bfloat16", ours=5.0),
    ]
    summary = summarise_rows(rows)
    groups = {(g["dtype"], g["layout"]): g for g in summary["groups"]}
    assert groups["float32", "nchw"]["over_stages"] == {
        "geomean": pytest.approx(1.0),
        "min": 0.5,
        "min_case": "b",
    }
    assert groups["float32", "nchw"]["failed"] == ["c"] and groups["float32", "nchw"]["saved"] is None
    assert groups["float32", "all"]["over_stages"]["geomean"] == pytest.approx(2.0)
    (half,) = summary["bfloat16"]
    assert half["over_float32"] == {"geomean": pytest.approx(2.0), "min": 2.0, "min_case": "a"}
    text = markdown(summary_table({"summary": summary}))
    assert "1.00 (least 0.50: b)" in text and "(1 failed)" in text


def test_compare_matches_rows_by_case():
    old = {"rows": [make_row("a", ours=10.0), make_row("b", ours=10.0, N=2), make_row("gone", N=9)]}
    new = {"rows": [make_row("b", ours=40.0, N=2), make_row("a", ours=5.0), make_row("new", N=4)]}
    changes = compare(old, new)
    assert [(r["label"], r["speedup"]) for r in changes["rows"]] == [("b", 0.25), ("a", 2.0)]
    assert changes["geomean"] == pytest.approx(math.sqrt(0.5))
    assert (changes["only_in_old"], changes["only_in_new"]) == (1, 1)
    through_json = json.loads(json.dumps({"rows": [make_row("a", k=(3, 2))]}))
    assert len(compare(through_json, {"rows": [make_row("a", k=(3, 2))]})["rows"]) == 1


def test_percentiles():
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([5.0], 0.9) == 5.0
    assert [percentile(range(11), q) for q in (0.0, 0.1, 1.0)] == [0, 1, 10]
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_interleaving_takes_turns():
    order = []
    names = ("a", "b", "c")
    effort = Effort(budget_s=0.0, min_rounds=3, max_rounds=3, warmup_s=0.0)
    timed = interleave({n: (lambda n=n: (order.append(n), sum(range(60_000)))) for n in names}, effort)
    measured = order[9:]  # three warm-up calls each
    turns = [n for i, n in enumerate(measured) if i == 0 or measured[i - 1] != n]
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert all(t.samples == 3 and t.p10_us <= t.median_us <= t.p90_us for t in timed.values())


def test_rows_on_a_gpu_begin_with_what_matters_most(monkeypatch):
    monkeypatch.setattr(suite_module, "get_device", lambda name: None)
    large, small = case_from_dict({"N": 128, "S": 8, "H": 32}), case_from_dict({"S": 8, "H": 8})
    settings = Settings(cases=[small, large], dtypes=["bfloat16", "tf32"], threads=[1], device="cuda")
    found = [(c.N, c.dtype, c.layout, d) for c, d, _ in settings.rows()]
    assert len(set(found)) == len(found) == 16
    assert found[:4] == [
        (128, "bfloat16", "nhwc", "forward"),
        (128, "bfloat16", "nhwc", "backward"),
        (128, "bfloat16", "nchw", "forward"),
        (128, "bfloat16", "nchw", "backward"),
    ]
    assert [dtype for _, dtype, _, _ in found[:8]] == ["bfloat16"] * 4 + ["tf32"] * 4
    assert all(n == 1 for n, *_ in found[8:])


def test_row_that_cannot_be_measured_says_so_and_the_run_goes_on(monkeypatch):
    settings = Settings(suite="pair", cases=suite_cases("pair", "cpu", quick=True), threads=[1])

    def measure(case, *rest, **options):
        raise torch.OutOfMemoryError("no memory for it")

    monkeypatch.setitem(SUITES, "pair", replace(SUITES["pair"], measure=measure))
    results = run_suite(settings)
    assert results["complete"] and len(results["rows"]) == 6
    assert all(row["error"] == "OutOfMemoryError: no memory for it" for row in results["rows"])
    assert "FAILED" in row_line(results["rows"][0])
    assert results["summary"]["device"][0]["failed"]


def test_rounds_follow_from_what_they_cost():
    effort = Effort(budget_s=2.0, min_rounds=15, max_rounds=101, limit_s=10.0)
    assert _rounds(effort, 0.01, 0.01) == 101
    assert _rounds(effort, 0.1, 0.1) == 20
    assert _rounds(effort, 0.5, 0.5) == 15
    assert _rounds(effort, 1.0, 1.0) == 10  # the limit
    assert _rounds(effort, 9.0, 9.0) == 5  # never fewer
    assert _rounds(effort, 1.5, 0.1) == 20  # the slow ones sit out after five


def test_slow_candidates_sit_out(monkeypatch):
    monkeypatch.setattr(timing_module, "SLOW_S", 0.0)
    monkeypatch.setattr(timing_module, "_warm_up", lambda call, seconds: call())
    effort = Effort(budget_s=0.0, min_rounds=7, max_rounds=7, warmup_s=0.0)
    timed = interleave({"fast": lambda: 0.001, "even": lambda: 0.009, "slow": lambda: 0.011}, effort)
    assert {name: t.samples for name, t in timed.items()} == {"fast": 7, "even": 7, "slow": 5}


@pytest.mark.parametrize(("p90", "expected"), [(15.0, False), (25.0, True)])
def test_rows_of_a_busy_machine_are_marked(p90, expected):
    candidates = [
        {"name": "ours layer", "median_us": 10.0, "p90_us": 10.0},
        {"name": "stages eager nchw", "median_us": 10.0, "p90_us": p90},
        {"name": "not compared", "median_us": 10.0, "p90_us": 99.0},
        {"name": "failed", "error": "y is off"},
    ]
    row = {"candidates": candidates, "best_stages": "stages eager nchw", "best_dense": None}
    assert noisy(row) is expected
