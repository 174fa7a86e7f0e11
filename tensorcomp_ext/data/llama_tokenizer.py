"""The tokenizer of llama2.c's models: byte pairs merged by score."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path

BEGIN = 1
_BYTES = 3
"""Number of the token of byte 0, behind those of unknown, begin and end."""
_LONGEST = 1 << 16


class LlamaTokenizer:
    """Text as tokens, in the format of llama2.c's tokenizer.bin.

    The file: int32 longest token, then for every token float32 score, int32 length and its bytes, all little
    endian. Text begins as single characters, those without a token as bytes; then the two neighbours whose
    union has the best score become one token, over and over.

    Arguments:
        path: the file.

    Raises FileNotFoundError; ValueError for a file that is truncated or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"LlamaTokenizer: no file {path}")
        content, place = path.read_bytes(), 4
        self.tokens: list[bytes] = []
        self.scores: list[float] = []
        while place < len(content):
            if place + 8 > len(content):
                raise ValueError(f"{path} is truncated in the header of token {len(self.tokens)}")
            score, length = struct.unpack_from("<fi", content, place)
            if not 0 <= length <= _LONGEST or not math.isfinite(score):
                raise ValueError(
                    f"{path} is no tokenizer of llama2.c: token {len(self.tokens)} has length {length}, "
                    f"score {score}"
                )
            token = content[place + 8 : place + 8 + length]
            if len(token) < length:
                raise ValueError(f"{path} is truncated in token {len(self.tokens)}")
            self.tokens.append(token)
            self.scores.append(score)
            place += 8 + length
        if len(self.tokens) < _BYTES + 256:
            raise ValueError(
                f"{path} is truncated or no tokenizer of llama2.c: it must have {_BYTES + 256} tokens or "
                f"more, got {len(self.tokens)}"
            )
        self._numbers = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Numbers of tokens: that of the begin, then text behind a blank. Time grows with its square."""
        found: list[int] = []
        for character in f" {text}" if text else "":
            spelled = character.encode()
            whole = self._numbers.get(spelled)
            found += [whole] if whole is not None else [byte + _BYTES for byte in spelled]
        while True:
            best, at = -1, -1
            for place in range(len(found) - 1):
                union = self._numbers.get(self.tokens[found[place]] + self.tokens[found[place + 1]])
                if union is not None and (best < 0 or self.scores[union] > self.scores[best]):
                    best, at = union, place
            if best < 0:
                return [BEGIN, *found]
            found[at : at + 2] = [best]

    def decode(self, numbers: Iterable[int]) -> str:
        """Text of tokens, without begin and end, the blank in front included."""
        spelled = b"".join(
            bytes([number - _BYTES])
            if number < _BYTES + 256 and self._is_byte(number)
            else self.tokens[number]
            for number in numbers
            if number >= _BYTES
        )
        return spelled.decode("utf-8", "replace")

    def _is_byte(self, number: int) -> bool:
        return self.tokens[number].startswith(b"<0x") and self.tokens[number].endswith(b">")
