"""The linear layers of transformers: a block of a vision transformer, and the MLP of a language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ViTBlock(nn.Module):
    """One block of a vision transformer: attention, then an MLP, each behind a layer norm with a residual.

    The defaults are those of DeiT-S (Touvron et al. 2021): 1,774,464 parameters. Parameters are named as in
    timm's blocks, whose state dicts load.

    Arguments:
        dim: width of a token.
        heads: attention heads, a divisor of dim.
        hidden: width of the MLP; None takes four times dim.

    Input and output [N, tokens, dim]. 349 M MACs an image of 197 tokens in the linear layers.
    Raises ValueError where heads does not divide dim.
    """

    def __init__(self, dim: int = 384, heads: int = 6, hidden: int | None = None) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"ViTBlock: heads must divide dim = {dim}, got {heads}")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim if hidden is None else hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, N, heads, tokens, d]
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMLP(nn.Module):
    """The MLP of a language model: ``down(silu(gate(x)) * up(x))``, without biases (Shazeer 2020).

    The defaults are those of LLaMA 7B (Touvron et al. 2023): 135,266,304 parameters, as many MACs a token.

    Arguments:
        dim: width of a token.
        hidden: width between.

    Input and output [..., dim].
    """

    def __init__(self, dim: int = 4096, hidden: int = 11008) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
