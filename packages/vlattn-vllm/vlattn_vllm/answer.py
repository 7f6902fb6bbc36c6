"""One answer to a prompt."""

from __future__ import annotations

from typing import NamedTuple

from vlattn_vllm.attention import Attention


class Answer(NamedTuple):
    """The completion of a prompt. `text` is empty where the engine has no tokenizer."""

    id: str
    tokens: list[int]
    text: str
    attention: Attention
