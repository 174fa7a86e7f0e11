"""Rules and specifications: budgets against exhaustive search, energy bound, parsing, bad input."""

import json
import math
import warnings

import pytest
import torch

from tensorcomp_ext import decompose, ranks
from tensorcomp_ext.decompose import svd as svd_module

RULES = [
    ranks.VBMF(),
    ranks.VBMF(exact_threshold=True),
    ranks.Energy(),
    ranks.Energy(0.7),
    ranks.Ratio(0.25),
    ranks.Params(10_000),
    ranks.Flops(2_000_000),
]
NETWORK_RULES = [
    ranks.NetworkParams(0.25),
    ranks.NetworkParams(10_000),
    ranks.NetworkFlops(0.5),
    ranks.Latency(),
    ranks.Latency(1.5),
]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel(t, s, rank_out, rank_in, noise=0.02, taps=(3, 3)):
    core = random(rank_out, rank_in, *taps)
    out, inner = (
        torch.linalg.qr(random(t, rank_out, seed=1))[0],
        torch.linalg.qr(random(s, rank_in, seed=2))[0],
    )
    clean = torch.einsum("tb,sa,ba...->ts...", out, inner, core)
    scale = clean.norm() / clean.numel() ** 0.5
    return clean + noise * scale * random(t, s, *taps, seed=3)


def tucker2_params(shape, rank_out, rank_in):
    return shape[1] * rank_in + math.prod(shape[2:]) * rank_in * rank_out + rank_out * shape[0]


@pytest.mark.parametrize("rule", [ranks.VBMF(), ranks.Energy(0.99)])
@pytest.mark.parametrize("large", [False, True])
def test_spectral_rules_find_planted_ranks_in_the_right_order(rule, large, monkeypatch):
    if large:
        monkeypatch.setattr(svd_module, "DENSE_SVD_WORK", 0)
    assert rule.resolve(kernel(40, 30, 9, 5), "tucker2") == (9, 5)
    assert rule.resolve(kernel(30, 40, 5, 9), "tucker2") == (5, 9)
    matrix = random(40, 6) @ random(6, 70, seed=1) + 0.02 * random(40, 70, seed=2)
    assert rule.resolve(matrix, "svd") == rule.resolve(matrix.T, "svd") == 6


@pytest.mark.parametrize("taps", [(3,), (3, 3), (2, 3, 2)])
def test_rules_take_every_number_of_spatial_dimensions(taps):
    assert ranks.VBMF().resolve(kernel(40, 36, 4, 3, taps=taps), "tucker2") == (4, 3)


@pytest.mark.parametrize("p", [0.3, 0.8, 0.95, 1.0])
def test_energy_rank_is_the_smallest_that_keeps_p(p):
    weight = random(17, 12, 3, 3)
    rank_out, rank_in = ranks.Energy(p).resolve(weight, "tucker2")
    for mode, rank in ((0, rank_out), (1, rank_in)):
        energy = torch.linalg.svdvals(decompose.unfold(weight, mode)) ** 2
        share = energy.cumsum(0) / energy.sum()
        assert share[rank - 1] >= p * (1 - 1e-12)
        assert rank == 1 or share[rank - 2] < p


@pytest.mark.parametrize("method", ["hosvd", "hooi"])
def test_energy_bounds_the_error_of_tucker2(method):
    for seed in range(5):
        weight = (
            random(24, 16, 3, 3, seed=seed)
            * torch.linspace(1, 0.01, 24, dtype=torch.float64)[:, None, None, None]
        )
        chosen = ranks.Energy(0.95).resolve(weight, "tucker2")
        assert decompose.tucker2(weight, *chosen, method=method).relative_error <= math.sqrt(2 * 0.05)


def test_energy_at_one_ignores_what_carries_none():
    planted = random(30, 5) @ random(5, 40, seed=1)
    assert ranks.Energy(1.0).resolve(planted, "svd") == 5
    assert ranks.Energy(1.0).resolve(random(30, 40), "svd") == 30


