from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tensorcomp_ext.compress import Latency, LayerReport, Report


@pytest.fixture
def report() -> Report:
    fast, slow = Latency(1e-4, 2e-4, 3e-4), Latency(2e-4, 5e-4, 9e-4)
    return Report(
        [
            LayerReport(
                "stem", "Conv2d", 432, 310, "tucker2", (7, 3), 0.199, (1, 3, 32, 32),
                442_368, 317_440, slow, fast, "fused",
            ),
            LayerReport(
                "head", "Linear", 640, 640, macs_before=640, macs_after=640, skipped="too [small] to care"
            ),
        ],
        parameters_before=1100,
        parameters_after=978,
        output_error=0.25,
        details={"accuracy": {"before": {"correct": 3, "total": 4}}},
    )  # fmt: skip


def test_ratios_and_totals(report):
    assert report.layer_ratio == 432 / 310 and report.model_ratio == 1100 / 978
    assert report.macs_before == 442_368 + 640 and report.macs_after == 317_440 + 640
    assert [layer.name for layer in report.replaced] == ["stem"] and report["head"].ratio == 1.0
    with pytest.raises(KeyError, match="tail"):
        report["tail"]


def test_dictionary_round_trip_through_json(report):
    assert Report.from_dict(json.loads(report.to_json())) == report
    empty = Report([], 0, 0)
    assert (
        Report.from_dict(empty.to_dict()) == empty and empty.layer_ratio == 1.0 and empty.macs_before is None
    )


@pytest.mark.parametrize("data", [{}, {"layers": 3}, {"layers": [{"name": "x"}]}, [], {"layers": [[1]]}])
def test_other_dictionaries_are_refused(data):
    with pytest.raises(ValueError, match="not a compression report"):
        Report.from_dict(data)


def test_text_has_a_line_per_layer(report):
    lines = str(report).splitlines()
    assert len(lines) == 4 and lines[1].startswith("stem") and lines[3].startswith("network")
    assert (
        "7×3" in lines[1] and "432 → 310" in lines[1] and "0.500 → 0.200" in lines[1] and "fused" in lines[1]
    )
    assert "too [small] to care" in lines[2] and "→" not in lines[2]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9999, "9,999"),
        (10_000, "10.0k"),
        (442_368, "442k"),
        (999_600, "1.00M"),
        (68_864_640, "68.9M"),
        (4_089_184_256, "4.09G"),
        (5 * 10**12, "5000G"),
    ],
)
def test_counts_have_three_digits(number, text):
    layer = LayerReport("a", "Linear", number, number, skipped="so")
    assert layer.cells()[2] == text


def test_table_shows_reasons_as_written(report):
    out = io.StringIO()
    Console(file=out, width=200).print(report.table("net"))
    assert "too [small] to care" in out.getvalue() and "1.39×" in out.getvalue()


def test_rich_is_not_needed_to_compress():
    code = "import sys, tensorcomp_ext.compress; sys.exit('rich' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
