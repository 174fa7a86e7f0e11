"""Files that may lie packed beside their name: plain, gzipped or as xz."""

from __future__ import annotations

import gzip
import importlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

_ENDINGS = ("", ".gz", ".xz")


def find(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, plain before packed; None where there is none."""
    return next((path for end in _ENDINGS if (path := folder / f"{name}{end}").is_file()), None)


def need(folder: Path, name: str, dataset: str) -> Path:
    """As `find`; raises FileNotFoundError, naming the data set, where there is none."""
    path = find(folder, name)
    if path is None:
        raise FileNotFoundError(f"{dataset}: {folder} has neither {name} nor {name}.gz nor {name}.xz")
    return path


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file open for reading, decompressed as its ending says.

    Raises ValueError where damaged compression shows while it is read.
    """
    damages: tuple[type[Exception], ...] = ()
    opening: Callable[[Path], Any] = partial(open, mode="rb")
    if path.suffix == ".gz":
        damages, opening = (gzip.BadGzipFile, EOFError, zlib.error), gzip.open
    elif path.suffix == ".xz":
        # Not at the top: a few builds of Python have no lzma.
        lzma = importlib.import_module("lzma")
        damages, opening = (lzma.LZMAError, EOFError), lzma.open
    with opening(path) as file:
        try:
            yield file
        except damages as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
