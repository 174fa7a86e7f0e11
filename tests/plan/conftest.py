"""Fixtures of the plan tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Measured rates of a test run stay out of the user's cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORCOMP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
