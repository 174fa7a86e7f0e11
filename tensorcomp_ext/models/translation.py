"""An encoder-decoder transformer for translation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values, each with a linear layer of its own.

    nn.MultiheadAttention keeps the first three in one matrix and reads the weight of the fourth, neither of
    which factorised layers can take the place of; these are four layers that are called.

    Input queries [N, T, dim], memory [N, S, dim] and ``allowed``, a mask that broadcasts to [N, heads, T, S]
    (False: not looked at; None: everything), or ``causal``. Output [N, T, dim].
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        allowed: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [N, heads, tokens, dim / heads]

        y = F.scaled_dot_product_attention(
            heads(self.query(x)),
            heads(self.key(memory)),
            heads(self.value(memory)),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.out(y.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    """What encoder and decoder layers share: the feed-forward part, and norms behind the residuals."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, attentions: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(attentions + 1))
        self.dropout = nn.Dropout(dropout)
        self.attention = CrossAttention(dim, heads, dropout)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class EncoderLayer(_Layer):
    """Attention to the sentence itself, then two linear layers; each ``norm(x + f(x))``."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__(dim, heads, hidden, dropout, attentions=1)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, x, allowed)))
        return self.norms[1](x + self.dropout(self.feed_forward(x)))


class DecoderLayer(_Layer):
    """Attention to earlier tokens, to the encoded source, then two linear layers."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__(dim, heads, hidden, dropout, attentions=2)
        self.cross = CrossAttention(dim, heads, dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, x, causal=True)))
        x = self.norms[1](x + self.dropout(self.cross(x, memory, allowed)))
        return self.norms[2](x + self.dropout(self.feed_forward(x)))


class Translator(nn.Module):
    """Encoder and decoder with one embedding for both languages and a linear layer of its own behind.

    The defaults are those of the ℓ0 experiments on IWSLT'14: 65,130,496 parameters, of which 16,777,216 are
    the embedding. In a tensor-ring matrix of modes (32, 32, 32) x (8, 8, 8) and rank R that has 768 R²; with
    R = 32 the network has 49,139,712. Positions are sines without parameters; norms stand behind the
    residuals.

    Arguments:
        vocabulary: tokens of both languages.
        dim, heads, hidden: width of a token, attention heads, width between the two linear layers.
        layers: of the encoder, and of the decoder.
        dropout: of embedded tokens, attention and every residual.
        padding_idx: the token behind the end of shorter sentences; nothing attends to it.

    Input source [N, S] and target [N, T] of int64, the target beginning with the token of the begin; output
    logits [N, T, vocabulary] of the token that follows each.
    Raises ValueError for sizes below 1, heads that do not divide dim, an odd dim, a dropout outside [0, 1).
    Source: Vaswani et al. 2017.
    """

    def __init__(
        self,
        vocabulary: int = 32_768,
        *,
        dim: int = 512,
        heads: int = 4,
        hidden: int = 1024,
        layers: int = 6,
        dropout: float = 0.1,
        padding_idx: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "dim": dim, "heads": heads, "hidden": hidden, "layers": layers}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"Translator: {name} must be at least 1, got {value}")
        if dim % heads or dim % 2:
            raise ValueError(f"Translator: dim must be even and a multiple of heads = {heads}, got {dim}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"Translator: dropout must be in [0, 1), got {dropout}")
        self.padding_idx = padding_idx
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=padding_idx)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(dim, heads, hidden, dropout) for _ in range(layers))
        self.output = nn.Linear(dim, vocabulary)
        self.dropout = nn.Dropout(dropout)
        self.scale = math.sqrt(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            # Scaled by sqrt(dim) where it is read: there entries have variance 1.
            nn.init.normal_(self.embedding.weight, std=1 / self.scale)
            self.embedding.weight[padding_idx] = 0

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, allowed = self.encode(source)
        return self.output(self._decode(target, memory, allowed))

    def encode(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoded source [N, S, dim], and which of its places may be attended to [N, 1, 1, S]."""
        allowed = source != self.padding_idx
        if source.shape[1]:
            # A sentence of padding alone would leave nothing to attend to, and a softmax of nothing is NaN.
            allowed = allowed | (torch.arange(source.shape[1], device=source.device) == 0)
        x, allowed = self._embed(source), allowed[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, allowed)
        return x, allowed

    @torch.no_grad()
    def greedy(self, source: torch.Tensor, begin: int, end: int, max_length: int = 128) -> torch.Tensor:
        """The most probable token after the other: int64 [N, at most max_length], padded behind the end.

        The model's mode is the caller's business: dropout stays on in training mode. The decoder runs on all
        earlier tokens again at every step, so the cost grows with the square of the length.

        Arguments:
            source: int64 [N, S].
            begin, end: tokens that begin a translation (not returned) and end it.

        Raises ValueError for a max_length below 1.
        """
        if max_length < 1:
            raise ValueError(f"Translator.greedy: max_length must be at least 1, got {max_length}")
        memory, allowed = self.encode(source)
        tokens = source.new_full((source.shape[0], 1), begin)
        ended = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
        while tokens.shape[1] <= max_length and not bool(ended.all()):
            logits = self.output(self._decode(tokens, memory, allowed)[:, -1])  # [N, vocabulary]
            following = logits.argmax(1).masked_fill(ended, self.padding_idx)
            tokens = torch.cat([tokens, following[:, None]], dim=1)
            ended = ended | (following == end)
        return tokens[:, 1:]

    def _decode(self, target: torch.Tensor, memory: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = self._embed(target)
        for layer in self.decoder:
            x = layer(x, memory, allowed)
        return x

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.dim() != 2:
            raise ValueError(f"Translator: tokens must be [N, T], got {list(tokens.shape)}")
        x = self.embedding(tokens) * self.scale
        return self.dropout(x + positions(tokens.shape[1], x.shape[2], x.device).to(x.dtype))


def positions(count: int, dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Sines and cosines of wavelengths 2π to 20,000π: ``[p, 2i] = sin(p / 10000^(2i/dim))``, cosine behind.

    Returns float32 [count, dim] for an even dim.
    """
    place = torch.arange(count, device=device, dtype=torch.float32)
    even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    angle = torch.outer(place, torch.exp(even * (-math.log(10_000.0) / dim)))
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)
