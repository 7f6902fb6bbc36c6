"""Scenario: latent attention (MLA), whose cache has no keys of heads. The numbers are those of the keys that a layer's latents
stand for, made anew from what comes into the layer, without its cache and its absorbed projection. (vLLM rotates such queries
on CPUs otherwise than transformers.)"""

from __future__ import annotations

from tests.helpers.tiny import Maps, close, engine, everything, prompts, sampling, saved

# isort: split
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

SIZES = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}


class Recorded(Maps):
    """Maps (layers, heads, N, N) of what came into the layers while one request ran alone."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[Any, list[Any]]] = {}

    def of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward_impl(layer: Any, *parts: Any, **rest: Any) -> Any:
            self.layers.setdefault(layer.layer_name, (layer, []))[1].append([part.clone() for part in parts[:3]])
            return original(layer, *parts, **rest)

        return forward_impl

    def begun(self, first: int, length: int) -> Tensor:
        """The maps of a prompt in a batch of prompts, from this row on."""
        one = Recorded()
        for name, (layer, calls) in self.layers.items():
            one.layers[name] = layer, [[part[first : first + length] for part in calls[0]]]
        return one([0] * length, [0])

    def __call__(self, prompt: list[int], tokens: list[int]) -> Tensor:
        maps = []
        for layer, calls in self.layers.values():
            query, latents, rotated = (torch.cat(parts) for parts in zip(*calls, strict=True))
            keys = layer.kv_b_proj(latents)[0].view(len(query), query.shape[1], -1)[..., :32]
            keys = torch.cat([keys, rotated.view(len(query), 1, -1).expand(-1, query.shape[1], -1)], -1)
            logits = torch.einsum("nhd,mhd->hnm", query, keys) * 96**-0.5
            maps.append(logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1))
        assert maps[0].shape[1] == len(prompt) + len(tokens) - 1
        return torch.stack(maps)


def main() -> None:
    folder = saved("DeepseekV2", **SIZES, head_dim=64, num_key_value_heads=4, first_k_dense_replace=2, initializer_range=0.06)
    llm = engine(folder, attention_backend="CPU_MLA")  # AMX takes no float32
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    lengths = 5, 33, 90
    some = prompts(*lengths)
    for prompt in some:
        recorded = Recorded()
        with mock.patch.object(MLAAttention, "forward_impl", recorded.of(MLAAttention.forward_impl)):
            (output,) = llm.generate([prompt], sampling(6, everything()), use_tqdm=False)
        recorded.check(output.outputs[0], prompt["prompt_token_ids"])
    asks, plain = (everything(), None, everything(layers=[1])), llm.generate(some, sampling(6), use_tqdm=False)
    recorded = Recorded()
    with mock.patch.object(MLAAttention, "forward_impl", recorded.of(MLAAttention.forward_impl)):
        together = [output.outputs[0] for output in llm.generate(some, [sampling(6, ask) for ask in asks], use_tqdm=False)]
    assert [one.token_ids for one in together] == [one.outputs[0].token_ids for one in plain] and together[1].attention is None
    for number, layers in ((0, slice(2)), (2, slice(1, 2))):  # the queries that chose their first tokens
        maps = recorded.begun(sum(lengths[:number]), lengths[number])[layers]
        close(together[number].attention.maximum[0], maps[:, :, -1].amax(-1))
        close(together[number].attention.diagonal[0], maps[:, :, -1, -1])
    with pytest.raises(ValueError, match="[(]MLA[)], which is not edited"):
        llm.generate(some, sampling(6, {"steer": [{"keys": [0, 4], "weight": 0}]}), use_tqdm=False)


if __name__ == "__main__":
    main()
