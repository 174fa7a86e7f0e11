from __future__ import annotations

import warnings

import pytest
import torch
from compress_networks import SmallNet, low_rank_conv, same_state, small_net, state
from torch import Tensor, nn
from torch.nn.utils import prune

from tensorcomp_ext.compress import compress
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.ranks import Energy

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to", "ignore:.*deprecated")

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach().double()).norm() / expected.detach().norm())


def test_default_formats_and_untouched_original():
    net = small_net()
    before = state(net)
    result = compress(net, rank=4)
    assert type(result.model.stem) is FactorizedConv2d
    assert type(result.model.body[1]) is FactorizedConv2d
    assert type(result.model.head) is FactorizedLinear
    assert result.report["stem"].format == "tucker2" and result.report["head"].format == "svd"
    assert isinstance(net.stem, nn.Conv2d) and same_state(before, net.state_dict())
    assert torch.equal(result.model.norm.running_var, net.norm.running_var)
    assert torch.equal(result.model.stem.bias, net.stem.bias) and result.model.body[1].bias is None


def test_exact_rank_gives_the_same_function():
    net = small_net()
    low_rank_conv(net.body[1], 5)
    model, report = compress(net, rank={"body.1": 5}, example_inputs=X)
    assert relative(model(X), net(X)) < 1e-5
    assert report["body.1"].relative_error < 1e-5 and report.output_error < 1e-5


def test_relative_error_is_that_of_the_stored_weight():
    net = small_net()
    model, report = compress(net, rank={"body.1": (6, 4)})
    dense = net.body[1].weight.double()
    expected = (model.body[1].to_dense().weight.double() - dense).norm() / dense.norm()
    assert report["body.1"].relative_error == pytest.approx(expected.item(), rel=1e-4)
    assert report["body.1"].rank == (6, 4)
    assert report["body.1"].parameters_after == 16 * 4 + 6 * 4 * 9 + 24 * 6


def test_inplace_swaps_in_the_given_model():
    net = small_net()
    bias = net.stem.bias
    result = compress(net, rank=4, inplace=True)
    assert result.model is net and type(net.stem) is FactorizedConv2d
    assert net.stem.bias is bias  # optimizers that hold it stay valid


@pytest.mark.parametrize("inplace", [False, True])
def test_mode_trainability_dtype_and_hooks_survive(inplace):
    net = small_net(dtype=torch.float64)
    net.body[1].train()
    net.stem.weight.requires_grad_(False)
    net.stem.tag = "first"
    seen: list[str] = []
    handle = net.stem.register_forward_hook(lambda *_: seen.append("after"))
    net.stem.register_forward_pre_hook(lambda *_: seen.append("before"))
    net.stem.register_full_backward_hook(lambda *_: seen.append("backward"))
    model = compress(net, rank=4, inplace=inplace).model
    assert model.body[1].training and not model.stem.training and not model.training
    assert model.stem.weight.core.dtype == torch.float64
    assert not any(p.requires_grad for p in model.stem.weight.parameters()) and model.stem.bias.requires_grad
    assert all(p.requires_grad for p in model.body[1].weight.parameters())
    assert model.stem.tag == "first"
    model(X.double().requires_grad_()).sum().backward()
    assert sorted(seen) == ["after", "backward", "before"]
    if inplace:
        handle.remove()
        model(X.double())
        assert seen.count("after") == 1


def test_layers_exclude_and_patterns():
    net = small_net()
    report = compress(net, rank=2, layers=["stem", "body.*"], exclude="body.1").report
    assert [layer.name for layer in report.replaced] == ["stem"]
    assert (
        report["head"].skipped == "not among the layers asked for" and report["body.1"].skipped == "excluded"
    )


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("layers", ["stem", "bodi.*"], r"layers pattern 'bodi\.\*' matches no"),
        ("layers", "body", r"write 'body\.\*'"),
        ("exclude", "norm", "exclude pattern 'norm' matches no"),
        ("rank", {"haed": 2}, "rank pattern 'haed' matches no"),
        ("format", {"tail*": "svd"}, r"format pattern 'tail\*' matches no"),
        ("format", "tukcer2", "tukcer2"),
        ("rank", 0, "stem"),
        ("rank", (1, 2, 3), "stem"),
        ("rank", 1.5, "stem"),
    ],
)
def test_wrong_arguments_name_the_culprit(argument, value, text):
    net = small_net()
    before = state(net)
    with pytest.raises(ValueError, match=text):
        compress(net, **{"rank": 2, argument: value}, inplace=True)
    assert same_state(before, net.state_dict())


