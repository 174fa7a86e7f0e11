"""Text small enough to train on in a second."""

import torch

from tensorcomp_ext.data import SentenceDataset, Sequences, TextDataset, TranslationDataset, Vocabulary

WORDS = Vocabulary(f"w{i}" for i in range(26))  # 30 tokens with the special ones


def sentences(train=96, test=32, seed=0):
    """The class is that of the one telling word in each sentence: 4..7 among tokens from 8 on."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(train + test) % 4
    rows = []
    for label in labels.tolist():
        length = int(torch.randint(2, 8, (), generator=generator))
        row = torch.randint(8, 30, (length,), generator=generator)
        row[int(torch.randint(length, (), generator=generator))] = 4 + label
        rows.append(row.tolist())
    return SentenceDataset(
        "telling words",
        Sequences.of(rows[:train]),
        labels[:train],
        Sequences.of(rows[train:]),
        labels[train:],
        WORDS,
        ("a", "b", "c", "d"),
    )


def translations(train=96, test=8, seed=0):
    """Every word has one translation, 11 tokens on."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(4, 15, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
        for _ in range(train + test)
    ]
    source, target = ([(row + shift).tolist() for row in rows] for shift in (0, 11))
    return TranslationDataset(
        "shifted words",
        Sequences.of(source[:train]),
        Sequences.of(target[:train]),
        Sequences.of(source[train:]),
        Sequences.of(target[train:]),
        tuple(" ".join(WORDS.decode(row)) for row in target[train:]),
        WORDS,
    )


def text(train=600, test=101):
    """Five words over and over."""
    tokens = torch.arange(train + test) % 5 + 4
    return TextDataset("five words", tokens[:train], tokens[train:], WORDS)
