"""The conv suite: cases, library ways against the oracle, rows."""

from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench.conv import our_ways
from tensorcomp_ext.bench.conv_cases import ConvCase, conv_cases, conv_from_dict, quick_convs
from tensorcomp_ext.bench.conv_library import library_ways
from tensorcomp_ext.bench.conv_problem import ConvProblem
from tensorcomp_ext.bench.suite import QUICK, Settings, run_suite

CASES = [
    *quick_convs(),
    ConvCase("tr", 1, 1, 3, 5, 6, 4, k=(3, 2), padding=(1, 0), stride=(2, 1)),
    ConvCase("cp", 4, 2, 3, 5, 9, 7, k=(5, 3), padding=(2, 1), stride=2),
    ConvCase("cp", 1, 2, 4, 1, 6, 6, padding=2, dilation=2),
]


def test_cases_of_the_design():
    cases = conv_cases("cpu")
    assert len(cases) == len(set(cases)) == 12 + 12
    assert {(c.rank, c.N) for c in cases if c.format == "tr"} == {(10, 1), (10, 32), (15, 1), (15, 32)}
    assert {c.rank for c in cases if c.format == "cp"} == {16, 32, 64, 128}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"format": "tucker2"}, "format must be one of cp, tr"),
        ({"rank": 0}, "rank must be an int >= 1"),
        ({"r_in": 2}, "unknown key 'r_in'"),
        ({"S": 0}, "S must be an int >= 1"),
        ({"k": 9, "padding": 0}, "smaller than the dilated kernel"),
    ],
)
def test_bad_case_is_named(wrong, text):
    row = {"format": "cp", "rank": 3, "S": 4, "H": 5}
    assert conv_from_dict(row) == ConvCase("cp", 3, 1, 4, 4, 5, 5)
    with pytest.raises(ValueError, match="case 1.*" + text):
        conv_from_dict(row | wrong, "case 1")


def test_stages_are_counted_and_capped_by_dense():
    case = ConvCase("tr", 3, 2, 8, 6, 7, 9)
    assert case.stage_macs() == 2 * 63 * (8 * 9 + 9 * 27 + 6 * 9)
    assert replace(case, rank=40).macs() == case.dense_macs() == 2 * 63 * 9 * 8 * 6
    depthwise = ConvCase("cp", 9, 1, 12, 16, 10, 10)
    assert depthwise.macs() == 100 * (12 * 9 + 9 * 9 + 16 * 9)
    assert depthwise.elements() == (1200, 1600, 9 * (12 + 16 + 6) + 16)
    assert depthwise.label() == "cp 1x12>16 10x10 k3 s1 r9"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=ConvCase.label)
def test_library_ways_agree_with_the_oracle(case, dtype, layout, training):
    problem = ConvProblem(replace(case, dtype=dtype, layout=layout), training=training)
    with torch.inference_mode(not training):
        ways = library_ways(problem, "never")
        for way in ways:
            outputs = way.to_factors(way.call())
            assert problem.fault(outputs, 4.0) is None, way.name
            whole = 3 + len(problem.factors)
            assert len(outputs) == (1 if not training else 2 if way.group == "dense" else whole)
    assert len(ways) == (4 if layout == "nhwc" else 7)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES, ids=ConvCase.label)
def test_our_ways_agree_with_the_oracle(case, training):
    problem = ConvProblem(replace(case, dtype="float32", layout="nchw"), training=training)
    with torch.inference_mode(not training):
        for way in our_ways(problem):
            assert problem.fault(way.call()) is None, way.name
            assert way.note and way.macs


def test_rows_have_everything():
    settings = Settings(
        suite="conv", cases=quick_convs(), threads=[1], layouts=["nhwc"], compiled="never", effort=QUICK
    )
    for row in run_suite(settings)["rows"]:
        assert row["error"] is None and not row["wrong"]
        assert row["over_stages"] > 0 and row["over_any"] > 0 and row["roofline_share"] > 0
