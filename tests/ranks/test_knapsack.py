"""The knapsack over layers against every combination there is."""

import itertools
import random

import pytest

from tensorcomp_ext.ranks.knapsack import knapsack


def brute_force(tables, budget):
    """The least (loss, cost) of all combinations within the budget."""
    found = None
    for combination in itertools.product(*tables):
        cost, loss = (sum(pair[k] for pair in combination) for k in (0, 1))
        if cost <= budget and (found is None or (loss, cost) < found):
            found = loss, cost
    return found


@pytest.mark.parametrize("seed", range(30))
def test_exact_against_all_combinations(seed):
    draw = random.Random(seed)
    # Whole numbers, so that sums are exact and ties are common; costs may be savings, below zero.
    tables = [
        [(float(draw.randint(-6, 9)), float(draw.randint(0, 7))) for _ in range(draw.randint(1, 6))]
        for _ in range(draw.randint(1, 5))
    ]
    budget = float(draw.randint(-12, 25))
    expected = brute_force(tables, budget)
    found = knapsack(tables, budget)
    if expected is None:
        assert found is None
        return
    assert (found.loss, found.cost) == expected
    chosen = [table[place] for table, place in zip(tables, found.chosen, strict=True)]
    assert (sum(c for c, _ in chosen), sum(loss for _, loss in chosen)) == (found.cost, found.loss)


def test_few_points_stay_within_the_budget_and_near_the_optimum():
    draw = random.Random(0)
    tables = [[(draw.random(), draw.random()) for _ in range(12)] for _ in range(25)]
    exact, coarse = knapsack(tables, 9.0), knapsack(tables, 9.0, points=300)
    assert coarse.cost <= 9.0
    assert exact.loss <= coarse.loss <= 1.02 * exact.loss
    least = sum(min(cost for cost, _ in table) for table in tables)
    assert knapsack(tables, least * (1 + 1e-9), points=2) is not None
    assert knapsack(tables, 0.99 * least) is None


def test_the_same_measurements_give_the_same_choice():
    tables = [[(1.0, 2.0), (2.0, 1.0), (2.0, 1.0)], [(0.0, 0.5), (0.0, 0.5)]]
    assert knapsack(tables, 2.0).chosen == (1, 0)
    assert knapsack([], 0.0).chosen == ()
    assert knapsack([], -1.0) is None


@pytest.mark.parametrize("tables", [[[]], [[(float("nan"), 1.0)]], [[(1.0, float("inf"))]]])
def test_bad_tables(tables):
    with pytest.raises(ValueError, match="knapsack: table 0 must hold finite"):
        knapsack(tables, 1.0)
