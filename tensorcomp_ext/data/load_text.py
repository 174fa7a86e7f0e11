"""Text sets by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .lines import read_labelled, read_lines, read_parallel, words
from .packed import find, need
from .sequences import Sequences
from .text import SentenceDataset, TextDataset, TranslationDataset
from .vocabulary import Vocabulary

Text = SentenceDataset | TranslationDataset | TextDataset

_SENTIMENTS = ("very negative", "negative", "neutral", "positive", "very positive")
_TREC = ("description", "entity", "abbreviation", "human", "location", "number")
_SENTENCES: dict[str, tuple[str, ...]] = {
    "sst5": _SENTIMENTS,
    "sst2": ("negative", "positive"),
    "trec": _TREC,
}
_HELD_OUT_SEED = 2021
_HELD_OUT = 0.1


def load_text(
    name: str, root: str | Path, *, min_count: int = 1, max_size: int | None = None, test: str | None = None
) -> Text:
    """Read a text set from its files, with a vocabulary of the training text alone.

    ============================ ============================================ ================================
    name                         files                                        returned
    ============================ ============================================ ================================
    sst5, sst2, trec             NAME_train.txt, NAME_test.txt, NAME_dev.txt: SentenceDataset
                                 lines "label sentence", words split at blanks
    multi30k                     train.de, train.en, test_2016_flickr.de, ... TranslationDataset de -> en
    wikitext2, tinyshakespeare   wikitext2_train.txt, _valid; NAME.txt        TextDataset of words, characters
    ============================ ============================================ ================================

    Files may be packed (.gz, .xz).

    Arguments:
        root: folder that holds the files, or the one above a folder of the set's name.
        min_count, max_size: of the vocabulary; see `Vocabulary.build`.
        test: split to test with: "test" or "dev" of sentences ("valid" of wikitext2), a name such as
            "test_2016_flickr" or "val" of multi30k. None takes the first of these that is there; where there
            is none, a tenth of the training text is held out: of sentences at random with a fixed seed, of
            running text the end.

    Raises ValueError for an unknown name, and for files with other contents, naming file and line;
    FileNotFoundError where files are missing.
    Source: Socher et al. 2013 (SST); Li and Roth 2002 (TREC); Elliott et al. 2016 (Multi30k); Merity et al.
    2017 (WikiText).
    """
    if name not in text_names():
        raise ValueError(f"data.load_text: unknown text set {name!r}; known: {', '.join(text_names())}")
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"data.load_text: {name}: no folder {folder}")
    folder = folder / name if (folder / name).is_dir() else folder

    def vocabulary(sentences: list[list[str]]) -> Vocabulary:
        return Vocabulary.build(sentences, min_count=min_count, max_size=max_size)

    if name in _SENTENCES:
        return _sentences(name, folder, test, vocabulary)
    if name == "multi30k":
        return _multi30k(folder, test, vocabulary)
    return _running(name, folder, test, vocabulary)


def text_names() -> tuple[str, ...]:
    """The names `load_text` knows."""
    return (*_SENTENCES, "multi30k", "wikitext2", "tinyshakespeare")


Build = Callable[[list[list[str]]], Vocabulary]


def _sentences(name: str, folder: Path, test: str | None, build: Build) -> SentenceDataset:
    classes = _SENTENCES[name]
    labels, sentences = read_labelled(need(folder, f"{name}_train.txt", name), len(classes))
    split = _split(folder, name, test, ("test", "dev"))
    if split is None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_HELD_OUT_SEED)).tolist()
        held = sorted(order[: max(1, int(_HELD_OUT * len(labels)))])
        kept = sorted(set(order) - set(held))
        test_labels, test_sentences = [labels[i] for i in held], [sentences[i] for i in held]
        labels, sentences = [labels[i] for i in kept], [sentences[i] for i in kept]
    else:
        test_labels, test_sentences = read_labelled(need(folder, f"{name}_{split}.txt", name), len(classes))
    vocabulary = build(sentences)
    return SentenceDataset(
        name=name,
        train=Sequences.of(map(vocabulary.encode, sentences)),
        train_labels=torch.tensor(labels, dtype=torch.int64),
        test=Sequences.of(map(vocabulary.encode, test_sentences)),
        test_labels=torch.tensor(test_labels, dtype=torch.int64),
        vocabulary=vocabulary,
        classes=classes,
        tested=split or "held out of train",
    )


def _multi30k(folder: Path, test: str | None, build: Build) -> TranslationDataset:
    splits = ("test_2016_flickr", "val") if test is None else (test,)
    split = next((s for s in splits if find(folder, f"{s}.de")), splits[0])
    train, test_pairs = (
        read_parallel(*(need(folder, f"{part}.{language}", "multi30k") for language in ("de", "en")))
        for part in ("train", split)
    )
    train_words = [(words(source), words(target)) for source, target in train]
    vocabulary = build([sentence for pair in train_words for sentence in pair])

    def encoded(sentences: Iterable[list[str]]) -> Sequences:
        return Sequences.of(map(vocabulary.encode, sentences))

    return TranslationDataset(
        name="multi30k",
        train_source=encoded(source for source, _ in train_words),
        train_target=encoded(target for _, target in train_words),
        test_source=encoded(words(source) for source, _ in test_pairs),
        test_target=encoded(words(target) for _, target in test_pairs),
        references=tuple(target.lower() for _, target in test_pairs),
        vocabulary=vocabulary,
    )


def _running(name: str, folder: Path, test: str | None, build: Build) -> TextDataset:
    whole = name == "tinyshakespeare"
    split = _split(folder, name, test, () if whole else ("test", "valid"))
    if whole or (test is None and not find(folder, f"{name}_train.txt")):
        # WikiText's validation text alone is enough for small experiments.
        path = need(folder, f"{name}.txt" if whole else f"{name}_valid.txt", name)
        tokens = _tokens(path, characters=whole)
        cut = len(tokens) - max(1, int(_HELD_OUT * len(tokens)))
        training, testing = tokens[:cut], tokens[cut:]
    else:
        training = _tokens(need(folder, f"{name}_train.txt", name), characters=False)
        testing = _tokens(need(folder, f"{name}_{split or 'test'}.txt", name), characters=False)
    vocabulary = build([training])
    return TextDataset(
        name,
        torch.tensor(vocabulary.encode(training), dtype=torch.int64),
        torch.tensor(vocabulary.encode(testing), dtype=torch.int64),
        vocabulary,
    )


def _tokens(path: Path, characters: bool) -> list[str]:
    if characters:
        return list("\n".join(read_lines(path)) + "\n")
    # Line ends are tokens as of WikiText's publication.
    return [word for line in read_lines(path) for word in (*line.split(), "<eos>")]


def _split(folder: Path, name: str, asked: str | None, known: tuple[str, ...]) -> str | None:
    """The split to test with: the one asked for, or the first that has a file."""
    if asked is not None and asked not in known:
        raise ValueError(
            f"data.load_text: {name}: test must be one of {', '.join(known) or 'none'}, got {asked!r}"
        )
    return asked or next((split for split in known if find(folder, f"{name}_{split}.txt")), None)
