"""Ranks of CP, Tucker, trains and rings: budgets against a search, planted spectra, specifications."""

import warnings

import pytest
import torch

from tensorcomp_ext import ranks
from tensorcomp_ext.formats import get_format
from tensorcomp_ext.ranks import rank_layout
from tensorcomp_ext.ranks.budgets import grow

MATRIX = {"in_modes": (4, 5), "out_modes": (3, 8)}
CASES = [
    ("cp", (24, 20), MATRIX),
    ("cp", (12, 10, 3, 3), {}),
    ("tucker", (24, 20), MATRIX),
    ("tucker", (12, 10, 3, 3), {}),
    ("tt", (24, 20), MATRIX),
    ("tt", (12, 10, 3), {}),
    ("tt", (12, 10, 3, 3), {"in_modes": (2, 5), "out_modes": (3, 4)}),
    ("ttm", (24, 20), MATRIX),
    ("ttm", (12, 10, 3, 3), {"in_modes": (2, 5), "out_modes": (3, 4)}),
    ("tr", (24, 20), MATRIX),
    ("tr", (12, 10, 3, 3), {}),
    ("tr_matrix", (24, 20), MATRIX),
]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stored(name, shape, rank, options):
    return get_format(name).empty(shape, rank, device="meta", **options).numel


def as_tuple(rank):
    return rank if isinstance(rank, tuple) else (rank,)


def check_filled(name, shape, options, chosen, uniform, budget):
    """At least the uniform ranks, and no single one can grow."""
    layout = rank_layout(torch.ones(shape), name, **options)
    found, least = layout.inner(as_tuple(chosen)), layout.inner(as_tuple(uniform))
    assert all(rank >= low for rank, low in zip(found, least, strict=True))
    assert stored(name, shape, chosen, options) <= budget
    for place in range(len(found)):
        larger = grow(layout, found, place)
        assert larger is None or stored(name, shape, layout.pack(larger), options) > budget


@pytest.mark.parametrize(("name", "shape", "options"), CASES)
@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:.*cannot be met")
def test_ratio_is_the_largest_uniform_choice_filled_up(name, shape, options, fraction):
    weight = torch.ones(shape)
    budget = fraction * weight.numel()
    chosen = ranks.Ratio(fraction).resolve(weight, name, **options)
    if name == "tucker":
        assert stored(name, shape, chosen, options) <= budget
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = next(
            (r for r in range(1, 200) if stored(name, shape, r, options) > budget), 200
        )  # the first uniform rank that does not fit
        best = get_format(name).check_rank(shape, max(1, top - 1), **options)
    if top == 1:
        assert as_tuple(chosen) == as_tuple(best)
    else:
        check_filled(name, shape, options, chosen, best, budget)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_tucker_ranks_begin_as_one_share_of_the_modes(fraction):
    weight = torch.ones(24, 20, 3, 3)
    chosen = ranks.Ratio(fraction).resolve(weight, "tucker")
    best = None
    for step in range(20_001):
        shares = tuple(max(1, round(step / 20_000 * size)) for size in (24, 20, 3, 3))
        if stored("tucker", weight.shape, shares, {}) <= fraction * weight.numel():
            best = shares
    check_filled("tucker", weight.shape, {}, chosen, best, fraction * weight.numel())


@pytest.mark.parametrize("size", [16, 32, 64])
def test_one_share_for_all_modes_leaves_budget_that_single_ranks_use(size):
    """A kernel of a CIFAR ResNet: where the window's ranks round up together, a third was left."""
    shape, budget = (size, size, 3, 3), 0.2
    chosen = ranks.Ratio(budget).resolve(torch.ones(shape), "tucker")
    assert 0.19 <= stored("tucker", shape, chosen, {}) / (9 * size * size) <= budget


def test_ranks_grow_no_further_than_their_neighbours_use():
    """(T, S, 3, 3) = (40, 2, 1, 1): beyond R_in · taps an output rank costs and adds nothing."""
    rank_out, rank_in = ranks.Params(400).resolve(torch.ones(40, 2, 1, 1), "tucker2")
    assert rank_out <= rank_in
    train = ranks.Params(500).resolve(torch.ones(64, 64), "tt", in_modes=(2, 32), out_modes=(32, 2))
    first, middle, last = rank_layout(torch.ones(64, 64), "tt", in_modes=(2, 32), out_modes=(32, 2)).inner(
        as_tuple(train)
    )
    assert middle <= min(2 * first, 2 * last)


@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_flops_and_params_keep_their_budget(name, shape, options):
    weight, pixels = torch.ones(shape), (1, 1) if len(shape) == 2 else (64, 16)
    count = 0.6 * weight.numel()
    rank = ranks.Params(count).resolve(weight, name, **options)
    assert stored(name, shape, rank, options) <= count
    budget = 2 * weight.numel() * pixels[1]
    rank = ranks.Flops(budget).resolve(weight, name, pixels=pixels, **options)
    made = get_format(name).empty(shape, rank, device="meta", **options)
    assert made.flops(*pixels) <= budget
    assert ranks.resolve_rank(ranks.Flops(budget), weight, name, pixels=pixels, **options) == rank


