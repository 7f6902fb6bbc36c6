"""Arguments of wrong kinds, at layers, models and data sets: refused where they are given, by name."""

import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import transformers

import vlattn_fast as va
from vlattn_fast.ops import attention_statistics as statistics

KINDS: dict[str, Any] = {
    "nan": float("nan"),
    "minus one": -1,
    "word": "nope",
    "fraction": 1.5,
    "array": numpy.ones((2, 3)),
    "tensor": torch.ones(3),
    "scalar": torch.tensor(1.0),
    "object": object(),
    "list": ["nope"],
    "lists": [[1, 2]],
}
INPUTS = {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 4, 3]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, num_labels=3
    )
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def capture(model: torch.nn.Module, **arguments: Any) -> None:
    with va.nn.capture_attention(model, **arguments):
        model(**INPUTS)


def too_large(x: Any, limit: int) -> Any:
    """`limit` where -1 would be right."""
    return limit if isinstance(x, int) else x


CALLS: dict[str, list[Callable[[Any, Any], Any]]] = {
    "backend": [
        lambda m, x: va.nn.ScoreAttention(32, 4, backend=x),
        lambda m, x: va.nn.CongruenceLoss(backend=x),
        lambda m, x: va.nn.DamsmLoss(backend=x),
        lambda m, x: va.nn.replace_attention(m, score="dot", backend=x),
        lambda m, x: va.nn.register_attention("named", "dot", backend=x),
    ],
    "score_options": [
        lambda m, x: va.nn.ScoreAttention(32, 4, "general", score_options=x),
        lambda m, x: va.nn.replace_attention(m, score="general", score_options=x),
        lambda m, x: va.nn.register_attention("named", "general", score_options=x),
    ],
    "embed_dim": [lambda m, x: va.nn.ScoreAttention(x, 4), lambda m, x: va.nn.ScoreAttention(None, 4)],
    "per_head": [
        lambda m, x: va.nn.replace_attention(m, score="general", per_head=x),
        lambda m, x: va.nn.register_attention("named", "general", per_head=x),
    ],
    "layers": [
        lambda m, x: va.nn.replace_attention(m, score="dot", layers=too_large(x, 5)),
        lambda m, x: capture(m, layers=too_large(x, 5)),
        lambda m, x: capture(m, layers=None),
    ],
    "statistics": [lambda m, x: statistics.attention_statistics(*torch.ones(2, 1, 2, 3, 4), statistics=x)],
    "weighting": [lambda m, x: va.explain(m, INPUTS, method=va.methods.Weighted(weighting=x))],
    "attention_mask": [lambda m, x: va.explain(m, {**INPUTS, "attention_mask": x})],
    "position": [lambda m, x: va.explain(m, INPUTS, position={})],
    "patches": [lambda m, x: va.explain(m, INPUTS, patches=x)],
    "per_token": [lambda m, x: va.explain(m, INPUTS, per_token=x)],
    "methods": [lambda m, x: va.evaluate(m, [], methods=x)],
    "tests": [lambda m, x: va.evaluate(m, [], tests=x), lambda m, x: va.probe(m, [], tests=x)],
    "steps": [lambda m, x: va.evaluate(m, [], tests=("positive",), steps=x)],
    "accuracy": [lambda m, x: va.evaluate(m, [], tests=("positive",), accuracy=x)],
    "probability": [lambda m, x: va.evaluate(m, [], tests=("deletion",), probability=x)],
    "words": [lambda m, x: va.evaluate(m, [], words=x)],
    "seed": [lambda m, x: va.evaluate(m, [], seed=too_large(x, 2**63)), lambda m, x: va.probe(m, [], seed=x)],
    "parts": [lambda m, x: va.probe(m, [], parts=x)],
    "dataset": [lambda m, x: va.evaluate(m, x), lambda m, x: va.probe(m, x)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds_are_refused_by_name(name: str, kind: str, bert: torch.nn.Module) -> None:
    for call in CALLS[name]:
        with pytest.raises((TypeError, ValueError)) as raised:
            call(bert, KINDS[kind])
        assert re.search(rf"\b{name}\b", str(raised.value)), str(raised.value)


QUERY = torch.ones(1, 2, 3, 4)
HUGE: dict[str, Callable[[int], Any]] = {
    "num_groups": lambda x: va.attention_statistics(QUERY, QUERY, key_groups=torch.zeros(3, dtype=torch.long), num_groups=x),
    "eps": lambda x: va.score_attention(QUERY, QUERY, QUERY, score=va.scores.Cosine(eps=x)),
    "lambda_lse": lambda x: va.stacked_cross_attention(torch.ones(2, 3, 4), torch.ones(2, 3, 4), lambda_lse=x),
    "weight": lambda x: va.nn.CongruenceLoss(weight=x),
    "embed_dim": lambda x: va.nn.ScoreAttention(x, 4),
    "num_hidden_layers": lambda x: va.models.UNITERConfig(99, 32, x, 4, 64),
    "hidden_size": lambda x: va.models.UNITERConfig(99, x, 2, 4, 64),
}


@pytest.mark.parametrize("name", HUGE)
def test_integers_of_more_than_64_bits(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be (at most|a float)"):
        HUGE[name](10**30)


@pytest.mark.parametrize("answer", [[3, -100], [[3, 4], [5, -100]]])
def test_ids_of_an_answer_below_zero(answer: Any) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    with pytest.raises(ValueError, match="answer must hold token ids from 0 on; got -100"):
        va.explain(transformers.LlamaForCausalLM(config), {"input_ids": torch.ones(2, 3, dtype=torch.long)}, answer=answer)
