"""The Tucker-2 convolution under function transforms and forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_problems import Case, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import tucker2_conv2d

OPS = torch.ops.tensorcomp
CALLS = ["function", "op"]
every_call = pytest.mark.parametrize("name", CALLS)


def of_x(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """A call and the oracle as functions of x, and an x."""
    arguments = Case(stride=2).make()

    def call(x: Tensor) -> Tensor:
        given = arguments._replace(x=x)
        return tucker2_conv2d(*given) if name == "function" else OPS.tucker2_conv2d(*given.explicit())

    double = arguments.double()
    return call, lambda x: reference.tucker2_conv2d(x, *double[1:]), arguments.x


def tangent_of(call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
    assert tangent is not None
    return tangent


@every_call
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode(name: str, mode: Callable[[], object]) -> None:
    call, exact, x = of_x(name)
    direction = torch.randn_like(x)
    wanted = exact(x.double() + direction.double()) - exact(x.double())  # linear in x
    with mode():  # type: ignore[attr-defined]
        assert relative(tangent_of(call, x, direction), wanted) <= 1e-5
        assert relative(jvp(call, (x,), (direction,))[1], wanted) <= 1e-5


@every_call
def test_function_transforms(name: str) -> None:
    call, exact, x = of_x(name)
    images = torch.stack([x, 2 * x])
    wanted = [grad(lambda x: exact(x).square().sum())(image.double()) for image in images]
    assert relative(grad(lambda x: call(x).square().sum())(x), wanted[0]) <= 1e-5
    for found, right in zip(vmap(grad(lambda x: call(x).square().sum()))(images), wanted, strict=True):
        assert relative(found, right) <= 1e-5
    assert relative(vmap(call)(images)[1], exact(images[1].double())) <= 1e-5


@every_call
def test_gradients_that_are_mapped_or_differentiated(name: str) -> None:
    """The graph is made outside of the transform, its backward runs inside."""
    call, exact, x = of_x(name)
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    y, wanted = call(leaf), exact(double)
    several = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, leaf, several, is_grads_batched=True, retain_graph=True)[0]
    for ours, each in zip(found, several, strict=True):
        expected = torch.autograd.grad(wanted, double, each.double(), retain_graph=True)[0]
        assert relative(ours, expected) <= 1e-5
    tangent = tangent_of(
        lambda g: torch.autograd.grad(y, leaf, g, retain_graph=True)[0], several[0], several[1]
    )
    assert relative(tangent, torch.autograd.grad(wanted, double, several[1].double())[0]) <= 1e-5


def test_tensors_that_outlive_a_transform() -> None:
    arguments, kept = Case().make().leaves(), []
    grad(lambda x: kept.append(x) or x.sum())(arguments.x)
    found = torch.autograd.grad(tucker2_conv2d(kept[0], *arguments[1:]).sum(), arguments.x)
    assert torch.equal(found[0], torch.autograd.grad(tucker2_conv2d(*arguments).sum(), arguments.x)[0])
