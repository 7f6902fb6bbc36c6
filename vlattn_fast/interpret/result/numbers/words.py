"""Tokens of a tokenizer, joined to words."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")  # <s>, <|im_start|>, [SEP]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte without a token in SentencePiece
_CLOSING = set(".,;:!?)]}%")
_BROKEN = "\ufffd"  # stands for bytes that are not a whole character


@dataclass(frozen=True)
class Word:
    """A word and its tokens."""

    text: str  # as people write the word
    tokens: range  # their indices
    space: bool  # whether a space stands before the word


class Marks(NamedTuple):
    """How a tokenizer marks where words begin or end."""

    byte_level: bool  # "Ġgiraffe"; every character stands for a byte
    spaced: bool  # "▁giraffe"
    ends: bool  # "giraffe</w>"
    is_bytes: bool  # every character stands for a byte, marked or not


def find_marks(vocabulary: Iterable[str]) -> Marks:
    """The marks in tokens of one tokenizer; more tokens make them surer."""
    tokens = list(vocabulary)
    byte_level = any(token.startswith("Ġ") or "Ċ" in token for token in tokens)  # ".Ċ" is a token, too
    spaced = any(token.startswith("▁") for token in tokens)
    ends = any(token.endswith("</w>") for token in tokens)
    # Characters of unmarked tokens may stand for bytes, too: then the bytes are text beyond ASCII.
    spelt = (_bytes_of(token) for token in tokens if all(c in _byte_table() for c in token))
    text = "" if byte_level or spaced else b"".join(spelt).decode(errors="replace")
    return Marks(byte_level, spaced, ends, byte_level or sum(c > "\x7f" for c in text) > 2 * text.count(_BROKEN))


def join_tokens(tokens: Sequence[str], marks: Marks | None = None) -> list[Word]:
    """The words that tokens make up, without the tokenizer's marks.

    The marks are those of byte-level BPE ("Ġgiraffe"), SentencePiece ("▁giraffe"), CLIP ("giraffe</w>") and WordPiece ("##affe").
    Tokens without marks are words, and so are punctuation, special tokens and each token of a script without spaces.

    Args:
        tokens: the result of `convert_ids_to_tokens`.
        marks: of the tokenizer; by default the marks in `tokens`.

    Examples:
        >>> [word.text for word in join_tokens(["▁a", "▁gir", "affe", "."])]
        ['a', 'giraffe', '.']
    """
    pieces = _pieces(tokens, marks or find_marks(tokens))
    units = _whole_characters(pieces)
    words: list[Word] = []
    start = 0
    for number, (first, end) in enumerate(units, 1):
        if number < len(units) and _continues(b"".join(pieces[first:end]), b"".join(pieces[slice(*units[number])])):
            continue
        text = b"".join(pieces[start:end]).decode("utf-8", errors="replace")
        shown = text.strip() or ("⏎" if "\n" in text else "␣")  # invisible text as a sign
        words.append(Word(shown, range(start, end), start > 0 and text[:1].isspace()))
        start = end
    return words


def _whole_characters(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """(start, stop) of groups of pieces; pieces that share one character are one group."""

    def fault(start: int, stop: int) -> str | None:
        """Why the pieces are not text; None if they are."""
        try:
            b"".join(pieces[start:stop]).decode()
        except UnicodeDecodeError as error:
            return error.reason
        return None

    units: list[tuple[int, int]] = []
    while (start := units[-1][1] if units else 0) < len(pieces):
        stop = start + 1
        while stop < len(pieces) and fault(start, stop) == "unexpected end of data":
            stop += 1
        units.append((start, start + 1 if fault(start, stop) else stop))
    return units


def _pieces(tokens: Sequence[str], marks: Marks) -> list[bytes]:
    """Every token as the bytes of its text, with a space before it where a word begins."""
    byte_level, spaced, ends, is_bytes = marks
    if byte_level or (is_bytes and not ends):
        return [_bytes_of(token) for token in tokens]
    if spaced:
        return [
            bytes([int(byte[1], 16)]) if (byte := _BYTE.fullmatch(token)) else token.replace("▁", " ").encode()
            for token in tokens
        ]
    pieces = []
    for i, token in enumerate(tokens):
        begins = (i == 0 or tokens[i - 1].endswith("</w>")) if ends else not token.startswith("##")
        text = token.removesuffix("</w>") if ends else token if begins else token[2:]
        encoded = _bytes_of(text) if is_bytes else text.encode()
        pieces.append(b" " + encoded if begins and text not in _CLOSING else encoded)
    return pieces


def _bytes_of(token: str) -> bytes:
    """The bytes that a token of byte-level BPE stands for."""
    table = _byte_table()
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()


@functools.cache
def _byte_table() -> dict[str, int]:
    """The byte of each character of a byte-level BPE: GPT-2 shifts bytes that do not print to above 255."""
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
