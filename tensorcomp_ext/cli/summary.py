"""Accuracy, size and latency of a whole network in one table."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from torch import nn

from tensorcomp_ext.cli.recipes import stored_rows
from tensorcomp_ext.compress.latency import Latency, faster


def state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def summary_table(summary: dict[str, Any]) -> Table:
    """Accuracy, size and latency of the whole network, before and after."""
    table = Table(title="network", show_lines=False)
    for column in ("", "dense", "compressed", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    accuracy = summary.get("accuracy") or {}
    for when in ("decomposed", "recalibrated", "finetuned", "trained"):
        if when in accuracy:
            before, after = accuracy["before"], accuracy[when]
            label = f"correct, {'fine-tuned' if when == 'finetuned' else when}"
            table.add_row(
                label, str(before["correct"]), str(after["correct"]), f"of {after['total']} test images"
            )
    for row in stored_rows(summary["lowrank_sparse"]) if "lowrank_sparse" in summary else ():
        table.add_row(*row)
    if "bytes" in summary:
        before, after = summary["bytes"]["before"], summary["bytes"]["after"]
        table.add_row(
            "bytes of weights", f"{before:,}", f"{after:,}", f"{before / max(after, 1):.2f}× smaller"
        )
    for batch, taken in (summary.get("latency") or {}).items():
        dense, small = Latency(**taken["dense"]), Latency(**taken["compressed"])
        for label, index in (("p50", 1), ("p90", 2)):
            ratio = "noisy" if dense.noisy or small.noisy else faster(dense[index], small[index])
            cells = (f"{dense[index] * 1e3:.2f}", f"{small[index] * 1e3:.2f}")
            table.add_row(f"ms at batch {batch}, {label}", *cells, ratio)
    if "latency_rule" in summary:
        rule = summary["latency_rule"]
        asked = f"{rule['asked']:g}× asked at batch {rule['batch']}, {rule['threads']} threads"
        table.add_row("speed-up ranks were chosen for", "", f"{rule['measured']:.2f}×", asked)
    return table
