"""What networks for text are trained for: classes of sentences, translations, the next token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorcomp_ext.data import SentenceDataset, Sequences, TextDataset, TranslationDataset, batches_by_length
from tensorcomp_ext.data.vocabulary import BEGIN, END, PAD
from tensorcomp_ext.plan.modes import evaluating

from .checkpoint import checksum
from .evaluate import Accuracy, check_classes, device_of, sent
from .options import check_known
from .task import Batch, Task


class SentenceTask(Task):
    """Sentences to classes: mean cross-entropy.

    The network is called with tokens int64 [N, T], padded to the longest of the batch, and lengths [N], which
    stay on the CPU, where recurrent kernels read them; it answers logits [N, classes].

    Args:
        dataset: training sentences are learned from, test sentences evaluated.
        label_smoothing: weight of the uniform distribution in the targets, 0..1.
        test_batch: sentences of nearly one length evaluated at a time.

    Evaluation also gives "test_loss", the mean cross-entropy without smoothing.

    Raises:
        ValueError: a label_smoothing outside [0, 1], a test_batch below 1; no test sentences to evaluate.
    """

    def __init__(
        self, dataset: SentenceDataset, *, label_smoothing: float = 0.0, test_batch: int = 256
    ) -> None:
        _check("SentenceTask", label_smoothing, test_batch=test_batch)
        self.name = dataset.name
        self.dataset = dataset
        self.label_smoothing, self.test_batch = label_smoothing, test_batch

    @property
    def size(self) -> int:
        return len(self.dataset.train)

    @property
    def test_size(self) -> int:
        return len(self.dataset.test)

    def batch(self, indices: Tensor, generator: torch.Generator, device: torch.device) -> Batch:
        tokens, lengths = self.dataset.train.padded(indices, PAD)
        return Batch((sent(tokens, device), lengths), sent(self.dataset.train_labels[indices], device))

    def trial(self) -> Tensor:
        return torch.tensor([_with_largest(self.dataset.train)])

    def check(self, name: str, model: nn.Module) -> None:
        answers, _ = self.tried(name, model)
        check_classes(
            name, answers, torch.cat([self.dataset.train_labels, self.dataset.test_labels]), self.name
        )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing)

    def count(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        correct = (outputs.detach().argmax(1) == labels).sum()
        return correct, labels.new_full((), len(labels))

    def evaluate(self, model: nn.Module) -> tuple[Accuracy, dict[str, float]]:
        data, device = self.dataset, device_of(model)
        _need_tests(self)
        sums = _Sums(device)
        with _inference(model):
            for part in batches_by_length(data.test.lengths, size=self.test_batch):
                tokens, lengths = data.test.padded(part, PAD)
                sums.add(model(sent(tokens, device), lengths), sent(data.test_labels[part], device))
        return sums.accuracy(), {"test_loss": sums.loss()}

    def settings(self) -> dict[str, Any]:
        rows = self.dataset.train
        return {
            "dataset": self.name,
            "sentences": self.size,
            "vocabulary": len(self.dataset.vocabulary),
            "label_smoothing": self.label_smoothing,
            "fingerprint": checksum(rows.tokens, rows.offsets, self.dataset.train_labels),
        }


class TranslationTask(Task):
    """Sentences to their translations: mean cross-entropy of every token given the ones before it.

    The network is called with source [N, S], which ends with the token of the end, and target [N, T], which
    begins with that of the begin, both int64 and padded; it answers logits [N, T, vocabulary].

    Args:
        dataset: training pairs are learned from, test pairs evaluated.
        label_smoothing: weight of the uniform distribution in the targets, 0..1.
        max_length: training pairs with more words on either side are left out; longest translation.
        tokens: None: an example is a pair, and a batch pads pairs of any lengths. Else an example is a group
            of pairs of nearly one length with at most so many tokens a side, to be trained with batch_size=1.
        bleu: translate the test sentences greedily and give their "bleu", lower-cased, by sacrebleu; None
            does where it is installed and the network has ``greedy``.
        test_batch: pairs of nearly one length evaluated at a time.

    What is right is counted by token, on the true earlier ones. Evaluation also gives "test_loss", without
    smoothing.

    Raises:
        ValueError: options out of range, no training pair that is short enough, no test pairs to evaluate.
        ModuleNotFoundError: bleu asked for without sacrebleu.
    """

    def __init__(
        self,
        dataset: TranslationDataset,
        *,
        label_smoothing: float = 0.1,
        max_length: int = 128,
        tokens: int | None = None,
        bleu: bool | None = None,
        test_batch: int = 100,
    ) -> None:
        _check("TranslationTask", label_smoothing, max_length=max_length, test_batch=test_batch)
        if tokens is not None:
            _check("TranslationTask", label_smoothing, tokens=tokens)
        if bleu and find_spec("sacrebleu") is None:
            raise ModuleNotFoundError("TranslationTask: bleu=True needs sacrebleu: pip install sacrebleu")
        self.name = dataset.name
        self.dataset = dataset
        self.label_smoothing, self.max_length, self.tokens = label_smoothing, max_length, tokens
        self.bleu, self.test_batch = bleu, test_batch
        longer = torch.maximum(dataset.train_source.lengths, dataset.train_target.lengths)
        kept = (longer <= max_length).nonzero()[:, 0]
        if not len(kept):
            raise ValueError(f"TranslationTask: {self.name} has no pair of at most max_length = {max_length}")
        self.pairs = len(kept)
        # One token more: that of the begin or the end.
        groups = batches_by_length(longer[kept] + 1, tokens=tokens) if tokens else kept[:, None]
        self._groups = [kept[group] for group in groups] if tokens else list(groups)

    @property
    def size(self) -> int:
        return len(self._groups)

    @property
    def test_size(self) -> int:
        return len(self.dataset.test_source)

    def batch(self, indices: Tensor, generator: torch.Generator, device: torch.device) -> Batch:
        pairs = torch.cat([self._groups[index] for index in indices.tolist()])
        data = self.dataset
        return _translations(data.train_source, data.train_target, pairs, device)

    def trial(self) -> Tensor:
        pairs = torch.cat(self._groups)
        ends = torch.tensor([len(group) for group in self._groups]).cumsum(0)
        sides = (self.dataset.train_source, self.dataset.train_target)
        places = torch.tensor([_with_largest(rows.select(pairs)) for rows in sides])
        return torch.searchsorted(ends, places, right=True)

    def check(self, name: str, model: nn.Module) -> None:
        check_classes(name, *self.tried(name, model), self.name)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            outputs.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=self.label_smoothing
        )

    def count(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        asked = self.asked(labels)
        return ((outputs.detach().argmax(2) == labels) & asked).sum(), asked.sum()

    def asked(self, labels: Tensor) -> Tensor:
        return labels != PAD

    def evaluate(self, model: nn.Module) -> tuple[Accuracy, dict[str, float]]:
        data, device = self.dataset, device_of(model)
        _need_tests(self)
        sums = _Sums(device)
        with _inference(model):
            for part in self._test_parts():
                inputs, labels = _translations(data.test_source, data.test_target, part, device)
                asked = self.asked(labels)
                sums.add(model(*inputs)[asked], labels[asked])
        figures = {"test_loss": sums.loss()}
        greedy = getattr(model, "greedy", None)
        able = greedy is not None and find_spec("sacrebleu") is not None
        if self.bleu or (self.bleu is None and able):
            import sacrebleu

            found = sacrebleu.corpus_bleu(self.translate(model), [list(data.references)], lowercase=True)
            figures["bleu"] = float(found.score)
        return sums.accuracy(), figures

    def translate(self, model: nn.Module) -> list[str]:
        """The test sentences in the other language, greedily, as words between blanks.

        Raises:
            TypeError: a network without ``greedy(source, begin, end, max_length)``.
        """
        greedy: Any = getattr(model, "greedy", None)
        if greedy is None:
            raise TypeError(f"TranslationTask: {type(model).__name__} has no method greedy to translate with")
        device, found = device_of(model), [""] * len(self.dataset.test_source)
        with _inference(model):
            for part in self._test_parts():
                source = sent(_ended(self.dataset.test_source, part), device)
                for place, row in zip(
                    part.tolist(), greedy(source, BEGIN, END, self.max_length), strict=True
                ):
                    found[place] = " ".join(self.dataset.vocabulary.decode(row.tolist()))
        return found

    def _test_parts(self) -> list[Tensor]:
        return batches_by_length(self.dataset.test_source.lengths, size=self.test_batch)

    def settings(self) -> dict[str, Any]:
        source, target = self.dataset.train_source, self.dataset.train_target
        return {
            "dataset": self.name,
            "pairs": self.pairs,
            "vocabulary": len(self.dataset.vocabulary),
            "label_smoothing": self.label_smoothing,
            "max_length": self.max_length,
            "tokens": self.tokens,
            "fingerprint": checksum(source.tokens, source.offsets, target.tokens, target.offsets),
        }


class LanguageTask(Task):
    """Running text to its next tokens: mean cross-entropy.

    The network is called with int64 [N, window] and answers logits [N, window, vocabulary].

    Args:
        dataset: the training text is learned from in windows one behind another, an incomplete last one left
            out; the test text is evaluated in such windows, its last one included.
        window: tokens the network sees at a time.
        test_batch: windows evaluated at a time.

    What is right is counted by token. Evaluation also gives "test_loss" in nats a token and "perplexity", its
    exponential.

    Raises:
        ValueError: options below 1, a training text shorter than a window and a token.
    """

    def __init__(self, dataset: TextDataset, *, window: int = 256, test_batch: int = 16) -> None:
        _check("LanguageTask", 0.0, window=window, test_batch=test_batch)
        if len(dataset.train) <= window:
            raise ValueError(
                f"LanguageTask: window must be below the {len(dataset.train)} training tokens of "
                f"{dataset.name}, got {window}"
            )
        self.name = dataset.name
        self.dataset = dataset
        self.window, self.test_batch = window, test_batch

    @property
    def size(self) -> int:
        return (len(self.dataset.train) - 1) // self.window

    @property
    def test_size(self) -> int:
        return max(0, len(self.dataset.test) - 1)

    def batch(self, indices: Tensor, generator: torch.Generator, device: torch.device) -> Batch:
        places = indices[:, None] * self.window + torch.arange(self.window + 1)
        tokens = sent(self.dataset.train[places], device)  # [N, window + 1]
        return Batch((tokens[:, :-1],), tokens[:, 1:])

    def trial(self) -> Tensor:
        place = int(self.dataset.train[: self.size * self.window + 1].argmax())
        return torch.tensor([min(place // self.window, self.size - 1)])

    def check(self, name: str, model: nn.Module) -> None:
        check_classes(name, *self.tried(name, model), self.name)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    def count(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        correct = (outputs.detach().argmax(2) == labels).sum()
        return correct, labels.new_full((), labels.numel())

    def evaluate(self, model: nn.Module) -> tuple[Accuracy, dict[str, float]]:
        text, device = self.dataset.test, device_of(model)
        _need_tests(self)
        whole = (len(text) - 1) // self.window * self.window
        rows = text[:whole].view(-1, self.window), text[1 : whole + 1].view(-1, self.window)
        parts = list(zip(*(row.split(self.test_batch) for row in rows), strict=True)) if whole else []
        if whole < len(text) - 1:
            parts.append((text[None, whole:-1], text[None, whole + 1 :]))
        sums = _Sums(device)
        with _inference(model):
            for tokens, labels in parts:
                sums.add(model(sent(tokens, device)).flatten(0, 1), sent(labels, device).flatten())
        return sums.accuracy(), {"test_loss": sums.loss(), "perplexity": math.exp(min(sums.loss(), 700.0))}

    def settings(self) -> dict[str, Any]:
        return {
            "dataset": self.name,
            "tokens": len(self.dataset.train),
            "vocabulary": len(self.dataset.vocabulary),
            "window": self.window,
            "fingerprint": checksum(self.dataset.train),
        }


class _Sums:
    """Right answers and losses of a test split."""

    def __init__(self, device: torch.device) -> None:
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.total = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits [answers, classes] and labels [answers]."""
        self.correct += (logits.argmax(1) == labels).sum()
        self.nats += F.cross_entropy(logits.float(), labels, reduction="sum")
        self.total += len(labels)

    def accuracy(self) -> Accuracy:
        return Accuracy(int(self.correct), self.total)

    def loss(self) -> float:
        return float(self.nats) / self.total


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd; the training modes come back afterwards."""
    with evaluating(model), torch.inference_mode():
        yield


def _with_largest(rows: Sequences) -> int:
    """The number of a sequence with the largest token there is."""
    if not len(rows.tokens):
        return 0
    return int(torch.searchsorted(rows.offsets, int(rows.tokens.argmax()), right=True)) - 1


def _ended(rows: Sequences, indices: Tensor) -> Tensor:
    """Rows of those numbers, each with the token of the end behind it, padded: [B, longest + 1]."""
    tokens, lengths = rows.padded(indices, PAD)
    tokens = F.pad(tokens, (0, 1), value=PAD)
    tokens[torch.arange(len(tokens)), lengths] = END
    return tokens


def _translations(source: Sequences, target: Sequences, pairs: Tensor, device: torch.device) -> Batch:
    labels = _ended(target, pairs)
    given = F.pad(target.padded(pairs, PAD)[0], (1, 0), value=BEGIN)  # each token is asked for the next one
    return Batch((sent(_ended(source, pairs), device), sent(given, device)), sent(labels, device))


def _check(name: str, label_smoothing: float, **numbers: int) -> None:
    check_known(name, "label_smoothing", label_smoothing)
    for option, value in numbers.items():
        if type(value) is not int:
            raise TypeError(f"{name}: {option} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name}: {option} must be at least 1, got {value}")


def _need_tests(task: Task) -> None:
    if not task.test_size:
        raise ValueError(f"evaluate: {task.name} has nothing to test with")
