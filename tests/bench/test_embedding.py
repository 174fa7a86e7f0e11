"""The embedding suite: cases, library ways against the oracle, shared work, rows and their table."""

from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench.embedding import our_ways
from tensorcomp_ext.bench.embedding_cases import (
    EmbeddingCase,
    embedding_cases,
    embedding_from_dict,
    quick_embeddings,
)
from tensorcomp_ext.bench.embedding_library import GATHER, REBUILT, SLICES, library_ways
from tensorcomp_ext.bench.embedding_problem import EmbeddingProblem
from tensorcomp_ext.bench.embedding_summary import embedding_table
from tensorcomp_ext.bench.measure import FUSED
from tensorcomp_ext.bench.suite import QUICK, Settings, run_suite

CASES = [
    *quick_embeddings(),
    EmbeddingCase("ttm", 5, 3, (5,), (3,), 2, 4),
    EmbeddingCase("tr_matrix", 5, 3, (5,), (3,), 2, 4),
    EmbeddingCase("ttm", 23, 4, (6, 4), (1, 4), 1, 1),
    EmbeddingCase("tr_matrix", 60, 12, (3, 4, 5), (2, 3, 2), 4, 17),
]


def test_cases_of_the_issue():
    cases = embedding_cases("cpu")
    assert len(cases) == len(set(cases)) == 12
    large = cases[0]
    assert (large.rows, large.vocab, large.dim, large.rank) == (4096, 1_000_000, 64, 16)
    sst, iwslt = cases[4], cases[8]
    assert sst.cores.numel == 24_128 and iwslt.cores.numel == 786_432
    assert {c.rows for c in cases} == {1, 128, 4096, 65536}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"format": "tt"}, "format must be one of ttm, tr_matrix"),
        ({"vocab_modes": [2]}, "as many vocab_modes as dim_modes"),
        ({"vocab": 7}, "vocab must be at most 6"),
        ({"dim": 3}, "dim must be 4"),
        ({"rows": 0}, "rows must be an int >= 1"),
        ({"rank": None}, "rank must be an int >= 1"),
        ({"mode": 2}, "unknown key 'mode'"),
    ],
)
def test_bad_case_is_named(wrong, text):
    row = {"format": "ttm", "vocab_modes": [2, 3], "dim_modes": [2, 2], "rank": 2, "rows": 1}
    assert embedding_from_dict(row | {"vocab": 5}).vocab == 5
    with pytest.raises(ValueError, match="case 1.*" + text):
        embedding_from_dict(row | wrong, "case 1")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=EmbeddingCase.label)
def test_library_ways_agree_with_the_oracle(case, dtype, training):
    problem = EmbeddingProblem(replace(case, dtype=dtype), training=training)
    assert problem.table().shape == (case.vocab, case.dim)
    served = set()
    with torch.inference_mode(not training):
        for way in library_ways(problem, "never"):
            try:
                outputs = way.to_factors(way.call())
            except ValueError as error:
                assert "tltorch" in str(error)
                continue
            served.add(way.name)
            assert problem.fault(outputs, 4.0) is None, way.name
            assert len(outputs) == (1 if not training or way.name == GATHER else 1 + len(problem.cores))
    assert {SLICES, REBUILT, GATHER} <= served


def test_table_has_the_rows_of_the_cores():
    problem = EmbeddingProblem(replace(CASES[-1], dtype="float32"), training=False)
    first, second, third = problem.cores
    i, j, k = 2, 1, 4
    row = torch.einsum("apb,bqc,cra->pqr", first[:, i], second[:, j], third[:, k]).flatten()
    torch.testing.assert_close(problem.table()[(i * 4 + j) * 5 + k], row, rtol=1e-5, atol=1e-6)


def test_shared_prefixes_are_counted_once():
    case = EmbeddingCase("ttm", 12, 8, (3, 4), (2, 4), 5, 3, "float32")
    problem = EmbeddingProblem(case, training=False)
    problem.indices = torch.tensor([7, 7, 6])
    assert problem.macs() == 2 * (2 * 5 * 4)  # two distinct rows
    three = EmbeddingCase("ttm", 24, 8, (2, 3, 4), (2, 2, 2), 3, 4, "float32")
    problem = EmbeddingProblem(three, training=False)
    problem.indices = torch.tensor([0, 1, 2, 3])  # one prefix of two digits, four rows
    assert problem.macs() == 2 * 3 * 2 * 3 + 4 * (4 * 3 * 2)
    ring = EmbeddingCase("tr_matrix", 12, 8, (3, 4), (2, 4), 5, 1, "float32")
    assert EmbeddingProblem(ring, training=False).macs() == 5 * 2 * 5 * 4


def test_slices_too_large_for_memory_are_refused(monkeypatch):
    monkeypatch.setattr("tensorcomp_ext.bench.embedding_library._MOST_BYTES", 100)
    problem = EmbeddingProblem(replace(CASES[0], dtype="float32"), training=False)
    way = next(way for way in library_ways(problem, "never") if way.name == SLICES)
    with pytest.raises(ValueError, match="slices of 9 rows would take"):
        way.call()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES, ids=EmbeddingCase.label)
def test_our_ways_agree_with_the_oracle(case, training):
    problem = EmbeddingProblem(replace(case, dtype="float32"), training=training)
    with torch.inference_mode(not training):
        for way in our_ways(problem):
            if way.name == FUSED and len(problem.cores) == 1:
                continue  # nothing to multiply: the op refuses a single core
            assert problem.fault(way.call()) is None, way.name


def test_rows_have_everything():
    settings = Settings(
        suite="embedding", cases=quick_embeddings(), threads=[1], compiled="never", effort=QUICK
    )
    results = run_suite(settings)
    for row in results["rows"]:
        assert row["error"] is None and not row["wrong"]
        assert row["headline"] == "ours fused"
        table, layer = 4 * row["case"]["vocab"] * row["case"]["dim"], row["memory"].get("layer_bytes", 0)
        plans = {c["name"]: c.get("plan") for c in row["candidates"]}
        if plans["ours layer"] == "dense" and row["direction"] == "forward":
            assert layer >= table  # the table it keeps is no saving
        assert row["over_rebuilt"] > 0 and row["over_dense"] > 0 and row["saved"] is None
        assert row["memory"]["least_bytes"] > 0 and row["memory"]["rebuilt_bytes"] > 0
    head, body = embedding_table(results)
    assert len(body) == 4 and all(len(cells) == len(head) for cells in body)
