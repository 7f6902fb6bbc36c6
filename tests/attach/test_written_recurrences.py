"""Forwards in place of those that write a recurrence out; what transformers' attention interface hands to a run."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tools.tiny_models.inputs import texts
from tools.tiny_models.mixers import each_within
from tools.tiny_models.shrink import small_model
from tools.tiny_models.stored import Double, Maps, in_double, stored_rows
from vlattn_fast.attach.recurrences.table import FORWARDS

MODELS = {
    "MiniMaxLightningAttention": "MiniMaxForCausalLM",
    "RecurrentGemmaRecurrentBlock": "RecurrentGemmaForCausalLM",
    "RwkvFeedForward": "RwkvForCausalLM",
    "RwkvSelfAttention": "RwkvForCausalLM",
    "ZambaMambaMixer": "ZambaForCausalLM",
}


def test_each_forward_has_a_model() -> None:
    assert {*MODELS} == {*FORWARDS}


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_the_models(name: str, double: None) -> None:
    import transformers

    model = small_model(getattr(transformers, MODELS[name]))
    calls: list[tuple[Any, ...]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, args, kwargs, output))

    for module in model.modules():
        if type(module).__name__ == name:
            module.register_forward_hook(keep, with_kwargs=True)
    model(**texts(model, "both"), use_cache=False)
    assert calls
    for module, args, kwargs, output in calls:
        handed: list[str] = []

        def hand(reader: Callable[..., Any], function: Any, handed: list[str] = handed) -> Any:
            handed.append(name)
            return function

        written = FORWARDS[name](module, hand, *args, **kwargs)
        first, expected = (x if isinstance(x, Tensor) else x[0] for x in (written, output))
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-11)
        assert len(handed) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_refused(name: str, double: None) -> None:
    import transformers

    model = small_model(getattr(transformers, MODELS[name]))
    model.config.use_cache = True
    for module in model.modules():
        if type(module).__name__ == name:
            vars(module)["forward"] = functools.partial(FORWARDS[name], module, lambda _, run: run)
    with pytest.raises(ValueError, match="model must run without a cache; got"):
        model(**texts(model, "both"))


IDS = torch.randint(3, 90, (1, 11), generator=torch.Generator().manual_seed(4))
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
NOTHING = va.Steer(keys=(0, 2), weight=1.0)  # an edit that changes nothing


@pytest.mark.parametrize("name", ["DeepseekV32ForCausalLM", "MiniMaxM3SparseForConditionalGeneration"])
@pytest.mark.filterwarnings("ignore:The relevancy leaves out what goes through:UserWarning")  # a choice has no gradient
def test_an_indexer_chooses_the_keys(name: str) -> None:
    """Keys or blocks of keys, in an edited run and in an explained one."""
    kind: Any = getattr(transformers, name)
    with in_double():
        model, eager = small_model(kind), small_model(kind, attention="eager")
        with Maps(eager) as kept:
            logits = eager(**INPUTS).logits
        maps = kept.with_size(IDS.shape[1])
        assert bool((maps[-1][..., -1, :] == 0).any()), "it chooses none"
        with va.intervene(model, INPUTS, [NOTHING]):
            torch.testing.assert_close(model(**INPUTS).logits, logits, rtol=0, atol=1e-9)
        rows = torch.nn.functional.one_hot(torch.tensor([10]), 11).double()
        expected = stored_rows(maps, logits[:, -1].max(-1).values, rows)
        with each_within(model, Double):
            explained = va.explain(model, INPUTS, method=va.methods.Gradient(freeze=()), target=int(logits[0, -1].argmax()))
        (got,) = explained.relevancy.values()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_the_last_queries_see_all_keys_before() -> None:
    """Gemma 4 leaves out the queries whose logits nobody asks for, and passes no mask."""
    sizes = {"vocab_size": 99, "vocab_size_per_layer_input": 99, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"global_head_dim": 8, "intermediate_size": 64, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4}
    shared: dict[str, Any] = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes, **shared, pad_token_id=0)).eval()
    wanted = model(**INPUTS, use_cache=False).logits[:, -2:]
    with va.intervene(model, INPUTS, [NOTHING]):
        torch.testing.assert_close(model(**INPUTS, use_cache=False, logits_to_keep=2).logits, wanted, rtol=1e-4, atol=1e-5)


def test_options_that_no_operator_supports_are_refused_by_name() -> None:
    llama = small_model(transformers.LlamaForCausalLM)
    with va.intervene(llama, INPUTS, [NOTHING]), pytest.raises(ValueError, match="'chosen_tomorrow'"):
        llama(**INPUTS, chosen_tomorrow=0)
    with va.intervene(llama, INPUTS, [NOTHING]), pytest.raises(ValueError, match="must use va.explain for attention maps"):
        llama(**INPUTS, output_attentions=True)
