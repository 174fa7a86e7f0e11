"""Tasks of text: batches, padding, counts, evaluation; networks learn them, dense and compressed."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_texts import WORDS, sentences, text, translations
from torch import nn

from tensorcomp_ext import compress, models
from tensorcomp_ext.data import Sequences, TextDataset
from tensorcomp_ext.nn import FactorizedEmbedding
from tensorcomp_ext.recipes import LanguageTask, SentenceTask, TranslationTask, text_tasks, train

CPU = torch.device("cpu")


def drawn(task, *indices):
    return task.batch(torch.tensor(indices), torch.Generator(), CPU)


def row(sequences, index):
    return sequences.padded(torch.tensor([index]))[0][0].tolist()


def test_batches_of_sentences():
    data = sentences()
    task = SentenceTask(data)
    (tokens, lengths), labels = drawn(task, 5, 2, 5)
    assert lengths.tolist() == [len(row(data.train, i)) for i in (5, 2, 5)] and labels.tolist() == [1, 2, 1]
    for found, length, index in zip(tokens.tolist(), lengths.tolist(), (5, 2, 5), strict=True):
        assert found == row(data.train, index) + [0] * (max(lengths) - length)
    assert task.size == 96 and task.settings()["vocabulary"] == 30


class Fixed(nn.Module):
    """Answers that depend on the first tokens alone."""

    def __init__(self, classes):
        super().__init__()
        self.table = nn.Embedding(30, classes)

    def forward(self, tokens, *others):
        return self.table(tokens if not others or others[0].dim() == 2 else tokens[:, 0])


def test_evaluation_of_sentences_is_that_of_each_alone():
    data, model = sentences(), Fixed(4)
    answers = torch.cat([model(torch.tensor([row(data.test, i)]), torch.tensor([1])) for i in range(32)])
    expected = int((answers.argmax(1) == data.test_labels).sum())
    model.train()
    accuracy, figures = SentenceTask(data, test_batch=5).evaluate(model)
    assert tuple(accuracy) == (expected, 32) and model.training
    assert figures["test_loss"] == pytest.approx(F.cross_entropy(answers, data.test_labels).item(), rel=1e-5)


def test_batches_of_translations():
    data = translations()
    task = TranslationTask(data)
    (source, target), labels = drawn(task, 3, 0)
    for place, index in enumerate((3, 0)):
        words, translated = row(data.train_source, index), row(data.train_target, index)
        width = source.shape[1]
        assert source[place].tolist() == [*words, 3] + [0] * (width - len(words) - 1)
        assert target[place].tolist() == [2, *translated] + [0] * (width - len(words) - 1)
        assert labels[place].tolist() == [*translated, 3] + [0] * (width - len(words) - 1)


def test_groups_of_translations_keep_to_the_budget():
    data = translations()
    task = TranslationTask(data, tokens=24)
    assert task.size < 96
    seen = []
    for index in range(task.size):
        (source, target), _ = drawn(task, index)
        assert source.shape == target.shape and source.numel() <= 24
        seen += [tuple(r[r > 3].tolist()) for r in source]
    assert sorted(seen) == sorted(tuple(row(data.train_source, i)) for i in range(96))


def test_long_pairs_are_left_out():
    data = translations()
    short = int((data.train_source.lengths <= 3).sum())
    task = TranslationTask(data, max_length=3)
    assert task.pairs == task.size == short < 96
    assert drawn(task, *range(short)).inputs[0].shape[1] == 4
    with pytest.raises(ValueError, match="no pair of at most max_length = 3"):
        TranslationTask(
            data.__class__(**{**data.__dict__, "train_source": Sequences.of([[4] * 9] * 96)}), max_length=3
        )


def test_padding_takes_no_part_in_loss_and_counts():
    task = TranslationTask(translations(), label_smoothing=0.1)
    labels = drawn(task, 3, 0, 7).labels
    outputs = torch.randn(*labels.shape, 30)
    real = labels != 0
    expected = F.cross_entropy(outputs[real], labels[real], label_smoothing=0.1)
    torch.testing.assert_close(task.loss(outputs, labels), expected)
    by_hand = -outputs[real].log_softmax(1)
    by_hand = 0.9 * by_hand.gather(1, labels[real][:, None])[:, 0] + 0.1 * by_hand.mean(1)
    torch.testing.assert_close(task.loss(outputs, labels), by_hand.mean())
    correct, counted = task.count(outputs, labels)
    assert int(counted) == int(real.sum())
    assert int(correct) == int((outputs.argmax(2) == labels)[real].sum())


def test_evaluation_of_translations(monkeypatch):
    data = translations()

    class Model(Fixed):
        def forward(self, source, target):
            return self.table(target)

        def greedy(self, source, begin, end, max_length):
            assert (begin, end, max_length) == (2, 3, 128) and not self.training
            return (source + 11).masked_fill(source == 3, 3).masked_fill(source == 0, 0)

    model, asked = Model(30), []

    def corpus_bleu(found, references, lowercase):
        asked.append((found, references))
        return SimpleNamespace(score=12.5)

    monkeypatch.setitem(sys.modules, "sacrebleu", SimpleNamespace(corpus_bleu=corpus_bleu))
    monkeypatch.setattr(text_tasks, "find_spec", lambda name: object())
    accuracy, figures = TranslationTask(data, test_batch=3).evaluate(model.train())
    tokens = int((data.test_target.lengths + 1).sum())
    correct, nats = 0, 0.0
    for i in range(8):
        given, labels = (
            torch.tensor([2, *row(data.test_target, i)]),
            torch.tensor([*row(data.test_target, i), 3]),
        )
        correct += int((model.table(given).argmax(1) == labels).sum())
        nats += F.cross_entropy(model.table(given), labels, reduction="sum").item()
    assert tuple(accuracy) == (correct, tokens)
    assert figures == {"test_loss": pytest.approx(nats / tokens, rel=1e-5), "bleu": 12.5}
    # Sentences come in the order of the references, whatever order they were translated in.
    assert asked == [(list(data.references), [list(data.references)])]
    assert "bleu" not in TranslationTask(data, bleu=False).evaluate(model)[1]
    monkeypatch.setattr(text_tasks, "find_spec", lambda name: None)
    assert "bleu" not in TranslationTask(data).evaluate(model)[1]
    with pytest.raises(ModuleNotFoundError, match="needs sacrebleu: pip install sacrebleu"):
        TranslationTask(data, bleu=True)
    with pytest.raises(TypeError, match="Fixed has no method greedy"):
        TranslationTask(data).translate(Fixed(30))


def test_real_bleu_of_perfect_translations():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")

    class Perfect(Fixed):
        def forward(self, source, target):
            return self.table(target)

        def greedy(self, source, begin, end, max_length):
            return (source + 11).masked_fill(source == 3, 3).masked_fill(source == 0, 0)

    assert TranslationTask(translations(test=40)).evaluate(Perfect(30))[1]["bleu"] == pytest.approx(100.0)


def test_windows_of_text():
    task = LanguageTask(text(train=601), window=7)
    assert task.size == 85
    (tokens,), labels = drawn(task, 0, 84)
    words = text(train=601).train
    assert torch.equal(tokens, torch.stack([words[:7], words[588:595]]))
    assert torch.equal(labels, torch.stack([words[1:8], words[589:596]]))


@pytest.mark.parametrize("window", [1, 7, 10, 100, 300])
def test_perplexity_counts_every_token_once(window):
    data, model = text(), Fixed(30)
    accuracy, figures = LanguageTask(data, window=window, test_batch=3).evaluate(model)
    logits, labels = model.table(data.test[:-1]), data.test[1:]
    loss = F.cross_entropy(logits, labels).item()
    assert accuracy.total == 100 and accuracy.correct == int((logits.argmax(1) == labels).sum())
    assert figures["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def sentence_case():
    return models.SentimentLSTM(30, 4, dim=16, hidden=8, dropout=0.1), SentenceTask(sentences()), "embedding"


def translation_case():
    model = models.Translator(30, dim=16, heads=2, hidden=24, layers=1, dropout=0.0)
    return model, TranslationTask(translations(), bleu=False), "embedding"


def language_case():
    model = models.Decoder(30, dim=16, hidden=24, layers=1, heads=2, kv_heads=1, tied=False)
    return model, LanguageTask(text(), window=10), "tok_embeddings"


CASES = {"sentences": sentence_case, "translations": translation_case, "text": language_case}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["dense", "ttm", "tr_matrix", "compressed"])
def test_networks_learn(name, kind):
    torch.manual_seed(0)
    model, task, layer = CASES[name]()
    if kind == "compressed":
        model = compress(model, "ttm", rank=8, layers=layer).model
    elif kind != "dense":
        padding = model.get_submodule(layer).padding_idx
        setattr(model, layer, FactorizedEmbedding(30, 16, padding, format=kind, rank=6))
    before, _ = task.evaluate(model)
    history = train(model, task, epochs=8, lr=1e-2, batch_size=16, optimizer="adam", weight_decay=0.0).history
    after, figures = task.evaluate(model)
    assert history[-1].loss < 0.7 * history[0].loss
    assert after.fraction > before.fraction + 0.15 and math.isfinite(figures["test_loss"])
    if name == "text":
        assert figures["perplexity"] < 5  # of 30 tokens


def test_resumed_bit_by_bit(tmp_path):
    def run(epochs, checkpoint=None):
        torch.manual_seed(0)
        model, task, _ = sentence_case()
        given = {"lr": 1e-2, "batch_size": 16, "optimizer": "adam", "schedule": "constant"}
        return train(model, task, epochs=2, checkpoint=checkpoint, progress=epochs, **given)

    whole = run(None)

    def stop(state):
        if state.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop, tmp_path / "run.pt")
    resumed = run(None, tmp_path / "run.pt")
    assert [e.loss for e in resumed.history] == [e.loss for e in whole.history]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SentenceTask(sentences(), label_smoothing=1.5),
            r"label_smoothing must be in \[0, 1\], got 1.5",
        ),
        (lambda: SentenceTask(sentences(), test_batch=0), "SentenceTask: test_batch must be at least 1"),
        (
            lambda: TranslationTask(translations(), tokens=0),
            "TranslationTask: tokens must be at least 1, got 0",
        ),
        (lambda: LanguageTask(text(), window=0), "window must be at least 1"),
        (lambda: LanguageTask(text(train=10), window=10), "window must be below the 10 training tokens"),
        (
            lambda: LanguageTask(
                TextDataset("t", torch.arange(4, 9), torch.tensor([4]), WORDS), window=2
            ).evaluate(Fixed(30)),
            "t has nothing to test with",
        ),
        (lambda: SentenceTask(sentences().first(test=0)).evaluate(Fixed(4)), "has nothing to test with"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
