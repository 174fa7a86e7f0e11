"""Small networks on real text, where it is: a few steps lower the loss."""

import pytest
import torch

from tensorcomp_ext import data, models, recipes
from tensorcomp_ext.nn import FactorizedEmbedding


@pytest.fixture(scope="module")
def folder(data_dir):
    path = data_dir / "text"
    if not path.is_dir():
        pytest.skip(f"no folder {path}; name the folder above it in TENSORCOMP_DATA")
    return path


def read(name, folder, **options):
    try:
        return data.load_text(name, folder, **options)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("factorized", [False, True])
def test_translator_on_multi30k(folder, factorized):
    torch.manual_seed(0)
    pairs = read("multi30k", folder, min_count=40).first(train=500, test=16)
    model = models.Translator(len(pairs.vocabulary), dim=64, heads=4, hidden=96, layers=1)
    if factorized:
        modes = {"in_modes": (4, 4, 4), "out_modes": (12, 12, 12)}
        model.embedding = FactorizedEmbedding(
            len(pairs.vocabulary), 64, 0, format="tr_matrix", rank=8, **modes
        )
    task = recipes.TranslationTask(pairs, tokens=512, bleu=False)
    _, before = task.evaluate(model)
    history = recipes.train(model, task, epochs=4, lr=3e-3, batch_size=1, optimizer="adam", warmup=10).history
    accuracy, after = task.evaluate(model)
    assert history[-1].loss < history[0].loss - 0.5 and after["test_loss"] < before["test_loss"] - 1.0
    assert accuracy.fraction > 0.1
    translated = task.translate(model)
    assert len(translated) == 16 and all(isinstance(line, str) for line in translated)


@pytest.mark.parametrize("name", ["tinyshakespeare", "wikitext2"])
def test_decoder_on_running_text(folder, name):
    torch.manual_seed(0)
    whole = read(name, folder, min_count=3)
    text = data.TextDataset(name, whole.train[:12_000], whole.test[:1_000], whole.vocabulary)
    model = models.Decoder(len(text.vocabulary), dim=32, hidden=48, layers=1, heads=2, kv_heads=1, tied=False)
    task = recipes.LanguageTask(text, window=64)
    before = task.evaluate(model)[1]["perplexity"]
    assert before == pytest.approx(len(text.vocabulary), rel=0.1)
    recipes.train(model, task, epochs=2, lr=5e-3, batch_size=8, optimizer="adam")
    assert task.evaluate(model)[1]["perplexity"] < 0.6 * before
