"""Scenario: requests that edit attention beside others, with chunks, a cached prefix, samples and a window; as `va.intervene` has
it in transformers. `ranks`: on two ranks. `compiled`: without enforce_eager; attention stays in sight, and can be edited."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any
from unittest import mock

from tests.helpers.tiny import GEMMA, Maps, close, engine, everything, prompts, sampling, saved

# isort: split
import torch
from torch import Tensor

import vlattn_fast as va

SIZE = 32  # of a block
KEYS, QUERIES, KEYS_WITH_MORE = (3, 9), (40, 95), (60, 70)
EDITS = [va.Knockout(keys=KEYS, layers=[0]), va.Steer(keys=KEYS_WITH_MORE, queries=QUERIES, heads=[1, 3], weight=20.0)]
WRITTEN = [
    {"keys": [3, 9], "layers": [0], "weight": 0},
    {"keys": [[60, 70]], "queries": [[40, 95]], "heads": [-1, 1], "weight": 20},
]


class EditedMaps(Maps):
    """With edits, which are added to the mask of eager attention; `tokens` is what the model answers with `va.intervene`."""

    def __call__(self, prompt: list[int], tokens: list[int]) -> Tensor:
        inputs = {"input_ids": torch.tensor([prompt + tokens[:-1]])}
        with torch.no_grad(), va.intervene(self.model, inputs, EDITS):
            self.tokens = self.model(**inputs).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        modeling = sys.modules[type(self.model).__module__]
        edited = functools.partial(with_edits, modeling.eager_attention_forward)
        with mock.patch.object(modeling, "eager_attention_forward", edited):
            return super().__call__(prompt, tokens)


def with_edits(original: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
    bias = torch.zeros(1, query.shape[1], query.shape[2], key.shape[2])
    bias[:, [1, 3], slice(*QUERIES), slice(*KEYS_WITH_MORE)] = math.log(20)
    if module.layer_idx == 0:
        bias[..., slice(*KEYS)] = -torch.inf
    return original(module, query, key, value, mask + bias, **options)


def main(kind: str = "") -> None:
    if kind:
        checked(saved(), **{"ranks": {"tensor_parallel_size": 2}, "compiled": {"enforce_eager": False, "block_size": SIZE}}[kind])
        return
    llm = checked(saved(), block_size=SIZE)
    samples(llm)
    checked(saved(**GEMMA))


def checked(folder: str, **options: Any) -> Any:
    llm = engine(folder, max_num_batched_tokens=64, **options)
    plain, edited = Maps(folder), EditedMaps(folder)
    (prompt,), (other,) = prompts(100), prompts(33, seed=2)
    numbers = prompt["prompt_token_ids"]
    asks = [everything(steer=EDITS), everything(), everything(steer=WRITTEN), None]
    requests = [prompt, prompt, prompt, other]
    for turn in range(2):  # in the second one each finds its own prefix in the cache, and nobody else's
        outputs = llm.generate(requests, [sampling(6, ask) for ask in asks], use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        for number, maps in ((0, edited), (1, plain), (2, edited)):
            first = outputs[number].outputs[0].attention.queries[0]
            assert turn == 0 or (first == 96) == ("block_size" in options), first
            maps.check(outputs[number].outputs[0], numbers, first=first)
        assert tokens[0] == tokens[2] == edited.tokens, "the answer is that of the edited model"
        assert tokens[0] != tokens[1] and outputs[3].outputs[0].attention is None
    (alone,) = llm.generate([prompt], sampling(6, {"steer": WRITTEN, "statistics": []}), use_tqdm=False)
    assert list(alone.outputs[0].token_ids) == tokens[0] and alone.outputs[0].attention.is_empty()
    one = {"layers": [1], "statistics": ["maximum"], "steer": [{"keys": [0, 100], "queries": "answer", "weight": 0}]}
    (answer,) = llm.generate([prompt], sampling(3, one), use_tqdm=False)
    assert answer.outputs[0].attention.maximum.shape == (3, 1, 4)
    close(answer.outputs[0].attention.maximum[1], torch.ones(1, 4))  # the first token of the answer sees itself alone
    return llm


def samples(llm: Any) -> None:
    (prompt,) = prompts(50, seed=5)
    params = sampling(4, everything(steer=WRITTEN[:1]), n=2, temperature=1.5)
    for completion in llm.generate([prompt], params, use_tqdm=False)[0].outputs:
        assert completion.attention.mass.shape == (4, 2, 4, 2) and completion.attention.seconds > 0


if __name__ == "__main__":
    main(*sys.argv[1:])
