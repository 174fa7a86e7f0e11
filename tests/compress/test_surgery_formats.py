"""Every format through compress, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorcomp_ext as tc


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4 * 4, 24), nn.Linear(24, 10)
    )


def image() -> Tensor:
    return torch.randn(2, 8, 4, 4)


CONV: dict[str, Any] = {"cp": 6, "tucker": (5, 4, 3, 3), "tt": (4, 5), "tr": 3, "ttm": (4,)}
LINEAR: dict[str, Any] = {"cp": 6, "tucker": 3, "tt": 4, "tr": 2, "ttm": 3, "tr_matrix": 2}


@pytest.mark.parametrize("format", CONV)
def test_convolutions(format: str, tmp_path: Path) -> None:
    x = image()
    model, report = tc.compress(network(), format=format, rank=CONV[format], layers="0", example_inputs=x)
    entry = report["0"]
    assert entry.format == format and entry.skipped is None
    assert entry.parameters_after == model[0].weight.numel
    assert entry.relative_error is not None and 0 < entry.relative_error < 1
    tc.save(model, tmp_path / "model.tc")
    twin = tc.load(tmp_path / "model.tc", network())
    assert twin[0].format == format and twin[0].config() == model[0].config()
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("format", LINEAR)
def test_linear_layers_with_modes(format: str, tmp_path: Path) -> None:
    """Channels, height and width of the flattened image are folded height first."""
    x = image()
    outs = (2, 3, 4) if format in ("ttm", "tr_matrix") else (4, 6)
    options = {"in_modes": (4, 4, 12), "out_modes": outs, "input_order": (2, 0, 1)}
    model, report = tc.compress(
        network(), format={"3": (format, options)}, rank={"3": LINEAR[format]}, example_inputs=x
    )
    layer = model[3]
    assert layer.format == format and layer.weight.structure["input_order"] == [2, 0, 1]
    assert report["3"].format == format and report["0"].skipped == "no rank pattern fits"
    tc.save(model, tmp_path / "model.tc", report=report)
    twin = tc.load(tmp_path / "model.tc", network())
    assert twin[3].weight.structure == layer.weight.structure
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_formats_by_type_with_options() -> None:
    formats = {nn.Conv2d: ("tr", {"method": "als", "sweeps": 2, "seed": 3}), nn.Linear: "tt"}
    model, report = tc.compress(network(), format=formats, rank=3, layers=("0", "3"))
    assert [model[0].format, model[3].format] == ["tr", "tt"]
    assert report["0"].rank == (3, 3, 3)


def test_one_format_with_options_for_all() -> None:
    model, _ = tc.compress(network(), format=("tt", {"out_modes": (4, 6)}), rank=3, layers="3")
    assert model[3].weight.structure["out_modes"] == [4, 6]


@pytest.mark.parametrize("format", ["cp", "tr"])
def test_without_a_rank_formats_that_no_spectrum_decides_say_what_to_pass(format: str) -> None:
    message = f"layer '0': {format}: rank must be given: .* pass rank=... or .* tc.ranks.Ratio"
    with pytest.raises(ValueError, match=message):
        tc.compress(network(), format=format)
    _, report = tc.compress(network(), format=format, rank=tc.ranks.Ratio(0.5), layers="0")
    assert report["0"].parameters_after <= 0.5 * report["0"].parameters_before


def test_misfits_name_the_layer() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"layer '3': tt: out_modes must have the product 24, got \[5, 5\]"):
        tc.compress(net, format=("tt", {"out_modes": (5, 5)}), rank=3, layers="3")
    with pytest.raises(TypeError, match="layer '3': tt: unknown option 'restarts'"):
        tc.compress(net, format=("tt", {"restarts": 5}), rank=3, layers="3")
    with pytest.raises(TypeError, match=r"format must be a name, .* got 5"):
        tc.compress(net, format=5, rank=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="format must be a name"):
        tc.compress(net, format={"3": ("tt", 5)}, rank=3)  # type: ignore[dict-item]
    report = tc.compress(net, format={"0": "tr_matrix"}, rank={"0": 2, "3": 2}).report
    assert report["0"].skipped == "format 'tr_matrix' is not for Conv2d"


def test_old_configurations_have_no_structure() -> None:
    layer = tc.nn.FactorizedLinear(12, 20, rank=3)
    config = layer.config()
    assert config.pop("structure") == {}
    assert tc.nn.from_config(config).config() == layer.config()


@pytest.mark.parametrize(
    "structure", [[], {"in_modes": 5}, {"in_modes": [3, 5]}, {"modes": [4]}, {"in_modes": ["a"]}]
)
def test_hostile_structures(structure: Any) -> None:
    config = tc.nn.FactorizedLinear(12, 20, format="tt", rank=3).config()
    with pytest.raises(ValueError, match=r"structure must be|in_modes must|unknown option"):
        tc.nn.from_config({**config, "structure": structure})


SPECTRA: list[Any] = [tc.ranks.Ratio(0.1), tc.ranks.Energy(0.5), "energy:0.4"]
RULES: list[tuple[str, Any]] = [(format, 0.2) for format in LINEAR]
RULES += [(format, rule) for format in ("tt", "tucker", "ttm") for rule in SPECTRA]


def as_tuple(rank: int | tuple[int, ...]) -> tuple[int, ...]:
    return rank if isinstance(rank, tuple) else (rank,)


@pytest.mark.parametrize(("format", "rule"), RULES)
def test_rules_choose_ranks_for_the_modes_asked_for(format: str, rule: Any) -> None:
    """Through compress and the layer's own constructor alike, of modes that are not the default ones."""
    options: dict[str, Any] = {"in_modes": (4, 48), "out_modes": (6, 4)}
    net = network()
    model, report = tc.compress(net, format=(format, options), rank=rule, layers="3")
    weight = model[3].weight
    expected = as_tuple(tc.ranks.resolve_rank(rule, net[3].weight.detach(), format, **options))
    assert report["3"].rank == expected == as_tuple(weight.rank)
    assert weight.structure["in_modes"] == [*options["in_modes"]]
    assert expected != as_tuple(tc.ranks.resolve_rank(rule, net[3].weight.detach(), format))
    assert weight.numel < net[3].weight.numel()
    if isinstance(rule, float):
        assert weight.numel <= rule * net[3].weight.numel()
        assert as_tuple(tc.nn.FactorizedLinear(192, 24, format=format, rank=rule, **options).rank) == expected
    else:
        made = tc.nn.FactorizedLinear.from_linear(net[3], format=format, rank=rule, **options)
        assert as_tuple(made.rank) == expected


@pytest.mark.parametrize("name", ["staged", "merged", "fused", "pair"])
def test_tuned_choices_of_networks_travel(name: str, tmp_path: Path) -> None:
    model = tc.compress(network(), format="tt", rank=4, layers="3").model
    x = torch.randn(5, 192)
    keys = [str(model[3].case(x, training)) for training in (False, True)]
    model[3].tuned = {key: {"plan": name, "seconds": {name: 1e-5, "dense": 2e-5}} for key in keys}
    model[3].choices_changed()
    tc.save(model, tmp_path / "model.tc")
    twin = tc.load(tmp_path / "model.tc", network())
    assert twin[3].tuned == model[3].tuned and twin[3].plan is None
    for training in (False, True):
        chosen, *others = twin[3].plans(x, training=training)
        serves = {c.name for c in (chosen, *others) if c.available.ok}
        assert chosen.name == name if name in serves else chosen.name != name
        assert chosen.measured == (1e-5 if name in serves else chosen.measured)
    model[3].plan = name
    tc.save(model, tmp_path / "forced.tc")
    assert tc.load(tmp_path / "forced.tc", network())[3].plan == name
