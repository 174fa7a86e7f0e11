"""Parameters that take the places of others in an optimizer."""

import pytest
import torch
from torch import nn

from tensorcomp_ext.recipes.exchange import exchange

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
}


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_stay_go_on_as_if_the_others_had_never_been(name):
    """Each row has a gradient of its own, so that a run with the kept rows alone is the oracle."""
    start, kept = torch.randn(5, 3), torch.tensor([0, 3, 4])
    whole, alone = nn.Parameter(start.clone()), nn.Parameter(start[kept])
    runs = [OPTIMIZERS[name]([{"params": [p]}]) for p in (whole, alone)]
    for _ in range(3):
        for optimizer, parameter in zip(runs, (whole, alone), strict=True):
            step(optimizer, (parameter**4).sum())
    new = nn.Parameter(whole.detach()[kept])
    exchange(runs[0], {whole: (new, lambda t: t[kept])})
    assert whole not in runs[0].state
    before = new.detach().clone()
    for _ in range(3):
        for optimizer, parameter in zip(runs, (new, alone), strict=True):
            step(optimizer, (parameter**4).sum())
    assert not torch.equal(new, before)
    assert torch.equal(new, alone)


def test_groups_places_and_scalars_are_kept():
    a, b, c = (nn.Parameter(torch.randn(4)) for _ in range(3))
    optimizer = torch.optim.Adam(
        [{"params": [a, b]}, {"params": [c], "lr": 0.5, "weight_decay": 0.1}], lr=0.1
    )
    for _ in range(2):
        step(optimizer, (a * b * c).sum())
    new_b, new_c = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(7))
    second = optimizer.state[b]["exp_avg_sq"].clone()
    exchange(optimizer, {b: (new_b, lambda t: t[:2]), c: (new_c, None)})
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        [id(a), id(new_b)],
        [id(new_c)],
    ]
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups[1]["weight_decay"] == 0.1
    assert optimizer.state[new_b]["step"] == 2
    assert torch.equal(optimizer.state[new_b]["exp_avg_sq"], second[:2])
    assert new_c not in optimizer.state
    assert set(optimizer.state) == {a, new_b}
    step(optimizer, (a[:2] * new_b).sum() + new_c.sum())
    assert optimizer.state[new_b]["step"] == 3
    assert optimizer.state[new_c]["step"] == 1


def test_the_state_is_loaded_by_place_as_before():
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([a, b], lr=0.1, momentum=0.9)
    step(optimizer, (a**2).sum() + (b**2).sum())
    new = nn.Parameter(torch.randn(2))
    exchange(optimizer, {a: (new, lambda t: t[2:])})
    other = torch.optim.SGD(
        [nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))], lr=0.1, momentum=0.9
    )
    other.load_state_dict(optimizer.state_dict())
    buffers = [other.state[p]["momentum_buffer"] for p in other.param_groups[0]["params"]]
    assert torch.equal(buffers[0], optimizer.state[new]["momentum_buffer"])
    assert torch.equal(buffers[1], optimizer.state[b]["momentum_buffer"])


def test_an_optimizer_without_state_takes_new_parameters():
    a, new = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))
    optimizer = torch.optim.Adam([a])
    exchange(optimizer, {a: (new, lambda t: t[:2])})
    assert optimizer.param_groups[0]["params"] == [new]
    assert not optimizer.state


def test_moments_of_a_parameter_that_only_moves_share_nothing():
    a = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.SGD([a], lr=0.1, momentum=0.9)
    step(optimizer, (a**2).sum())
    old, new = optimizer.state[a]["momentum_buffer"], nn.Parameter(a.detach().clone())
    exchange(optimizer, {a: (new, lambda t: t)})
    moved = optimizer.state[new]["momentum_buffer"]
    assert torch.equal(moved, old)
    assert moved.data_ptr() != old.data_ptr()


def test_refusals_change_nothing():
    a, b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([a, b])
    step(optimizer, (a**2).sum() + (b**2).sum())
    stranger, new = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"does not have the old parameter of change 1, .*\[6\] to \[2, 2\]"):
        exchange(optimizer, {a: (new, lambda t: t[:2]), stranger: (new, None)})
    with pytest.raises(ValueError, match=r"has the new parameter of change 0, .* already"):
        exchange(optimizer, {a: (b, None)})
    with pytest.raises(ValueError, match=r"must give \[2, 2\], got \[1, 2\]: 'exp_avg'"):
        exchange(optimizer, {a: (new, lambda t: t[:1])})
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(a), id(b)]
    assert set(optimizer.state) == {a, b}
