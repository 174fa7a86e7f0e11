"""The HTML report: complete, self-contained, well formed, safe against hostile names."""

import re
from html.parser import HTMLParser

import pytest

from tensorcomp_ext.cli import html, plots, report_plots
from tensorcomp_ext.compress.latency import Latency
from tensorcomp_ext.compress.report import LayerReport, Report


class Document(HTMLParser):
    """Checks that elements are closed in order; collects ids, links, tags and the text of table cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.cells = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        self.links += [values[key] for key in ("href", "src", "srcset", "xlink:href") if key in values]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def report(**details):
    fast, slow = Latency(1e-4, 1.1e-4, 2e-4), Latency(2e-4, 2.2e-4, 3e-4)
    layers = [
        LayerReport(
            "layer1.0.conv1", "Conv2d", 2304, 684, "tucker2", (6, 6), 0.25, (1, 16, 32, 32),
            2_359_296, 700_416, slow, fast, "fused",
        ),
        LayerReport("layer1.0.conv2", "Conv2d", 2304, 2304, macs_before=2_359_296, skipped="grouped"),
    ]  # fmt: skip
    return Report(layers, 269_722, 268_102, 0.125, details)


DETAILS = {
    "model": "resnet20",
    "accuracy": {
        "before": {"correct": 353, "total": 355},
        "decomposed": {"correct": 100, "total": 355},
        "finetuned": {"correct": 352, "total": 355},
    },
    "latency": {
        batch: {
            "dense": {"p10": 0.001, "p50": 0.002, "p90": 0.003},
            "compressed": {"p10": 0.0005, "p50": 0.001, "p90": 0.0015},
        }
        for batch in ("1", "64")
    },
    "bytes": {"before": 1_090_000, "after": 545_000},
}


def test_numbers_of_the_report_are_all_there(tmp_path):
    html.write_report(tmp_path / "report.html", report(**DETAILS))
    document = Document((tmp_path / "report.html").read_text())
    cells = [" ".join(cell.split()) for cell in document.cells]
    for expected in (
        "layer1.0.conv1", "tucker2", "6 × 6", "2,304", "684", "2,359,296", "700,416", "0.250", "fused",
        "0.220", "0.110", "2.00×", "grouped",
        "269,722 → 268,102 (1.01×)",
        "99.44 % (353 of 355)", "28.17 % (100 of 355)", "99.15 % (352 of 355)",
        "2.00 → 1.00 ms (2.00×)", "3.00 → 1.50 ms (2.00×)",
        "1,090,000 → 545,000 (2.00×)",
    ):  # fmt: skip
        assert expected in cells, expected


def test_file_is_self_contained_and_semantic(tmp_path):
    runs = [
        {"name": "VBMF", "report": report(**DETAILS)},
        {"name": "energy 0.95", "report": report(**DETAILS)},
    ]
    results = {"title": "Two runs", "runs": runs, "description": ["a", "b"], "environment": {"threads": "2"}}
    html.write_html(tmp_path / "report.html", results)
    text = (tmp_path / "report.html").read_text()
    document = Document(text)
    assert all(link.startswith("#") for link in document.links)
    assert "http" not in text and "@import" not in text and "script" not in document.tags
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert len(document.ids) == len(set(document.ids))
    assert {link[1:] for link in document.links} <= set(document.ids)
    for tag in (
        "main",
        "header",
        "section",
        "nav",
        "caption",
        "thead",
        "tbody",
        "figure",
        "figcaption",
        "dl",
    ):
        assert tag in document.tags, tag
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]


def test_plots_take_the_colour_of_the_page():
    pytest.importorskip("matplotlib")
    text = plots.layer_plot(report().replaced, "p")
    assert text.startswith("<svg") and "currentColor" in text and "#010203" not in text
    assert "layer1.0.conv1" in text
    assert "#000000" not in text and 'fill="black"' not in text
    assert re.search(r'<svg[^>]*viewBox="', text) and not re.search(r"<svg[^>]*\swidth=", text)
    assert plots.layer_plot(report().replaced, "p") == text


def test_histograms_have_a_panel_a_layer(tmp_path):
    """Five layers take two rows of panels; counts of nothing are no matter for the axis."""
    counts = {"limit": 0.5, "before": [0, 3, 900, 2], "after": [1, 0, 4, 0]}
    names = ["<script>", "b", "c", "d", "e"]
    sparse = {"histograms": dict.fromkeys(names, counts), "lowrank_sparse": {"method": "sparse"}}
    path = tmp_path / "report.html"
    html.write_report(path, report(**sparse))
    text = path.read_text()
    Document(text)
    assert "<script" not in text and "after training" in text and "before fine-tuning" not in text
    assert text.count('id="run-1-histograms-axes_') == 5 + 3
    plain = html.render({"runs": [{"name": "x", "report": report()}]})
    assert "which value" not in plain and "before fine-tuning" in plain


def test_errors_of_layers_are_drawn_where_there_are_several(tmp_path):
    """A layer without a low-rank part has none, and is left out."""
    pytest.importorskip("matplotlib")
    entries = [
        LayerReport(n, "Conv2d", 9, 4, relative_error=e) for n, e in (("a", 0.5), ("b", None), ("<c>", 0.25))
    ]
    html.write_report(tmp_path / "r.html", Report(entries, 27, 12))
    text = (tmp_path / "r.html").read_text()
    Document(text)
    assert "relative error of the low-rank part" in text and 'id="run-1-errors-' in text
    assert ">a<" in text and ">&lt;c&gt;<" in text and "<c>" not in text
    figure = text[text.index('id="run-1-errors-') :]
    assert ">b<" not in figure[: figure.index("</svg>")]
    one = html.render({"runs": [{"name": "x", "report": Report(entries[:2], 18, 8)}]})
    assert "run-1-errors-" not in one
    lines = report_plots.error_plot({"CP": {"a": 0.5, "b": 0.4}, "TT": {"b": 0.1}}, "p")
    assert ">CP<" in lines and ">TT<" in lines and lines.count("-xtick_") >= 2


def test_tables_alone_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    html.write_report(tmp_path / "r.html", report(**DETAILS))
    text = (tmp_path / "r.html").read_text()
    assert "<svg" not in text and "Plots need matplotlib" in text and "layer1.0.conv1" in text


def test_report_without_measurements_or_replaced_layers(tmp_path):
    layers = [LayerReport("conv", "Conv2d", 100, 100, skipped="grouped")]
    html.write_report(tmp_path / "r.html", Report(layers, 100, 100))
    document = Document((tmp_path / "r.html").read_text())
    assert "accuracy" not in "".join(document.cells) and "grouped" in document.cells


def test_counts_side_by_side_are_written_alike_and_noise_has_no_ratio(tmp_path):
    entry = report(latency={"1": {"dense": dict.fromkeys(("p10", "p50", "p90"), 0.002)}})
    entry.details["latency"]["1"]["compressed"] = {"p10": 0.001, "p50": 0.001, "p90": 0.0021}
    entry.layers = [LayerReport("conv", "Conv2d", 9, 4, macs_before=40_300_000, macs_after=8_984_512)]
    entry.layers[0].latency_before = entry.layers[0].latency_after = Latency(0.001, 0.001, 0.0021)
    html.write_report(tmp_path / "r.html", entry)
    cells = [" ".join(cell.split()) for cell in Document((tmp_path / "r.html").read_text()).cells]
    assert "40.3 M → 9.0 M (4.49×)" in cells
    assert "2.00 → 1.00 ms (noisy)" in cells and "noisy" in cells
    assert "1.000 noisy" in entry.layers[0].cells()


def test_names_cannot_inject(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    entry = report()
    entry.layers[0].name = evil
    results = {"title": evil, "runs": [{"name": evil, "report": entry.to_dict(), "notes": [evil]}]}
    html.write_html(tmp_path / "r.html", {**results, "environment": {evil: evil}, "description": [evil]})
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text
    assert evil in Document(text).cells


def test_bad_results_write_nothing(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="at least one run"):
        html.write_html(path, {"runs": []})
    with pytest.raises(ValueError, match="not a compression report"):
        html.write_html(path, {"runs": [{"name": "x", "report": {"layers": 3}}]})
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        html.write_html(tmp_path / "absent" / "r.html", {"runs": [{"name": "x", "report": report()}]})
