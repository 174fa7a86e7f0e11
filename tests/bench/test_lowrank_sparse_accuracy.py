"""Ways of compressing that store as much: their rows and order, what they count, and runs that are killed."""

import gzip
import importlib
import json
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tensorcomp_ext.bench.equal_size_summary import equal_size_lines, equal_size_table

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "network": "lenet5",
    "formats": "tt",
    "sizes": "0.2",
    "masked": "none",
    "dense-epochs": "1",
    "images": "48",
    "held-out": "20",
    "epochs": "2",
    "prune-epochs": "1",
    "batch-size": "16",
}
WAYS = [
    ("sparse", "none", "none"),
    ("lowrank-sparse", "tt", "additive"),
    ("lowrank", "tt", "none"),
    ("lowrank-sparse", "tt", "masking"),
]
WORKER = textwrap.dedent("""
    import os, signal, sys
    root, moment, *arguments = sys.argv[1:]
    sys.path.insert(0, root)
    from benchmarks.accuracy import lowrank_sparse
    replace, left = os.replace, [int(moment)]
    def replaced(*paths):  # files written whole: that of the moment is not yet in place
        left[0] -= 1
        return replace(*paths) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replaced
    sys.exit(lowrank_sparse.main(arguments))
""")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_importable():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def driver():
    return importlib.import_module("benchmarks.accuracy.lowrank_sparse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fashion-MNIST's files with 80 + 40 images: noise, brighter in a column of its own for each class."""
    found = tmp_path_factory.mktemp("data") / "fashion-mnist"
    found.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 80), ("t10k", 40)):
        labels = (torch.arange(count) % 10).to(torch.uint8)
        images = torch.randint(0, 100, (count, 28, 28), generator=generator).to(torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 2 * label + 4 : 2 * label + 6] += 120
        files = {"images-idx3": (2051, images), "labels-idx1": (2049, labels)}
        for kind, (magic, values) in files.items():
            head = struct.pack(f">{1 + values.dim()}i", magic, *values.shape)
            content = gzip.compress(head + values.numpy().tobytes())
            (found / f"{name}-{kind}-ubyte.gz").write_bytes(content)
    return found.parent


def arguments_of(folder, path, *more):
    tiny = [f"--{name}={value}" for name, value in OPTIONS.items()]
    return [*tiny, "--data", str(folder), "--json", str(path), *more]


def errors(row):
    return sum(layer["error"] for layer in row["layers"])


def without_times(path):
    """Results but for times and versions."""
    found = json.loads(path.read_text())
    for row in found["rows"]:
        del row["seconds"], row["training_seconds"]
        for epoch in row["history"]:
            del epoch["seconds"]
    return {key: found[key] for key in ("suite", "network", "config", "complete", "dense", "rows")}


