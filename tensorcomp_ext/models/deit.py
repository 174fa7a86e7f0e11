"""DeiT-Small: a vision transformer for 224 x 224 images."""

from __future__ import annotations

import torch
from torch import nn

from .transformer import ViTBlock


class PatchEmbedding(nn.Module):
    """Every patch of an image as a token, by a convolution with stride: [N, C, H, W] to [N, patches, dim]."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DeiT(nn.Module):
    """A vision transformer without distillation token (Touvron et al. 2021); the defaults are DeiT-Small's.

    Patches as tokens, a learned token before them, learned positions, blocks of attention and MLP, a layer
    norm, one linear layer on the first token. 22,050,664 parameters for 1,000 classes. Parameters are named
    as in timm's deit_small_patch16_224, whose state dicts load. No dropout and no stochastic depth.

    Arguments:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: height and width of the images, a multiple of patch.
        patch: height and width of a patch.
        dim, depth, heads: width of a token, number of blocks, attention heads of each.

    Input [N, in_channels, image_size, image_size], output [N, num_classes]. 4.24 G MACs an image at
    3 x 224 x 224 in convolution and linear layers.
    Raises ValueError where patch does not divide image_size, or heads dim, and from forward for another image
    size.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        patch: int = 16,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
    ) -> None:
        super().__init__()
        if patch < 1 or image_size < 1 or image_size % patch:
            raise ValueError(f"DeiT: patch must divide image_size = {image_size}, got {patch}")
        self.in_channels, self.image_size = in_channels, image_size
        self.patch_embed = PatchEmbedding(in_channels, dim, patch)
        tokens = (image_size // patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wanted = (self.in_channels, self.image_size, self.image_size)
        if x.dim() != 4 or x.shape[1:] != wanted:
            raise ValueError(f"DeiT: input must be [N, {', '.join(map(str, wanted))}], got {list(x.shape)}")
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(tokens + self.pos_embed))[:, 0])
