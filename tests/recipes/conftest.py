"""Fixtures of the training tests."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

# Test folders are not packages; what several files share is imported from beside them.
sys.path.insert(0, str(Path(__file__).parent))

from small_images import quadrants


@pytest.fixture
def dataset():
    return quadrants()


@pytest.fixture(autouse=True)
def one_thread():
    """Results are reproducible bit by bit for a fixed number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nothing_begun(monkeypatch):
    """From here on a decomposition fails the test."""
    for module in ("decompose_finetune", "posttraining", "sparse_start", "decisions", "start"):
        found = importlib.import_module(f"tensorcomp_ext.recipes.{module}")
        monkeypatch.setattr(found, "compress", lambda *a, **o: pytest.fail("decomposed before the checks"))
