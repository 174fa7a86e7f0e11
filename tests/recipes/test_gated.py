"""Gates of a network in training: counts, removal with the optimizer's state, freezing, resuming."""

import copy
import math

import pytest
import torch
from gated_networks import DENSE, gated, set_open, state_of, step
from torch.utils._python_dispatch import TorchDispatchMode

from tensorcomp_ext import recipes
from tensorcomp_ext.formats.bonds import stored_at
from tensorcomp_ext.models import build
from tensorcomp_ext.nn.gates import gates_of
from tensorcomp_ext.ranks.bernoulli_gates import BernoulliGate
from tensorcomp_ext.ranks.concrete_gates import ConcreteGate
from tensorcomp_ext.ranks.gaussian_gates import GaussianGate
from tensorcomp_ext.recipes import L0, GatedNetwork, RankSelection
from tensorcomp_ext.recipes.start import factorized


def logits(model, state):
    model.eval()
    with torch.no_grad():
        found = model(*state.inputs)
    model.train()
    return found


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_published_first_penalty_and_counts_of_lenet():
    small, report = factorized("l0", build("lenet5"), rank=25, preset="lenet5-tr")
    found = GatedNetwork(small, GaussianGate(spread=0.0), report.parameters_before)
    assert report.parameters_before == 429_100
    assert found.stored() == report.parameters_after == 161 * 625 + 400
    assert sum(len(sizes) for sizes in found.ranks().values()) == 20
    assert sum(len(location) for location in found.locations) == found.count_gates() == 480
    method = L0(found)
    assert method.penalty().item() == pytest.approx(20 * 0.991802, abs=1e-4)
    assert method.penalty().item() == pytest.approx(19.84, abs=5e-3)
    assert L0(found, reduction="sum").penalty().item() == pytest.approx(480 * 0.991802, abs=2e-3)
    method.penalty().backward()
    slopes = found.locations[0].grad * 24
    torch.testing.assert_close(slopes, torch.full_like(slopes, 0.044789), rtol=1e-4, atol=0)


def test_ranks_and_ratio_are_those_after_folding():
    found = gated()
    set_open(found, (0.5, 0.3))
    ranks, stored, count = found.ranks(), found.stored(), found.count_gates()
    assert ranks == {"0": {"R_0": 1, "R_1": 3, "R_2": 2}, "3": {"R_0": 2, "R_1": 2, "R_2": 2}}
    assert count == sum(size - 1 for sizes in ranks.values() for size in sizes.values())
    ratio = found.ratio()
    found.fold()
    assert sum(p.numel() for p in found.model.parameters()) == stored
    assert found.sizes == ranks
    assert ratio == DENSE / stored


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_removal_changes_neither_outputs_nor_the_steps_of_what_stays(dataset, name):
    """The oracle keeps the entries, their gates shut for good."""
    make = {"sgd": {"optimizer": torch.optim.SGD, "momentum": 0.9}, "adam": {"optimizer": torch.optim.Adam}}
    cut, whole = gated(), gated()
    states = [state_of(g, dataset, lr=0.01, **make[name]) for g in (cut, whole)]
    methods = [L0(g, weight=0.1) for g in (cut, whole)]
    for g, state, method in zip((cut, whole), states, methods, strict=True):
        torch.manual_seed(7)
        for _ in range(3):
            step(state, method)
        set_open(g, (0.5, 0.4), low=-9.0)
        g.freeze()  # without noise both see the same gates
    before = logits(cut.model, states[0])
    methods[0].remove(states[0])
    assert cut.sizes == whole.ranks() != whole.sizes
    assert states[0].changed
    assert apart(logits(cut.model, states[0]), before) < 1e-6
    kept = {id(p) for group in states[0].optimizer.param_groups for p in group["params"]}
    assert kept == {id(p) for p in cut.model.parameters()}
    for _ in range(3):
        for state, method in zip(states, methods, strict=True):
            step(state, method)
    assert apart(logits(cut.model, states[0]), before) > 1e-3
    assert apart(logits(cut.model, states[0]), logits(whole.model, states[1])) < 1e-5


