"""The kernels run on torch's own thread pool: one OpenMP runtime is mapped, and every thread of it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.native

SCRIPT = """
import json, os, re, sys, time
import torch
import tensorcomp_ext

torch.set_num_threads(2)
x = torch.randn(8, 64, 56, 56).contiguous(memory_format=torch.channels_last)
core, factor_out, factor_in = torch.randn(32, 32, 3, 3), torch.randn(64, 32), torch.randn(64, 32)

def ticks():
    # utime, clock ticks, of every thread
    found = {}
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/stat") as stat:
            found[thread] = int(stat.read().rsplit(")", 1)[1].split()[11])
    return found

def run(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tensorcomp_ext.ops.tucker2_conv2d(x, core, factor_out, factor_in, padding=1, backend="native")

with torch.inference_mode():
    run(0.05)
    before = ticks()
    run(1.5)
    after = ticks()
with open("/proc/self/maps") as maps:
    mapped = {line.split()[-1] for line in maps if "/" in line}
openmp = sorted(m for m in mapped if re.match(r"lib(gomp|omp|iomp5)\\b.*\\.so", os.path.basename(m)))
print(json.dumps({"openmp": openmp, "ticks": [after[t] - before.get(t, 0) for t in after]}))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, list]:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_one_openmp_runtime_is_mapped(report: dict[str, list]) -> None:
    assert len(report["openmp"]) == 1, report["openmp"]


def test_both_threads_work(report: dict[str, list]) -> None:
    """Shares of the work, not times: a second thread that only waits or sleeps gets no CPU time to speak of.

    A thread that spins for work would be counted too, but torch's pool does so for milliseconds at most.
    """
    first, second = sorted(report["ticks"], reverse=True)[:2]
    assert first > 0
    assert second >= 0.25 * first, report["ticks"]
