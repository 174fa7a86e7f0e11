"""Words as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
"""The tokens in front of every vocabulary's words, by number."""


class Vocabulary:
    """Words and their numbers, behind those of padding, unknown words, begin and end of a sentence.

    Arguments:
        words: in the order of their numbers, from 4 on.

    Raises ValueError for a word that is there twice or looks like a special token.

    >>> vocabulary = Vocabulary.build([["a", "b", "a"], ["c", "a", "b"]], min_count=2)
    >>> len(vocabulary), vocabulary.encode(["b", "c"])
    (6, [5, 1])
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.tokens: tuple[str, ...] = (*SPECIAL, *words)
        counts = Counter(self.tokens)
        if len(counts) != len(self.tokens):
            twice = next(token for token, count in counts.items() if count > 1)
            raise ValueError(
                f"Vocabulary: words must be different and none a special token, got {twice!r} twice"
            )
        # Without the special tokens: a text that spells "<pad>" out must not end there.
        self._numbers = {token: n for n, token in enumerate(self.tokens) if n >= len(SPECIAL)}

    @classmethod
    def build(
        cls, sentences: Iterable[Sequence[str]], *, min_count: int = 1, max_size: int | None = None
    ) -> Vocabulary:
        """The words of training sentences, most frequent first, words of one frequency by alphabet.

        Arguments:
            sentences: of words; of the training split alone, so that the test tells of unknown words, too.
            min_count: words that are rarer become unknown.
            max_size: most tokens, special ones included.

        Raises ValueError for a min_count below 1 or a max_size that leaves no place for words.
        """
        if min_count < 1:
            raise ValueError(f"Vocabulary.build: min_count must be at least 1, got {min_count}")
        if max_size is not None and max_size <= len(SPECIAL):
            raise ValueError(f"Vocabulary.build: max_size must be above {len(SPECIAL)}, got {max_size}")
        counts = Counter(word for sentence in sentences for word in sentence)
        for token in SPECIAL:  # text may spell "<unk>" out
            counts.pop(token, None)
        kept = sorted((w for w, c in counts.items() if c >= min_count), key=lambda w: (-counts[w], w))
        return cls(kept if max_size is None else kept[: max_size - len(SPECIAL)])

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Numbers of words: that of unknown ones for words not in it or spelled like a special token."""
        return [self._numbers.get(word, UNKNOWN) for word in words]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Words of numbers up to the first end of a sentence, without padding and begin."""
        found = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, BEGIN):
                found.append(self.tokens[number])
        return found
