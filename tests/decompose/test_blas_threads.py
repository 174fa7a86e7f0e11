"""A small eigenproblem runs on one BLAS thread, and leaves the number as it was."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController

from tensorcomp_ext.decompose import blas_threads as module
from tensorcomp_ext.decompose.svd import leading_eigenvectors, singular_values


def blas() -> list[int]:
    return [found["num_threads"] for found in ThreadpoolController().info() if found["user_api"] == "blas"]


@pytest.mark.parametrize("driver", ["eigh", "eigvalsh"])
def test_one_thread_inside_and_as_before_afterwards(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    solver = getattr(scipy.linalg, driver)

    def watched(*args: object, **options: object) -> object:
        seen.append(blas())
        return solver(*args, **options)

    monkeypatch.setattr(scipy.linalg, driver, watched)
    matrix = torch.randn(300, 6000, dtype=torch.float64)
    before = blas()
    if driver == "eigh":
        leading_eigenvectors(lambda: matrix @ matrix.T, 4)
    else:
        singular_values(matrix)
    assert seen and all(count == 1 for counts in seen for count in counts)
    assert blas() == before


def test_the_last_of_several_threads_restores_the_number() -> None:
    before = blas()
    first, second = module.blas_threads(10), module.blas_threads(20)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert all(count == 1 for count in blas())
    second.__exit__(None, None, None)
    assert blas() == before
    with pytest.raises(ZeroDivisionError), module.blas_threads(10):
        raise ZeroDivisionError
    assert blas() == before


def test_large_problems_keep_their_threads() -> None:
    before = blas()
    with module.blas_threads(module.ONE_THREAD_SIZE + 1):
        assert blas() == before
