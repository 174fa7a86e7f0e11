"""Runs rings, depthwise cores and packed forms on tensors between two pages nobody may touch.

A program of its own, for a read past an end kills it; prints the number of problems it survived.
"""

from __future__ import annotations

import torch
from bottleneck_problems import DEPTHWISE, PLAIN, RING, BottleneckArguments
from tucker2_guarded import Island
from tucker2_problems import DTYPES

from tensorcomp_ext import _C as native
from tensorcomp_ext.ops import bottleneck_conv2d
from tensorcomp_ext.ops.bottleneck_packed import bind_packed_bottleneck, bottleneck_geometry, pack_bottleneck

OPS = torch.ops.tensorcomp
PROBLEMS = [
    *(f.but(c_in=17, c_out=33, size=(5, 19), rank_in=7, rank_out=9) for f in (PLAIN, RING, DEPTHWISE)),
    *(form.but(c_in=16, rank_in=16, rank_out=17, stride=2, padding=0) for form in (RING, DEPTHWISE)),
    *(form.but(n=1, c_in=1, c_out=1, rank_in=1, rank_out=1, size=(3, 3)) for form in (RING, DEPTHWISE)),
    *(form.but(rank_in=33, kernel=(1, 4), padding=(0, 2), dilation=(1, 2)) for form in (RING, DEPTHWISE)),
]


def check(islands: list[Island]) -> int:
    survived = 0
    for isa in native.isa_available():
        native.set_isa_cap(isa)
        for case in PROBLEMS:
            for layout in ("contiguous", "channels_last", "plane_slice", "every_other_channel"):
                for dtype in DTYPES:
                    plain = case.but(layout=layout).make(dtype)
                    for at_end in (True, False):
                        survived += one(islands, plain, at_end)
    return survived


def one(islands: list[Island], plain: BottleneckArguments, at_end: bool) -> int:
    expected = bottleneck_conv2d(*plain, backend="native")
    placed = [island.place(t, at_end) for island, t in zip(islands, plain.given, strict=False)]
    a = plain.with_tensors(placed)
    assert torch.equal(bottleneck_conv2d(*a, backend="native"), expected)
    geometry = bottleneck_geometry(
        a.core.shape, a.x.shape[1], a.factor_out.shape[0], a.geometry, a.ring, a.depthwise
    )
    packed = islands[5].place(
        pack_bottleneck(a.core, a.factor_out, a.factor_in, a.ring, a.depthwise), at_end=False
    )
    residual = torch.randn(expected.shape).to(expected.dtype).as_strided(expected.shape, expected.stride())
    call = bind_packed_bottleneck(packed, geometry, relu=True)
    assert torch.equal(
        call(a.x, a.bias, islands[6].place(residual, at_end)), call(plain.x, plain.bias, residual)
    )
    found = OPS.bottleneck_conv2d_backward(*a.backward(islands[6].place(residual, at_end)))
    for ours, theirs in zip(found, OPS.bottleneck_conv2d_backward(*plain.backward(residual)), strict=True):
        assert torch.equal(ours, theirs)
    return 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(check([Island() for _ in range(7)]))
