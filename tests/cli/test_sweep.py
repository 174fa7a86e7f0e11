"""A sweep over ranks, spectra, and their plots in the report."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tensorcomp_ext import models
from tensorcomp_ext.cli import html, plots, report_plots
from tensorcomp_ext.cli.main import app
from tensorcomp_ext.cli.spectra import MOST, add_spectra, layer_spectra
from tensorcomp_ext.cli.sweep import sweep
from tensorcomp_ext.compress import compress
from tensorcomp_ext.compress.report import LayerReport

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to")

FAST = ["--batch", "1", "--seconds", "0"]


@pytest.fixture(scope="module")
def points():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 28, 28)
    return sweep(models.build("lenet5"), x, ["0.2", "0.5", "energy:0.99"], seconds=0.0, min_seconds=0.0)


def test_every_rank_is_a_point(points):
    assert [point["rank"] for point in points] == ["dense", "0.2", "0.5", "energy:0.99"]
    dense, small, middle, noise = points
    assert dense["parameters"] == noise["parameters"] == 429_100  # noise needs all ranks
    assert small["parameters"] < middle["parameters"] < dense["parameters"]
    assert small["output_error"] > middle["output_error"] > 0 and noise["replaced"] == 0
    assert all(point["latency"]["p50"] > 0 for point in points)
    assert "accuracy" not in dense


def test_sweep_is_plotted_in_the_report(points, tmp_path):
    html.write_html(tmp_path / "r.html", {"title": "ranks", "sweep": points})
    text = (tmp_path / "r.html").read_text()
    assert 'id="sweep"' in text and "429,100" in text and 'id="summary"' not in text
    if plots.available():
        assert "<svg" in text
    scored = [point | {"accuracy": {"correct": 9, "total": 10}} for point in points]
    html.write_html(tmp_path / "r.html", {"sweep": scored})
    assert "90.00 % (9 of 10)" in (tmp_path / "r.html").read_text()


def test_pareto_keeps_what_none_beats():
    points = [(3.0, 9.0), (1.0, 5.0), (2.0, 5.0), (2.0, 7.0), (4.0, 8.0)]
    assert report_plots.pareto(points) == [(1.0, 5.0), (2.0, 7.0), (3.0, 9.0)]
    assert report_plots.quality({"output_error": 0.25}) == 0.75


def test_spectra_are_singular_values():
    torch.manual_seed(0)
    weight = torch.randn(5, 7, 3, 3)
    entry = LayerReport("conv", "Conv2d", 315, 99, "tucker2", (4, 2))
    rows, columns = layer_spectra(weight, entry)
    expected = torch.linalg.svdvals(weight.permute(1, 0, 2, 3).reshape(7, -1).double())
    torch.testing.assert_close(
        torch.tensor(columns["values"]).double(), expected / expected[0], rtol=1e-5, atol=1e-6
    )
    assert (rows["rank"], columns["rank"], rows["count"], columns["count"]) == (4, 2, 5, 7)
    (matrix,) = layer_spectra(torch.randn(600, 400), LayerReport("fc", "Linear", 1, 1, "tt", (4, 2)))
    assert matrix["rank"] is None and matrix["count"] == 400 and len(matrix["values"]) == MOST
    assert matrix["values"][0] == 1.0


def test_spectra_are_plotted_with_the_ranks(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    _, report = compress(dense, rank=4)
    add_spectra(report, dense)
    assert set(report.details["spectra"]) == {"0", "2"}
    json.dumps(report.to_dict())
    html.write_report(tmp_path / "r.html", report)
    text = (tmp_path / "r.html").read_text()
    assert "output channels" in text and "Singular values of the dense weights" in text


def test_command_sweeps(tmp_path):
    out, page = tmp_path / "sweep.json", tmp_path / "sweep.html"
    words = ["bench", "--sweep", "lenet5", "--rank", "0.3", "--rank", "4", "--seconds", "0.01"]
    done = CliRunner().invoke(app, [*words, "--json", str(out), "--html", str(page)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [point["rank"] for point in found["points"]] == ["dense", "0.3", "4"]
    assert "0.3" in done.stdout and page.exists()
    bad = CliRunner().invoke(app, ["bench", "--sweep", "alexnet"])
    assert bad.exit_code == 2 and "'alexnet' is none of" in bad.output


def test_compressing_noise_says_why_nothing_happened():
    done = CliRunner().invoke(app, ["compress", "--model", "lenet5", "--rank", "energy:0.99", *FAST])
    assert done.exit_code == 0, done.output
    assert "nothing was compressed and nothing tuned" in done.stderr
    assert "random weights have no low-rank structure" in done.stderr and "--rank 0.5" in done.stderr
