"""Tables of experiments with one row a training run: accuracy against size, beside what was published."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .tables import Table

Row = Mapping[str, Any]

EXPERIMENTS = ("rank_selection", "tucker_methods")
"""What results of ``benchmarks.accuracy.experiment`` call themselves."""

FURTHER = (
    ("table_ratio", "table, times smaller", 1),
    ("perplexity", "perplexity", 3),
    ("perplexity_finetuned", "perplexity, fine-tuned", 3),
    ("speedup", "measured, times faster", 2),
    ("correct_dense", "correct, dense", 0),
    ("correct_decomposed", "correct, decomposed", 0),
    ("correct_recalibrated", "correct, normalisation measured again", 0),
)
"""Figures that only some experiments have, what tables call them, and their digits."""

PUBLISHED: Mapping[tuple[str, str, str, str], str] = {
    ("lenet5_rings", "mnist", "dense", "{}"): "99.37 ± 0.06",
    ("lenet5_rings", "mnist", "uniform", '{"rank": 10}'): "99.03 ± 0.15 at 26×",
    ("lenet5_rings", "mnist", "uniform", '{"rank": 15}'): "99.16 ± 0.06 at 11.7×",
    ("lenet5_rings", "mnist", "uniform", '{"rank": 20}'): "99.20 ± 0.08 at 6.6×",
    ("lenet5_rings", "mnist", "l0", '{"weight": 0.2}'): "99.37 ± 0.03 at 20.5×",
    ("lenet5_rings", "mnist", "l0", '{"weight": 1.0}'): "99.19 ± 0.06 at 61.4×",
    ("lenet5_rings", "mnist", "l0", '{"sigma": 0.1, "weight": 1.0}'): "≈ 4×",
    ("lenet5_rings", "mnist", "l0", '{"sigma": 0.3, "weight": 1.0}'): "≈ 4×",
    ("lenet5_rings", "mnist", "reinforce", '{"weight": 0.2}'): "96.27 ± 1.02 at 19.0×",
    ("lenet5_rings", "fashion-mnist", "dense", "{}"): "≈ 92.3 (curve)",
    ("lenet5_rings", "fashion-mnist", "uniform", '{"rank": 10}'): "≈ 88.1 at 26× (curve)",
    ("lenet5_rings", "fashion-mnist", "uniform", '{"rank": 15}'): "≈ 89.1 at 11.7× (curve)",
    ("lenet5_rings", "fashion-mnist", "uniform", '{"rank": 20}'): "≈ 89.8 at 6.6× (curve)",
    ("lenet5_rings", "fashion-mnist", "uniform", '{"rank": 25}'): "≈ 90.4 at 4.2× (curve)",
    ("lenet5_rings", "fashion-mnist", "l0", '{"weight": 0.2}'): "≈ 91.0 at 12× (curve, λ not told)",
    ("lenet5_rings", "fashion-mnist", "l0", '{"weight": 0.5}'): "≈ 90.9 at 26× (curve, λ not told)",
    ("lenet5_rings", "fashion-mnist", "l0", '{"weight": 1.0}'): "≈ 90.1 at 52× (curve, λ not told)",
    ("mlp_trains", "mnist", "mars", '{"strength": "soft"}'): "98.14 at 141×",
    ("mlp_trains", "mnist", "mars", '{"strength": "hard"}'): "97.88 at 205×",
    ("sst5", "sst5", "dense", "{}"): "37.4",
    ("sst5", "sst5", "uniform", '{"rank": 16}'): "41.1, table 182×",
    ("sst5", "sst5", "l0", '{"weight": 0.005}'): "42.2, table 449×",
}
"""By experiment, data, method and options; per cent of whole test sets, after far longer training. Of points
on a curve whose weight of the penalty is not told, the one of the nearest size."""


def ways_of(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by data set, method and options, whatever their seed, in the order they come."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        key = row["dataset"], row["method"], json.dumps(row["options"], sort_keys=True)
        found.setdefault(key, []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def experiment_table(results: Mapping[str, Any]) -> Table:
    """A row a way: correct answers, what is stored, the network's ratio, and what was published."""
    ways = ways_of(results["rows"])
    published = any((results["name"], *key) in PUBLISHED for key in ways)
    head = ["data", "way", "seeds", "correct, %", "parameters", "model, times smaller"]
    further = [
        (name, title, digits)
        for name, title, digits in FURTHER
        if any(name in row for row in results["rows"])
    ]
    head += [title for _, title, _ in further] + ["published, correct, %"] * published
    body = []
    for (dataset, method, options), rows in ways.items():
        words = ", ".join(f"{name} {value}" for name, value in json.loads(options).items())
        cells = [
            dataset,
            f"{method} ({words})" if words else method,
            str(len(rows)),
            _spread([100 * row["test"]["correct"] / row["test"]["total"] for row in rows], 2),
            _spread([row["parameters"] for row in rows], 0),
            _spread([row["ratio"] for row in rows], 2),
        ]
        for name, _, digits in further:
            values = [row[name] for row in rows if name in row]
            cells.append(_spread(values, digits) if values else "–")
        if published:
            cells.append(PUBLISHED.get((results["name"], dataset, method, options), "–"))
        body.append(cells)
    return head, body


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation of several values that differ."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if len(set(values)) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def experiment_lines(results: Mapping[str, Any]) -> list[str]:
    """What was trained how, for how long, and where."""
    config = results["config"]
    given = ", ".join(
        f"{name} {value}" for name, value in config.items() if isinstance(value, (int, float, str))
    )
    rows = results["rows"]
    tested = sorted({f"{row['test']['total']:,}" for row in rows})
    seconds = sum(row["seconds"] for row in rows)
    revisions = sorted({row["revision"] for row in rows})
    lines = [
        f"every row: {given}",
        f"tested on {' or '.join(tested)} examples; rows of the same way differ in the seed",
        f"{results['machine']['cpu']}, {results['threads']} threads, torch {results['versions']['torch']}, "
        f"revision {', '.join(revisions)}; {len(rows)} rows in {seconds / 60:.0f} minutes, pauses included",
    ]
    if not results["complete"]:
        lines.append("**not all rows of this experiment have been run yet**")
    return lines


RING_TIMES = "ring_times"
"""What results of ``benchmarks.accuracy.ring_times`` call themselves."""


def ring_times_table(results: Mapping[str, Any]) -> Table:
    """Times of the rows and their ratios to the dense network's, beside the published ratios."""
    rows = results["rows"]
    first = rows[0]
    head = ["network", "parameters", "10,000 images, s", "to dense", "published", "training step, s"]
    head += ["to dense", "published"]
    body = []
    for row in rows:
        cells = [row["name"], f"{row['parameters']:,}"]
        for key, digits in (("inference", 2), ("training", 3)):
            if row[key] is None:
                cells += ["–", "–", "–"]
                continue
            published, known = "–", row["published"] or {}
            if key in known:
                published = f"{known[key] / first['published'][key]:.2f}"
            ratio = row[key]["p50"] / first[key]["p50"]
            cells += [f"{row[key]['p50']:.{digits}f}", f"{ratio:.2f}", published]
        body.append(cells)
    return head, body


def ring_times_lines(results: Mapping[str, Any]) -> list[str]:
    """Where and with what."""
    return [
        f"{results['network']}, batches of {results['batch']}, channels-last, float32, tuned; medians of "
        "interleaved calls",
        f"{results['machine']['cpu']}, {results['threads']} threads, torch {results['versions']['torch']}, "
        f"revision {results['revision']}",
    ]
