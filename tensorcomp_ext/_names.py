"""Names users misspell."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(given: object, known: Iterable[str]) -> str:
    """What ends a message about a name there is not: "; did you mean 'rank'?", or nothing."""
    found = get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
