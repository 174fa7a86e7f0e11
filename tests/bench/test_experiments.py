"""Drivers of experiments: rows shared among processes, resumed, told apart, and put in tables."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from benchmarks.accuracy.experiment import Experiment, Row, drive, revision
from benchmarks.accuracy.rank_selection import lenet5_rows, mlp_rows
from benchmarks.accuracy.rank_selection_plots import curves, draw
from benchmarks.accuracy.tucker_methods import nrmf_rows, progressive_rows
from tensorcomp_ext.bench.experiment_summary import PUBLISHED, experiment_lines, experiment_table, ways_of


def options(tmp_path, **changed):
    given = {"json": tmp_path / "out.json", "work": tmp_path / "work", "only": "", "limit": 1e9, "threads": 1}
    return argparse.Namespace(**{**given, **changed})


def experiment(run, config=None, seeds=(0, 1)):
    rows = [Row(method, "set", seed, {"rank": 2}) for seed in seeds for method in ("a", "b")]
    return Experiment("rank_selection", "lenet5_rings", config or {"epochs": 3}, rows, run)


def finished(row, checkpoint):
    correct = 90 + row.seed + (row.method == "b")
    return {
        "test": {"correct": correct, "total": 100},
        "parameters": 50,
        "ratio": 4.0,
        "accuracy": correct / 100,
    }


def test_rows_that_are_done_are_not_run_again(tmp_path):
    ran = []

    def run(row, checkpoint):
        ran.append(row.key)
        if len(ran) == 3:
            checkpoint.write_text("an epoch")
            raise KeyboardInterrupt
        return finished(row, checkpoint)

    with pytest.raises(KeyboardInterrupt):
        drive(experiment(run), options(tmp_path))
    first = json.loads((tmp_path / "out.json").read_text())
    assert len(first["rows"]) == 2 and not first["complete"]
    assert (tmp_path / "work" / f"{ran[2]}.ckpt").exists()  # what the row goes on from
    (tmp_path / "work" / f"{ran[2]}.claim").touch()  # of a process that was killed
    drive(experiment(run), options(tmp_path))
    assert ran == [
        "a_rank-2_set_seed-0",
        "b_rank-2_set_seed-0",
        *2 * ["a_rank-2_set_seed-1"],
        "b_rank-2_set_seed-1",
    ]
    whole = json.loads((tmp_path / "out.json").read_text())
    assert whole["complete"] and whole["started"] == first["started"]
    assert [(r["method"], r["seed"]) for r in whole["rows"]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert all(row["revision"] == revision() and row["seconds"] >= 0 for row in whole["rows"])
    left = {path.suffix for path in (tmp_path / "work").iterdir()}
    assert left == {".json"}


def test_results_alone_are_enough_to_go_on(tmp_path):
    drive(experiment(finished, seeds=(0,)), options(tmp_path))
    ran = []

    def run(row, checkpoint):
        ran.append(row.seed)
        return finished(row, checkpoint)

    drive(experiment(run), options(tmp_path, work=tmp_path / "elsewhere"))
    assert ran == [1, 1]
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 4


def test_a_row_of_a_living_process_is_left_to_it(tmp_path):
    (tmp_path / "work").mkdir()
    claim = tmp_path / "work" / "a_rank-2_set_seed-0.claim"
    holding = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", holding, claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        other.stdout.readline()
        drive(experiment(finished), options(tmp_path))
    finally:
        other.kill()
        other.communicate()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(r["method"], r["seed"]) for r in rows] == [("b", 0), ("a", 1), ("b", 1)]
    drive(experiment(finished), options(tmp_path))  # what was left is free when its process is gone
    assert json.loads((tmp_path / "out.json").read_text())["complete"]


def test_no_row_is_run_twice_by_two_processes(tmp_path):
    """The other one runs all the rest while this one has its first row."""
    ran = []

    def run(row, checkpoint):
        if not ran:
            drive(experiment(lambda row, path: ran.append(row.key) or finished(row, path)), options(tmp_path))
        return finished(row, checkpoint)

    drive(experiment(run), options(tmp_path))
    assert ran == ["b_rank-2_set_seed-0", "a_rank-2_set_seed-1", "b_rank-2_set_seed-1"]


def test_results_of_other_settings_are_left_alone(tmp_path):
    drive(experiment(finished), options(tmp_path))
    before = (tmp_path / "out.json").read_text()
    with pytest.raises(ValueError, match="results of other settings"):
        drive(experiment(finished, {"epochs": 4}), options(tmp_path, work=tmp_path / "other"))
    assert (tmp_path / "out.json").read_text() == before


def test_only_and_limit(tmp_path):
    drive(experiment(finished), options(tmp_path, only="b_,zzz"))
    assert {r["method"] for r in json.loads((tmp_path / "out.json").read_text())["rows"]} == {"b"}
    drive(experiment(finished), options(tmp_path, limit=-1.0))
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2


def test_tables_have_means_spreads_and_what_was_published(tmp_path):
    rows = [Row("l0", "mnist", seed, {"weight": 1.0}) for seed in (0, 1)] + [Row("dense", "mnist", 0)]
    drive(Experiment("rank_selection", "lenet5_rings", {"epochs": 3}, rows, finished), options(tmp_path))
    results = json.loads((tmp_path / "out.json").read_text())
    head, body = experiment_table(results)
    assert body[0] == ["mnist", "l0 (weight 1.0)", "2", "90.50 ± 0.71", "50", "4.00", "99.19 ± 0.06 at 61.4×"]
    assert body[1][1:4] == ["dense", "1", "90.00"] and len(head) == len(body[0])
    assert "epochs 3" in experiment_lines(results)[0]
    assert curves(results["rows"])["mnist"]["l0"] == [(4.0, 90.5, pytest.approx(0.7071, abs=1e-4))]


def test_a_figure_is_the_same_for_the_same_results(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    rows = [Row("l0", "mnist", 0, {"weight": 1.0, "sigma": 0.1}), Row("uniform", "mnist", 0, {"rank": 5})]
    drive(Experiment("rank_selection", "x", {"epochs": 1, "network": "n"}, rows, finished), options(tmp_path))
    results = json.loads((tmp_path / "out.json").read_text())
    for name in ("a.svg", "b.svg"):
        draw(results, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"uniform" in (tmp_path / "a.svg").read_bytes() or os.path.getsize(tmp_path / "a.svg") > 5000


def test_published_figures_belong_to_rows_there_are():
    from benchmarks.accuracy import sst5

    rows = {
        "lenet5_rings": lenet5_rows(["mnist", "fashion-mnist"], [0, 1, 2]),
        "mlp_trains": mlp_rows(["mnist"], [0]),
    }
    rows["sst5"] = sst5.rows([0])
    keys = {(name, *key) for name, found in rows.items() for key in ways_of([row.to_dict() for row in found])}
    assert set(PUBLISHED) <= keys


def test_every_row_has_files_of_its_own():
    for rows in (
        lenet5_rows(["mnist", "fashion-mnist"], [0, 1, 2]),
        mlp_rows(["mnist"], [0, 1]),
        nrmf_rows("cifar10", [0, 1]),
        progressive_rows("cifar10", [0, 1]),
    ):
        assert len({row.key for row in rows}) == len(rows)
        assert all("/" not in row.key and " " not in row.key for row in rows)
