"""Embeddings under compress: replaced where ranks are given, left alone where results could change."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tensorcomp_ext import compress, load, save
from tensorcomp_ext.nn import FactorizedEmbedding, FactorizedEmbeddingBag


class Words(nn.Module):
    """A sentence classifier with an embedding, a bag and a tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 12, padding_idx=0)
        self.bag = nn.EmbeddingBag(60, 12, mode="sum")
        self.tied = nn.Embedding(30, 12)
        self.last = nn.Linear(12, 30, bias=False)
        self.last.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.words(x).mean(1) + self.bag(x) + self.tied(x % 30).sum(1))


def test_embeddings_are_replaced_and_loaded(tmp_path: Path) -> None:
    model, x = Words().eval(), torch.randint(0, 60, (8, 5))
    result = compress(model, rank={"words": 4, "bag": 10_000}, example_inputs=x, measure=True)
    assert isinstance(result.model.words, FactorizedEmbedding) and result.model.words.padding_idx == 0
    assert isinstance(result.model.bag, FactorizedEmbeddingBag) and result.model.bag.mode == "sum"
    assert result.report["words"].format == "ttm" and result.report["words"].macs_before == 0
    assert result.report["bag"].relative_error < 1e-5
    for name in ("tied", "last"):
        assert "its weight is shared with" in (result.report[name].skipped or "")
    save(result.model, tmp_path / "words")
    again = load(tmp_path / "words", Words().eval())
    assert torch.equal(again(x), result.model(x))


def test_what_has_no_factorized_form_stays() -> None:
    model = nn.ModuleDict(
        {
            "normed": nn.Embedding(9, 4, max_norm=1.0),
            "sparse": nn.Embedding(9, 4, sparse=True),
            "largest": nn.EmbeddingBag(9, 4, mode="max"),
            "plain": nn.Embedding(9, 4),
        }
    )
    report = compress(model, rank=0.5).report
    assert "max_norm=1.0" in (report["normed"].skipped or "")
    assert "sparse=True" in (report["sparse"].skipped or "")
    assert "mode 'max'" in (report["largest"].skipped or "")
    assert report["plain"].format == "ttm" and report["plain"].parameters_after <= 18


def test_rank_rules() -> None:
    model = nn.Sequential(nn.Embedding(120, 16), nn.Linear(16, 4))
    for rule in ("energy:0.9", "vbmf", "ratio:0.5"):
        report = compress(model, rank=rule).report
        assert report["0"].format == "ttm" or "would not get smaller" in (report["0"].skipped or ""), rule
