"""Tokens of a tokenizer joined to the words that people read."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")  # <s>, <|im_start|>, [SEP]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte that SentencePiece has no token for
_CLOSING = set(".,;:!?)]}%")
_BROKEN = "\ufffd"  # stands for bytes that are no whole character


@dataclass(frozen=True)
class Word:
    """A word, and which tokens it is made of.

    Args:
        text: as people write it.
        tokens: the indices of its tokens.
        space: whether a space stands before it.
    """

    text: str
    tokens: range
    space: bool


def join_tokens(tokens: Sequence[str], vocabulary: Sequence[str] | None = None) -> list[Word]:
    """The words that tokens make up, without the tokenizer's marks.

    Known are the marks of byte-level BPE ("Ġgiraffe"), SentencePiece ("▁giraffe"), CLIP ("giraffe</w>") and WordPiece
    ("##affe"). Tokens without marks are words. Punctuation and special tokens are words of their own, and so is each token of a
    script that writes no spaces.

    Args:
        tokens: what `convert_ids_to_tokens` returned.
        vocabulary: further tokens of the same tokenizer, by which its marks are known; default: none.

    Example:
        >>> [word.text for word in join_tokens(["▁a", "▁gir", "affe", "."])]
        ['a', 'giraffe', '.']
    """
    pieces = _pieces(tokens, [*tokens, *(vocabulary or ())])
    words: list[Word] = []
    start = 0
    for end in range(1, len(pieces) + 1):
        if end < len(pieces) and _continues(pieces[end - 1], pieces[end]):
            continue
        text = b"".join(pieces[start:end]).decode("utf-8", errors="replace")
        words.append(Word(_shown(text), range(start, end), start > 0 and text[:1].isspace()))
        start = end
    return words


def _pieces(tokens: Sequence[str], vocabulary: Sequence[str]) -> list[bytes]:
    """Every token as the bytes of its text, with a space before it where a word begins."""
    if any(token[:1] in ("Ġ", "Ċ") for token in vocabulary):
        table = _byte_table()
        return [bytes(table[c] for c in token) if all(c in table for c in token) else token.encode() for token in tokens]
    if any(token.startswith("▁") for token in vocabulary):
        return [
            bytes([int(byte[1], 16)]) if (byte := _BYTE.fullmatch(token)) else token.replace("▁", " ").encode()
            for token in tokens
        ]
    ends = any(token.endswith("</w>") for token in vocabulary)
    pieces = []
    for i, token in enumerate(tokens):
        begins = (i == 0 or tokens[i - 1].endswith("</w>")) if ends else not token.startswith("##")
        text = token.removesuffix("</w>") if ends else token if begins else token[2:]
        pieces.append(((" " if begins and text not in _CLOSING else "") + text).encode())
    return pieces


@functools.cache
def _byte_table() -> dict[str, int]:
    """The byte that each character of a byte-level BPE stands for: GPT-2 shifts those that do not print behind 255."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


def _continues(before: bytes, piece: bytes) -> bool:
    """Whether a piece belongs to the word of the piece before it."""
    left, right = (part.decode("utf-8", errors="replace") for part in (before, piece))
    if _BROKEN in left or _BROKEN in right:
        return _BROKEN in left and _BROKEN in right
    return not (right[:1].isspace() or _stands_alone(left.strip()) or _stands_alone(right))


def _stands_alone(text: str) -> bool:
    """Punctuation, a special token, or text of a script without spaces."""
    if not text:
        return False
    return not any(c.isalnum() for c in text) or bool(_SPECIAL.fullmatch(text)) or unicodedata.east_asian_width(text[0]) in "WF"


def _shown(text: str) -> str:
    """The text without spaces around it; what nobody could see as a sign."""
    return text.strip() or ("⏎" if "\n" in text else "␣")
