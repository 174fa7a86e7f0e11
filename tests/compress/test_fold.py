"""Folding: the same outputs from fewer modules, and what cannot be folded stays as it is."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext.compress.fold import FoldError
from tensorcomp_ext.compress.fold_weights import difference
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear, FoldedLayer, fold_layer
from tensorcomp_ext.plan import get_plan


def randomize(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters of batch normalizations as training would leave them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(generator=generator)
    return model.eval()


def conv(c_in: int, c_out: int, *, stride: int = 1, bias: bool = True) -> FactorizedConv2d:
    return FactorizedConv2d(c_in, c_out, 3, stride, 1, bias=bias, rank=(3, 2))


class Block(nn.Module):
    """A residual block whose addition is spelled in one of several ways."""

    def __init__(self, add: str = "plain", shortcut: bool = False) -> None:
        super().__init__()
        self.add = add
        self.conv1, self.bn1 = conv(4, 4, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4)) if shortcut else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        other = self.shortcut(x)
        if self.add == "plain":
            return F.relu(y + other)
        if self.add == "in place":
            y += other
            return self.relu(y)
        if self.add == "method":
            return other.add(y).relu()
        if self.add == "function":
            return torch.relu(torch.add(other, y))
        if self.add == "scaled":
            return F.relu(torch.add(other, y, alpha=0.5))
        if self.add == "into the other":
            return F.relu(other.clone().add_(y))
        if self.add == "broadcast":
            return F.relu(y + other.mean((2, 3), keepdim=True))
        return y + 1.0


ADDITIONS = ["plain", "in place", "method", "function", "broadcast"]
LEFT_ALONE = ["scaled", "into the other", "constant"]


def folded_layers(model: nn.Module) -> list[FoldedLayer]:
    return [m for m in model.modules() if isinstance(m, FoldedLayer)]


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("add", ADDITIONS + LEFT_ALONE)
def test_a_residual_block_computes_the_same(add: str, shortcut: bool) -> None:
    model = randomize(Block(add, shortcut))
    x = torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        expected = model(x)
        made = tc.fold(model, x)
        assert difference(made(x), expected) < 1e-5
        assert difference(made(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    texts = {f.name: f.text for f in made.fold_report.folded}
    last = texts["shortcut.0" if shortcut and add != "broadcast" else "conv2"]
    assert ("residual" in last) == (add in ADDITIONS)


@pytest.mark.parametrize("plan", ["dense", "staged", "fused"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_every_plan_adds_and_rectifies(plan: str, relu: bool, second: bool) -> None:
    layer = conv(5, 7, stride=2)
    made = fold_layer(layer, relu=relu)
    made.plan = plan
    for shape in [(2, 5, 9, 8), (1, 5, 4, 4)]:
        x = torch.randn(shape)
        with torch.no_grad():
            y = layer(x)
            residual = torch.randn_like(y) if second else None
            kept = None if residual is None else residual.clone()
            expected = y if residual is None else y + residual
            found = made(x, residual)
            again = made(x, residual)
        assert difference(found, F.relu(expected) if relu else expected) < 1e-5
        assert torch.equal(found, again)
        assert residual is None or torch.equal(residual, kept)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["svd", "tt", "cp", "tr", "tr conv", "cp conv"])
def test_own_kernels_add_and_rectify_as_they_store(
    format: str, dtype: torch.dtype, relu: bool, second: bool
) -> None:
    """The call bound for a folded layer is one call of the kernel, of odd sizes, strided rows and none."""
    torch.manual_seed(0)
    layer: Any
    if format.endswith("conv"):
        layer = FactorizedConv2d(5, 7, 3, 2, 1, format=format.split()[0], rank=3, dtype=dtype)
        inputs = [torch.randn(2, 5, 9, 8), torch.randn(1, 5, 3, 3)]
    else:
        layer = FactorizedLinear(15, 21, format=format, rank=3, dtype=dtype)
        inputs = [torch.randn(9, 15), torch.randn(2, 3, 15), torch.randn(15, 4).t(), torch.randn(0, 15)]
    layer.bias.data.normal_()
    made = fold_layer(layer, relu=relu)
    made.plan = "fused"
    dense = layer.to_dense().double()
    for x in (given.to(dtype) for given in inputs):
        case = made.case(x, training=False)
        if not get_plan("fused").support(made, case).ok:
            pytest.skip(get_plan("fused").support(made, case).reason)
        with torch.no_grad():
            expected = dense(x.double())
            residual = torch.randn(expected.shape).to(dtype) if second else None
            whole = get_plan("fused").bind_folded(made, case, relu)
            assert whole is not None
            expected = expected if residual is None else expected + residual
            expected = F.relu(expected) if relu else expected
            for found in (whole(x, made.bias, residual), made(x, residual), made(x, residual)):
                assert found.shape == expected.shape and found.dtype == dtype
                if x.numel():
                    assert difference(found.double(), expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_gradients_and_single_images_go_through() -> None:
    made = fold_layer(conv(3, 3), relu=True)
    x, residual = torch.randn(3, 6, 6, requires_grad=True), torch.randn(3, 6, 6)
    made(x, residual).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with torch.no_grad():
        assert torch.equal(made(x, residual), made(x[None], residual[None])[0])


FORMATS = [("tucker2", (3, 2)), ("tucker", 2), ("cp", 5), ("tt", 3), ("tr", 2), ("ttm", 2)]


MODES: dict[str, Any] = {"in_modes": (2, 3), "out_modes": (4, 2)}


@pytest.mark.parametrize(
    ("format", "rank", "modes"), [(*f, {}) for f in FORMATS] + [(*f, MODES) for f in FORMATS[1:]]
)
def test_convolutions_of_every_format(format: str, rank: Any, modes: dict[str, Any]) -> None:
    layer = FactorizedConv2d(6, 8, 3, 2, 1, format=format, rank=rank, **modes)
    model = randomize(nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 6, 7, 8)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    texts = [f.text for f in made.fold_report.folded]
    # The cores of TTM hold modes of outputs and inputs alike: only what needs no factor per output is folded.
    assert len(texts) == (format != "ttm")
    assert all(text.startswith("batch normalization") and text.endswith("ReLU") for text in texts)
    assert any(" weights)" in text for text in texts) == (format in ("tucker", "tt") or bool(modes and texts))
    assert bool(made.fold_report.left) == (format == "ttm")


@pytest.mark.parametrize("format", ["svd", "cp", "tucker", "tt", "tr", "ttm", "tr_matrix"])
def test_linear_layers_of_every_format(format: str) -> None:
    model = randomize(
        nn.Sequential(FactorizedLinear(12, 8, format=format, rank=2), nn.BatchNorm1d(8), nn.ReLU())
    )
    x = torch.randn(9, 12)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    # Merged to a pair, this train takes no more than its cores; the others would.
    assert bool(made.fold_report.folded) == (format in ("svd", "tt"))
    if not made.fold_report.folded:
        text = made.fold_report.left[0].text
        assert ("no core of format" if format in ("ttm", "tr_matrix") else "merged") in text


def test_settings_of_another_format_are_dropped() -> None:
    # Whole modes: the train is a pair of matrices, which SVD stores in as many numbers.
    layer = FactorizedLinear(12, 8, format="tt", rank=2, in_modes=(12,), out_modes=(8,))
    x = torch.randn(9, 12)
    tc.tune(layer, x, min_seconds=0.001)
    layer.plan = "staged"
    (folded,) = folded_layers(tc.fold(randomize(nn.Sequential(layer, nn.BatchNorm1d(8), nn.ReLU())), x))
    assert folded.format == "svd" and folded.plan is None and folded.tuned == {}


def test_linear_layers_take_normalization_and_relu() -> None:
    model = randomize(
        nn.Sequential(
            FactorizedLinear(6, 8, rank=3), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5)
        )
    )
    x = torch.randn(9, 6)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert [f.text for f in made.fold_report.folded] == ["batch normalization, ReLU", "batch normalization"]
    left = [f.text for f in tc.fold(model).fold_report.left]
    assert len(left) == 2 and all("only example_inputs can tell" in text for text in left)


def test_a_normalization_along_the_sequence_is_no_factor_of_the_features() -> None:
    for layer in (FactorizedLinear(6, 8, rank=3), nn.Linear(6, 8)):
        model = randomize(nn.Sequential(layer, nn.BatchNorm1d(8)))
        x = torch.randn(4, 8, 6)
        made = tc.fold(model, x)
        with torch.no_grad():
            assert torch.equal(made(x), model(x))
        assert "[3] dims" in made.fold_report.left[0].text


def test_dense_layers_take_normalization() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    made = tc.fold(model, x)
    with torch.no_grad():
        assert difference(made(x), model(x)) < 1e-5
    assert len(list(made.children())) == 2


def test_a_whole_network() -> None:
    model = randomize(tc.models.CifarResNet(8, option="B"))
    x = torch.randn(2, 3, 16, 16)
    compressed = tc.compress(model, rank=0.5, example_inputs=x).model
    before = copy.deepcopy(compressed.state_dict())
    made = tc.fold(compressed, x)
    assert made.fold_report.difference < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    assert all(torch.equal(before[k], v) for k, v in compressed.state_dict().items())
    assert "conv1: batch normalization, ReLU" in str(made.fold_report)
    result = tc.tune(made, x, min_seconds=0.001)
    assert len(result.layers) >= 7
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        with torch.no_grad():
            assert difference(twin(x), compressed.eval()(x)) < 1e-5


def test_compiled_and_exported() -> None:
    model = randomize(Block())
    x = torch.randn(2, 4, 6, 6)
    made = tc.fold(model, x)
    with torch.no_grad():
        expected = made(x)
        assert difference(torch.compile(made, fullgraph=True)(x), expected) < 1e-5
        assert difference(torch.export.export(made, (x,)).module()(x), expected) < 1e-5


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
