"""Random changes of training images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .evaluate import sent


def crop_and_flip(
    images: torch.Tensor, generator: torch.Generator, *, pad: int = 4, flip: bool = True
) -> torch.Tensor:
    """Each image shifted by up to `pad` pixels over black borders and perhaps mirrored (He et al. 2016).

    Arguments:
        images: [N, C, H, W] of any dtype, on any device.
        generator: of the CPU, where the shifts and flips come from: the same state gives the same images.
        pad: largest shift, in pixels.
        flip: whether to mirror left and right, each image with probability 1/2.

    Returns a new tensor of the same shape and dtype.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (pad,) * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    rows = top + torch.arange(height)  # [N, H]
    columns = left + torch.arange(width)  # [N, W]
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    place = images.device
    return padded[
        torch.arange(n, device=place)[:, None, None, None],
        torch.arange(channels, device=place)[None, :, None, None],
        sent(rows, place)[:, None, :, None],
        sent(columns, place)[:, None, None, :],
    ]