def test_mappings_first_fit():
    net = small_net()
    report = compress(net, format={nn.Linear: "svd", "stem": "tucker2"}, rank={"head": 2, "*": (3, 4)}).report
    assert report["head"].rank == (2,) and report["stem"].rank == (
        3,
        3,
    )  # R_in is clipped to the three channels
    assert report["body.1"].rank == (3, 4)


def test_rank_mapping_leaves_other_layers_dense():
    report = compress(small_net(), rank={"stem": 2}).report
    assert report["head"].skipped == "no rank pattern fits"


def test_single_format_leaves_other_kinds_dense():
    report = compress(small_net(), format="tucker2", rank=2).report
    assert "not for Linear" in report["head"].skipped and report["stem"].skipped is None


def test_rules_skip_what_would_not_get_smaller_and_explicit_ranks_do_not():
    net = small_net()
    with pytest.warns(UserWarning, match="nothing was replaced"):
        report = compress(net, rank=Energy(1.0)).report
    assert not report.replaced and "would not get smaller" in report["stem"].skipped
    report = compress(net, rank={"body.1": (24, 16)}).report
    assert report["body.1"].skipped is None and "as asked" in report["body.1"].note
    assert report["body.1"].ratio < 1


def test_nothing_to_replace_warns_or_raises():
    with pytest.warns(UserWarning, match="nothing was replaced"):
        compress(nn.Sequential(nn.ReLU()), rank=2)
    with pytest.raises(ValueError, match="would not get smaller"):
        compress(small_net(), rank=Energy(1.0), layers="stem")


def shared() -> nn.Module:
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    net["b"].weight = net["a"].weight
    return net


def aliased() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.ModuleDict({"a": layer, "b": layer})


def same_memory() -> nn.Module:
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    net["b"].weight.data = net["a"].weight.data
    return net


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def overridden() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(8, 8))


REFUSED = {
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2), "grouped"),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), "transposed"),
    "reflect": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "lazy"),
    "lazy linear": (lambda: nn.LazyLinear(8), "lazy"),
    "subclass": (lambda: OwnLinear(8, 8), "OwnLinear"),
    "overridden": (overridden, "forward is overridden"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "parametrized"),
    "weight norm": (normed, "computed from other tensors"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5), "computed from"),
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "complex64"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "meta device"),
    "shared": (shared, "shared with"),
    "same memory": (same_memory, "shared with"),
    "aliased": (aliased, "the same module is also"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "MultiheadAttention"),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16), "fast path"),
    "quantised": (lambda: torch.ao.nn.quantized.dynamic.Linear(8, 8), "quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_layers_stay_with_a_reason(case):
    make, text = REFUSED[case]
    net = nn.Sequential(make(), nn.Linear(16, 16))
    model, report = compress(net, rank=2)
    assert [layer.name for layer in report.replaced] == ["1"] and type(model[0]) is type(net[0])
    reasons = [layer.skipped for layer in report.skipped]
    assert reasons and any(text in reason for reason in reasons)


def test_transformer_encoder_runs_after_compression():
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = nn.Sequential(net, nn.Linear(16, 16))
    x = torch.randn(2, 5, 16)
    result = compress(model, rank=4, example_inputs=x)
    with torch.no_grad():
        assert result.model(x).shape == (2, 5, 16)


def test_bias_shared_by_two_layers_stays_shared():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].bias = net[0].bias
    model = compress(net, rank=2).model
    assert model[0].bias is model[1].bias and model[0].bias is not net[0].bias


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("inplace", [False, True])
def test_nonfinite_weight_is_named_and_nothing_replaced(value, inplace):
    net = small_net()
    with torch.no_grad():
        net.head.weight[2, 3] = value
    with pytest.raises(ValueError, match=r"'head'.*NaN or Inf"):
        compress(net, rank=2, inplace=inplace)
    assert isinstance(net.stem, nn.Conv2d) and isinstance(net.head, nn.Linear)
    assert compress(net, rank=2, exclude="head").report["head"].skipped == "excluded"


