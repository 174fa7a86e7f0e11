"""Runs the Tucker-2 kernels on tensors that lie between two pages nobody may touch.

A program of its own, for a read past an end kills it. ``python tucker2_guarded.py check`` prints the number
of problems it survived, ``python tucker2_guarded.py stray`` reads an element too many on purpose.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor
from tucker2_problems import DTYPES, LAYOUTS, Arguments, Case

from tensorcomp_ext import _C as native
from tensorcomp_ext.ops import tucker2_conv2d
from tensorcomp_ext.ops.tucker2_conv import pack_tucker2, packed_geometry

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

PROT_NONE = 0
SLOT = 64 * mmap.PAGESIZE


class Island:
    """Readable pages with a forbidden one before and behind."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        page = mmap.PAGESIZE
        start = _libc.mmap(None, SLOT + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        for forbidden in (start, start + page + SLOT):
            if _libc.mprotect(forbidden, page, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.memory = (ctypes.c_char * SLOT).from_address(start + page)

    def place(self, tensor: Tensor, at_end: bool) -> Tensor:
        """A copy with the same strides whose last (or first) element is the island's."""
        if tensor.numel() == 0:
            return tensor
        span = 1 + sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
        size = span * tensor.element_size()
        flat = torch.frombuffer(
            self.memory, dtype=tensor.dtype, count=span, offset=SLOT - size if at_end else 0
        )
        flat.copy_(tensor.detach().as_strided((span,), (1,)))
        return flat.as_strided(tensor.shape, tensor.stride())


PROBLEMS = [
    Case(),
    Case(c_in=17, c_out=33, rank_in=7, rank_out=9, size=(5, 19)),
    Case(c_in=16, c_out=16, rank_in=16, rank_out=17, stride=(2, 1), padding=0),
    Case(n=1, c_in=1, c_out=1, rank_in=1, rank_out=1, size=(3, 3), kernel=(2, 2)),
    Case(c_in=3, c_out=40, rank_in=33, rank_out=25, kernel=(1, 4), padding=(0, 2), dilation=(1, 2)),
    Case(n=1, c_in=31, c_out=8, rank_in=5, rank_out=50, size=(7, 7), kernel=(5, 1), padding=3),
]


def check(islands: list[Island]) -> int:
    survived = 0
    for isa in native.isa_available():
        native.set_isa_cap(isa)
        for case in PROBLEMS:
            for layout in LAYOUTS:
                for dtype in DTYPES:
                    plain = case.but(layout=layout).make(dtype)
                    expected = tucker2_conv2d(*plain, backend="native")
                    # The gradient comes in the strides of each layout too.
                    grad = LAYOUTS[layout](tuple(expected.shape), dtype)
                    for at_end in (True, False):
                        survived += one(islands, plain, expected, grad, at_end)
    return survived


def one(islands: list[Island], plain: Arguments, expected: Tensor, grad: Tensor, at_end: bool) -> int:
    placed = [island.place(t, at_end) for island, t in zip(islands, plain[:5], strict=False)]
    arguments = plain.with_tensors(placed)
    assert torch.equal(tucker2_conv2d(*arguments, backend="native"), expected)
    x, core, factor_out, factor_in, bias, *geometry = arguments.explicit()
    packed = islands[5].place(pack_tucker2(core, factor_out, factor_in), at_end=False)
    numbers = packed_geometry(core.shape, x.shape[1], factor_out.shape[0], arguments.geometry)
    assert torch.equal(torch.ops.tensorcomp.tucker2_conv2d_packed(x, packed, bias, numbers), expected)
    backward = torch.ops.tensorcomp.tucker2_conv2d_backward
    found = backward(islands[5].place(grad, at_end), x, core, factor_out, factor_in, *geometry, 31)
    for ours, theirs in zip(found, backward(grad, *plain[:4], *geometry, 31), strict=True):
        assert torch.equal(ours, theirs)
    return 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "stray":
        last = Island().place(torch.zeros(4), at_end=True)
        print(ctypes.c_float.from_address(last.data_ptr() + last.nbytes).value)
    else:
        torch.manual_seed(0)
        print(check([Island() for _ in range(6)]))
