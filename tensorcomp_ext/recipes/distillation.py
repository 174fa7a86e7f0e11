"""Training a network to answer as another one does."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorcomp_ext.plan.modes import modes_kept

from .callbacks import Callback, TrainState
from .checkpoint import fingerprint

Direction = Literal["teacher-student", "student-teacher"]


def divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: Direction = "teacher-student",
    asked: Tensor | None = None,
) -> Tensor:
    """``KL(p || q)`` of the softmax of logits / T, in nats, the mean over the answers that are asked for.

    Args:
        student, teacher: logits ``[..., classes]``.
        temperature: T.
        direction: "teacher-student": p of the teacher, q of the student (Hinton et al. 2015); or the reverse.
        asked: bool ``[...]``, such as ``False`` where sentences are padded; None for all.

    Raises:
        ValueError: shapes that differ, a temperature of 0 or below, another direction.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"divergence: teacher must be {list(student.shape)} as student, got {list(teacher.shape)}"
        )
    _check("divergence", 0.5, temperature, direction)
    ours, theirs = (F.log_softmax(t.float() / temperature, dim=-1) for t in (student, teacher))
    p, q = (theirs, ours) if direction == "teacher-student" else (ours, theirs)
    each = (p.exp() * (p - q)).sum(-1)
    if asked is None:
        return each.mean()
    if asked.shape != each.shape:
        raise ValueError(f"divergence: asked must be {list(each.shape)}, got {list(asked.shape)}")
    return each.where(asked, 0.0).sum() / asked.sum().clamp(min=1)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    hard: Tensor,
    *,
    alpha: float = 0.9,
    temperature: float = 3.0,
    direction: Direction = "teacher-student",
    asked: Tensor | None = None,
) -> Tensor:
    """``alpha hard + (1 - alpha) T^2 KL``: the loss of the labels, and the divergence from a teacher.

    Args:
        student, teacher: logits ``[..., classes]``.
        hard: the loss of the labels, as ``cross_entropy`` gives it.
        alpha: weight of the labels, in [0, 1].
        temperature: T.
        direction, asked: of the divergence, see :func:`divergence`.

    Raises:
        ValueError: shapes that differ, or options out of range.

    Source: Hinton et al. 2015; Hawkins et al. 2021 write the divergence the other way round.
    """
    _check("distillation_loss", alpha, temperature, direction)
    soft = divergence(student, teacher, temperature, direction, asked)
    return alpha * hard + (1.0 - alpha) * temperature**2 * soft


class Distillation(Callback):
    """Adds the divergence from a teacher to the loss of the labels; see :func:`distillation_loss`.

    Args:
        teacher: asked in evaluation mode, without gradients, on what the student sees; its modes are left as
            they were. Answers that the task does not ask for, such as those at padding, do not count.
        alpha, temperature, direction: as :func:`distillation_loss` takes them.

    Raises:
        ValueError: options out of range.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        alpha: float = 0.9,
        temperature: float = 3.0,
        direction: Direction = "teacher-student",
    ) -> None:
        _check("Distillation", alpha, temperature, direction)
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature
        self.direction: Direction = direction

    def settings(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "temperature": self.temperature,
            "direction": self.direction,
            "teacher": fingerprint(self.teacher),
        }

    def on_loss(self, state: TrainState, loss: Tensor) -> Tensor:
        assert state.outputs is not None and state.labels is not None
        with modes_kept(self.teacher), torch.no_grad():
            answers = self.teacher.eval()(*state.inputs)
        return distillation_loss(
            state.outputs,
            answers,
            loss,
            alpha=self.alpha,
            temperature=self.temperature,
            direction=self.direction,
            asked=state.task.asked(state.labels),
        )


def _check(name: str, alpha: float, temperature: float, direction: str) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{name}: alpha must be in [0, 1], got {alpha}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be above 0 and finite, got {temperature}")
    if direction not in ("teacher-student", "student-teacher"):
        raise ValueError(
            f"{name}: direction must be 'teacher-student' or 'student-teacher', got {direction!r}"
        )
