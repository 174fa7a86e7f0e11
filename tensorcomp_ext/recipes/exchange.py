"""Parameters of an optimizer that take the place of others, with what it remembers of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Convert = Callable[[Tensor], Tensor]


@torch.no_grad()
def exchange(
    optimizer: torch.optim.Optimizer,
    changes: Mapping[nn.Parameter, tuple[nn.Parameter, Convert | None]],
) -> None:
    """Put new parameters in the places of old ones, in the same groups.

    Tensors that the optimizer keeps of an old parameter, in its shape, go through the callable: with the one
    that made the new parameter, moments stay with the entries that stay. What else it keeps, as the count of
    Adam's steps, is handed on. Without a callable everything is dropped: moments begin anew.

    Args:
        optimizer: of torch.optim, or one that keeps ``param_groups`` and ``state`` as those do.
        changes: of each old parameter the new one, and what makes of a tensor of the old shape one of the
            new; None drops.

    Raises:
        ValueError: a parameter that the optimizer does not have, or has already, and a callable that gives
            another shape, all before anything is changed; parameters are told by their place and shape.
    """
    places = {
        parameter: (group["params"], place)
        for group in optimizer.param_groups
        for place, parameter in enumerate(group["params"])
    }
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for number, (old, (new, convert)) in enumerate(changes.items()):
        what = f"change {number}, of a parameter {list(old.shape)} to {list(new.shape)}"
        if old not in places:
            raise ValueError(f"exchange: the optimizer does not have the old parameter of {what}")
        if new is not old and new in places and new not in changes:
            raise ValueError(f"exchange: the optimizer has the new parameter of {what} already")
        if convert is not None and old in optimizer.state:
            states[new] = {
                key: _converted(value, old, new, convert, f"{key!r} in {what}")
                for key, value in optimizer.state[old].items()
            }
    for old in changes:
        optimizer.state.pop(old, None)
    for old, (new, _) in changes.items():
        parameters, place = places[old]
        parameters[place] = new
        if new in states:
            optimizer.state[new] = states[new]


def _converted(value: Any, old: Tensor, new: Tensor, convert: Convert, what: str) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape or value.dim() == 0:
        return value
    made = convert(value)
    if made.shape != new.shape:
        raise ValueError(
            f"exchange: the callable must give {list(new.shape)}, got {list(made.shape)}: {what}"
        )
    # Of a callable that returns its argument nothing may be shared with what is dropped.
    return made.clone() if made.data_ptr() == value.data_ptr() else made
