"""Folding: what cannot be folded stays as it is, and nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fold_networks import Block, conv, folded_layers, randomize
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext.compress.fold import FoldError
from tensorcomp_ext.compress.fold_weights import difference
from tensorcomp_ext.nn import fold_layer


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


def with_hook() -> nn.Module:
    model = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Shared(), "called 2 times"),
        (with_hook(), "has hooks"),
        (nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
    ],
)
def test_what_cannot_be_folded_is_left_with_the_reason(model: nn.Module, reason: str) -> None:
    model, x = randomize(model), torch.randn(2, 4, 6, 6)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
    assert reason in made.fold_report.left[0].text and not made.fold_report.folded


class Branching(nn.Module):
    """Looks at its input, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) if bool(x.sum() > -1e9) else x


def test_parts_of_a_network_that_cannot_be_traced() -> None:
    model, x = randomize(Branching()), torch.randn(2, 4, 6, 6)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert isinstance(made, Branching) and folded_layers(made)
    assert "not folded as a whole" in made.fold_report.left[0].text
    assert made.fold_report.folded[0].name == "block.conv1"


class Writes(nn.Module):
    """The convolution reads x before it is overwritten; the sum comes later."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.conv = conv(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        other = x + 1.0
        y = self.conv(x)
        z = x.mul_(3.0)
        return F.relu(y + (other if self.early else z))


@pytest.mark.parametrize("early", [False, True])
def test_a_layer_is_not_moved_past_a_write(early: bool) -> None:
    model, x = Writes(early).eval(), torch.randn(2, 4, 6, 6)
    made = tc.fold(model)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-6


class Sums(nn.Module):
    """Two additions after one layer, and a normalization after a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bn = conv(4, 4), conv(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.bn(self.second(x) + x) + (self.first(x) + x + y)


def test_folding_twice_changes_nothing() -> None:
    model = randomize(Sums())
    x = (torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6))
    once = tc.fold(model, x)
    twice = tc.fold(once, x)
    with torch.no_grad():
        assert difference(once(*x), model(*x)) < 1e-5
        assert torch.equal(twice(*x), once(*x))
    assert not twice.fold_report.folded


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.block(x if mask is None else x * mask)


def test_optional_arguments() -> None:
    model, x, mask = randomize(Masked()), torch.randn(2, 4, 6, 6), torch.rand(2, 1, 6, 6)
    for example in ((x, mask), {"x": x, "mask": mask}):
        made = tc.fold(model, example)
        with torch.no_grad():
            assert difference(made(x, mask), model(x, mask)) < 1e-5
    for made in (tc.fold(model, x), tc.fold(model)):
        with torch.no_grad():
            assert difference(made(x), model(x)) < 1e-5
    parts = tc.fold(model)
    with torch.no_grad():
        assert difference(parts(x, mask), model(x, mask)) < 1e-5
    assert "optional arguments (mask)" in parts.fold_report.left[0].text and parts.fold_report.folded


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(4, 4), nn.BatchNorm2d(4)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class Walks(nn.Module):
    """Walks through its layers, asks a part for more than its forward, and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), Block())
        self.encoder = Encoder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() < -1e9):
            return x
        for layer in self.layers:
            x = layer(x)
        return self.encoder.encode(x) + self.encoder(x)


def test_parts_that_other_code_uses_stay_what_they_are() -> None:
    model, x = randomize(Walks()), torch.randn(2, 4, 6, 6)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert type(made.layers) is nn.Sequential and len(made.layers) == 4
    assert [type(m) for m in made.layers][1:3] == [nn.Identity, nn.Identity]
    assert any(f.name == "layers.0" and "ReLU" in f.text for f in made.fold_report.folded)
    assert any("may use its encode" in f.text for f in made.fold_report.left)


def test_hooks_of_the_network_still_run() -> None:
    model, x = randomize(Block()), torch.randn(2, 4, 6, 6)
    model.register_forward_hook(lambda module, inputs, output: output * 0)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert made(x).abs().max() == 0
    assert "hooks" in made.fold_report.left[0].text


@pytest.mark.parametrize("plan", ["dense", None, "staged", "fused"])
def test_a_residual_gets_its_gradient(plan: str | None) -> None:
    made = fold_layer(conv(4, 4), relu=True).requires_grad_(False)
    made.plan = plan
    x, residual = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6, requires_grad=True)
    made(x, residual).sum().backward()
    with torch.no_grad():
        expected = (made(x, residual) > 0).float()
    assert torch.equal(residual.grad, expected)


class AddsASize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + x.size(0)


def test_what_is_no_tensor_is_added_too() -> None:
    model, x = AddsASize().eval(), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert difference(tc.fold(model)(x), model(x)) < 1e-6


def test_a_folded_network_cannot_be_saved_or_made_dense(tmp_path: Path) -> None:
    made = tc.fold(randomize(Block()))
    with pytest.raises(ValueError, match="save: the network is folded"):
        tc.save(made, tmp_path / "folded.safetensors")
    for convert in ("to_dense", "to_sequential"):
        with pytest.raises(ValueError, match="what follows the layer is folded in"):
            getattr(folded_layers(made)[0], convert)()


def test_the_generator_stays_where_it_is() -> None:
    model = randomize(Block())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tc.fold(model, torch.zeros(2, 4, 6, 6))
    assert torch.equal(torch.rand(3), expected)


class Half(nn.Module):
    """Is not deterministic, so that no folded network can agree with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.bn(self.conv(x)), 0.5, training=True)


def test_a_network_that_disagrees_is_refused() -> None:
    with pytest.raises(FoldError) as info:
        tc.fold(randomize(Half()), torch.randn(2, 4, 6, 6))
    assert "relative L2" in str(info.value)


@pytest.mark.parametrize("wrong", [None, 3, "model"])
def test_only_modules_are_taken(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        tc.fold(wrong)


def test_low_precision() -> None:
    model = randomize(Block()).bfloat16()
    x = torch.randn(2, 4, 6, 6).bfloat16()
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 3e-2
