"""The low-rank + sparse suite: cases, every way against the oracle, rows and their tables."""

from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench.sparse import our_ways
from tensorcomp_ext.bench.sparse_cases import (
    LARGE,
    SparseCase,
    budget_rank,
    quick_sparse,
    sparse_cases,
    sparse_from_dict,
)
from tensorcomp_ext.bench.sparse_library import ADDED, CSR, DENSE, EAGER, REBUILT, library_ways
from tensorcomp_ext.bench.sparse_problem import SparseProblem
from tensorcomp_ext.bench.sparse_summary import sparse_lines, sparse_tables
from tensorcomp_ext.bench.suite import QUICK, Settings, run_suite

CASES = [
    *quick_sparse(),
    SparseCase(7, 1, 1, None, 0.5, "masking"),
    SparseCase(1, 9, 1, 1, 0.0, "additive", None, "linear"),
    SparseCase(17, 9, 3, 5, 0.99, "masking", None, "linear"),
]


def test_cases_of_the_design():
    cases = sparse_cases("cpu")
    assert len(cases) == len(set(cases))
    weights = {(c.c_out, c.c_in) for c in cases if c.rows is None}
    assert weights == {(256, 256), (1024, 1024), (3072, 768), (4096, 1024), (512, 4608)}
    assert {c.rows for c in cases} == {None, 1, 16, 128, 512}
    assert {c.sparsity for c in cases if c.rows} == {0.5, 0.7, 0.8, 0.9, 0.95}
    for case in cases:
        pair = case.rank * (case.c_out + case.c_in)
        assert pair <= 0.1 * case.c_out * case.c_in < pair + case.c_out + case.c_in
    assert budget_rank(2, 3) == 1


def test_cases_of_a_gpu():
    """Large ones first, among them weights of few operations an entry; then those of the CPU."""
    cases, common = sparse_cases("cuda"), sparse_cases("cpu")
    assert len(cases) == len(set(cases)) and cases[-len(common) :] == common
    large = cases[: -len(common)]
    assert all(c.c_out * c.c_in >= LARGE for c in large) and not any(
        c.c_out * c.c_in >= LARGE for c in common
    )
    assert {(c.c_out, c.mode) for c in large if c.rows is None} >= {
        (n, mode) for n in (4096, 8192) for mode in ("additive", "masking")
    }
    assert {c.rows for c in large} == {None, 1, 8, 32}
    assert min(c.rank for c in large) == 64


def test_uneven_rows():
    """As many entries, in rows of very different lengths."""
    lengths = []
    for spread in (0.0, 1.0):
        row = {"out": 64, "in": 200, "rows": 1, "spread": spread, "dtype": "float32"}
        case = sparse_from_dict(row)
        assert case.label().endswith("uneven 1") == bool(spread)
        mask = SparseProblem(case, training=False).mask
        assert int(mask.sum()) == case.nnz
        lengths.append(mask.sum(1).float())
    assert lengths[1].std() > 3 * lengths[0].std()


def test_counts():
    weight = SparseCase(6, 8, 2, None, 0.75, dtype="float32")
    assert (weight.nnz, weight.macs(), weight.dense_macs()) == (12, 96, 0)
    assert weight.elements() == (48 + 48 // 32, 48, 28)
    linear = SparseCase(6, 8, 2, 5, 0.75, dtype="float32", layout="linear")
    assert (linear.macs(), linear.dense_macs()) == (5 * (28 + 12), 240)
    assert linear.elements() == (40, 30, 28 + 12 + 48 // 32 + 6)
    sparse = SparseCase(64, 64, 2, 5, 0.99, dtype="float32", layout="linear")
    assert sparse.elements()[2] == 256 + sparse.nnz + 16 * sparse.nnz // 32 + 64


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"out": 0}, "out must be an int >= 1"),
        ({"in": None}, "in must be an int >= 1"),
        ({"rows": 0}, "rows must be an int >= 1"),
        ({"rank": True}, "rank must be an int >= 1"),
        ({"sparsity": 1}, r"sparsity must be a number in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"sparsity must be a number in \[0, 1\)"),
        ({"mode": "added"}, "mode must be one of additive, masking"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"spread": -1}, r"spread must be a number in \[0, 10\]"),
        ({"modes": 2}, "unknown key 'modes'"),
    ],
)
def test_bad_case_is_named(wrong, text):
    row = {"out": 40, "in": 30}
    assert sparse_from_dict(row | {"rows": 4, "rank": 2}).layout == "linear"
    assert sparse_from_dict(row).rank == budget_rank(40, 30)
    with pytest.raises(ValueError, match="case 1.*" + text):
        sparse_from_dict(row | wrong, "case 1")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=SparseCase.label)
def test_every_way_agrees_with_the_oracle(case, dtype, training):
    problem = SparseProblem(replace(case, dtype=dtype), training=training)
    assert int(problem.mask.sum()) == case.nnz
    served = set()
    with torch.inference_mode(not training):
        for way in library_ways(problem, "never"):
            try:
                outputs = way.to_factors(way.call())
            except (RuntimeError, ValueError):
                assert (way.name, dtype) == (CSR, "bfloat16")  # where torch has no such product
                continue
            if way.group == "part":
                assert not outputs and not training
                continue
            served.add(way.name)
            assert problem.fault(outputs, 4.0) is None, way.name
            assert len(outputs) == (1 if not training or way.name == DENSE else len(problem.names))
        for way in our_ways(problem):
            try:
                outputs = way.call()
            except ValueError as error:
                assert way.name == "ours fused" and "native" in str(error)
                continue
            assert problem.fault(outputs) is None, way.name
            assert len(outputs) == (len(problem.names) if training else 1)
    if case.rows is None:
        assert served == {EAGER, *([ADDED] if case.mode == "additive" else [])}
    else:
        assert {REBUILT, DENSE} <= served and (CSR in served) <= (not training)


def test_a_wrong_gradient_is_seen():
    problem = SparseProblem(replace(CASES[0], dtype="float32"), training=True)
    way = library_ways(problem, "never")[0]
    y, a, b, values = way.call()
    assert problem.fault((y, a, b, values)) is None
    assert "grad values" in problem.fault((y, a, b, values + 0.1 * ~problem.mask))


def test_rows_have_everything():
    settings = Settings(
        suite="lowrank_sparse", cases=quick_sparse(), threads=[1], compiled="never", effort=QUICK
    )
    results = run_suite(settings)
    for row in results["rows"]:
        assert row["error"] is None and not row["wrong"]
        if row["case"]["rows"] is None:
            assert row["headline"] == "ours op" and row["over_eager"] > 0 and row["over_compiled"] is None
        else:
            assert row["headline"] == "ours tuned" and row["over_dense"] > 0
    tables = sparse_tables(results)
    assert [len(body) for _, (_, body) in tables] == [4, 2, 2]
    assert all(len(cells) == len(head) for _, (head, body) in tables for cells in body)
    assert [line.split(":")[0] for line in sparse_lines(results)] == [
        f"weights reconstructed, float32 {direction}, 1 threads" for direction in ("forward", "backward")
    ]
    failed = results["rows"][0] | {"error": "no such kernel"}
    head, body = sparse_tables(results | {"rows": [failed]})[0][1]
    assert len(body[0]) == len(head) and "failed: no such kernel" in body[0]
    assert not sparse_lines({"suite": "chain", "rows": []})