@pytest.fixture(scope="module")
def whole(driver, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "rows.json"
    assert driver.main(arguments_of(folder, path)) == 0
    return path


def test_rows_count_what_is_stored_and_what_is_right(whole, driver):
    found = without_times(whole)
    assert found["suite"] == driver.EQUAL_SIZE and found["complete"] and found["dense"]["total"] == 40
    assert [(r["method"], r["format"], r["mode"]) for r in found["rows"]] == WAYS
    weights = 20 * 25 + 50 * 20 * 25 + 320 * 1250
    for row in found["rows"]:
        assert row["weights"] == weights and row["stored"] == row["low_rank"] + row["sparse"]
        assert row["left_dense"] == [] and sum(layer["stored"] for layer in row["layers"]) == row["stored"]
        assert row["test"]["total"] == 40 and [e["held_out"][1] for e in row["history"]] == [20, 20]
        assert [layer["shape"] for layer in row["layers"]] == [[20, 1, 5, 5], [50, 20, 5, 5], [320, 1250]]
    sparse, both, low, masking = found["rows"]
    assert {r["stored"] for r in (sparse, both, masking)} == {round(0.2 * weights)}
    assert low["stored"] <= 0.2 * weights < 1.1 * low["stored"]
    assert both["low_rank"] <= 0.1 * weights < 1.1 * both["low_rank"]
    # Bytes with places: 4 a factor, and for an entry 4 and its place.
    assert low["stored_bytes"] == 4 * low["stored"] and sparse["stored_bytes"] > 4 * sparse["stored"]
    assert all(layer["error"] is None for layer in sparse["layers"])
    assert all(0 < layer["error"] < 1 for layer in (*both["layers"], *low["layers"]))
    assert errors(both) > errors(low)
    for counted, numel in zip(both["histograms"].values(), (500, 25_000, 400_000), strict=True):
        assert sum(counted["before"]) == sum(counted["after"]) == numel
    assert "histograms" not in masking
    assert list(whole.parent.glob("rows.work/*")) == [whole.parent / "rows.work" / "dense.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [6, 8])
def test_a_killed_run_goes_on(whole, folder, tmp_path, driver, moment):
    """After the first epoch of the second row, and before it is written; 1 and 2 are the dense network."""
    path = tmp_path / "rows.json"
    arguments = arguments_of(folder, path)
    command = [sys.executable, "-c", WORKER, str(ROOT), str(moment + 1), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = json.loads(path.read_text())
    assert len(killed["rows"]) == (1 if moment == 6 else 2) and not killed["complete"]
    assert driver.main(arguments) == 0
    assert without_times(path) == without_times(whole)


def test_time_that_is_over_ends_a_run_between_rows(whole, folder, tmp_path, driver, capsys):
    path = tmp_path / "rows.json"
    assert driver.main(arguments_of(folder, path, "--limit", "0")) == 0
    assert "the run goes on" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["rows"] == [] and not found["complete"]
    # Rows that are there are not run again: one that no run would give stays.
    path.write_text(whole.read_text().replace('"method": "lowrank"', '"method": "other"'))
    assert driver.main(arguments_of(folder, path, "--limit", "0")) == 0
    kept = json.loads(path.read_text())
    assert [row["method"] for row in kept["rows"]] == ["sparse", "lowrank-sparse", "other", "lowrank-sparse"]


def test_results_of_other_settings_are_not_mixed(whole, folder, driver):
    before = whole.read_bytes()
    with pytest.raises(ValueError, match=r"rows\.json has results of other settings"):
        driver.main(arguments_of(folder, whole, "--lr", "0.5"))
    assert whole.read_bytes() == before
    with pytest.raises(SystemExit):
        driver.main(arguments_of(folder, whole, "--formats", "tr"))


def test_learning_rates_are_compared_on_images_held_out(folder, tmp_path, driver, monkeypatch):
    def no_test_images(*_, **__):
        raise AssertionError("test images were looked at")

    monkeypatch.setattr(driver, "evaluate", no_test_images)
    path, choice = tmp_path / "rows.json", tmp_path / "rows.work" / "choice.json"
    assert driver.main(arguments_of(folder, path, "--epochs", "1", "--choose", "0.01,1e30")) == 0
    found = json.loads(choice.read_text())
    assert not path.exists() and list(found) == ["0.01", "1e+30"]
    assert {method: total for method, (_, total) in found["0.01"].items()} == dict.fromkeys(
        driver.CHOOSE_BY, 20
    )
    assert found["1e+30"] == dict.fromkeys(driver.CHOOSE_BY)
    monkeypatch.undo()
    assert driver.main(arguments_of(folder, path, "--limit", "0")) == 0
    assert json.loads(path.read_text())["chosen_by"] == found


def test_order_of_rows(driver):
    runs = importlib.import_module("benchmarks.accuracy.lowrank_sparse_runs")
    found = runs.runs_of((0.3, 0.2, 0.15), ("cp", "tucker", "tt"), (0, 1), ("tt", "tucker"))
    assert len(found) == len(set(found)) == len({run.key for run in found}) == 3 * 10 + 4 + 3 * 3
    assert [run.storage for run in found] == [0.2] * 17 + [0.3] * 10 + [0.15] * 10 + [0.3] * 3 + [0.15] * 3
    ways = [(run.method, run.format, run.mode) for run in found[:10]]
    assert len(set(ways)) == 10 and all(run.init != "masking" for run in found[:10])
    three = {("sparse", "none", 1), ("lowrank-sparse", "tt", 1), ("lowrank", "tt", 1)}
    for begin in (10, 37, 40):
        assert {(run.method, run.format, run.seed) for run in found[begin : begin + 3]} == three
    assert [(r.format, r.mode, r.init, r.seed) for r in found[13:17]] == [
        ("tt", "additive", "masking", 0),
        ("tt", "masking", "masking", 0),
        ("tucker", "additive", "masking", 0),
        ("tucker", "masking", "masking", 0),
    ]


def test_held_out_images_are_no_training_images(folder):
    runs = importlib.import_module("benchmarks.accuracy.lowrank_sparse_runs")
    network = runs.NETWORKS["lenet5"]
    with pytest.raises(ValueError, match="must be at most 80 together, got 5120 and 1000"):
        runs.images_of(network, folder)
    small = runs.Network(**{**vars(network), "images": 60, "held_out": 20})
    whole, images = runs.images_of(small, folder)
    rows = torch.cat([images.train_images, images.test_images]).flatten(1).unique(dim=0)
    assert len(rows) == 80 and torch.equal(rows, whole.train_images.flatten(1).unique(dim=0))


def rows_of_seeds(whole):
    """The results of one seed, once more with ten answers fewer, and the starts of the others."""
    found = json.loads(whole.read_text())
    first = found["rows"][1]
    again = {**first, "seed": 1, "test": {"correct": first["test"]["correct"] - 10, "total": 40}}
    start = {**first, "init": "masking", "test": {"correct": 7, "total": 40}}
    larger = {**found["rows"][0], "storage_asked": 0.5, "stored": found["rows"][0]["weights"] // 2}
    masking = found["rows"][3]
    others = [{**masking, "format": "cp", "init": init} for init in ("residual", "masking")]
    for row in (again, start, larger, *others):
        row.pop("histograms", None)
        found["rows"].append(row)
    return found


def test_table_of_equal_sizes(whole):
    results = rows_of_seeds(whole)
    lost = {**{k: results["rows"][2][k] for k in ("method", "mode", "init", "seed")}, "format": "cp"}
    results["diverged"] = [{**lost, "storage": 0.2, "error": "train: the loss is nan"}]
    head, body = equal_size_table(results)
    assert head[:3] == ["way", "0.5 stored: correct, %", "0.2 stored: correct, %"]
    assert all(len(cells) == len(head) for cells in body)
    found = {cells[0]: cells[1:] for cells in body}
    assert list(found) == [
        "sparse alone",
        "low-rank + sparse, TT, additive",
        "low-rank + sparse, TT, masking",
        "low-rank + sparse, CP, masking",
        "low rank alone, TT",
        "low rank alone, CP",
        "low-rank + sparse, TT, additive, masking start",
        "low-rank + sparse, CP, masking, masking start",
    ]
    assert found["low rank alone, CP"] == ["–", "diverged", "–", "–"]
    right = [row["test"]["correct"] for row in results["rows"]]
    assert found["sparse alone"][:2] == [f"{right[0] / 0.4:.2f}"] * 2
    # Of n and n - 10 of 40 the mean is 12.5 below n and the deviation 25 / sqrt(2).
    assert found["low-rank + sparse, TT, additive"][:2] == [
        "–",
        f"{right[1] / 0.4 - 12.5:.2f} ± 17.68 (2 seeds)",
    ]
    low = results["rows"][2]
    share = f"{low['stored'] / low['weights']:.3f} stored"
    assert found["low rank alone, TT"][1] in (f"{right[2] / 0.4:.2f}", f"{right[2] / 0.4:.2f}, {share}")
    assert found["low rank alone, TT"][2] == f"{low['stored_bytes'] / 1e3:,.0f}"
    assert found["low-rank + sparse, TT, additive, masking start"][1] == "17.50"
    assert not any("not all rows" in line or "compared" in line for line in equal_size_lines(results))
    results["chosen_by"] = {
        "0.1": {"sparse": [8, 9], "lowrank": None},
        "1": {"sparse": None, "lowrank": [7, 9]},
    }
    expected = "correct of 9 held out by sparse / lowrank: 0.1: 8 / diverged; 1: diverged / 7"
    assert equal_size_lines(results)[-1].endswith(expected)
    assert "not all rows" in equal_size_lines({**results, "complete": False})[-1]


def test_a_way_that_diverges_is_told_and_others_go_on(folder, tmp_path, driver):
    path = tmp_path / "rows.json"
    arguments = arguments_of(folder, path, "--epochs=1", "--formats=tt", "--lr=1e30")
    assert driver.main(arguments) == 0
    found = json.loads(path.read_text())
    assert found["complete"] and found["rows"] == []
    assert [(row["method"], row["format"], row["mode"]) for row in found["diverged"]] == WAYS
    assert all("the loss is" in row["error"] for row in found["diverged"])
    assert driver.main(arguments) == 0 and json.loads(path.read_text())["diverged"] == found["diverged"]
    with pytest.raises(RuntimeError, match="out of memory"):
        driver.diverged(RuntimeError("out of memory"))


def test_page_of_figures(whole, tmp_path):
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("benchmarks.accuracy.lowrank_sparse_plots")
    path, page = tmp_path / "rows.json", tmp_path / "page.html"
    path.write_text(json.dumps(rows_of_seeds(whole)))
    assert plots.main([str(path), str(whole), "--html", str(page)]) == 0
    text = page.read_text()
    assert "http" not in text and "<script" not in text
    for words in ("TT, residual start", "TT, masking start", "low rank alone, TT", "sparse alone", ">fc1<"):
        assert words in text, words
    # Sizes, starts and errors, and weights of three ways; one run has no second start.
    assert text.count("<figure>") == 6 + 5 and text.count("<section") == 2
    for name in ("sizes-1", "sizes-2", "starts-1", "errors-1", "weights-1-0"):
        assert f'id="{name}-' in text, name
    starts = text[text.index('id="starts-1-') :]
    for words in ("TT, residual start", "CP, residual start", "CP, masking start"):
        assert starts[: starts.index("</svg>")].count(words) == 1, words
    assert 'id="starts-2-' not in text
    other = tmp_path / "other.json"
    other.write_text('{"suite": "chain", "rows": [1]}')
    with pytest.raises(SystemExit):
        plots.main([str(other), "--html", str(page)])