def test_cp_has_a_closed_form():
    weight = torch.ones(24, 20, 3, 3)
    assert ranks.Ratio(0.3).resolve(weight, "cp") == int(0.3 * weight.numel() / (24 + 20 + 3 + 3))


@pytest.mark.parametrize("rule", [ranks.Energy(1.0 - 1e-6), ranks.VBMF()])
@pytest.mark.parametrize("name", ["tt", "ttm"])
@pytest.mark.parametrize("shape", [(48, 60), (24, 20, 3, 3)])
def test_spectral_rules_find_the_ranks_of_a_train(rule, name, shape):
    options = {"in_modes": (6, 10), "out_modes": (6, 8)} if len(shape) == 2 else {}
    cls = get_format(name)
    torch.manual_seed(3)
    planted = cls.check_rank(shape, 3, **options)
    weight = cls.random(shape, planted, dtype=torch.float64, **options).to_dense().detach()
    weight = weight + 1e-5 * weight.std() * random(*shape, seed=5)
    found = rule.resolve(weight, name, **options)
    found = (found,) if isinstance(found, int) else found
    if isinstance(rule, ranks.Energy):
        assert found == planted
    else:
        assert all(
            1 <= r <= limit for r, limit in zip(found, cls.check_rank(shape, 10_000, **options), strict=True)
        )


def test_spectral_rules_find_the_ranks_of_tucker():
    torch.manual_seed(1)
    tucker = get_format("tucker")
    weight = tucker.random((12, 10, 3, 3), (4, 5, 2, 3), dtype=torch.float64).to_dense().detach()
    assert ranks.Energy(1.0).resolve(weight, "tucker") == (4, 5, 2, 3)
    matrix = tucker.random((24, 20), (2, 3, 3, 2), dtype=torch.float64, **MATRIX).to_dense().detach()
    assert ranks.Energy(1.0).resolve(matrix, "tucker", **MATRIX) == (2, 3, 3, 2)


@pytest.mark.parametrize("name", ["cp", "tr", "tr_matrix"])
@pytest.mark.parametrize("rule", [ranks.Energy(), ranks.VBMF()])
def test_formats_without_a_deciding_spectrum_say_so(name, rule):
    with pytest.raises(ValueError, match=f"^fc: {name}: rank must be given: no unfolding .*Ratio"):
        ranks.resolve_rank(rule, torch.ones(24, 20), name, "fc")


class TestResolve:
    weight = torch.ones(24, 20)

    def test_boundary_ranks_may_be_given(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for spec in [(2, 3, 4), (1, 2, 3, 4, 1), "2,3,4", {"*": (2, 3, 4)}]:
                assert ranks.resolve_rank(spec, self.weight, "tt", "fc", **MATRIX) == (2, 3, 4)
            assert ranks.resolve_rank((2, 3, 4, 3), self.weight, "tr", **MATRIX) == (2, 3, 4, 3)
            assert ranks.resolve_rank((2, 3, 4, 3, 2), self.weight, "tr", **MATRIX) == (2, 3, 4, 3)
            # An int is the largest that each may be: the outer bonds hold 3 and 5.
            assert ranks.resolve_rank(7, self.weight, "tt", **MATRIX) == (3, 7, 5)
            assert ranks.resolve_rank(4, self.weight, "cp", **MATRIX) == 4

    def test_clipping_warns(self):
        with pytest.warns(UserWarning, match="fc: tt: R_0 9 exceeds 3; clipped to 3"):
            assert ranks.resolve_rank((9, 3, 4), self.weight, "tt", "fc", **MATRIX) == (3, 3, 4)
        with pytest.warns(UserWarning, match="clipped to 20"):
            assert ranks.resolve_rank(99, self.weight, "tt", **MATRIX) == (3, 20, 5)

    def test_text_and_fractions(self):
        expected = ranks.Ratio(0.4).resolve(self.weight, "tt", **MATRIX)
        for spec in (0.4, "0.4", "ratio:0.4", {"f*": 0.4}):
            assert ranks.resolve_rank(spec, self.weight, "tt", "fc", **MATRIX) == expected

    def test_errors_name_the_layer(self):
        with pytest.raises(ValueError, match=r"^fc: tt takes 3 rank\(s\) \(R_0, R_1, R_2\), got \(2, 3\)"):
            ranks.resolve_rank((2, 3), self.weight, "tt", "fc", **MATRIX)
        with pytest.raises(ValueError, match="out_modes must have the product 24"):
            ranks.resolve_rank(2, self.weight, "tt", "fc", out_modes=(5, 5))
        with pytest.raises(TypeError, match="unknown option 'modes'"):
            ranks.rank_layout(self.weight, "tt", modes=(5, 5))
        known = "known formats: cp, .*, svd, tr, tr_matrix, tt, ttm, tucker, tucker2"
        with pytest.raises(ValueError, match=known):
            ranks.rank_layout(self.weight, "block_term")

    def test_method_options_of_the_format_are_ignored(self):
        assert ranks.resolve_rank(3, self.weight, "cp", restarts=1) == 3
        assert ranks.resolve_rank(3, torch.ones(8, 6, 3, 3), "tucker2", method="hosvd") == (3, 3)
