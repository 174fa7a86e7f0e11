"""A small language model, and the reader of its published weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .weights import load_weights, read_tensor_file


class DecoderAttention(nn.Module):
    """Causal attention with rotated queries and keys, several heads of queries to one of keys and values."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        q = rotated(self.wq(x).unflatten(2, (self.heads, -1)).transpose(1, 2), cosine, sine)
        k = rotated(self.wk(x).unflatten(2, (self.kv_heads, -1)).transpose(1, 2), cosine, sine)
        v = self.wv(x).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        share = self.heads // self.kv_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [N, heads, T, width]
        return self.wo(y.transpose(1, 2).flatten(2))


class DecoderMLP(nn.Module):
    """``w2(silu(w1(x)) * w3(x))``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DecoderBlock(nn.Module):
    """Attention, then the MLP, each behind a norm with a residual."""

    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = DecoderAttention(dim, heads, kv_heads)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.feed_forward = DecoderMLP(dim, hidden)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    """A language model in the manner of LLaMA (Touvron et al. 2023), with the parameter names of llama2.c.

    RMS norms before attention and MLP, rotated positions in pairs of neighbours, grouped queries, gated MLP,
    no biases. The defaults are those of the weights trained on TinyStories: 260,032 parameters.

    Arguments:
        vocabulary: tokens.
        dim, hidden: width of a token, and within the MLP.
        layers, heads, kv_heads: blocks, heads of queries, and of keys and values (None: as many).
        tied: the logits' matrix is the embedding. Such an embedding stays dense under compression, as the
            matrix of a linear layer cannot be its factors; untied both can be factorised.

    Input int64 [N, T], output [N, T, vocabulary], the logits of the token that follows each.
    Raises ValueError for sizes below 1, heads that do not divide dim into even parts, kv_heads that do not
    divide heads.
    """

    def __init__(
        self,
        vocabulary: int = 512,
        *,
        dim: int = 64,
        hidden: int = 172,
        layers: int = 5,
        heads: int = 8,
        kv_heads: int | None = 4,
        tied: bool = True,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"vocabulary": vocabulary, "dim": dim, "hidden": hidden, "layers": layers, "heads": heads}
        for name, value in {**sizes, "kv_heads": kv_heads}.items():
            if value < 1:
                raise ValueError(f"Decoder: {name} must be at least 1, got {value}")
        if dim % (2 * heads):
            raise ValueError(f"Decoder: dim must be a multiple of 2 * heads = {2 * heads}, got {dim}")
        if heads % kv_heads:
            raise ValueError(f"Decoder: kv_heads must divide heads = {heads}, got {kv_heads}")
        self.width = dim // heads
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(DecoderBlock(dim, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.tok_embeddings.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.dim() != 2:
            raise ValueError(f"Decoder: tokens must be [N, T], got {list(tokens.shape)}")
        x = self.tok_embeddings(tokens)
        place = torch.arange(tokens.shape[1], device=x.device, dtype=torch.float32)
        even = torch.arange(0, self.width, 2, device=x.device, dtype=torch.float32)
        angle = torch.outer(place, 1 / 10_000 ** (even / self.width))  # [T, width / 2]
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.output(self.norm(x))


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours of [..., T, width] turned by angles [T, width / 2] (Su et al. 2021)."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cosine - b * sine, a * sine + b * cosine), dim=-1).flatten(-2)


def load_decoder(path: str | Path, heads: int = 8) -> Decoder:
    """A `Decoder` of the sizes and with the weights of a state dict under llama2.c's names.

    Sizes are read from the tensors; a file without "output.weight" is of a tied decoder. Read with
    weights_only=True.

    Arguments:
        heads: of queries, which no shape tells.

    Raises FileNotFoundError; ValueError for a file that is damaged or of another network, or where ``heads``
    does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_decoder: no file {path}")
    content = read_tensor_file(path)

    def shape(name: str) -> tuple[int, ...]:
        tensor = content.get(name)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            raise ValueError(f"load_decoder: {path} is for another network: no matrix {name}")
        return tuple(tensor.shape)

    vocabulary, dim = shape("tok_embeddings.weight")
    hidden, _ = shape("layers.0.feed_forward.w1.weight")
    numbers = {key.split(".")[1] for key in content if str(key).startswith("layers.")}
    if heads < 1 or dim % heads:
        raise ValueError(f"load_decoder: heads must divide dim = {dim} of {path}, got {heads}")
    model = Decoder(
        vocabulary,
        dim=dim,
        hidden=hidden,
        layers=len(numbers),
        heads=heads,
        kv_heads=shape("layers.0.attention.wk.weight")[0] // (dim // heads),
        tied="output.weight" not in content,
    )
    load_weights(model, path)
    return model
