"""Memory of the randomised SVD, measured in processes of their own."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import resource, sys, time, torch
    from tensorcomp_ext import decompose
    from tensorcomp_ext.decompose import randomized
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows, columns, rank, randomized.ROW_BLOCK = map(int, sys.argv[1:])
    torch.manual_seed(0)
    decompose.randomized_svd(torch.randn(64, 64), 4)
    scale = 1.0 / torch.arange(1, 2 * rank + 1)
    matrix = torch.randn(rows, columns).mul_(1e-4)
    matrix.addmm_(torch.randn(rows, 2 * rank) * scale, torch.randn(2 * rank, columns))
    before, start = peak(), time.perf_counter()
    found = decompose.svd_factors(matrix, rank, method="randomized")
    print(peak() - before, time.perf_counter() - start, found.relative_error)
"""


def measured(rows, columns, rank, block):
    """Bytes by which the peak grows, seconds, relative error, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(rows), str(columns), str(rank), str(block)],
        capture_output=True,
        text=True,
        check=True,
        timeout=580,
    )
    return tuple(map(float, run.stdout.split()))


def test_memory_is_a_few_thin_matrices_and_a_block():
    growth, _, error = measured(4096, 8192, 16, 1 << 20)
    assert growth < 0.7 * 8 * 4096 * 8192  # not even one copy in float64
    assert error < 1.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_8192_by_28672_at_rank_256_in_three_gigabytes():
    growth, seconds, error = measured(8192, 28672, 256, 1 << 24)
    print(f"{growth / 1e9:.2f} GB beyond the matrix, {seconds:.1f} s, relative error {error:.4f}")
    assert growth < 3e9
    assert error < 1.0