def test_what_is_removed_opens_hardly_ever(dataset):
    found, gate = gated(), GaussianGate()
    with torch.no_grad():
        for location in found.locations:
            location.copy_(torch.linspace(-3.0, 0.5, len(location)))
    expected = {
        name: {
            bond: max(1, int((chances > 0.05).sum()))
            for bond, chances in gates.by_bond(gates.entries(gate.probability(gates.location), 1.0)).items()
        }
        for name, gates in ((n, gates_of(layer)) for n, layer in found.layers.items())
    }
    method = RankSelection(found, remove_below=0.05)
    before = [location.detach().clone() for location in found.locations]
    method.remove(state_of(found, dataset))
    assert found.sizes == expected
    for old, new in zip(before, found.locations, strict=True):
        assert torch.equal(new, old[gate.probability(old) > 0.05])
    method.remove(state_of(found, dataset))
    assert found.sizes == expected


@pytest.mark.parametrize("gate", [GaussianGate(), BernoulliGate(), ConcreteGate()])
def test_ranks_never_fall_to_nothing(dataset, gate):
    found = gated(gate)
    with torch.no_grad():
        for location in found.locations:
            location.fill_(-50.0)
    assert all(size == 1 for sizes in found.ranks().values() for size in sizes.values())
    RankSelection(found).remove(state_of(found, dataset))
    assert all(size == 1 for sizes in found.sizes.values() for size in sizes.values())
    found.fold()
    assert torch.isfinite(found.model(torch.randn(2, 1, 8, 8))).all()


@pytest.mark.parametrize("every", [0, 3])
def test_removal_is_tried_at_its_steps(dataset, every):
    found = gated()
    method = RankSelection(found, remove_every=every)
    state = state_of(found, dataset)
    set_open(found, (0.5, 0.5), low=-20.0)
    sizes = []
    for _ in range(4):
        step(state, method)
        sizes.append(found.sizes == found.ranks())
    assert sizes == ([False] * 4 if every == 0 else [False, False, True, True])
    method.on_epoch(state)
    assert found.sizes == found.ranks()


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_frozen_gates_are_not_moved_by_momentum_either(dataset, name):
    make = {
        "sgd": {"optimizer": torch.optim.SGD, "momentum": 0.9, "weight_decay": 0.1},
        "adam": {"optimizer": torch.optim.Adam},
    }
    found = gated()
    state = state_of(found, dataset, **make[name])
    method = L0(found, target=found.ratio() * 1.05)
    for _ in range(3):
        step(state, method)
    assert not found.frozen
    set_open(found, (0.5, 0.5), low=-20.0)
    assert found.ratio() >= method.target
    step(state, method)
    assert found.frozen
    assert found.sizes == found.ranks()
    before = [location.detach().clone() for location in found.locations]
    weights = [layer.weight.factors[0].detach().clone() for layer in found.layers.values()]
    for _ in range(4):
        step(state, method)
    assert all(torch.equal(a, b) for a, b in zip(before, found.locations, strict=True))
    assert not any(
        torch.equal(w, layer.weight.factors[0])
        for w, layer in zip(weights, found.layers.values(), strict=True)
    )
    x = state.inputs[0]
    assert torch.equal(found.model(x), found.model(x))  # no noise
    loss = torch.tensor(1.5)
    assert method.on_loss(state, loss) is loss  # no penalty


@pytest.mark.parametrize("gate", [GaussianGate(), BernoulliGate(), ConcreteGate(), ConcreteGate(mean=1.0)])
def test_the_ratio_is_looked_at_without_waiting_for_every_rank(gate):
    """On an accelerator each number that Python reads is waited for."""
    found = gated(gate)
    with torch.no_grad():
        for location in found.locations:
            location.copy_(torch.linspace(-1.0, -3.0, len(location)))  # l0's has some open, the others none
    expected = found.ratio()

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.count += op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
            return op(*args, **(kwargs or {}))

    with Reads() as reads:
        assert found.ratio() == expected
    assert reads.count == 1  # what stays, with what stayed before, both on the CPU


@pytest.mark.parametrize("gate", [GaussianGate(), BernoulliGate(), ConcreteGate(), ConcreteGate(mean=0.5)])
def test_gates_are_open_where_they_are_opened(gate):
    found = gated(gate)
    assert gate.begins_open == (found.ranks() == found.sizes)
    with torch.no_grad():
        for location in found.locations:
            location.fill_(-9.0)
    found.open_all()
    assert found.ranks() == found.sizes
    for gates in gates_of(found.layers["0"]), gates_of(found.layers["3"]):
        assert all((values == 1).all() for values in gates.decided().values())


