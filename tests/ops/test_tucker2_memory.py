"""What the Tucker-2 convolution reads, what it lets through, and how much memory it takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from tucker2_problems import DTYPES, LAYOUTS, Arguments, Case, oracle

from tensorcomp_ext.bench.memory import peak_bytes
from tensorcomp_ext.ops import tucker2_conv2d

pytestmark = pytest.mark.native

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OWN_MEMORY = [name for name in LAYOUTS if name not in ("expanded", "one_image")]


def guarded(repository: Path, task: str) -> subprocess.CompletedProcess:
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(repository), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(folder / "tucker2_guarded.py"), task],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        timeout=240,
    )


def test_reads_nothing_beside_its_tensors(repository: Path) -> None:
    """Every tensor at the very end, then at the very start, of the memory the process may read."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mmap and mprotect are called as on Linux")
    assert guarded(repository, "stray").returncode == -signal.SIGSEGV
    run = guarded(repository, "check")
    assert run.returncode == 0, run.stderr or f"killed by signal {-run.returncode}"
    assert int(run.stdout) > 0


SPREADING = [
    Case(c_in=5, rank_in=3, rank_out=7),
    Case(c_in=8, c_out=17, size=(9, 20), rank_in=17, rank_out=5, stride=2),
    Case(c_in=7, c_out=3, size=(8, 11), rank_in=16, rank_out=31, kernel=(2, 3), padding="same", dilation=2),
    Case(c_in=1, c_out=1, rank_in=1, rank_out=1, stride=(1, 3), padding=0),
]


@dtypes
@pytest.mark.parametrize("layout", OWN_MEMORY)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_goes_where_the_window_goes(
    isa: str, value: float, layout: str, dtype: torch.dtype
) -> None:
    """Exactly the oracle's pixels are hit; every other is bitwise what it was, the other image whole."""
    for case in SPREADING:
        arguments = case.but(layout=layout).make(dtype)
        clean = tucker2_conv2d(*arguments, backend="native")
        h, w = case.size
        for row, column in ((0, 0), (h // 2, w // 2), (h - 1, w - 1), (1, w - 2)):
            held = arguments.x[0, -1, row, column].clone()
            arguments.x[0, -1, row, column] = value
            y, hit = tucker2_conv2d(*arguments, backend="native"), ~oracle(arguments).isfinite()
            assert torch.equal(~y.isfinite(), hit)
            assert torch.equal(y[~hit], clean[~hit])
            assert not hit[1].any()
            arguments.x[0, -1, row, column] = held


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice", "every_other"])
def test_gradients_not_finite_stay_in_their_image(isa: str, layout: str, dtype: torch.dtype) -> None:
    for case in SPREADING:
        leaves = case.but(layout=layout).make(dtype).leaves()
        y = tucker2_conv2d(*leaves, backend="native")
        grad = LAYOUTS[layout](tuple(y.shape), dtype)
        clean = torch.autograd.grad(y, leaves.x, grad, retain_graph=True)[0]
        grad[0, 0, -1, -1] = torch.nan
        found = torch.autograd.grad(y, leaves.x, grad)[0]
        wide = leaves.double().leaves()
        expected = torch.autograd.grad(tucker2_conv2d(*wide), wide.x, grad.double())[0]
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[~found.isnan()], clean[~found.isnan()])


@dtypes
def test_weights_not_finite_are_seen(isa: str, dtype: torch.dtype) -> None:
    """A NaN anywhere in the weights reaches the outputs it reaches in the oracle."""
    for case in SPREADING[:3]:
        for index in (1, 2, 3, 4):
            for layout in ("contiguous", "channels_last"):
                arguments = case.but(layout=layout).make(dtype)
                weight = arguments.tensors[index]
                assert weight is not None
                weight.view(-1)[-1] = torch.nan
                y = tucker2_conv2d(*arguments, backend="native")
                # The oracle's padding of zeros times NaN is NaN in some libraries and skipped in others.
                assert y.isnan().any()
                assert not (y.isnan() & ~oracle(arguments).isnan()).any()


def library_stages(arguments: Arguments) -> Tensor:
    """The three library convolutions a user would write."""
    x, core, factor_out, factor_in, bias, stride, padding, dilation = arguments
    z = F.conv2d(x, factor_in.t()[:, :, None, None])
    v = F.conv2d(z, core, None, stride, padding, dilation)
    return F.conv2d(v, factor_out[:, :, None, None], bias)


def training_peak(arguments: Arguments, call: Callable[[Arguments], Tensor]) -> int:
    leaves = arguments.leaves()
    given = [t for t in leaves.tensors if t is not None]

    def step() -> list[Tensor]:
        y = call(leaves)
        return [y, *torch.autograd.grad(y, given, torch.ones_like(y))]

    return peak_bytes(step)


BATCHES = [
    Case(n=8, c_in=64, c_out=64, size=(56, 56), rank_in=16, rank_out=16),
    Case(n=8, c_in=64, c_out=64, size=(32, 32), rank_in=13, rank_out=21),
    Case(n=8, c_in=64, c_out=128, size=(28, 28), rank_in=24, rank_out=40, stride=2),
    Case(n=32, c_in=16, c_out=16, size=(32, 32), rank_in=6, rank_out=6),
    Case(n=32, c_in=64, c_out=64, size=(8, 8), rank_in=16, rank_out=16),
]
SINGLE_IMAGES = [
    Case(n=1, c_in=64, c_out=64, size=(56, 56), rank_in=17, rank_out=19),
    Case(n=1, c_in=64, c_out=128, size=(56, 56), rank_in=24, rank_out=40, stride=2),
    Case(n=1, c_in=512, c_out=512, size=(7, 7), rank_in=31, rank_out=39),
]


def peaks(case: Case, layout: str) -> tuple[Arguments, int, int]:
    arguments = case.but(layout=layout).make()
    ours = training_peak(arguments, lambda a: tucker2_conv2d(*a, backend="native"))
    return arguments, ours, training_peak(arguments, library_stages)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_a_training_step_holds_no_more_than_three_library_convolutions(case: Case, layout: str) -> None:
    _, ours, theirs = peaks(case, layout)
    assert ours <= theirs


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SINGLE_IMAGES, ids=str)
def test_a_single_image_pays_for_packed_weights_at_most(case: Case, layout: str) -> None:
    """With few pixels the weights are most of what is held: packed for both directions, and their sums."""
    arguments, ours, theirs = peaks(case, layout)
    weights = sum(t.nbytes for t in arguments.tensors[1:4] if t is not None)
    assert ours <= theirs + 3 * weights


def test_forward_holds_no_full_size_intermediate() -> None:
    """Beyond the output: less than one rank-space activation."""
    case = BATCHES[0]
    for layout in ("contiguous", "channels_last"):
        arguments = case.but(layout=layout).make()
        with torch.inference_mode():
            held = peak_bytes(lambda a=arguments: tucker2_conv2d(*a, backend="native"))
        h, w = case.size
        output, activation = case.n * case.c_out * h * w * 4, case.n * case.rank_in * h * w * 4
        assert output <= held < output + activation / 2
