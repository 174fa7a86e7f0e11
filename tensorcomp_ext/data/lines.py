"""Lines of text files, plain or packed; whatever is wrong is told with file and line."""

from __future__ import annotations

import re
from pathlib import Path

from .packed import unpacked

_WORDS = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks.

    >>> words("Ein Mann, der's weiß.")
    ['ein', 'mann', ',', 'der', "'", 's', 'weiß', '.']
    """
    return _WORDS.findall(text.lower())


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without line ends; unpacked where its name ends in .gz or .xz.

    Raises FileNotFoundError; ValueError for an empty file, damaged compression and bytes that are not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with unpacked(path) as file:
        content = file.read()
    rows = content.split(b"\n")
    if rows[-1] == b"":  # behind the last line end
        rows.pop()
    if not rows:
        raise ValueError(f"{path} is empty")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(row.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number} is not UTF-8: {error.reason}") from error
    return found


def read_labelled(path: Path, classes: int) -> tuple[list[int], list[list[str]]]:
    """Lines "label sentence": labels 0..classes - 1, and the sentences split at blanks.

    Raises ValueError for a line with another label or without a word, and as `read_lines` does.
    """
    labels, sentences = [], []
    for number, line in enumerate(read_lines(path), 1):
        label, *sentence = line.split() or [""]
        if not label.isascii() or not label.isdigit() or int(label) >= classes:
            raise ValueError(
                f"{path}, line {number} must begin with a label 0..{classes - 1}, got {label[:20]!r}"
            )
        if not sentence:
            raise ValueError(f"{path}, line {number} has no sentence behind its label")
        labels.append(int(label))
        sentences.append(sentence)
    return labels, sentences


def read_parallel(source: Path, target: Path) -> list[tuple[str, str]]:
    """Pairs of lines of two files, one the translation of the other.

    Raises ValueError where one has more lines than the other or a line is empty, and as `read_lines` does.
    """
    left, right = read_lines(source), read_lines(target)
    if len(left) != len(right):
        raise ValueError(f"{source} has {len(left)} lines but {target} has {len(right)}")
    for path, rows in ((source, left), (target, right)):
        empty = next((number for number, line in enumerate(rows, 1) if not line.strip()), None)
        if empty is not None:
            raise ValueError(f"{path}, line {empty} is empty, so it has no translation")
    return list(zip(left, right, strict=True))
