"""The command, and the tables written into the README."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tensorcomp_ext.bench.suite import read_results
from tensorcomp_ext.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["bench", "--quick", "--threads", "1", "--layout", "nhwc", "--direction", "forward"]


@pytest.fixture(scope="module")
def summarise():
    spec = importlib.util.spec_from_file_location(
        "benchmarks_summarise", ROOT / "benchmarks" / "summarise.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    cases = folder / "cases.json"
    cases.write_text(json.dumps([{"S": 6, "H": 5}, {"S": 4, "H": 7, "stride": 2, "dtype": "bfloat16"}]))
    out = folder / "results" / "tucker2.json"
    done = CliRunner().invoke(app, [*QUICK, "--cases", str(cases), "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "1x6>6 5x5 k3 s1 r1/1: ours" in done.output and "no torch.compile candidates" in done.output
    return out


def test_command_measures_the_cases_given(results):
    data = read_results(results)
    assert [(r["case"]["S"], r["case"]["dtype"], r["threads"]) for r in data["rows"]] == [
        (6, "float32", 1),
        (4, "bfloat16", 1),
    ]
    assert {row["mode"] for row in data["overhead"]} == {"no_grad", "inference_mode"}
    assert data["settings"]["compiled"] == "never" and data["complete"]


def test_command_writes_json_to_stdout_and_compares(results):
    cases = results.parents[1] / "cases.json"
    done = CliRunner().invoke(app, [*QUICK, "--cases", str(cases), "--json", "-", "--compare", str(results)])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dtype", "int8"], "dtype must be of float32, bfloat16, float16, got 'int8'"),
        (["--suite", "nothing"], "suite must be of tucker2"),
        (["--cases", "missing.json"], "missing.json"),
        (["--compare", "missing.json"], "missing.json"),
    ],
)
def test_command_says_what_is_wrong(arguments, text):
    done = CliRunner().invoke(app, [*QUICK, *arguments])
    assert done.exit_code == 1
    assert text in done.stderr


def test_readme_is_filled_from_results(results, summarise):
    folder = results.parents[1]
    (folder / "README.md").write_text("before\n<!-- tucker2:begin -->\nold\n<!-- tucker2:end -->\nafter\n")
    assert summarise.main(["--folder", str(folder), "--check"]) == 1
    assert summarise.main(["--folder", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "1x4>4 7x7 k3 s2 r1/1" in text and "| float32 | forward | 1 | nhwc | 1 |" in text
    assert summarise.main(["--folder", str(folder), "--check"]) == 0


def test_readme_without_markers_is_an_error(summarise):
    with pytest.raises(ValueError, match="has no <!-- tucker2:begin -->"):
        summarise.fill("text", "tucker2", "content")


def test_readme_of_the_repository_matches_its_results(summarise):
    assert summarise.main(["--check"]) == 0
