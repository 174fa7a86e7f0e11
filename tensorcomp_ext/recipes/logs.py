"""Training histories in files that other programs read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorcomp_ext.compress.atomic import replacing

from .settings import Epoch

SummaryWriter: Any
try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # tensorboard is optional
    SummaryWriter = None


def flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def row_of(epoch: Epoch) -> dict[str, Any]:
    """One line of a table: counts of right answers as shares, further figures each in a column."""
    row: dict[str, Any] = {"epoch": epoch.epoch, "loss": epoch.loss, "train": epoch.train.fraction}
    if epoch.test is not None:
        row["test"] = epoch.test.fraction
    return {**row, "lr": epoch.lr, "seconds": epoch.seconds, **flat(epoch.extra)}


class Logs:
    """``history.csv`` and ``history.jsonl`` of a run, and TensorBoard's events where it is installed.

    The files are written whole after every epoch, each in one step, so that a resumed run leaves no line
    twice and a killed one no half of a line.

    Args:
        folder: made where there is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = None

    def write(self, history: Sequence[Epoch]) -> None:
        """Bring the files up to date; OSError where they cannot be written."""
        lines = "".join(json.dumps(epoch.to_dict()) + "\n" for epoch in history)
        _replace(self.folder / "history.jsonl", lines)
        rows = [row_of(epoch) for epoch in history]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        _replace(self.folder / "history.csv", text.getvalue())
        if SummaryWriter is not None and rows:
            if self._writer is None:
                # Events behind the epoch a killed run resumed from are marked void.
                self._writer = SummaryWriter(str(self.folder), purge_step=history[-1].epoch)
            for column, value in rows[-1].items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and column != "epoch":
                    self._writer.add_scalar(column, value, history[-1].epoch)
            self._writer.flush()

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()


def _replace(path: Path, text: str) -> None:
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")
