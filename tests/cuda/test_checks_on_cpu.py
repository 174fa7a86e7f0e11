"""The checks of this folder on CPU tensors: they hold there, and they notice what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_problems import (
    EVERY_OP,
    MODES,
    Problem,
    check_bitwise,
    check_differences,
    check_forward,
    check_gradients,
    check_masks,
    check_second_derivatives,
    misaligned,
)
from test_against_oracle import DIFFERENCES, PAIRS, SIZES, WINDOWS

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


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_hold_and_notice_a_wrong_gradient(name: str) -> None:
    problem = DIFFERENCES[name]("cpu")
    check_differences(problem)

    class Wrong(Problem):
        """A backward op that is right but for one part in ten thousand."""

        @property
        def backward_op(self) -> object:
            right = super().backward_op
            return lambda *arguments: tuple(t * 1.0001 for t in right(*arguments))

    with pytest.raises(AssertionError):
        check_differences(Wrong(**vars(problem)))


def test_problems_cover_the_sizes_asked_for() -> None:
    assert {1, 6, 16, 17, 31, 64, 65, 130} <= {c.rank_in for c in SIZES} & {c.rank_out for c in SIZES}
    assert {1, 7, 16, 17, 129} <= {c.c_in for c in SIZES} & {c.c_out for c in SIZES}
    assert {0, 1, 3} <= {c.n for c in SIZES}
    assert {(1, 1), (3, 3), (3, 1), (5, 5)} <= {c.kernel for c in WINDOWS + SIZES}
    assert {1, 6, 16, 17, 31, 64, 65, 130} <= {rank for _, _, rank, _ in PAIRS}


def test_tf32_is_off_unless_a_test_switches_it_on() -> None:
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
