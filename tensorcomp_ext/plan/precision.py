"""Whether torch may round float32 to TF32 now; part of what a bound call on CUDA depends on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

_precision_of = torch._C._get_fp32_precision_getter


def autocast_off(device: str) -> AbstractContextManager[object]:
    """Products of factors in their own dtype: rounded once, as the result is cast, and not at every merge."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


class Tf32(NamedTuple):
    """What torch lets a device round to TF32."""

    convolutions: bool = False
    """As ``torch.backends.cudnn.allow_tf32`` says."""
    products: bool = False
    """As ``torch.backends.cuda.matmul.allow_tf32`` says."""


_NONE = Tf32()


def tf32_state(device: str) -> Tf32:
    """What may be rounded on a type of device at present; nothing outside CUDA, where no setting is read.

    Reads what the public attributes stand for: these raise where somebody has set the precision both by them
    and by ``fp32_precision``.
    """
    if device != "cuda":
        return _NONE
    return Tf32(_precision_of("cuda", "conv") == "tf32", _precision_of("cuda", "matmul") == "tf32")
