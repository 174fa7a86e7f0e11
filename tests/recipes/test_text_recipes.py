"""Recipes of rank selection on the tables of networks for text: they train, cut, and keep padding."""

import pytest
import torch
from small_texts import sentences, text, translations

from tensorcomp_ext import load, models, recipes, save
from tensorcomp_ext.nn import FactorizedEmbedding

CASES = {
    "sentences": (
        lambda: models.SentimentLSTM(30, 4, dim=16, hidden=8, dropout=0.1),
        lambda: recipes.SentenceTask(sentences()),
        "embedding",
    ),
    "translations": (
        lambda: models.Translator(30, dim=16, heads=2, hidden=24, layers=1, dropout=0.0),
        lambda: recipes.TranslationTask(translations(), bleu=False),
        "embedding",
    ),
    "text": (
        lambda: models.Decoder(30, dim=16, hidden=24, layers=1, heads=2, kv_heads=1, tied=False),
        lambda: recipes.LanguageTask(text(), window=10),
        "tok_embeddings",
    ),
}
TRAINING = {"epochs": 4, "lr": 1e-2, "batch_size": 8, "optimizer": "adam"}


@pytest.mark.parametrize("format", ["ttm", "tr_matrix"])
@pytest.mark.parametrize("name", CASES)
def test_gates_on_tables(name, format, tmp_path):
    make, task, layer = (CASES[name][0], CASES[name][1](), CASES[name][2])
    torch.manual_seed(0)
    dense = make()
    given = {"rank": 6, "format": format, "layers": layer, "weight": 0.5, "gate_lr": 20.0}
    model, report, history = recipes.l0(dense, task, **given, **TRAINING)
    table = model.get_submodule(layer)
    assert isinstance(table, FactorizedEmbedding) and type(dense.get_submodule(layer)) is torch.nn.Embedding
    # Not all gates can hold against a penalty this heavy, and none of the ranks may fall to 0.
    before = report.details["l0"]["ranks_before"][layer]
    assert sum(table.rank) < sum(before) and min(table.rank) >= 1
    assert report[layer].parameters_after == sum(p.numel() for p in table.parameters())
    # What the loop counted last is what the folded network answers.
    assert history[-1].loss < history[0].loss
    inputs, _ = task.batch(torch.arange(4), torch.Generator(), torch.device("cpu"))
    if table.padding_idx is not None:
        assert not bool(table(torch.tensor([table.padding_idx])).any())
    model.eval()
    save(model, tmp_path / "net")
    torch.manual_seed(0)
    again = load(tmp_path / "net", make()).eval()
    assert torch.equal(again(*inputs), model(*inputs))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recipe", ["uniform", "mars", "reinforce"])
def test_other_recipes_run(name, recipe):
    make, task, layer = (CASES[name][0], CASES[name][1](), CASES[name][2])
    torch.manual_seed(0)
    model, report, history = getattr(recipes, recipe)(
        make(), task, rank=4, format="ttm", layers=layer, **{**TRAINING, "epochs": 1}
    )
    assert [entry.name for entry in report.replaced] == [layer] and len(history) == 1
    accuracy, _ = task.evaluate(model)
    assert accuracy.total > 0


def test_lowrank_sparse_translator():
    """All linear layers but the last; the loss of tokens, padding left out, beside that of the teacher."""
    make, task, _ = CASES["translations"]
    torch.manual_seed(0)
    result = recipes.lowrank_sparse(make(), task(), sparsity=0.5, **TRAINING)
    assert len(result.report.replaced) == 16
    assert result.history[-1].loss < result.history[0].loss
