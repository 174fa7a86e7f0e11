"""Fixtures of the benchmark tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorly


@pytest.fixture(autouse=True)
def _tensorly_as_it_was() -> Iterator[None]:
    """Columns of tltorch have tensorly compute with torch; other tests compare with it in numpy."""
    before = tensorly.get_backend()
    yield
    tensorly.set_backend(before)
