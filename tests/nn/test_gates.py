"""Gates on the ranks of layers: calls and gradients against gated factors written out, cuts, folding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensorcomp_ext.formats.bonds import bond_sizes
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from tensorcomp_ext.nn.gates import attach_gates, cut, fold_gates, gates_of
from tensorcomp_ext.plan import tune
from tensorcomp_ext.ranks.bernoulli_gates import BernoulliGate
from tensorcomp_ext.ranks.concrete_gates import ConcreteGate
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate

LINEAR = {"svd": 5, "tt": 4, "tr": (2, 3, 1, 4, 3, 2), "ttm": 4, "tr_matrix": 3, "cp": 5, "tucker": 3}
CONV = {"tucker2": (4, 3), "tt": 3, "tr": (2, 4, 3), "ttm": 4, "cp": 4, "tucker": (4, 3, 2, 3)}
CASES = [
    *(("linear", name, rank) for name, rank in LINEAR.items()),
    *(("conv", name, rank) for name, rank in CONV.items()),
    *(("embedding", name, 4) for name in ("ttm", "tr_matrix")),
]
GATES = [GaussianGate(), BernoulliGate(), ConcreteGate(mean=0.5)]


def layer_of(kind, format, rank, dtype=torch.float32):
    torch.manual_seed(1)
    if kind == "linear":
        return FactorizedLinear(24, 30, format=format, rank=rank, dtype=dtype)
    if kind == "conv":
        return FactorizedConv2d(6, 8, 3, padding=1, format=format, rank=rank, dtype=dtype)
    return FactorizedEmbedding(23, 8, padding_idx=2, format=format, rank=rank, dtype=dtype)


def input_of(kind, dtype=torch.float32):
    if kind == "linear":
        return torch.randn(7, 24, dtype=dtype)
    return torch.randn(3, 6, 5, 7, dtype=dtype) if kind == "conv" else torch.randint(0, 23, (4, 3))


def dense_call(kind, layer, weight, x):
    if kind == "linear":
        return F.linear(x, weight, layer.bias)
    if kind == "conv":
        return F.conv2d(x, weight, layer.bias, padding=1)
    return F.embedding(x, weight, 2) * (x != 2).unsqueeze(-1)


def written_out(layer, gates):
    """The dense weight with the gates of every bond at the last of its places, which carries none."""
    weight = layer.weight
    factors = dict(zip(weight.factor_names, weight.factors, strict=True))
    for bond, places in weight.bonds().items():
        name, dim = next(p for p in reversed(places) if p != gates_of(layer).carriers[bond])
        factors[name] = (factors[name].movedim(dim, -1) * gates[bond]).movedim(-1, dim)
    return torch.func.functional_call(weight, factors)


def settle(layer, seed=0):
    """Locations spread out, so that of each bond some gates are open, some shut, and some between."""
    gates = gates_of(layer)
    torch.manual_seed(seed)
    with torch.no_grad():
        spread = torch.rand_like(gates.location)
        offset = getattr(gates.gate, "offset", None)
        gates.location.copy_(2 * spread - 0.7 - offset if offset is not None else 2 * spread - 0.6)
    return gates


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize(("kind", "format", "rank"), CASES)
def test_a_training_call_is_that_of_gated_factors(kind, format, rank, gate):
    layer = layer_of(kind, format, rank, torch.float64)
    attach_gates(layer, gate)
    gates, x = settle(layer), input_of(kind, torch.float64)
    for seed in (5, 6):
        torch.manual_seed(seed)
        found = layer(x)
        torch.manual_seed(seed)
        drawn = gates.draw()
        expected = dense_call(kind, layer, written_out(layer, drawn), x)
        assert relative(found, expected) < 1e-12
        parameters = [p for p in layer.parameters() if p.requires_grad]
        target = torch.randn_like(expected)
        ours, theirs = (
            torch.autograd.grad((y * target).sum(), parameters, allow_unused=True) for y in (found, expected)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or float((a - b).norm()) <= 1e-10 * max(1.0, float(b.norm()))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize(("kind", "format", "rank"), CASES)
def test_folding_keeps_the_outputs_of_evaluation(kind, format, rank, gate):
    layer, x = layer_of(kind, format, rank), input_of(kind)
    keys = list(layer.state_dict())
    attach_gates(layer, gate)
    gates = settle(layer)
    ranks = gates.ranks()
    layer.eval()
    with torch.no_grad():
        before = layer(x)
    assert relative(before, dense_call(kind, layer, written_out(layer, gates.decided()), x).detach()) < 1e-5
    fold_gates(layer)
    with torch.no_grad():
        after = layer(x)
    assert float((before - after).norm()) <= 1e-5 * float(before.norm())
    assert bond_sizes(layer.weight) == ranks
    assert min(ranks.values()) >= 1
    assert gates_of(layer) is None
    assert list(layer.state_dict()) == keys
    assert not (layer._forward_hooks or layer._forward_pre_hooks or layer._forward_hooks_always_called)
    layer.train()
    assert relative(layer(x).detach(), before) < 1e-5  # nothing is drawn any more


def test_gates_are_drawn_at_each_training_call_and_decided_in_evaluation():
    layer, x = layer_of("linear", "tr", 3), input_of("linear")
    gates = attach_gates(layer, GaussianGate())
    assert relative(layer(x), layer(x)) > 1e-3
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    gates.frozen = True
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_prepares_its_weights_once_a_state(mode):
    layer, x = layer_of("linear", "tt", 3).eval(), input_of("linear")
    gates = settle_attached(layer)
    with mode():
        first = layer(x)
        prepared = layer._prepared
        assert torch.equal(layer(x), first)
        assert prepared is not None
        assert layer._prepared is prepared
    with torch.no_grad():
        gates.location[-1] += 0.3
        layer.weight.core_0[0] *= 2
    with mode():
        changed = layer(x)
    assert relative(changed, first) > 1e-3
    expected = dense_call("linear", layer, written_out(layer, gates.decided()), x).detach()
    assert relative(changed, expected) < 1e-5


def test_a_layer_that_was_moved_prepares_anew():
    layer, x = layer_of("linear", "tt", 3).eval(), input_of("linear")
    settle_attached(layer)
    with torch.no_grad():
        before = layer(x)
        after = layer.double()(x.double())
    assert after.dtype == torch.float64
    assert relative(after.float(), before) < 1e-5


def settle_attached(layer):
    attach_gates(layer, GaussianGate())
    return settle(layer)


def test_outside_of_calls_factors_are_what_they_were():
    layer = layer_of("conv", "tucker2", (4, 3))
    before = dict(layer.named_parameters())
    attach_gates(layer, GaussianGate())
    layer(input_of("conv")).sum().backward()
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.randn(3, 5, 5, 5))
    after = dict(layer.named_parameters())
    assert set(after) == {*before, "gates.location"}
    assert all(after[name] is p for name, p in before.items())
    assert all(p.grad is not None for p in after.values())
    assert set(layer.state_dict()) == set(after)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_copies_have_gates_of_their_own(gate):
    layer, x = layer_of("linear", "tr", 3), input_of("linear")
    attach_gates(layer, gate)
    settle(layer)
    layer(x)
    with torch.no_grad():
        layer.eval()(x)
    other = copy.deepcopy(layer)
    assert gates_of(other) is not gates_of(layer)
    with torch.no_grad():
        expected = layer(x)
        gates_of(layer).location.fill_(-5.0)
        layer.weight.core_0.zero_()
        assert torch.equal(other(x), expected)
        assert not torch.equal(layer(x), expected)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(("kind", "format", "rank"), CASES)
def test_a_cut_of_shut_entries_changes_no_output_and_no_gate(kind, format, rank):
    layer, x = layer_of(kind, format, rank), input_of(kind)
    gates = settle_attached(layer).eval()
    decided, shares = gates.decided(), gates.shares.clone()
    with torch.no_grad():
        before = layer.eval()(x)
    layer.tuned = {"a case": {"plan": "dense", "seconds": {}}}
    old = dict(layer.named_parameters())
    kept = {bond: (z > 0).nonzero().flatten() for bond, z in decided.items()}
    changes = cut(layer, kept)
    with torch.no_grad():
        assert relative(layer(x), before) < 1e-5
    assert layer.tuned == {}
    assert bond_sizes(layer.weight) == gates.sizes == {bond: len(k) for bond, k in kept.items()}
    for bond, z in gates.decided().items():
        assert torch.equal(z, decided[bond][kept[bond]])
    assert all(float(s) in shares.tolist() for s in gates.shares)
    for name, parameter in layer.named_parameters():
        if old[name] is not parameter:
            new, convert = changes[old[name]]
            assert new is parameter
            assert torch.equal(convert(old[name].detach()), parameter.detach())
    assert len(changes) == sum(old[n] is not p for n, p in layer.named_parameters()) > 0
    layer.train()(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_cut_core_keeps_its_memory_format():
    layer = FactorizedConv2d(8, 12, 3, format="tucker2", rank=(6, 5)).to(memory_format=torch.channels_last)
    attach_gates(layer, GaussianGate())
    kept = {bond: torch.arange(size - 2) for bond, size in bond_sizes(layer.weight).items()}
    cut(layer, kept)
    assert layer.weight.rank == (4, 3)
    assert layer.weight.core.is_contiguous(memory_format=torch.channels_last)


def test_a_cut_of_nothing_changes_nothing():
    layer = layer_of("linear", "svd", 5)
    weight = layer.weight
    assert cut(layer, {"R": torch.arange(5)}) == {}
    assert layer.weight is weight


def test_ranks_never_fall_to_nothing():
    for gate, low in ((GaussianGate(), -9.0), (BernoulliGate(), -9.0), (ConcreteGate(), -9.0)):
        layer, x = layer_of("linear", "tr", 3).eval(), input_of("linear")
        gates = attach_gates(layer, gate)
        with torch.no_grad():
            gates.location.fill_(low)
            gates.location[-1] += 1.0  # the likeliest of the last bond
        assert set(gates.ranks().values()) == {1}
        with torch.no_grad():
            before = layer(x)
        fold_gates(layer)
        assert set(bond_sizes(layer.weight).values()) == {1}
        with torch.no_grad():
            assert relative(layer(x), before) < 1e-5


def test_bonds_of_rank_one_have_nothing_to_draw():
    layer, x = layer_of("linear", "tt", 1), input_of("linear")
    gates = attach_gates(layer, GaussianGate())
    assert gates.location.numel() == 0
    layer(x).sum().backward()
    layer.eval()
    fold_gates(layer)


def test_compiled_training_draws_the_same_gates():
    torch.compiler.reset()
    layer, x = layer_of("linear", "tr", 3), input_of("linear")
    attach_gates(layer, GaussianGate())
    compiled, found = torch.compile(layer, backend="aot_eager"), []
    for call in (layer, compiled):
        torch.manual_seed(5)
        y = call(x)
        found.append((y, *torch.autograd.grad(y.sum(), list(layer.parameters()))))
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours.detach(), theirs.detach()) < 1e-4
    assert all(isinstance(p, nn.Parameter) for p in layer.weight._parameters.values())
    assert relative(compiled(x).detach(), found[1][0].detach()) > 1e-3


def test_steps_of_low_precision_layers_are_not_lost():
    layer = layer_of("linear", "svd", 5).to(torch.bfloat16)
    gates = attach_gates(layer, GaussianGate())
    assert gates.location.dtype == torch.float32
    y = layer(input_of("linear").to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert gates.location.grad.dtype == torch.float32


def test_refusals():
    layer = layer_of("linear", "svd", 5)
    attach_gates(layer, GaussianGate())
    with pytest.raises(ValueError, match="attach_gates: FactorizedLinear has gates already"):
        attach_gates(layer, GaussianGate())
    with pytest.raises(ValueError, match="cut: entry 0 of bond R has no gate and must stay, got \\[1, 2\\]"):
        cut(layer, {"R": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match="fold_gates: FactorizedLinear has no gates"):
        fold_gates(layer_of("linear", "svd", 5))
    sparse = FactorizedLinear(6, 6, format="lowrank_sparse", rank=(), low_rank="none")
    with pytest.raises(ValueError, match="format with inner ranks, FactorizedLinear is in 'lowrank_sparse'"):
        attach_gates(sparse, GaussianGate())
    assert gates_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("training", [False, True])
def test_a_gated_layer_can_be_tuned(training):
    """The plans of its factors are measured; gates do not take part, and have no gradient then."""
    layer = layer_of("conv", "tr", (2, 4, 3))
    attach_gates(layer, GaussianGate())
    x = input_of("conv")
    tune(layer.train(training), x, training=training, min_seconds=0.001)
    assert layer.tuned
    y = layer(x)
    y.sum().backward()
    assert layer.gates.location.grad is not None


@pytest.mark.parametrize("kind,format,rank", CASES)
def test_a_torch_layer_cannot_have_gates(kind, format, rank):
    layer = layer_of(kind, format, rank)
    attach_gates(layer, GaussianGate())
    for convert in (layer.to_dense, layer.to_sequential):
        with pytest.raises(ValueError, match="fold_gates"):
            convert()
    fold_gates(layer.eval())
    x = input_of(kind)
    torch.testing.assert_close(layer.to_dense()(x), layer(x), rtol=1e-4, atol=1e-5)
