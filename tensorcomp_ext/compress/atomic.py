"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place at the end, permissions kept.

    A reader sees the old file or the whole new one; after an exception, and after a loss of power, too. The
    folder must exist. Raises OSError where it cannot be written.
    """
    folder, name = os.path.split(os.path.realpath(path))
    handle, written = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".partial")
    os.close(handle)
    try:
        yield Path(written)
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(written, _mode_for(path))
        os.replace(written, os.path.join(folder, name))
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(written)
        raise
    _sync_folder(folder)


def _mode_for(path: str | os.PathLike[str]) -> int:
    """The permissions of the file to be replaced, else those the umask gives a new one."""
    with suppress(FileNotFoundError):
        return os.stat(path).st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: str) -> None:
    """Make the rename itself durable, where the system lets folders be synchronised."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
