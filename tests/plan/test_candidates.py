"""The table of candidates that ``plans`` returns."""

from __future__ import annotations

import torch

from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.ops import Support
from tensorcomp_ext.plan import Candidate, CandidateList

_CHOSEN = Candidate(
    "staged", 12345, 2_000_000, 1.5e-3, 1.25e-3, Support(True), True, "measured fastest", "x·G1·G0"
)
_REFUSED = Candidate("partial", 7, 7, 7.0, None, Support(False, "for CUDA only"), False, "for CUDA only")


def test_prints_a_row_for_each() -> None:
    found = CandidateList([_CHOSEN, _REFUSED])
    head, first, second = str(found).splitlines()
    assert head.split("  ")[-1] == "reason" and head.split()[0] == "plan"
    assert first.split() == [
        *("*", "staged", "12,345", "2.000", "1.5000", "1.2500", "x·G1·G0", "measured", "fastest")
    ]
    assert second.split() == ["partial", "–", "–", "–", "–", "–", "for", "CUDA", "only"]
    assert head.index("reason") == first.index("measured f") == second.index("for CUDA")
    assert head.index("MACs") + 4 == first.index("12,345") + 6
    assert repr(found) == str(found)
    assert str(CandidateList()).split()[0] == "plan"


def test_is_what_layers_return() -> None:
    found = FactorizedLinear(24, 30, format="tt", rank=3).plans(torch.ones(2, 24), training=False)
    assert isinstance(found, list) and isinstance(found, CandidateList)
    rows = str(found).splitlines()[1:]
    assert len(rows) == len(found) and rows[0].startswith("*") and found[0].chosen
    assert [row[1:].split()[0] for row in rows] == [candidate.name for candidate in found]
    assert found[0].to_dict()["name"] == found[0].name
