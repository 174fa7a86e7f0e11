"""The native CPU kernels of rings and depthwise cores, on every instruction set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bottleneck_problems import (
    BOTTLENECK_GEOMETRIES,
    BOTTLENECK_SIZES,
    DEPTHWISE,
    RING,
    BottleneckCase,
    bottleneck_gradients,
    bottleneck_oracle,
)
from torch import Tensor
from tucker2_problems import DTYPES, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, LAYOUTS, relative

from tensorcomp_ext.ops import bottleneck_conv, bottleneck_packed

pytestmark = pytest.mark.native

OPS = torch.ops.tensorcomp
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_forms = pytest.mark.parametrize("form", [RING, DEPTHWISE], ids=str)

LARGER = [
    # Bands, windows and whole images; ranks of the tensor-ring ResNet-32.
    RING.but(c_in=16, c_out=16, size=(32, 32), ring=10, rank_in=10, rank_out=10),
    RING.but(c_in=64, c_out=64, size=(8, 8), ring=15, rank_in=15, rank_out=15),
    RING.but(c_in=8, c_out=12, size=(17, 33), ring=3, rank_in=24, rank_out=40, stride=2),
    RING.but(n=1, c_in=40, c_out=40, size=(7, 7), ring=2, rank_in=90, rank_out=85),
    DEPTHWISE.but(c_in=64, c_out=64, size=(28, 28), rank_in=64),
    DEPTHWISE.but(n=1, c_in=256, c_out=256, size=(7, 7), rank_in=131),
    DEPTHWISE.but(c_in=20, c_out=12, size=(35, 70), rank_in=9, kernel=(5, 4), padding=2),
]


@dtypes
@pytest.mark.parametrize("case", [*BOTTLENECK_SIZES, *BOTTLENECK_GEOMETRIES, *LARGER], ids=str)
def test_matches_reference(isa: str, case: BottleneckCase, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        arguments = case.but(layout=layout).make(dtype)
        expected = bottleneck_oracle(arguments)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = bottleneck_conv.bottleneck_conv2d(*arguments, backend="native")
            assert relative(y, expected) <= FORWARD_TOLERANCE[dtype], (layout, threads)


@dtypes
@both_forms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa: str, form: BottleneckCase, layout: str, dtype: torch.dtype) -> None:
    for case in (form.but(layout=layout), form.but(layout=layout, stride=(2, 1), rank_in=17, size=(9, 12))):
        arguments = case.make(dtype)
        y = bottleneck_conv.bottleneck_conv2d(*arguments, backend="native")
        assert relative(y, bottleneck_oracle(arguments)) <= FORWARD_TOLERANCE[dtype]
        check_gradients(case, dtype)


def check_gradients(case: BottleneckCase, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    dy = torch.randn_like(bottleneck_oracle(arguments)).to(dtype)
    expected = bottleneck_gradients(arguments, dy)
    found = OPS.bottleneck_conv2d_backward(*arguments.backward(dy))
    names = ("x", "core", "factor_out", "factor_in", "bias")
    for name, ours in zip(names, found, strict=True):
        if name in expected:
            assert relative(ours, expected[name]) <= GRADIENT_TOLERANCE[dtype], (case, name)


@dtypes
@pytest.mark.parametrize("case", [*BOTTLENECK_SIZES, *BOTTLENECK_GEOMETRIES, *LARGER], ids=str)
def test_gradients(isa: str, case: BottleneckCase, dtype: torch.dtype) -> None:
    for layout, threads in (("contiguous", 2), ("channels_last", 1)):
        torch.set_num_threads(threads)
        check_gradients(case.but(layout=layout), dtype)


@dtypes
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_same_bits_every_time(isa: str, case: BottleneckCase, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first: list[Tensor] | None = None
        for _ in range(2):
            y = bottleneck_conv.bottleneck_conv2d(*arguments, backend="native")
            found = [y, *OPS.bottleneck_conv2d_backward(*arguments.backward(torch.ones_like(y)))]
            if first is None:
                first = found
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@dtypes
def test_an_infinity_stays_in_its_own_image(isa: str, dtype: torch.dtype) -> None:
    for form in (RING, DEPTHWISE.but(rank_in=5)):
        arguments = form.make(dtype)
        arguments.x[0, 0, 3, 3] = torch.inf
        y = bottleneck_conv.bottleneck_conv2d(*arguments, backend="native")
        assert not y[0, :, 3, 3].isfinite().any()
        assert y[1].isfinite().all() and y[0, :, 0].isfinite().all()


def test_reads_nothing_beside_its_tensors(repository: Path) -> None:
    """Every tensor at the very end, then at the very start, of the memory the process may read."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mmap and mprotect are called as on Linux")
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(repository), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(folder / "bottleneck_guarded.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr or f"killed by signal {-run.returncode}"
    assert int(run.stdout) > 0


def test_schemas_in_python_are_the_librarys(repository: Path) -> None:
    schemas = bottleneck_conv.SCHEMAS | bottleneck_packed.SCHEMAS
    source = (repository / "csrc/ops/bottleneck_conv.cpp").read_text()
    defined = [re.sub(r'"\s*"', "", text) for text in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', source)]
    assert sorted(d.strip().strip('"') for d in defined) == sorted(n + s for n, s in schemas.items())


def test_weights_that_do_not_fit_are_named_by_the_library() -> None:
    """What a C++ program without the Python checks is told."""
    ring, depthwise = RING.make(), DEPTHWISE.make()
    with pytest.raises(RuntimeError, match=r"factor_out must be .* with ring R_out = 12, got \[6, 11\]"):
        OPS.bottleneck_conv2d(*ring._replace(factor_out=ring.factor_out[:, 1:]).explicit())
    with pytest.raises(RuntimeError, match=r"factor_in must be \[C_in, R\] with R = 3, got \[5, 2\]"):
        OPS.bottleneck_conv2d(*depthwise._replace(factor_in=depthwise.factor_in[:, 1:]).explicit())
    with pytest.raises(RuntimeError, match="ring must be 1 where depthwise=True, got 3"):
        OPS.bottleneck_conv2d(*ring._replace(depthwise=True).explicit())
    with pytest.raises(RuntimeError, match="ring must be an int >= 1, got 0"):
        OPS.bottleneck_conv2d(*ring._replace(ring=0).explicit())