@pytest.mark.parametrize("rule", RULES)
def test_floor_of_one(rule):
    zero = torch.zeros(6, 5, 3, 3)
    pure_noise = random(64, 48, 3, 3)
    for weight in (zero, pure_noise):
        rank_out, rank_in = rule.resolve(weight, "tucker2")
        assert 1 <= rank_out <= weight.shape[0]
        assert 1 <= rank_in <= weight.shape[1]
    assert ranks.VBMF().resolve(pure_noise, "tucker2") == (1, 1)


@pytest.mark.parametrize(
    "shape", [(64, 32, 3, 3), (16, 3, 5, 5), (50, 20, 5), (7, 31, 1, 1), (10, 12, 2, 3, 2)]
)
@pytest.mark.parametrize("fraction", [0.06, 0.25, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:.*cannot be met")
def test_ratio_is_the_largest_uniform_choice_filled_up(shape, fraction):
    weight = torch.ones(shape)
    chosen = ranks.Ratio(fraction).resolve(weight, "tucker2")
    budget = fraction * weight.numel()
    t, s, taps = shape[0], shape[1], math.prod(shape[2:])
    best = None
    for step in range(20_001):  # every distinct pair of rounded ranks along kappa
        kappa = step / 20_000
        pair = max(1, round(kappa * t)), max(1, round(kappa * s))
        pair = min(pair[0], pair[1] * taps), min(pair[1], pair[0] * taps)
        if tucker2_params(shape, *pair) <= budget:
            best = pair
    if best is None:
        assert chosen == (1, 1)
        return
    assert chosen[0] >= best[0] and chosen[1] >= best[1]
    assert tucker2_params(shape, *chosen) <= budget
    for larger in ((chosen[0] + 1, chosen[1]), (chosen[0], chosen[1] + 1)):
        idle = larger[0] > larger[1] * taps or larger[1] > larger[0] * taps
        beyond = larger[0] > t or larger[1] > s
        assert idle or beyond or tucker2_params(shape, *larger) > budget


@pytest.mark.parametrize("shape", [(320, 1250), (10, 320), (64, 64), (33, 7)])
@pytest.mark.parametrize("fraction", [0.1, 0.37, 1.0])
@pytest.mark.filterwarnings("ignore:.*cannot be met")
def test_ratio_of_a_linear_layer(shape, fraction):
    rank = ranks.Ratio(fraction).resolve(torch.ones(shape), "svd")
    expected = math.floor(fraction * shape[0] * shape[1] / sum(shape))
    assert rank == min(max(1, expected), min(shape))


def test_params_and_flops_count_the_layer():
    weight = torch.ones(64, 32, 3, 3)
    for count in (500, 4_608, 10_000):
        rank_out, rank_in = ranks.Params(count).resolve(weight, "tucker2")
        assert tucker2_params(weight.shape, rank_out, rank_in) <= count
        # One multiply-add a weight and position: the same ranks when a position is all there is.
        assert ranks.Flops(2 * count).resolve(weight, "tucker2") == (rank_out, rank_in)
    linear = torch.ones(30, 50)
    assert ranks.Params(800).resolve(linear, "svd") == 10
    assert ranks.Flops(1600).resolve(linear, "svd") == 10


def test_flops_with_positions_know_the_stride():
    weight, pixels = torch.ones(64, 32, 3, 3), (56 * 56, 28 * 28)
    count = 4_000_000
    rank_out, rank_in = ranks.Flops(count).resolve(weight, "tucker2", pixels=pixels)

    def flops(r_out, r_in):
        return 2 * (pixels[0] * 32 * r_in + pixels[1] * (9 * r_in * r_out + r_out * 64))

    assert flops(rank_out, rank_in) <= count < flops(rank_out + 2, rank_in + 1)
    assert ranks.resolve_rank(ranks.Flops(count), weight, "tucker2", pixels=pixels) == (rank_out, rank_in)
    with pytest.raises(ValueError, match="pixels must be"):
        ranks.Flops(count).resolve(weight, "tucker2", pixels=(0, 4))


def test_unreachable_budget_warns_and_uses_rank_one():
    weight = torch.ones(64, 32, 3, 3)
    with pytest.warns(UserWarning, match=r"params:100 cannot be met .*rank 1 already needs 105 of 100"):
        assert ranks.Params(100).resolve(weight, "tucker2") == (1, 1)


class TestResolve:
    weight = torch.ones(16, 12, 3, 3)

    def test_plain_ranks(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ranks.resolve_rank(8, self.weight, "tucker2") == (8, 8)
            assert ranks.resolve_rank((5, 7), self.weight, "tucker2") == (5, 7)
            assert ranks.resolve_rank([5, 7], self.weight, "tucker2") == (5, 7)
            assert ranks.resolve_rank(3, self.weight[:, :, 0, 0], "svd") == 3
            assert ranks.resolve_rank((3,), self.weight[:, :, 0, 0], "svd") == 3
            assert ranks.resolve_rank(torch.tensor(4), self.weight, "tucker2") == (4, 4)

    def test_clipping_warns_with_layer_and_value(self):
        with pytest.warns(
            UserWarning, match="conv1: tucker2: rank_in 14 exceeds 12; clipped to 12"
        ) as record:
            assert ranks.resolve_rank(14, self.weight, "tucker2", "conv1") == (14, 12)
        assert len(record) == 1

    def test_fraction_is_a_ratio(self):
        expected = ranks.Ratio(0.4).resolve(self.weight, "tucker2")
        assert ranks.resolve_rank(0.4, self.weight, "tucker2") == expected

    def test_mapping_by_name(self):
        spec = {"*": 2, "layer1.*": 3, "layer1.0.conv?": 4, "fc": ranks.Energy(1.0)}
        assert ranks.resolve_rank(spec, self.weight, "tucker2", "layer1.0.conv1") == (3, 3)
        assert ranks.resolve_rank(spec, self.weight, "tucker2", "stem") == (2, 2)
        assert ranks.resolve_rank(spec, random(4, 9), "svd", "fc") == 4
        with pytest.raises(ValueError, match="stem: no rank given"):
            ranks.resolve_rank({"layer1.*": 3}, self.weight, "tucker2", "stem")
        with pytest.raises(ValueError, match="needs the name"):
            ranks.resolve_rank(spec, self.weight, "tucker2")

    @pytest.mark.parametrize("spec", [0, -2, (3, 0), 0.0, 1.5, -0.1, float("nan"), (1, 2, 3), (4,)])
    def test_bad_values(self, spec):
        with pytest.raises(ValueError, match=r"^conv1: "):
            ranks.resolve_rank(spec, self.weight, "tucker2", "conv1")

    @pytest.mark.parametrize("spec", [None, True, (2.0, 3), (True, 2), object(), {"conv1": {"a": 2}}])
    def test_bad_types(self, spec):
        expected = (
            r"^conv1: rank must be an int, a tuple of ints, a float in \(0, 1\], a rank rule, text such as "
            "'energy:0.95' or a mapping from layer names to any of these, got "
        )
        with pytest.raises(TypeError, match=expected):
            ranks.resolve_rank(spec, self.weight, "tucker2", "conv1")

    @pytest.mark.parametrize("text", ["3", "5,7", "0.4", "vbmf", "energy:0.8", "params:500"])
    def test_text_is_what_it_stands_for(self, text):
        expected = ranks.resolve_rank(ranks.parse_rank(text), self.weight, "tucker2")
        assert ranks.resolve_rank(text, self.weight, "tucker2") == expected
        assert ranks.resolve_rank({"conv*": text}, self.weight, "tucker2", "conv1") == expected

    def test_text_that_is_no_rank(self):
        with pytest.raises(ValueError, match=r"^conv1: unknown rank rule 'many'"):
            ranks.resolve_rank("many", self.weight, "tucker2", "conv1")

    def test_bad_weights(self):
        with pytest.raises(ValueError, match=r"svd: weight must be \[M, N\]"):
            ranks.resolve_rank(2, self.weight, "svd")
        with pytest.raises(ValueError, match="tucker2: weight must be"):
            ranks.resolve_rank(2, self.weight[:, :, 0, 0], "tucker2")
        with pytest.raises(ValueError, match=r"known formats: cp, .*, svd, tr, "):
            ranks.resolve_rank(2, self.weight, "block_term")
        broken = self.weight.clone()
        broken[0, 0] = float("inf")
        for rule in (ranks.VBMF(), ranks.Energy()):
            with pytest.raises(ValueError, match=r"conv1: .*NaN or Inf"):
                ranks.resolve_rank(rule, broken, "tucker2", "conv1")

    def test_failed_svd_names_the_layer(self, monkeypatch):
        monkeypatch.setattr(svd_module, "_SVD_DRIVERS", ())
        with pytest.raises(decompose.DecompositionError, match=r"^conv1: .*did not converge"):
            ranks.resolve_rank(ranks.VBMF(), self.weight, "tucker2", "conv1")


class TestText:
    @pytest.mark.parametrize("rule", [*RULES, *NETWORK_RULES])
    def test_rules_survive_text_and_json(self, rule):
        assert ranks.parse_rank(str(rule)) == rule
        assert ranks.RankRule.from_config(json.loads(json.dumps(rule.to_config()))) == rule
        assert eval(repr(rule), vars(ranks)) == rule

    @pytest.mark.parametrize(
        ("text", "spec"),
        [
            ("16", 16),
            (" 16 ", 16),
            ("16,24", (16, 24)),
            ("16, 24", (16, 24)),
            ("0.25", 0.25),
            ("1.0", 1.0),
            ("energy", ranks.Energy(0.95)),
            ("Energy:0.9", ranks.Energy(0.9)),
            ("ratio: 0.5", ranks.Ratio(0.5)),
            ("flops:2e6", ranks.Flops(2_000_000)),
            ("vbmf:exact", ranks.VBMF(exact_threshold=True)),
            ("latency", ranks.Latency(2.0)),
            ("latency:1.5", ranks.Latency(1.5)),
            ("network-params:0.3", ranks.NetworkParams(0.3)),
            ("network-flops:2e6", ranks.NetworkFlops(2_000_000)),
        ],
    )
    def test_parse(self, text, spec):
        parsed = ranks.parse_rank(text)
        assert parsed == spec
        assert type(parsed) is type(spec)

    @pytest.mark.parametrize(
        "text",
        ["", "0", "-3", "0.0", "1.5", "16,", "16,0", "a,b", "2e3", "energy:", "energy:x", "energy:1.5",
         "ratio", "ratio:0", "params:-5", "params:inf", "params:nan", "vbmf:0.5", "svd:3", "nan",
         "inf", ":3", "16;24", "latency:0.5", "latency:inf", "latency:x", "network-params",
         "network-params:0", "network-flops:-1"],
    )  # fmt: skip
    def test_unreadable(self, text):
        with pytest.raises(ValueError, match="rank"):
            ranks.parse_rank(text)

    @pytest.mark.parametrize(
        "config",
        [{}, {"rule": "nope"}, {"rule": ["energy"]}, {"rule": "energy", "q": 1},
         {"rule": "energy", "p": "0.9"}, {"rule": "energy", "p": 7},
         {"rule": "vbmf", "exact_threshold": 3}, {"rule": "ratio"},
         {"rule": "latency", "speedup": 0.9}, {"rule": "latency", "rounds": 0}],
    )  # fmt: skip
    def test_bad_config(self, config):
        with pytest.raises(ValueError, match=r"rule|Energy|VBMF|Latency"):
            ranks.RankRule.from_config(config)

    @pytest.mark.parametrize("make", [lambda: ranks.Energy("0.9"), lambda: ranks.Ratio(True)])
    def test_arguments_of_the_wrong_type(self, make):
        with pytest.raises(TypeError, match="must be a number"):
            make()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: ranks.Latency("fast"),
            lambda: ranks.Latency(2.0, rounds=2.5),
            lambda: ranks.Latency(2.0, calibration="images"),
        ],
    )
    def test_latency_arguments_of_the_wrong_type(self, make):
        with pytest.raises(TypeError, match="Latency: "):
            make()

    def test_a_rule_for_networks_is_none_for_a_layer(self):
        for rule in NETWORK_RULES:
            with pytest.raises(ValueError, match="chooses the ranks of all layers together"):
                ranks.resolve_rank(rule, torch.ones(8, 8), "svd")
