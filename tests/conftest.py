"""Fixtures every test may use."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorcomp_ext import _native

ROOT = Path(__file__).resolve().parent.parent
NO_NATIVE = "no native code"


def native_module() -> Any | None:
    """``tensorcomp_ext._C``, or None where there is no native build."""
    return importlib.import_module("tensorcomp_ext._C") if _native.status().ok else None


def pytest_sessionstart(session: pytest.Session) -> None:
    """A run that expects native code must not pass by testing the references with themselves."""
    if os.environ.get("TENSORCOMP_EXPECT_NATIVE") == "1" and not _native.status().ok:
        pytest.exit(f"native code was expected and is missing: {_native.status().reason}", returncode=1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        module = native_module()
        available = module.isa_available() if module is not None else [NO_NATIVE]
        metafunc.parametrize("isa", available, indirect=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("native") is not None and not _native.status().ok:
        pytest.skip(_native.status().reason)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for every instruction set this machine has, with the kernels capped at it."""
    if request.param == NO_NATIVE:
        pytest.skip(_native.status().reason)
    module = native_module()
    assert module is not None
    before = module.isa()
    module.set_isa_cap(request.param)
    try:
        yield request.param
    finally:
        module.set_isa_cap(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run and in any order of tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets and pretrained weights: TENSORCOMP_DATA, else ``../shared/data``."""
    folder = Path(os.environ.get("TENSORCOMP_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; name one in TENSORCOMP_DATA")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The source tree the tests belong to."""
    return ROOT
