"""A dense weight that fades beside factors: exact starts, both ways of computing it, gradients, its end."""

import copy

import pytest
import torch
from torch import nn

from tensorcomp_ext.nn import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedLinear,
    FadingDense,
)

CASES = {
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), FactorizedConv1d, (3, 2), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), FactorizedConv2d, (4, 3), (2, 5, 9, 7)),
    "rank 1": (
        lambda: nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False),
        FactorizedConv2d,
        (1, 1),
        (3, 4, 8, 8),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding="same"), FactorizedConv3d, (2, 2), (2, 2, 3, 4, 5)),
    "linear": (lambda: nn.Linear(9, 6), FactorizedLinear, 2, (4, 3, 9)),
}


def parts(name, start="residual", dtype=torch.float64):
    torch.manual_seed(5)
    make, kind, rank, shape = CASES[name]
    dense = make().to(dtype)
    layer = (kind.from_linear if name == "linear" else kind.from_conv)(dense, rank=rank)
    return dense, FadingDense.of(layer, dense.weight, start), torch.randn(shape, dtype=dtype)


def both_ways(fading, x):
    """Outputs in one convolution and in two."""
    found = []
    for rebuilds in (True, False):
        fading.rebuilds = lambda x, rebuilds=rebuilds: rebuilds
        found.append(fading(x))
        del fading.rebuilds
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("start", ["residual", "lora"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_it_begins_as_the_dense_layer(name, start, dtype, tolerance):
    dense, fading, x = parts(name, start, dtype)
    expected = dense(x)
    for y in (*both_ways(fading, x), fading(x)):
        assert (y - expected).norm() <= tolerance * expected.norm()
    if start == "lora":
        assert not fading.layer.weight.to_dense().any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
def test_both_ways_are_the_weighted_sum(name, gate):
    dense, fading, x = parts(name)
    fading.fade(gate)
    expected = copy.deepcopy(dense)
    low = fading.layer.weight.to_dense().detach()
    expected.weight.data = gate * (dense.weight.data - low) + low
    for y in both_ways(fading, x):
        torch.testing.assert_close(y, expected(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fading.to_dense().detach(), expected.weight.data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_gradients(name):
    _, fading, x = parts(name)
    fading.fade(0.4)
    assert {n for n, _ in fading.named_parameters()} == {
        f"layer.{n}" for n, _ in fading.layer.named_parameters()
    }
    x.requires_grad_()
    names, values = zip(*fading.named_parameters(), strict=True)
    for rebuilds in (True, False):
        fading.rebuilds = lambda x, rebuilds=rebuilds: rebuilds
        called = lambda x, *ps: torch.func.functional_call(fading, dict(zip(names, ps, strict=True)), (x,))  # noqa: E731
        assert torch.autograd.gradcheck(called, (x, *values))


@pytest.mark.parametrize("name", CASES)
def test_at_zero_the_dense_branch_is_nothing(name):
    _, fading, x = parts(name)
    fading.fade(0.0)
    before = both_ways(fading, x)
    parameters = list(fading.parameters())
    layer = fading.finalize()
    after = layer(x)
    for y in before:
        torch.testing.assert_close(y, after, rtol=1e-12, atol=1e-12)
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert not list(layer.buffers())


def test_inputs_without_a_batch_strided_and_empty():
    dense, fading, x = parts("conv2d")
    strided = torch.randn(2, 9, 7, 5, dtype=x.dtype).permute(0, 3, 1, 2)
    for given in (x[0], strided, x[:0], x[:, :, ::2]):
        for y in both_ways(fading, given):
            torch.testing.assert_close(y, dense(given))
    with pytest.raises(ValueError, match=r"x must be \[N, 5, H, W\]"):
        fading(x[:, :4])


def test_the_way_is_chosen_by_cost():
    """A weight that is costly to rebuild and a long input on one hand, the reverse on the other."""
    torch.manual_seed(0)
    wide = nn.Linear(512, 512)
    thin = FadingDense.of(FactorizedLinear.from_linear(wide, rank=8), wide.weight)
    x = torch.randn(1024, 512, requires_grad=True)
    few, many = thin._fewer_macs(x[:4]), thin._fewer_macs(x)
    # 3 * 1024 * 8 * 1024 beside 1024 * 512^2: apart; factors of full rank cost more than one product.
    assert not many and not few
    full = FadingDense.of(FactorizedLinear.from_linear(wide, rank=512), wide.weight)
    assert full._fewer_macs(x)
    assert thin.rebuilds(x) == thin._faster(x, True) and len(thin._rebuilds) == 1


def test_compiled_autocast_and_modes():
    _, fading, x = parts("conv2d", dtype=torch.float32)
    fading.fade(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = both_ways(fading, x)
    for y in found:
        assert y.dtype == torch.bfloat16
        assert (y.float() - fading(x)).norm() <= 1e-2 * fading(x).norm()
    compiled = torch.compile(fading, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), fading(x), rtol=1e-5, atol=1e-6)
    fading.eval()
    assert not fading.finalize().training
    again = copy.deepcopy(fading)
    again.load_state_dict(fading.state_dict())
    torch.testing.assert_close(again(x), fading(x))
    assert fading.to(torch.float64).gate.dtype == torch.float64


def test_refusals():
    dense, fading, _ = parts("conv2d")
    with pytest.raises(TypeError, match="layer must be factorized, got Conv2d"):
        FadingDense(dense, dense.weight)
    with pytest.raises(ValueError, match=r"residual must be \[7, 5, 3, 3\], got \[7, 5, 3, 1\]"):
        FadingDense(fading.layer, dense.weight[..., :1])
    with pytest.raises(ValueError, match="start must be one of residual, lora, got 'cold'"):
        FadingDense.of(fading.layer, dense.weight, "cold")
    with pytest.raises(ValueError, match="start 'lora' is for formats svd, tucker2, got 'cp'"):
        FadingDense.of(FactorizedConv2d.from_conv(dense, "cp", 2), dense.weight, "lora")
    for gate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"gate must be in \[0, 1\]"):
            fading.fade(gate)
