import json

import pytest
import torch

from tensorcomp_ext.bench.cases import Case, case_from_dict, development_cases, expand, read_cases


def test_defaults():
    case = case_from_dict({"S": 12, "H": 9})
    assert case == Case(1, 12, 12, 9, 9, 3, 3, k=3, stride=1, padding=1, dilation=1)
    assert case_from_dict({"S": 2, "H": 9, "k": [1, 5], "dilation": 2}).padding == (0, 4)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"H": 3}, "S is missing"),
        ({"S": 3, "H": 3, "stide": 1}, "unknown key 'stide'"),
        ({"S": 0, "H": 3}, "S must be an int >= 1, got 0"),
        ({"S": 3, "H": 3, "r_in": 4}, "r_in must be at most S = 3, got 4"),
        ({"S": 3, "H": 3, "r_out": True}, "r_out must be an int"),
        ({"S": 3, "H": 3, "stride": [1, 2, 3]}, "stride must be an int or a pair"),
        ({"S": 3, "H": 3, "padding": "full"}, "padding must be"),
        ({"S": 3, "H": 3, "dtype": "int8"}, "dtype must be one of float32, bfloat16"),
        ({"S": 3, "H": 3, "layout": "chwn"}, "layout must be one of nchw, nhwc"),
        ({"S": 3, "H": 3, "k": 5, "padding": 0}, "smaller than the dilated kernel"),
        ([1], "expected an object"),
    ],
)
def test_bad_case_is_named(row, text):
    with pytest.raises(ValueError, match="case 2.*" + text):
        case_from_dict(row, "case 2")


@pytest.mark.parametrize(
    ("content", "text"), [("{", "not a JSON file"), ("[]", "non-empty"), ("{}", "JSON list")]
)
def test_bad_file_is_named(tmp_path, content, text):
    path = tmp_path / "cases.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"cases.json.*{text}"):
        read_cases(path)


def test_file_counts_cases_from_one(tmp_path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([{"S": 4, "H": 5, "layout": "nhwc"}, {"S": 4}]))
    with pytest.raises(ValueError, match="case 2: H is missing"):
        read_cases(path)
    path.write_text(json.dumps([{"S": 4, "H": 5, "layout": "nhwc"}, {"S": 4, "H": 5}]))
    rows = expand(read_cases(path), ["float32", "bfloat16"], ["nchw", "nhwc"])
    assert [(c.dtype, c.layout) for c in rows] == [
        ("float32", "nhwc"),
        ("bfloat16", "nhwc"),
        ("float32", "nchw"),
        ("float32", "nhwc"),
        ("bfloat16", "nchw"),
        ("bfloat16", "nhwc"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"N": 2, "S": 5, "T": 7, "H": 9, "W": 11, "stride": [2, 1], "r_in": 2, "r_out": 3},
        {"S": 4, "H": 8, "k": [3, 2], "padding": "same", "dilation": 2},
        {"S": 4, "H": 8, "k": 5, "padding": [0, 2], "stride": 3},
    ],
)
def test_macs_count_every_multiply_add(row):
    """Against the shapes that torch's own convolutions of ones produce."""
    case = case_from_dict(row)
    z = torch.nn.functional.conv2d(
        torch.ones(case.N, case.S, case.H, case.W), torch.ones(case.r_in, case.S, 1, 1)
    )
    window = (case.stride, case.padding, case.dilation)
    v = torch.nn.functional.conv2d(z, torch.ones(case.r_out, case.r_in, *case.kernel), None, *window)
    taps = case.kernel[0] * case.kernel[1]
    assert case.macs() == z.numel() * case.S + v.numel() * (case.r_in * taps + case.T)
    assert case.dense_macs() == v.numel() // case.r_out * case.T * case.S * taps
    assert case.elements()[:2] == (case.N * case.S * case.H * case.W, v.numel() // case.r_out * case.T)


def test_development_cases():
    cases = development_cases()
    assert len(cases) == 14 and len(set(cases)) == 14
    assert cases[12].output_size == (28, 28)
    assert cases[0].macs() == 3136 * (64 * 16 + 9 * 16 * 16 + 16 * 64)
