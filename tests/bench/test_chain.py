"""The chain suite: cases, least work, library ways against the oracle, rows."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench.chain import our_ways
from tensorcomp_ext.bench.chain_cases import ChainCase, chain_cases, chain_from_dict, quick_chains
from tensorcomp_ext.bench.chain_library import TLTORCH, library_ways
from tensorcomp_ext.bench.chain_problem import ChainProblem
from tensorcomp_ext.bench.chain_summary import against_dense, chain_lines
from tensorcomp_ext.bench.cores import CORES, READ, Cores
from tensorcomp_ext.bench.suite import QUICK, Settings, run_suite

ODD = [
    ChainCase("tt", 7, 6, (7,), (2, 3), 2, 5),
    ChainCase("ttm", 6, 5, (6,), (5,), 1, 3),
    ChainCase("ttm", 24, 30, (3, 2, 4), (2, 5, 3), 4, 6),
    ChainCase("tr", 10, 21, (2, 5), (7, 3), 3, 4),
    ChainCase("tr_matrix", 24, 30, (3, 2, 4), (2, 5, 3), 2, 1),
    ChainCase("tr_matrix", 6, 5, (6,), (5,), 3, 3),
    ChainCase("cp", 24, 10, (4, 6), (5, 2), 7, 9),
]


def test_cases_of_the_design():
    cases = chain_cases("cpu")
    assert len(cases) == len(set(cases)) == 7 + 2 * 21 + 4
    assert {c.format for c in cases} == {"tt", "ttm", "tr"}
    first = cases[0]
    assert (first.c_in, first.c_out, first.rank) == (4096, 4096, 16)
    assert [c.rows for c in cases[:2]] == [1, 4096]
    assert first.cores.numel == 2 * 16 * 16 + 4 * 16**3
    lenet = [c for c in cases if c.c_in == 1250]
    assert [c.cores.numel for c in lenet] == [46 * 100] * 2 + [46 * 225] * 2


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rows": None}, "rows must be an int >= 1, got None"),
        ({"rank": True}, "rank must be an int >= 1"),
        ({"format": "bt"}, "format must be one of"),
        ({"in_modes": 4}, "in_modes must be a list"),
        ({"out_modes": [0]}, "out_modes must be a list"),
        ({"format": "ttm", "in_modes": [2, 2]}, "as many in_modes"),
        ({"in": 5}, "in must be 2, the product of its modes"),
        ({"ranks": 2}, "unknown key 'ranks'"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_bad_case_is_named(wrong, text):
    row = {"format": "tt", "in_modes": [2], "out_modes": [3], "rank": 2, "rows": 1}
    with pytest.raises(ValueError, match="case 3.*" + text):
        chain_from_dict(row | wrong, "case 3")


def test_sizes_follow_from_the_modes():
    row = {"format": "tt", "in_modes": [2, 3], "out_modes": [4], "rank": 2, "rows": 5}
    assert chain_from_dict(row) == ChainCase("tt", 6, 4, (2, 3), (4,), 2, 5)
    assert chain_from_dict(row | {"in": 6, "out": 4, "dtype": "bfloat16"}).dtype == "bfloat16"


def contracted(cores: Cores, order) -> int:
    """Multiply-adds of an order of groups, counted by the tensors that really meet."""
    rest, held, total = set(range(len(cores.shapes))), set(cores.inputs), 0
    for group in order:
        rest -= set(group)
        wanted = set(cores.outputs) | {label for i in rest for label in cores.labels[i]}
        inside = {label for i in group for label in cores.labels[i]}
        merged = inside & (wanted | held)
        total += math.prod(cores.sizes[label] for label in held | merged)
        held = (held | merged) & wanted
    assert held == set(cores.outputs)
    return total


@pytest.mark.parametrize("case", ODD, ids=ChainCase.label)
def test_least_work_is_the_least_of_all_orders(case):
    cores = case.cores
    every = range(len(cores.shapes))

    def orders(left):
        if not left:
            yield ()
        for size in range(1, len(left) + 1):
            for group in itertools.combinations(left, size):
                for rest in orders([i for i in left if i not in group]):
                    yield (group, *rest)

    counts = {order: contracted(cores, order) for order in orders(list(every))}
    many, order = cores.least(10**9)
    assert many == 10**9 * min(counts.values()) and counts[order] == cores.order_macs(order) == min(
        counts.values()
    )
    for rows in (1, 5):
        read = {o: rows * count + READ * cores.order_weights(o) for o, count in counts.items()}
        macs, order = cores.least(rows)
        assert macs == rows * counts[order] and read[order] == min(read.values())
    assert counts[(tuple(every),)] == case.c_in * case.c_out
    pairs = [count for order, count in counts.items() if len(order) == 2]
    assert (cores.pair is None) == (not pairs) and (not pairs or counts[cores.pair] == min(pairs))


def test_ranks_are_clipped_as_trains_need():
    assert CORES["tt"]([12, 16, 16], [8, 8, 12], 24).ranks == (12, 24, 24, 24, 12)
    assert CORES["ttm"]([2, 2], [3, 2], 9).shapes == ((1, 2, 3, 4), (4, 2, 2, 1))
    assert CORES["tr"]([5, 2], [3], 7).ranks == (7, 7, 7)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*ODD, *quick_chains()], ids=ChainCase.label)
def test_library_ways_agree_with_the_oracle(case, dtype, training):
    problem = ChainProblem(replace(case, dtype=dtype), training=training)
    served = set()
    with torch.inference_mode(not training):
        for way in library_ways(problem, "never"):
            try:
                outputs = way.to_factors(way.call())
            except ValueError as error:
                assert way.name == TLTORCH or "not installed" in str(error)
                continue
            served.add(way.name)
            assert problem.fault(outputs, 4.0) is None, way.name
            whole = 3 + len(case.cores.shapes)
            assert len(outputs) == (1 if not training else 2 if way.group == "dense" else whole)
    assert {"rebuild eager", "dense eager"} <= served
    assert ("pair eager" in served) == (case.cores.pair is not None)


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_result_is_a_fault(training):
    problem = ChainProblem(replace(quick_chains()[0], dtype="float32"), training=training)
    good = problem.expected
    assert problem.fault(good) is None
    assert "y is" in problem.fault([good[0] * (1 + 2e-5), *good[1:]])
    if training:
        assert "grad core 1" in problem.fault([*good[:3], good[3] * 1.01, *good[4:]])


def test_weights_are_of_unit_scale():
    case = replace(quick_chains()[2], rows=1, dtype="float32")
    drawn = [ChainProblem(case, training=False, seed=seed).dense_weight() for seed in range(40)]
    assert float(torch.stack(drawn).square().mean()) * case.c_in == pytest.approx(1.0, rel=0.2)


def make_row(rows, over_dense, **case):
    case = {"format": "tt", "c_in": 4096, "c_out": 4096, "rank": 16, "rows": rows, "dtype": "float32"} | case
    return {"case": case, "direction": "forward", "threads": 2, "over_dense": over_dense}


def test_figures_against_dense():
    rows = [make_row(1, 150.0), make_row(4096, 31.5), make_row(1, 9.0, format="tr"), make_row(8, None)]
    found = against_dense(rows)
    assert [(f["rows"], f["over_dense"]) for f in found] == [(1, 150.0), (4096, 31.5)]
    (first, second) = chain_lines({"summary": {"chain": found}})
    assert "1 rows: 150.00 times" in first and "4096 rows: 31.50 times" in second
    assert chain_lines({"summary": {}}) == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", [*ODD, *quick_chains()], ids=ChainCase.label)
def test_our_ways_agree_with_the_oracle(case, training):
    problem = ChainProblem(replace(case, dtype="float32"), training=training)
    with torch.inference_mode(not training):
        for way in our_ways(problem):
            assert problem.fault(way.call()) is None, way.name
            assert way.note and way.macs


def test_rows_have_everything():
    settings = Settings(suite="chain", cases=quick_chains(), threads=[1], compiled="never", effort=QUICK)
    results = run_suite(settings)
    assert results["complete"] and len(results["rows"]) == 10
    for row in results["rows"]:
        assert row["error"] is None and not row["wrong"]
        assert {"ours layer", "ours tuned"} <= set(row["ours"])
        assert row["over_any"] > 0 and row["roofline_share"] > 0
    assert results["summary"]["device"] and results["summary"]["chain"] == []
