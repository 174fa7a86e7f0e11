"""What the readers of text return: sentences with labels, pairs of translations, running text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .sequences import Sequences
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class SentenceDataset:
    """Sentences and their classes.

    Attributes:
        name: as given to `data.load_text`.
        train, test: the sentences' tokens.
        train_labels, test_labels: int64 [N], 0..len(classes) - 1.
        vocabulary: of the training sentences.
        classes: names of the classes.
        tested: which sentences ``test`` holds, such as "dev" where the official test split is not there.

    Raises ValueError where these do not fit together, or for tokens outside the vocabulary.
    """

    name: str
    train: Sequences
    train_labels: torch.Tensor
    test: Sequences
    test_labels: torch.Tensor
    vocabulary: Vocabulary
    classes: tuple[str, ...]
    tested: str = "test"

    def __post_init__(self) -> None:
        for split, rows, labels in (
            ("train", self.train, self.train_labels),
            ("test", self.test, self.test_labels),
        ):
            _check_tokens(self.name, split, rows.tokens, self.vocabulary)
            if labels.dtype != torch.int64 or labels.shape != (len(rows),):
                raise ValueError(
                    f"{self.name}: {split} labels must be int64 [{len(rows)}], "
                    f"got {labels.dtype} {list(labels.shape)}"
                )
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
                raise ValueError(
                    f"{self.name}: {split} labels must be in 0..{len(self.classes) - 1}, "
                    f"got {int(labels.min())}..{int(labels.max())}"
                )

    def first(self, train: int | None = None, test: int | None = None) -> SentenceDataset:
        """The first so many sentences of each split; None keeps all. The vocabulary stays."""
        kept_train = torch.arange(len(self.train))[:train]
        kept_test = torch.arange(len(self.test))[:test]
        return replace(
            self,
            train=self.train.select(kept_train),
            train_labels=self.train_labels[kept_train],
            test=self.test.select(kept_test),
            test_labels=self.test_labels[kept_test],
        )


@dataclass(frozen=True)
class TranslationDataset:
    """Sentences and their translations, with one vocabulary for both languages.

    Attributes:
        name: as given to `data.load_text`.
        train_source, train_target, test_source, test_target: tokens, without begin and end.
        references: the test translations as text, lower-cased, for BLEU.
        vocabulary: of both sides of the training pairs.

    Raises ValueError where the sides differ in number, or for tokens outside the vocabulary.
    """

    name: str
    train_source: Sequences
    train_target: Sequences
    test_source: Sequences
    test_target: Sequences
    references: tuple[str, ...]
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        for split, numbers in (
            ("train", {len(self.train_source), len(self.train_target)}),
            ("test", {len(self.test_source), len(self.test_target), len(self.references)}),
        ):
            if len(numbers) > 1:
                raise ValueError(f"{self.name}: {split} sides have different numbers of sentences: {numbers}")
        for side in ("train_source", "train_target", "test_source", "test_target"):
            rows: Sequences = getattr(self, side)
            _check_tokens(self.name, side, rows.tokens, self.vocabulary)

    def first(self, train: int | None = None, test: int | None = None) -> TranslationDataset:
        """The first so many pairs of each split; None keeps all. The vocabulary stays."""
        kept_train = torch.arange(len(self.train_source))[:train]
        kept_test = torch.arange(len(self.test_source))[:test]
        return replace(
            self,
            train_source=self.train_source.select(kept_train),
            train_target=self.train_target.select(kept_train),
            test_source=self.test_source.select(kept_test),
            test_target=self.test_target.select(kept_test),
            references=self.references[:test],
        )


@dataclass(frozen=True)
class TextDataset:
    """Running text for language models.

    Attributes:
        name: as given to `data.load_text`.
        train, test: int64 [tokens].
        vocabulary: of the training text.

    Raises ValueError for other tensors, or tokens outside the vocabulary.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        for split, tokens in (("train", self.train), ("test", self.test)):
            if tokens.dtype != torch.int64 or tokens.dim() != 1:
                raise ValueError(
                    f"{self.name}: {split} must be int64 [tokens], got {tokens.dtype} {list(tokens.shape)}"
                )
            _check_tokens(self.name, split, tokens, self.vocabulary)


def _check_tokens(name: str, split: str, tokens: torch.Tensor, vocabulary: Vocabulary) -> None:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(vocabulary):
        raise ValueError(
            f"{name}: {split} tokens must be in 0..{len(vocabulary) - 1}, "
            f"got {int(tokens.min())}..{int(tokens.max())}"
        )
