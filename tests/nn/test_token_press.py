"""The press of token_scores beside kvpress's own presses, on a tiny Llama: the same tokens stay in the cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    kvpress = pytest.importorskip("kvpress")

import vlattn_fast as va  # noqa: E402

N = 60


@pytest.fixture(autouse=True)
def presses_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """kvpress 0.5.5 reads the position in the cache, which transformers 5.3 and newer do not hand to a layer."""
    theirs = kvpress.ScorerPress.forward_hook

    def forward_hook(self: Any, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        last = kwargs["past_key_values"].get_seq_length(module.layer_idx) - 1
        return theirs(self, module, args, {"cache_position": torch.tensor([last]), **kwargs}, output)

    for press in (kvpress.SnapKVPress, kvpress.TOVAPress, kvpress.ObservedAttentionPress):
        monkeypatch.setattr(press, "forward_hook", forward_hook)


def llama(attention: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": attention}
    config = transformers.LlamaConfig(**{**sizes, **heads, **options}, initializer_range=0.5)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def cached(model: Any, press: Any, **inputs: Tensor) -> list[Tensor]:
    """The keys that stay, of each layer, those of a head in a fixed order."""
    cache = transformers.DynamicCache()
    with press(model):
        model(**inputs, past_key_values=cache)
    return [layer.keys.sort(2).values for layer in cache.layers]


def prompt(batch: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 99, (batch, N), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("kernel_size", [1, 5])
def test_snapkv_keeps_what_kvpress_keeps(ratio: float, kernel_size: int) -> None:
    model = llama()
    theirs = cached(model, kvpress.SnapKVPress(ratio, window_size=8, kernel_size=kernel_size), **prompt())
    ours = cached(model, va.nn.token_press("snapkv", ratio, queries=8, kernel_size=kernel_size), **prompt())
    assert ours[0].shape[2] == int(N * (1 - ratio))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_tova_keeps_what_kvpress_keeps() -> None:
    model = llama()
    ours = cached(model, va.nn.token_press("tova", 0.6, recent=1), **prompt())
    for sample in range(2):
        ids = {"input_ids": prompt()["input_ids"][sample : sample + 1]}
        theirs = cached(model, kvpress.TOVAPress(0.6), **ids)
        torch.testing.assert_close([x[sample : sample + 1] for x in ours], theirs, rtol=0, atol=1e-5)


def test_h2o_is_observed_attention_before_its_division() -> None:
    """kvpress reads stored maps; ours runs beside fused attention."""
    model = llama("eager")

    class Divided(kvpress.ObservedAttentionPress):  # type: ignore[misc, name-defined, unused-ignore]
        def score(self, module: Any, hidden_states: Any, keys: Any, *rest: Any) -> Tensor:
            scores = super().score(module, hidden_states, keys, *rest)
            return scores * torch.arange(keys.shape[2], 0, -1)

    theirs = cached(model, Divided(0.5), **prompt())
    ours = cached(llama("sdpa"), va.nn.token_press("h2o", 0.5), **prompt())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["snapkv", "h2o", "tova"])
def test_padding_is_removed_first(rule: str) -> None:
    """In front of a shorter prompt of a batch, as generate has it: the real tokens are those that the prompt keeps alone."""
    model, inputs = llama(), prompt()
    real = torch.ones(2, N, dtype=torch.int64)
    real[0, :20] = 0
    position = (real.cumsum(1) - 1).clamp(min=0)
    options = {"queries": 8} if rule == "snapkv" else {}
    press = va.nn.token_press(rule, 0.5, **options)
    together = cached(model, press, **inputs, attention_mask=real, position_ids=position)
    alone = cached(model, va.nn.token_press(rule, 0.25, **options), input_ids=inputs["input_ids"][:1, 20:])
    assert alone[0].shape[2] == together[0].shape[2] == 30
    torch.testing.assert_close([x[:1] for x in together], alone, rtol=1e-4, atol=1e-4)


def test_decoding_goes_on_behind_the_pruned_prompt() -> None:
    model, cache = llama(), transformers.DynamicCache()
    with torch.no_grad(), va.nn.token_press("snapkv", 0.5, queries=8)(model):
        model(**prompt(), past_key_values=cache)
        model(input_ids=torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [N // 2 + 1] * 2
