"""What every format must do in every layer it can serve; a new format is tested here by being registered."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import tensorcomp_ext.nn as tcnn
from tensorcomp_ext.formats import LowRankSparse, format_names
from tensorcomp_ext.plan import plans_for

RANKS: dict[tuple[str, str], Any] = {
    ("svd", "linear"): 3,
    ("cp", "linear"): 4,
    ("tucker", "linear"): (2, 3, 2, 3),
    ("tt", "linear"): (2, 3, 2),
    ("tr", "linear"): (2, 3, 2, 3),
    ("ttm", "linear"): (3,),
    ("tr_matrix", "linear"): (2, 3),
    ("tucker2", "conv"): (5, 4),
    ("cp", "conv"): 5,
    ("tucker", "conv"): 4,
    ("tt", "conv"): (4, 5),
    ("tr", "conv"): (2, 3, 2),
    ("ttm", "conv"): 3,
    ("lowrank_sparse", "linear"): 2,
    ("lowrank_sparse", "conv"): (3, 2),
    ("lowrank_sparse_packed", "linear"): 2,
    ("lowrank_sparse_packed", "conv"): (3, 2),
}
"""Small uneven ranks; a format that is not listed takes half of the dense parameters."""
MODES: dict[str, dict[str, Any]] = {"linear": {"in_modes": (2, 5), "out_modes": (3, 3)}}
"""Foldings of the layers, for formats that fold."""
FOLDED = {"cp", "tucker", "tt", "tr", "ttm", "tr_matrix"}
LAYERS: dict[str, tuple[type[nn.Module], type[tcnn.FactorizedLayer], tuple[Any, ...], tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d, tcnn.FactorizedConv1d, (7, 9, 3, 2, 1), (2, 7, 11)),
    "conv2d": (nn.Conv2d, tcnn.FactorizedConv2d, (7, 9, (3, 2), 1, (1, 0)), (2, 7, 9, 8)),
    "conv3d": (nn.Conv3d, tcnn.FactorizedConv3d, (7, 9, 3, 1, 1), (2, 7, 4, 5, 3)),
    "linear": (nn.Linear, tcnn.FactorizedLinear, (10, 9), (2, 5, 10)),
}


class Pair(NamedTuple):
    layer: str
    format: str


PAIRS = [
    Pair(layer, name) for layer in LAYERS for name in format_names("linear" if layer == "linear" else "conv")
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def options_of(pair: Pair) -> dict[str, Any]:
    """Format, rank and folding of a pair."""
    kind = "linear" if pair.layer == "linear" else "conv"
    modes = MODES.get(pair.layer, {}) if pair.format in FOLDED else {}
    return {"format": pair.format, "rank": RANKS.get((pair.format, kind), 0.5), **modes}


def factorized(dense: nn.Module, pair: Pair) -> tcnn.FactorizedLayer:
    cls: Any = LAYERS[pair.layer][1]
    make = cls.from_linear if pair.layer == "linear" else cls.from_conv
    return make(dense, **options_of(pair))  # type: ignore[no-any-return]


def random_layer(pair: Pair, **options: Any) -> tcnn.FactorizedLayer:
    """A layer with random factors and bias."""
    _, cls, arguments, _ = LAYERS[pair.layer]
    layer = cls(*arguments, **options_of(pair), **options)
    if isinstance(layer.weight, LowRankSparse) and not layer.weight.sparse.is_meta:
        layer.weight.keep(torch.rand(layer.weight.shape) < 0.4)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def dense_layer(pair: Pair, **options: Any) -> nn.Module:
    cls, _, arguments, _ = LAYERS[pair.layer]
    return cls(*arguments, **options)


def sample(pair: Pair, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(LAYERS[pair.layer][3], dtype=dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def usable_plans(layer: tcnn.FactorizedLayer, x: Tensor) -> list[str]:
    return [plan.name for plan in plans_for(layer) if plan.support(layer, layer.case(x)).ok]


@every_pair
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_plan_equals_the_dense_layer(pair: Pair, dtype: torch.dtype, tolerance: float) -> None:
    layer = random_layer(pair).to(dtype)
    x = sample(pair, dtype)
    expected = copy.deepcopy(layer).double().to_dense()(x.double())
    for name in usable_plans(layer, x):
        layer.plan = name
        assert relative(layer(x), expected) < tolerance, name
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                first, again = layer(x), layer(x)
            assert relative(first, expected) < tolerance, name
            assert torch.equal(first, again), name


@every_pair
def test_gradients(pair: Pair) -> None:
    layer = random_layer(pair).double()
    x = sample(pair, torch.float64).requires_grad_()
    tensors = [x, *layer.parameters()]
    dense = layer.geometry.apply(x, layer.weight.to_dense(), layer.bias)
    gradient = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, tensors, gradient)
    for name in usable_plans(layer, x):
        layer.plan = name
        found = torch.autograd.grad(layer(x), tensors, gradient)
        for f, e in zip(found, expected, strict=True):
            assert relative(f, e) < 1e-12, name
    layer.plan = "staged" if "staged" in usable_plans(layer, x) else "dense"
    assert torch.autograd.gradcheck(lambda x: layer(x), x)


@every_pair
def test_float32_gradients_of_every_plan(pair: Pair) -> None:
    layer = random_layer(pair)
    exact = copy.deepcopy(layer).double()
    x = sample(pair).requires_grad_()
    y = exact.geometry.apply(x.double(), exact.weight.to_dense(), exact.bias)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, list(exact.parameters()), gradient)
    for name in usable_plans(layer, x):
        layer.plan = name
        found = torch.autograd.grad(layer(x), list(layer.parameters()), gradient.float())
        for f, e in zip(found, expected, strict=True):
            assert relative(f, e) < 1e-4, name


@every_pair
def test_conversion_keeps_state(pair: Pair) -> None:
    dense = dense_layer(pair).double().eval()
    assert isinstance(dense.bias, nn.Parameter)
    dense.bias.requires_grad_(False)
    layer = factorized(dense, pair)
    assert layer.bias is not None and torch.equal(layer.bias, dense.bias) and layer.bias is not dense.bias
    assert not layer.bias.requires_grad and all(f.requires_grad for f in layer.weight.parameters())
    assert not layer.training and not layer.weight.training
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    dense.weight.requires_grad_(False)
    assert not any(p.requires_grad for p in factorized(dense, pair).parameters())
    back = layer.to_dense()
    assert type(back) is type(dense) and not back.training
    assert set(back.state_dict()) == {"weight", "bias"}
    assert factorized(dense_layer(pair, bias=False), pair).bias is None


@every_pair
@pytest.mark.parametrize("bias", [True, False])
def test_to_sequential(pair: Pair, bias: bool) -> None:
    layer = random_layer(pair, bias=bias).double()
    x = sample(pair, torch.float64)
    sequence = layer.to_sequential()
    assert all(type(m).__module__.startswith("torch.nn") for m in sequence.modules())
    if pair.format not in (*FOLDED, "lowrank_sparse", "lowrank_sparse_packed"):
        stored = sum(p.numel() for p in layer.parameters())
        assert sum(p.numel() for p in sequence.parameters()) == stored
    assert relative(sequence(x), layer.to_dense()(x)) < 1e-13


@every_pair
def test_config_round_trip(pair: Pair) -> None:
    layer = random_layer(pair)
    config = json.loads(json.dumps(layer.config()))
    empty = tcnn.from_config(config)
    assert type(empty) is type(layer) and empty.config() == layer.config()
    empty.load_state_dict(layer.state_dict())
    x = sample(pair)
    assert torch.equal(empty(x), layer(x))


@every_pair
def test_state_dict_is_strict(pair: Pair) -> None:
    layer = random_layer(pair)
    with torch.no_grad():
        layer(sample(pair))
    state = layer.state_dict()
    names = (*layer.weight.factor_names, *getattr(layer.weight, "buffer_names", ()))
    assert set(state) == {"bias", *(f"weight.{name}" for name in names)}
    missing = {key: value for key, value in state.items() if key != "bias"}
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**state, "extra": torch.ones(1)})


@every_pair
def test_copies_leave_prepared_weights_behind(pair: Pair) -> None:
    layer = random_layer(pair)
    layer.plan = "dense"
    x = sample(pair)
    with torch.no_grad():
        expected = layer(x)
    assert layer._prepared is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for twin in copies:
        assert twin._prepared is None and twin.plan == "dense"
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
            twin.weight.factors[0].zero_()
            assert relative(twin(x), expected) > 1e-3
            assert torch.equal(layer(x), expected)


@every_pair
def test_autocast(pair: Pair) -> None:
    layer = random_layer(pair)
    x = sample(pair)
    expected = layer.to_dense()(x)
    plans = [*usable_plans(layer, x)]
    for name in plans:
        layer.plan = name
        with torch.autocast("cpu", torch.bfloat16):
            trained, low = layer(x), layer(x.bfloat16())
            with torch.no_grad():
                bound, again = layer(x), layer(x)
        assert trained.dtype == bound.dtype == low.dtype == torch.bfloat16
        assert relative(trained, expected) < 2e-2 and relative(low, expected) < 2e-2
        assert relative(bound, expected) < 2e-2 and torch.equal(bound, again)
        with torch.no_grad():
            assert layer(x).dtype == torch.float32
        trained.float().sum().backward()


@every_pair
@pytest.mark.parametrize("requires_grad", [True, False])
def test_compile(pair: Pair, requires_grad: bool) -> None:
    layer = random_layer(pair).requires_grad_(requires_grad)
    x = sample(pair)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name in [None, *usable_plans(layer, x)]:
        torch._dynamo.reset()
        layer.plan = name
        expected = layer(x)
        assert relative(compiled(x), expected) < 1e-5, name
        with torch.no_grad():
            assert relative(compiled(x), expected) < 1e-5, name
        if requires_grad:
            gradient = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, list(layer.parameters()), gradient)
            found = torch.autograd.grad(compiled(x), list(layer.parameters()), gradient)
            for f, w in zip(found, wanted, strict=True):
                assert relative(f, w) < 1e-4, name


@every_pair
def test_export(pair: Pair) -> None:
    layer = random_layer(pair).eval()
    x = sample(pair)
    program = torch.export.export(
        nn.Sequential(layer), (x,), dynamic_shapes=[{0: torch.export.Dim("n", max=64)}]
    )
    larger = torch.cat([x, x, x])
    assert relative(program.module()(larger), layer(larger)) < 1e-5


def test_linear_layers_under_fx() -> None:
    layer = tcnn.FactorizedLinear(7, 9, rank=3)
    x = torch.randn(2, 7)
    # The graph may take another plan, whose roundings differ.
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))


@every_pair
def test_counts(pair: Pair) -> None:
    layer = random_layer(pair)
    x = sample(pair)
    y = layer(x)
    cores = [p.numel() for p in layer.weight.parameters()]
    assert layer.weight.numel == sum(cores)
    positions = y.numel() // layer.weight.shape[0]
    assert layer.dense_macs(x.shape) == positions * layer.weight.shape.numel()
    before = x.numel() // layer.weight.shape[1]
    assert layer.macs(x.shape) == layer.weight.macs(before, positions)
    assert layer.geometry.output_shape(x.shape, layer.weight.shape) == tuple(y.shape)


@every_pair
def test_meta_device(pair: Pair) -> None:
    config = random_layer(pair).config()
    layer = tcnn.from_config(config, device="meta")
    x = sample(pair).to("meta")
    expected = layer.geometry.output_shape(LAYERS[pair.layer][3], layer.weight.shape)
    for plan in (None, *(p.name for p in plans_for(layer))):
        layer.plan = plan
        y = layer(x)
        assert y.device.type == "meta" and tuple(y.shape) == expected


@every_pair
def test_called_by_keyword(pair: Pair) -> None:
    layer, x = random_layer(pair), sample(pair)
    with torch.no_grad():
        assert torch.equal(layer(input=x), layer(x))


@every_pair
def test_wrong_inputs_are_named(pair: Pair) -> None:
    layer = random_layer(pair)
    shape = list(LAYERS[pair.layer][3])
    shape[-1 if pair.layer == "linear" else 1] += 1
    with pytest.raises(ValueError, match=r"x must be \[.*(7|10).*\], got \["):
        layer(torch.randn(shape))
    with pytest.raises(TypeError, match=r"x must have the weight's dtype torch.float32, got torch.float64"):
        layer(sample(pair, torch.float64))
    layer(sample(pair))
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            layer(sample(pair))
            for wrong in ("x", None, [1.0], sample(pair).numpy()):
                named = rf"^{type(layer).__name__}: x must be a tensor"
                message = rf"{named} \[.*(7|10).*\], got {type(wrong).__name__}$"
                with pytest.raises(TypeError, match=message):
                    layer(wrong)
    with pytest.raises(ValueError, match=r"plan must be None or one of \['dense'"):
        layer.plan = "quick"