@pytest.mark.parametrize("ratio", [1.0, 5.2, 8.0, 20.0, 1000.0])
def test_no_more_is_cut_than_a_ratio_asks_for(ratio):
    """Of all entries that might go the likeliest stay, whichever layer they are of."""
    found = gated(ConcreteGate())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for location in found.locations:
            location.copy_(-7.0 - torch.rand(len(location), generator=generator))
    # All entries but the likeliest of each bond, in the order in which they go.
    entries = sorted(
        (value, name, bond)
        for name, layer in found.layers.items()
        for bond, values in gates_of(layer).by_bond(gates_of(layer).location.detach()).items()
        for value in sorted(values.tolist())[:-1]
    )
    sizes, expected = found.sizes, []
    for value, name, bond in entries:
        if (
            DENSE / (found.rest + sum(stored_at(m.weight, sizes[n]) for n, m in found.layers.items()))
            >= ratio
        ):
            break
        sizes[name][bond] -= 1
        expected.append(value)
    before = {value for location in found.locations for value in location.tolist()}
    found.remove(0.02, ratio)
    assert found.sizes == sizes
    assert before - {v for location in found.locations for v in location.tolist()} == set(expected)
    assert len(expected) == {1.0: 0, 1000.0: len(entries)}.get(ratio, len(expected))


def test_a_start_beyond_the_target_is_frozen_before_the_first_step(dataset):
    found = gated()
    method = L0(found, target=1.0 + 1e-9)
    state = state_of(found, dataset)
    method.on_start(state)
    assert found.frozen == (found.ratio() >= method.target)


def test_figures_of_an_epoch():
    found = gated(GaussianGate(spread=0.0))
    method = L0(found, weight=3.0)
    entry = method.log()
    assert entry["ranks"] == {"0": [2, 4, 3], "3": [4, 5, 5]}
    stored, gates = found.stored(), found.count_gates()
    assert entry["ratio"] == DENSE / stored
    assert entry["ratio_with_gates"] == DENSE / (stored + gates)
    assert entry["penalty"] == pytest.approx(6 * 0.991802, abs=1e-5)
    assert entry["frozen"] is False


def test_resuming_gives_the_ranks_that_were_saved(dataset):
    found, other = gated(), gated()
    state, method = state_of(found, dataset, momentum=0.9), L0(found, target=1000.0)
    for _ in range(2):
        step(state, method)
    set_open(found, (0.5, 0.4), low=-9.0)
    method.remove(state)
    found.freeze()
    saved = copy.deepcopy(method.state_dict())
    fresh, again = state_of(other, dataset, momentum=0.9), L0(other, target=1000.0)
    again.reshape(fresh, saved)
    assert other.sizes == found.sizes
    assert other.frozen
    assert not any(location.requires_grad for location in other.locations)
    fresh.model.load_state_dict(state.model.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    assert [g.shares.tolist() for g in other.gates] == [g.shares.tolist() for g in found.gates]
    for s, m in ((state, method), (fresh, again)):
        torch.manual_seed(3)
        step(s, m)
    assert all(map(torch.equal, found.model.state_dict().values(), other.model.state_dict().values()))
    with pytest.raises(ValueError, match=r"rank R_1 of 0 must be in \[1, 3\], got 9"):
        again.reshape(
            fresh, {"sizes": {**saved["sizes"], "0": {"R_0": 1, "R_1": 9, "R_2": 1}}, "frozen": False}
        )
    with pytest.raises(ValueError, match="ranks are of another network"):
        again.reshape(fresh, {"sizes": {}, "frozen": False})


def test_settings_tell_one_run_from_another():
    plain = L0(gated()).settings()
    assert plain == L0(gated()).settings()
    others = [
        L0(gated(), weight=0.5, start={"weight": 0.5}),
        L0(gated(GaussianGate(0.3))),
        L0(gated(), remove_every=5),
        L0(gated(), target=4.0),
        L0(gated(), remove_below=0.1),
    ]
    assert all(other.settings() != plain for other in others)


def test_a_dense_network_has_nothing_to_select():
    with pytest.raises(ValueError, match="GatedNetwork: the model has no factorised layer with inner ranks"):
        GatedNetwork(torch.nn.Linear(3, 3), GaussianGate(), 12)


def test_the_loop_trains_a_gated_network(dataset):
    found = gated()
    method = L0(found, weight=0.5, remove_every=4)
    history = recipes.train(
        found.model, dataset, epochs=2, lr=0.05, batch_size=16, optimizer="adam", callbacks=[method]
    ).history
    assert all(math.isfinite(e.loss) for e in history)
    assert [set(e.extra) for e in history] == [
        {"ranks", "ratio", "ratio_with_gates", "frozen", "penalty"}
    ] * 2
    assert history[-1].extra["penalty"] < history[0].extra["penalty"]
