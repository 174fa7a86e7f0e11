"""A convolution whose network went to channels-last answers in it, as torch.nn's own does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tensorcomp_ext as tc
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedConv3d, FactorizedLinear
from tensorcomp_ext.plan.memory_format import as_channels_last, memory_layout, suggests_channels_last

CL = torch.channels_last


def layers(c_in: int, c_out: int, kernel: int = 3) -> tuple[nn.Conv2d, FactorizedConv2d]:
    torch.manual_seed(c_in + c_out)
    dense = nn.Conv2d(c_in, c_out, kernel, padding=1)
    return dense, FactorizedConv2d.from_conv(dense, "tucker2", (c_out, c_in)).eval()


def images(*shape: int) -> list[Tensor]:
    x = torch.randn(*shape)
    return [x, x.contiguous(memory_format=CL), as_channels_last(x), x.transpose(2, 3)]


@pytest.mark.parametrize("c_in", [1, 3, 8])
@pytest.mark.parametrize("pixels", [2, 5])
@pytest.mark.parametrize("grad", [True, False])
def test_results_are_laid_out_as_those_of_torch(c_in: int, pixels: int, grad: bool) -> None:
    dense, ours = layers(c_in, 6)
    for model in (dense, ours):
        model.to(memory_format=CL)
    for x in images(2, c_in, pixels, pixels):
        with torch.set_grad_enabled(grad):
            for _ in range(2):  # the second call goes through what the first one bound
                expected, found = dense(x), ours(x)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                assert memory_layout(found) == memory_layout(expected) == "channels_last"


def test_gradients_of_a_restrided_input() -> None:
    dense, ours = (layer.to(memory_format=CL) for layer in layers(1, 4))
    grads = []
    for model in (dense, ours):
        x = torch.linspace(-1, 1, 50).view(2, 1, 5, 5).requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_conversion_is_noticed_and_kept() -> None:
    _, ours = layers(3, 4)
    assert not ours.channels_last
    ours.to(memory_format=CL)
    assert ours.channels_last and copy.deepcopy(ours).channels_last
    ours.double().float().to("cpu")
    assert ours.channels_last
    assert not suggests_channels_last(
        *_form(ours.to(memory_format=torch.contiguous_format).to_dense().weight)
    )
    assert not ours.channels_last


def test_from_a_layer_in_channels_last_and_back() -> None:
    dense, _ = layers(3, 4)
    ours = FactorizedConv2d.from_conv(dense.to(memory_format=CL), "tucker2", (4, 3))
    assert ours.channels_last
    back = ours.to_dense()
    assert suggests_channels_last(*_form(back.weight))
    torch.testing.assert_close(back.weight, dense.weight, rtol=1e-4, atol=1e-5)


def test_compressed_networks_keep_the_format() -> None:
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3)).eval().to(memory_format=CL)
    small = tc.compress(net, format="tucker2", rank=0.9).model
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert memory_layout(small(x)) == memory_layout(net(x)) == "channels_last"


def test_unbatched_and_traced_inputs() -> None:
    dense, ours = (layer.to(memory_format=CL) for layer in layers(3, 4))
    x = torch.randn(3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), dense(x), rtol=1e-4, atol=1e-5)
        y = torch.func.vmap(ours)(x[None])
    torch.testing.assert_close(y, dense(x)[None], rtol=1e-4, atol=1e-5)


def test_other_layers_have_no_format() -> None:
    linear = FactorizedLinear(4, 4, format="svd", rank=2)
    assert not linear.to(memory_format=CL).channels_last
    conv = FactorizedConv3d(2, 3, 3, format="tucker2", rank=(2, 2))
    assert not conv.double().channels_last
    assert FactorizedConv3d.from_conv(
        nn.Conv3d(2, 3, 3).to(memory_format=torch.channels_last_3d), "tucker2", (2, 2)
    ).channels_last


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 4, 4), (2, 3, 4, 5)])
def test_the_rule_is_torchs(shape: tuple[int, ...]) -> None:
    from torch._prims_common import suggest_memory_format

    for x in (
        torch.zeros(shape),
        torch.zeros(shape).contiguous(memory_format=CL),
        as_channels_last(torch.zeros(shape)),
    ):
        assert suggests_channels_last(x.shape, x.stride()) == (suggest_memory_format(x) == CL)
    made = as_channels_last(torch.zeros(shape))
    assert as_channels_last(made) is made


def _form(weight: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return weight.shape, weight.stride()


@pytest.mark.parametrize("format", ["tucker2", "cp", "tucker", "tt", "tr", "ttm"])
def test_every_plan_of_every_format_answers_in_it(format: str) -> None:
    for c_in in (1, 4):
        layer = FactorizedConv2d(c_in, 8, 3, format=format, rank=2).to(memory_format=CL).eval()
        x = torch.randn(2, c_in, 6, 6)
        expected = layer.to_dense()(x)
        with torch.no_grad():
            for plan in [candidate.plan for candidate in layer.plans(x) if candidate.reason is None]:
                layer.plan = plan
                found = layer(x)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                assert memory_layout(found) == "channels_last", plan


def test_standard_layers_and_loaded_ones_keep_the_format(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3)).eval().to(memory_format=CL)
    small = tc.compress(net, format="tucker2", rank=0.9).model
    tc.save(small, tmp_path / "small.safetensors")
    again = tc.load(tmp_path / "small.safetensors", copy.deepcopy(net))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert (
            memory_layout(again(x))
            == memory_layout(again[2].to_sequential()(x[:, :1].expand(2, 12, 8, 8)))
            == "channels_last"
        )
