from __future__ import annotations

import pytest
import torch
from torch import nn

from tensorcomp_ext.compress.latency import interleave, measure_network, percentile


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [([3.0], 0.9, 3.0), ([1.0, 2.0, 3.0], 0.5, 2.0), ([2.0, 1.0], 0.5, 1.5), (list(range(11)), 0.1, 1.0)],
)
def test_percentile(values, fraction, expected):
    assert percentile(values, fraction) == pytest.approx(expected)


def test_subjects_take_turns():
    order: list[str] = []
    taken = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, min_rounds=4)
    assert order == ["a", "b"] * 6  # two untimed rounds and four timed ones
    assert all(t.p10 <= t.p50 <= t.p90 for t in taken.values())


def test_networks_run_in_evaluation_mode_and_keep_theirs():
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Dropout()
            self.seen: set[tuple[bool, bool, bool]] = set()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.seen.add((self.training, self.inner.training, torch.is_grad_enabled()))
            return x + y

    probe = Probe().train()
    probe.inner.eval()
    x = torch.ones(2)
    assert set(measure_network({"a": probe}, (x, x), 0.0)) == {"a"}
    measure_network({"a": probe}, {"x": x, "y": x}, 0.0)
    assert probe.seen == {(False, False, False)} and probe.training and not probe.inner.training
    assert measure_network({}, x) == {}
    with pytest.raises(TypeError, match="example_inputs"):
        measure_network({"a": probe}, [x, x], 0.0)
