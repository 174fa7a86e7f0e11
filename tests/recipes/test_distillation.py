"""Distillation: published numbers, gradients, and a teacher that is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_texts import translations
from torch import nn

from tensorcomp_ext import recipes
from tensorcomp_ext.recipes import Distillation, distillation_loss, divergence

STUDENT = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)
LABEL = torch.tensor([1])


@pytest.mark.parametrize(
    "direction,kl,total", [("teacher-student", 0.093826, 1.480744), ("student-teacher", 0.091327, 1.478495)]
)
def test_method_sheet_numbers(direction, kl, total):
    assert divergence(STUDENT, TEACHER, 3.0, direction).item() == pytest.approx(kl, abs=1e-6)
    hard = F.cross_entropy(STUDENT, LABEL)
    loss = distillation_loss(STUDENT, TEACHER, hard, direction=direction)
    assert loss.item() == pytest.approx(total, abs=1e-6)


def test_divergence_by_its_definition():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 5)
    p, q = (t.double().div(2.5).softmax(-1) for t in (teacher, student))
    for direction, (a, b) in (("teacher-student", (p, q)), ("student-teacher", (q, p))):
        expected = (a * (a / b).log()).sum(-1).mean()
        found = divergence(student, teacher, 2.5, direction)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert divergence(teacher, teacher, 2.5, direction).item() == pytest.approx(0.0, abs=1e-7)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = distillation_loss(student, -student.detach(), torch.zeros(()))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_alpha_is_the_weight_of_the_labels():
    hard = F.cross_entropy(STUDENT, LABEL)
    assert distillation_loss(STUDENT, TEACHER, hard, alpha=1.0) == hard
    soft = distillation_loss(STUDENT, TEACHER, hard, alpha=0.0, temperature=2.0)
    assert soft.item() == pytest.approx(4 * divergence(STUDENT, TEACHER, 2.0).item())


def test_teacher_is_asked_in_evaluation_mode_and_left_as_it_was(dataset):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4), nn.BatchNorm1d(4))
    teacher[0].eval()
    modes = [m.training for m in teacher.modules()]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    heard = []
    teacher[3].register_forward_hook(lambda m, x, y: heard.append((m.training, y.requires_grad)))
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    callback = recipes.Distillation(teacher, alpha=0.0)
    recipes.train(student, dataset, epochs=1, batch_size=80, callbacks=[callback])
    assert heard == [(False, False)] * 2
    assert [m.training for m in teacher.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_student_learns_the_teacher(dataset):
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)) for _ in range(2))
    x = dataset.normalize(dataset.test_images)

    def apart():
        with torch.no_grad():
            return divergence(student(x), teacher(x)).item()

    before = apart()
    callback = recipes.Distillation(teacher, alpha=0.0)
    recipes.train(student, dataset, epochs=8, lr=0.05, batch_size=16, callbacks=[callback])
    assert apart() < 0.2 * before


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"divergence: teacher must be \[1, 3\] as student, got \[1, 2\]"):
        divergence(STUDENT, TEACHER[:, :2])
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        recipes.Distillation(nn.Identity(), alpha=1.5)
    with pytest.raises(ValueError, match="temperature must be above 0 and finite, got 0"):
        divergence(STUDENT, TEACHER, 0)
    with pytest.raises(ValueError, match="direction must be 'teacher-student' or 'student-teacher', got 'x'"):
        distillation_loss(STUDENT, TEACHER, STUDENT.sum(), direction="x")


def test_settings_are_those_of_a_checkpoint(dataset, tmp_path):
    options = {"epochs": 1, "batch_size": 80, "checkpoint": tmp_path / "run.ckpt"}
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    recipes.train(copy.deepcopy(teacher), dataset, callbacks=[Distillation(teacher)], **options)
    for changed in ({"alpha": 0.1}, {"temperature": 9.0}, {"direction": "student-teacher"}):
        with pytest.raises(ValueError, match=f"other settings: callbacks: .*{next(iter(changed))}"):
            recipes.train(
                copy.deepcopy(teacher), dataset, callbacks=[Distillation(teacher, **changed)], **options
            )


def test_padding_is_not_learned():
    """Student and teacher differ at a padded position only; what is asked for counts each the same."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    asked = torch.tensor([[True, True, False], [True, False, False]])
    found = divergence(student, teacher, 2.0, asked=asked)
    torch.testing.assert_close(found, divergence(student[asked], teacher[asked], 2.0))
    same = torch.where(asked[..., None], teacher, student).requires_grad_()
    loss = distillation_loss(same, teacher, torch.zeros(()), asked=asked)
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, same)
    assert gradient.abs().max() < 1e-6
    assert divergence(student, teacher, asked=torch.zeros_like(asked)) == 0
    with pytest.raises(ValueError, match=r"asked must be \[2, 3\], got \[2\]"):
        divergence(student, teacher, asked=asked[:, 0])


def test_translations_are_distilled_where_they_are_asked_for():
    class Says(nn.Module):
        """One answer everywhere, another one behind the end of the target."""

        def __init__(self, padded):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(30))
            self.padded = padded

        def forward(self, source, target):
            found = self.logits.expand(*target.shape, 30).clone()
            found[..., 5] += self.padded * (target == 0)
            return found

    task = recipes.TranslationTask(translations(train=32), bleu=False)
    callback = Distillation(Says(50.0), alpha=0.0)
    student = Says(0.0)
    batch = task.batch(torch.arange(8), torch.Generator(), torch.device("cpu"))
    assert (batch.inputs[1] == 0).any()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    state = recipes.TrainState(student, optimizer, task, 1, 1, inputs=batch.inputs, labels=batch.labels)
    assert callback.on_loss(state, state.forward()).item() == pytest.approx(0.0, abs=1e-6)
