"""The checks of this folder on CPU tensors: they hold there, and they notice what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_problems import (
    EVERY_OP,
    MODES,
    check_bitwise,
    check_forward,
    check_gradients,
    check_masks,
    check_second_derivatives,
    misaligned,
)
from test_against_oracle import PAIRS, SIZES, WINDOWS

names = pytest.mark.parametrize("name", EVERY_OP)


@names
@pytest.mark.parametrize("mode", MODES)
def test_checks_hold(name: str, mode: str) -> None:
    problem = EVERY_OP[name](mode, "cpu")
    check_forward(problem)
    check_gradients(problem)
    check_masks(problem)
    check_second_derivatives(problem)
    check_bitwise(problem, 2)
    moved = problem.but([t if t is None else misaligned(t) for t in problem.tensors])
    for ours, theirs in zip(moved.given.values(), problem.given.values(), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        assert ours.data_ptr() % 16
    check_forward(moved)


@names
def test_checks_notice(name: str) -> None:
    problem = EVERY_OP[name]("float32", "cpu")

    class Wrong:
        """A public function that is right but for one part in a thousand."""

        def __getattr__(self, attribute: str) -> object:
            found = getattr(problem.module, attribute)
            return lambda *a, **k: found(*a, **k) * 1.001

    wrong = replace(problem, module=Wrong())
    with pytest.raises(AssertionError):
        check_forward(wrong)
    with pytest.raises(AssertionError):
        check_gradients(wrong)
    with pytest.raises(AssertionError):
        check_second_derivatives(wrong)


def test_problems_cover_the_sizes_asked_for() -> None:
    assert {1, 6, 16, 17, 31, 64, 65, 130} <= {c.rank_in for c in SIZES} & {c.rank_out for c in SIZES}
    assert {1, 7, 16, 17, 129} <= {c.c_in for c in SIZES} & {c.c_out for c in SIZES}
    assert {0, 1, 3} <= {c.n for c in SIZES}
    assert {(1, 1), (3, 3), (3, 1), (5, 5)} <= {c.kernel for c in WINDOWS + SIZES}
    assert {1, 6, 16, 17, 31, 64, 65, 130} <= {rank for _, _, rank, _ in PAIRS}
