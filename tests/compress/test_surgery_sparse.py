"""Networks with low-rank + sparse layers: surgery, report, files and what they must not contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tensorcomp_ext as tc
from tensorcomp_ext.compress import CheckpointError, Report
from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLayer, FactorizedLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*clipped to", "ignore:ratio")


class Mobile(nn.Sequential):
    """An inverted residual block in small: pointwise, depthwise, pointwise, classifier."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.Conv2d(24, 16, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
ADDITIVE = ("lowrank_sparse", {})
FORMAT: dict[Any, Any] = {"2": ("lowrank_sparse", {"low_rank": "none"}), "*": ADDITIVE}


def compressed(mode: str = "additive", **options: Any) -> Any:
    formats = {key: (name, {**options, "mode": mode}) for key, (name, options) in FORMAT.items()}
    return tc.compress(Mobile(), format=formats, rank=0.1, exclude="6", example_inputs=X, **options)


@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_outputs_are_those_of_the_dense_network(mode: str) -> None:
    dense, result = Mobile(), compressed(mode)
    assert isinstance(result.model[2], FactorizedConv2d) and result.model[2].groups == 24
    assert type(result.model[6]) is nn.Linear
    with torch.no_grad():
        assert (result.model(X) - dense(X)).norm() < 1e-5 * dense(X).norm()
    assert result.report.output_error < 1e-5


def test_report_has_both_counts() -> None:
    result = compressed()
    entry, depthwise = result.report["3"], result.report["2"]
    layer = result.model[3]
    low = layer.weight.low_rank.numel
    assert entry.parameters_before == 384 and entry.parameters_after == low + 384 and entry.skipped is None
    assert entry.bytes_before == 4 * 384 and entry.bytes_after == layer.weight.stored_bytes
    dense = Mobile()[3].weight
    lost = ((layer.weight.low_rank_dense() - dense).norm() / dense.norm()).item()
    assert entry.relative_error == pytest.approx(lost, rel=1e-5) and 0.1 < entry.relative_error < 1
    assert depthwise.relative_error is None and depthwise.rank == ()
    assert "bytes" in str(result.report)
    assert "bytes" not in str(tc.compress(Mobile(), rank=2, example_inputs=X).report)
    again = Report.from_dict(result.report.to_dict())
    assert again["3"].bytes_after == entry.bytes_after


def test_other_formats_leave_grouped_layers_alone() -> None:
    report = tc.compress(Mobile(), rank=2, example_inputs=X).report
    assert report["2"].skipped == "depthwise convolution"


def finalized(share: float = 0.04) -> nn.Module:
    model: nn.Module = compressed().model
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, FactorizedLayer):
            module.weight.keep(torch.rand(module.weight.shape) < share)
            module.finalize()
    return model.eval()


def test_files_hold_what_the_report_counts(tmp_path: Path) -> None:
    model = finalized()
    path = tmp_path / "net"
    tc.save(model, path)
    stored = {name: t for name, t in load_file(path).items() if ".weight." in name}
    layers = [m for m in model.modules() if isinstance(m, FactorizedLayer)]
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sum(
        layer.weight.stored_bytes for layer in layers
    )
    fresh = tc.load(path, Mobile(1)).eval()
    with torch.no_grad():
        assert torch.equal(fresh(X), model(X))
    assert tc.load(path, fresh) is fresh


def rewritten(path: Path, change: Any) -> None:
    """The file with some tensor changed, everything else as it was."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


HOSTILE = [
    ("3.weight.positions", lambda t: t.fill_(-1), "must be columns below 24"),
    ("3.weight.offsets", lambda t: t.__setitem__(-1, 2**31 - 1), "must begin with 0 and end with nnz"),
    ("0.weight.offsets", lambda t: t.__setitem__(1, -5), "must not descend"),
]


@pytest.mark.parametrize("name,change,message", HOSTILE)
@pytest.mark.parametrize("target", ["dense", "packed"])
def test_indices_out_of_range_are_refused(
    name: str, change: Any, message: str, target: str, tmp_path: Path
) -> None:
    path = tmp_path / "net"
    tc.save(finalized(), path)
    rewritten(path, lambda tensors: change(tensors[name]))
    model = Mobile(1) if target == "dense" else finalized()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"is damaged: {name.rpartition('.')[0]}.*{message}"):
        tc.load(path, model)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net"
    tc.save(finalized(), path)
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 8, 0):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            tc.load(path, Mobile(1))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"nnz": 10**9}, "nnz must be an int in"),
        ({"nnz": "3"}, "nnz must be an int in"),
        ({"nnz": 4}, "must be \\[4\\] by its configuration"),
        ({"positions": "rows"}, "positions must be"),
        ({"low_rank": "lowrank_sparse"}, "without a sparse part"),
        ({"low_rank": "nothing"}, "low_rank must be a format without"),
        ({"odd": 1}, "takes no option 'odd'"),
    ],
)
def test_hostile_configurations(change: Any, message: str, tmp_path: Path) -> None:
    layer = FactorizedLinear(12, 10, format="lowrank_sparse_packed", rank=2)
    config = layer.config()
    hostile = {**config, "structure": {**config["structure"], **change}}
    if "by its configuration" in message:
        empty = tc.nn.from_config(hostile)
        with pytest.raises(RuntimeError, match="size mismatch"):
            empty.load_state_dict(layer.state_dict())
        return
    with pytest.raises(ValueError, match=message):
        tc.nn.from_config(hostile)