def test_failing_decomposition_names_the_layer(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    net = small_net()
    monkeypatch.setattr(FactorizedLinear, "from_linear", fail)
    with pytest.raises(ValueError, match=r"'head'.*did not converge"):
        compress(net, rank=2, inplace=True)
    assert isinstance(net.stem, nn.Conv2d)


def test_inplace_is_undone_when_the_outcome_does_not_run():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) @ self.used.weight

    net = Reader()
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        compress(net, rank=2, example_inputs=torch.randn(3, 8), inplace=True)
    assert type(net.used) is nn.Linear


def test_layer_reached_by_another_route_is_an_error():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.route = [self.layer]

        def forward(self, x: Tensor) -> Tensor:
            return self.route[0](x)

    net = Hidden()
    with pytest.raises(ValueError, match="another route"):
        compress(net, rank=2, example_inputs=torch.randn(3, 8), inplace=True)
    assert type(net.layer) is nn.Linear


def test_uncalled_layers_stay():
    class Partial(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.stem(x) @ self.head.weight[:1, :8].T

    report = compress(Partial().eval(), rank=2, example_inputs=X).report
    assert "not called" in report["head"].skipped and report["stem"].skipped is None


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_example_inputs_kinds(kind):
    net = small_net()
    inputs = {"tensor": X, "tuple": (X,), "dict": {"x": X}}[kind]
    report = compress(net, rank=4, example_inputs=inputs).report
    assert report["body.1"].input_shape == (2, 16, 8, 8)
    assert report["body.1"].macs_before == 2 * 16 * 24 * 16 * 9
    with pytest.raises(TypeError, match="example_inputs"):
        compress(net, rank=4, example_inputs=3.0)


def test_example_run_moves_neither_statistics_nor_random_state():
    net = small_net().train()
    net.body.append(nn.Dropout(0.5))
    before = state(net)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = compress(net, rank=4, example_inputs=X).model
    assert torch.equal(torch.rand(3), expected)
    assert same_state(before, net.state_dict()) and net.training and model.training
    assert torch.equal(model.norm.running_mean, net.norm.running_mean)


def test_macs_count_the_plan_that_runs():
    net = small_net()
    model, report = compress(net, rank={"body.1": (4, 3)}, example_inputs=X)
    entry = report["body.1"]
    factorised = 2 * (64 * 16 * 3 + 16 * (9 * 3 * 4 + 4 * 24))
    assert entry.plan in ("dense", "staged", "fused")
    assert entry.macs_after == (entry.macs_before if entry.plan == "dense" else factorised)
    assert report["stem"].macs_after == report["stem"].macs_before == 2 * 64 * 16 * 27
    assert report.macs_before == sum(layer.macs_before for layer in report)
    model.body[1].plan = "staged"
    from tensorcomp_ext.compress import refresh

    assert refresh(report, model, X)["body.1"].macs_after == factorised
    model.body[1].plan = "dense"
    assert refresh(report, model, X)["body.1"].macs_after == entry.macs_before


def test_measure_gives_ordered_percentiles():
    report = compress(small_net(), rank=4, example_inputs=X, measure=True).report
    for layer in report.replaced:
        for latency in (layer.latency_before, layer.latency_after):
            assert 0 < latency.p10 <= latency.p50 <= latency.p90
    with pytest.raises(ValueError, match="needs example_inputs"):
        compress(small_net(), rank=4, measure=True)


def test_the_model_may_be_one_layer():
    layer = nn.Linear(16, 16)
    result = compress(layer, rank=2)
    assert type(result.model) is FactorizedLinear and type(layer) is nn.Linear
    with pytest.raises(ValueError, match="itself one layer"):
        compress(layer, rank=2, inplace=True)


def test_exclude_that_is_no_pattern_is_named() -> None:
    with pytest.raises(TypeError, match="compress: exclude must be a name pattern or several, got 3"):
        compress(nn.Sequential(nn.Conv2d(4, 4, 3)), rank=2, exclude=3)  # type: ignore[arg-type]
