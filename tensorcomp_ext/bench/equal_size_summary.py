"""Tables of ways of compressing that store as much, low-rank + sparse against its parts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .tables import Table

Row = Mapping[str, Any]
Way = tuple[str, str, str, str]
"""Method, format, mode and start."""

EQUAL_SIZE = "lowrank_sparse_accuracy"
"""What results of ``benchmarks.accuracy.lowrank_sparse`` call themselves."""

_ORDER = ("sparse", "lowrank-sparse", "lowrank")


def ways_of(rows: Sequence[Row]) -> dict[Way, list[Row]]:
    """Rows by way: pruning, sums, decompositions; other starts than the residual one last."""
    found: dict[Way, list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["format"], row["mode"], row["init"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][3] == "masking", _ORDER.index(item[0][0]))))


def way_label(way: Way) -> str:
    """A way in words."""
    method, name, mode, init = way
    if method == "sparse":
        return "sparse alone"
    shown = "Tucker" if name == "tucker" else name.upper()
    if method == "lowrank":
        return f"low rank alone, {shown}"
    return f"low-rank + sparse, {shown}, {mode}" + (", masking start" if init == "masking" else "")


def mean_and_spread(rows: Sequence[Row]) -> tuple[float, float | None]:
    """Per cent of correct test images: the mean and standard deviation over seeds, None of a single one."""
    values = [100 * row["test"]["correct"] / row["test"]["total"] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def equal_size_table(results: Mapping[str, Any]) -> Table:
    """Accuracies, a row a way and a column a stored size; the bytes are those of the middle size."""
    rows = results["rows"]
    sizes = sorted({row["storage_asked"] for row in rows}, reverse=True)
    middle = rows[0]["storage_asked"] if rows else None
    head = ["way", *(f"{size:g} stored: correct, %" for size in sizes)]
    head += [
        f"kB at {middle:g}, places of entries included",
        "held-out images by epoch, pruned for the next, %",
    ]
    body = []
    lost = {(*way, row["storage"]) for way, given in ways_of(results["diverged"]).items() for row in given}
    for way, found in ways_of([*rows, *results["diverged"]]).items():
        found = [row for row in found if "test" in row]
        cells = [way_label(way)]
        for size in sizes:
            there = [row for row in found if row["storage_asked"] == size]
            cells.append("diverged" if (*way, size) in lost else _cell(there, size))
        there = [row for row in found if row["storage_asked"] == middle]
        cells.append(f"{there[0]['stored_bytes'] / 1e3:,.0f}" if there else "–")
        cells.append(_epochs(there[0]["history"]) if there else "–")
        body.append(cells)
    return head, body


def _cell(rows: Sequence[Row], size: float) -> str:
    if not rows:
        return "–"
    mean, spread = mean_and_spread(rows)
    text = f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f} ({len(rows)} seeds)"
    share = rows[0]["stored"] / rows[0]["weights"]
    # Ranks are whole numbers: decompositions take what they can of the size, others all of it.
    return text if abs(share - size) < 0.005 * size else f"{text}, {share:.3f} stored"


def _epochs(history: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(f"{100 * entry['held_out'][0] / entry['held_out'][1]:.1f}" for entry in history)


def equal_size_lines(results: Mapping[str, Any]) -> list[str]:
    """What was trained on what, for how long, where."""
    config, dense, versions = results["config"], results["dense"], results["versions"]
    total = dense["total"]
    dirty = " (with uncommitted changes)" if versions["git_dirty"] else ""
    seconds = sum(row["seconds"] for row in results["rows"])
    lines = [
        f"{results['network']} on {config['dataset']}, dense: {dense['correct']:,} of {total:,} test images, "
        f"{100 * dense['correct'] / total:.2f} % ({dense['source']})",
        f"every way: {config['epochs']} epochs of the same {config['images']:,} training images, pruned over "
        f"the first {config['prune_epochs']}, learning rate {config['lr']} (schedule {config['schedule']}), "
        f"batches of {config['batch_size']}, {config['optimizer']}, distilled from the dense network; "
        f"{config['held_out']:,} further training images are held out",
        f"low-rank parts beside sparse ones take {config['fraction']:g} of each layer's weights; stored are "
        "weights of all layers but the last, places of entries not counted",
        f"{results['machine']['cpu']}, {config['threads']} threads, torch {versions['torch']}, revision "
        f"{versions['git_revision']}{dirty}; {len(results['rows'])} rows in {seconds / 60:.0f} minutes",
    ]
    if "chosen_by" in results:
        lines.append(_choice(results["chosen_by"]))
    if not results["complete"]:
        lines.append("**the run was ended by its time: not all rows are there**")
    return lines


def _choice(rates: Mapping[str, Mapping[str, Sequence[int] | None]]) -> str:
    """What learning rates gave on images held out, by method in the order of the first rate."""
    methods = list(next(iter(rates.values())))
    total = next(given[1] for found in rates.values() for given in found.values() if given is not None)
    cells = []
    for rate, found in rates.items():
        correct = ("diverged" if given is None else f"{given[0]}" for given in found.values())
        cells.append(f"{rate}: {' / '.join(correct)}")
    ways = " / ".join(methods)
    return f"learning rates compared, correct of {total:,} held out by {ways}: {'; '.join(cells)}"
