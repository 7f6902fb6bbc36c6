"""The tokenizer that a caller passes as `processor`: names of tokens, special tokens, and targets that are words."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlattn_fast.interpret.adapters.adapter import Adapter
from vlattn_fast.interpret.explaining.similarity import SIMILARITY, Similarity

_OF_IMAGES = ("image_processor", "image_mean", "preprocess")  # what a tokenizer does not have


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer that a processor is, or has; None of an image processor, and of None. TypeError for anything else."""
    if processor is None:
        return None
    inner = getattr(processor, "tokenizer", processor)
    if callable(inner) and (hasattr(inner, "convert_ids_to_tokens") or not any(hasattr(inner, name) for name in _OF_IMAGES)):
        return inner
    if not any(hasattr(processor, name) for name in _OF_IMAGES):
        got = type(processor).__name__
        raise TypeError(f"processor must be a tokenizer, a processor or an image processor of Hugging Face; got {got}")
    return None


def special_ids(tokenizer: Any) -> frozenset[int] | None:
    """The ids of special tokens; None if the tokenizer does not say."""
    ids = getattr(tokenizer, "all_special_ids", None)
    return None if ids is None else frozenset(ids)


def token_target(target: Any, tokenizer: Any, model: nn.Module, adapter: Adapter, position: Any) -> Any:
    """`target` with its words, one or one a row, as indices: of tokens, or of classes by their names in the config. The word
    "similarity" is a callable, of encoders whose embedding `position` says. ValueError for a word of several tokens, or no
    class."""
    scored = adapter.scoring
    if isinstance(target, str) and target == SIMILARITY and not (scored.predicts or scored.pairs or target in _classes(model)):
        return Similarity(model, adapter, position)
    if isinstance(target, (list, tuple)) and target and all(isinstance(word, str) for word in target):
        return [_index(word, tokenizer, model, adapter) for word in target]
    return _index(target, tokenizer, model, adapter) if isinstance(target, str) else target


def _index(word: str, tokenizer: Any, model: nn.Module, adapter: Adapter) -> int:
    if not adapter.scoring.predicts:
        classes = {} if adapter.scoring.pairs else _classes(model)
        if word not in classes:
            names = list(classes)
            known = f"one of {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}" if names else "an index"
            raise ValueError(f"target must be {known} for {type(model).__name__}; got {word!r}")
        if len(classes[word]) > 1:
            which = " and ".join(map(str, classes[word]))
            raise ValueError(f"target must name one class; got {word!r}, the name of classes {which}. Pass the index")
        return classes[word][0]
    if tokenizer is None:
        raise ValueError(f"processor must have a tokenizer for a target that is a word; got none for {word!r}")
    ids = encoded("target", word, tokenizer)
    if not ids:
        raise ValueError(f"target must be one token; got {word!r}, which has none")
    if len(ids) != 1:
        raise ValueError(
            f"target must be one token; got {word!r}, which has {len(ids)}. Pass answer={word!r} to explain them all"
        )
    return ids[0]


def _classes(model: nn.Module) -> dict[str, list[int]]:
    """The classes of each name in the config: those that `id2label` gives outputs, and further names of `label2id`."""
    config = getattr(model, "config", None)
    classes: dict[str, list[int]] = {}
    for index, name in (getattr(config, "id2label", None) or {}).items():
        classes.setdefault(name, []).append(int(index))
    for name, index in (getattr(config, "label2id", None) or {}).items():
        classes.setdefault(name, [int(index)])
    return classes


def encoded(name: str, text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text without special ones. ValueError, with the argument's `name`, if a part is not in the vocabulary."""
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    unknown = getattr(tokenizer, "unk_token", None)
    if unknown and tokenizer.unk_token_id in ids and unknown not in text:
        raise ValueError(f"{name} must be text in the tokenizer's vocabulary; got {text!r}, for which it gives {unknown!r}")
    return ids
