"""Edits while a model generates: groups follow the cache."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.edited_maps import biased, hooked, llama

NEW = 4


def decoder(name: str) -> tuple[Any, dict[str, Any]]:
    """With its small weights: it writes no image token."""
    case = DECODERS[name]()
    model = case.model.double().eval()
    model.generation_config.eos_token_id = None
    return model, {k: v.double() if v.is_floating_point() else v for k, v in case.inputs("left").items()}


def places(inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"] == 98


def cut_of(inputs: dict[str, Any], keys: str) -> Any:
    """The whole mask of a knockout from "last" to the image, or from "answer" to itself, for the layers of the decoder."""
    prompt = inputs["input_ids"].shape[1]

    def bias(module: nn.Module, n: int, m: int) -> Tensor | float:
        if getattr(module, "layer_idx", None) != 1 or n < prompt:
            return 0.0
        row, column = torch.arange(n), torch.arange(m)
        if keys == "image":
            image = nn.functional.pad(places(inputs), (0, m - prompt))
            cut = (row >= prompt - 1)[:, None] & image[:, None, None]
        else:
            cut = ((row >= prompt)[:, None] & (column >= prompt))[None, None]
        return torch.zeros(cut.shape, dtype=torch.float64).masked_fill(cut, -torch.inf)

    return bias


EDITS = {"image": {"queries": "last", "keys": "image"}, "answer": {"queries": "answer", "keys": "answer"}}


def steps(model: Any, inputs: dict[str, Any], cache: Any) -> Iterator[Tensor]:
    """The logits (B, vocabulary) of greedy decoding, token by token; without a cache the whole sequence runs each time."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if cache is None:
        for _ in range(NEW):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **images).logits[:, -1]
            yield logits
            ids, mask = torch.cat([ids, logits.argmax(-1)[:, None]], 1), nn.functional.pad(mask, (0, 1), value=1)
        return
    step = {"input_ids": ids, **images}
    for _ in range(NEW):
        logits = model(**step, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
        yield logits
        step, mask = {"input_ids": logits.argmax(-1)[:, None]}, nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.parametrize("keys", EDITS)
@pytest.mark.parametrize("kind", ["LlavaForConditionalGeneration", "Mistral3ForConditionalGeneration", "LlamaForCausalLM"])
def test_a_cache_gives_what_whole_sequences_under_the_whole_mask_give(kind: str, keys: str) -> None:
    model, inputs = decoder(kind)
    edit = va.Knockout(**EDITS[keys], layers=1)
    if kind == "LlamaForCausalLM" and keys == "image":
        with pytest.raises(ValueError, match="has no meaning in tower 'language'"):
            va.intervene(model, inputs, edit)
        return
    inputs["attention_mask"][:] = 1  # positions then do not depend on the cache
    with torch.no_grad(), biased(model, cut_of(inputs, keys)):
        expected = list(steps(model, inputs, None))
    with torch.no_grad():
        plain = list(steps(model, inputs, transformers.DynamicCache()))
        with va.intervene(model, inputs, edit):
            for cache in (transformers.DynamicCache(), None, transformers.StaticCache(model.config, max_cache_len=64)):
                for logits, whole in zip(steps(model, inputs, cache), expected, strict=True):
                    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-9)
            generated = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert not torch.allclose(plain[-1], expected[-1], atol=1e-4)
    tokens = torch.stack([logits.argmax(-1) for logits in expected], 1)
    assert torch.equal(generated[:, -NEW:], tokens)


def test_beams_are_copies_of_their_prompt() -> None:
    model, inputs = decoder("LlavaForConditionalGeneration")
    chosen = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    inputs["attention_mask"][:] = 1
    with torch.no_grad():
        with biased(model, lambda *call: _of_beams(cut_of(inputs, "image")(*call))):
            expected = model.generate(**inputs, **chosen, use_cache=False)
        with va.intervene(model, inputs, va.Knockout(**EDITS["image"], layers=1)):
            assert torch.equal(model.generate(**inputs, **chosen), expected)
        assert not torch.equal(model.generate(**inputs, **chosen), expected)


def _of_beams(bias: Any) -> Any:
    return bias.repeat_interleave(3, 0) if isinstance(bias, Tensor) and len(bias) > 1 else bias


def test_beams_are_patched_with_the_outputs_of_their_prompt() -> None:
    """Two beams: all go on from the first row of their prompt, and of three, row 3 is the second prompt's in any order."""
    model, inputs = llama()
    model.generation_config.eos_token_id = None
    chosen: Any = {"max_new_tokens": NEW, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    chosen |= {"output_scores": True, "return_dict_in_generate": True}
    run = va.record_heads(model, {**inputs, "input_ids": inputs["input_ids"].flip(1)}, layers=1)
    assert run.outputs is not None
    other = run.outputs[1][:, 2].repeat_interleave(2, 0)  # (B, N, Dv) of head 2

    def changed(states: Tensor) -> Tensor:
        states[:, : other.shape[1], 2] = other
        return states

    layer = model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        with hooked(layer, changed, 4):
            expected = model.generate(**inputs, **chosen, use_cache=False)
        with va.intervene(model, inputs, va.Patch(run, {1: [2]})):
            patched = model.generate(**inputs, **chosen)
    assert torch.equal(patched.sequences, expected.sequences)
    torch.testing.assert_close(patched.sequences_scores, expected.sequences_scores)


def test_a_prompt_may_run_in_parts() -> None:
    """`prefill_chunk_size` runs the prompt part by part: groups count on from the cache, as in a run on the whole prompt."""
    model, inputs = llama()
    model.generation_config.eos_token_id = None
    inputs["attention_mask"][1, :3] = 0
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    run, states = va.record_heads(model, other, layers=0), va.record_states(model, other, layers=1)
    edits = [
        va.Knockout(queries=(2, 7), keys=[(1, 3), (4, 5)], layers=2),
        va.Steer(queries="last", keys=(3, 6), weight=3.0),
        va.Steer(keys="last", weight=0.3, layers=1),
        va.Patch(run, {0: [1]}, queries=(3, 8)),
        va.Residual(1, (2, 6), set=states),
        va.Mlp(2, "last", scale=0.5),
    ]
    chosen: Any = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), va.intervene(model, inputs, edits):
        whole = torch.stack(model.generate(**inputs, **chosen).logits)
        for further in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
            parts = model.generate(**inputs, **chosen, **further, prefill_chunk_size=4)
            if "num_beams" in further:
                assert torch.equal(parts.sequences, model.generate(**inputs, **chosen, **further).sequences)
            else:
                torch.testing.assert_close(torch.stack(parts.logits), whole, rtol=0, atol=1e-5)
        for ids in (other["input_ids"], inputs["input_ids"][:, :5]):  # parts of other inputs have no groups
            with pytest.raises(ValueError, match="must run on the 9 tokens .* part by part with a cache, .*; got [46]"):
                model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=4)
    assert not torch.allclose(torch.stack(model.generate(**inputs, **chosen).logits), whole, atol=1e-2)


def test_last_among_the_keys_is_the_row_that_runs() -> None:
    model, inputs = decoder("LlamaForCausalLM")
    inputs["attention_mask"][:] = 1
    with torch.no_grad(), va.intervene(model, inputs, va.Knockout(queries="last", keys="last")):
        with pytest.raises(ValueError, match="keys='last' needs tokens that run one by one"):
            list(steps(model, inputs, None))


def test_an_encoder_decoder_generates_with_edits_of_its_cross_attention() -> None:
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.randint(3, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    chosen = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), va.intervene(model, inputs, va.Knockout(keys=(2, 7), tower=("tower1", "tower0"))):
        cut = model.generate(**inputs, **chosen)
    with torch.no_grad():
        states, mask = model.encoder(**inputs), inputs["attention_mask"].clone()
        mask[:, 2:] = 0  # the decoder alone does not see them
        masked = model.generate(encoder_outputs=states, attention_mask=mask, **chosen)
    for one, other in zip(cut.logits, masked.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# Pairs of edits: one of keys="last", and one whose set holds the prompt's last token, or grows behind it.
PAIRS = ("answer", "span", "mask", "image")


def of_pair(inputs: dict[str, Any], name: str) -> tuple[list[Any], Any]:
    """The edits, and the bias that they are on whole sequences: each row from the prompt's last one on ran as the newest."""
    prompt = inputs["input_ids"].shape[1]
    second: dict[str, Any] = {
        "answer": {"keys": "answer"},
        "span": {"queries": "last", "keys": (prompt - 4, prompt)},
        "mask": {"keys": nn.functional.one_hot(torch.tensor(prompt - 1), prompt).bool()},
        "image": {"queries": "last", "keys": "image"},
    }[name]

    def bias(module: nn.Module, n: int, m: int) -> Tensor | float:
        if "vision" in type(module.config).__name__.lower():
            return 0.0
        row, column = torch.arange(n)[:, None], torch.arange(m)
        runs = row >= prompt - 1
        keys = {"answer": column >= prompt, "span": (column >= prompt - 4) & (column < prompt), "mask": column == prompt - 1}
        of_keys = nn.functional.pad(places(inputs), (0, m - prompt))[:, None, None] if name == "image" else keys[name]
        of_second = of_keys & (runs if "queries" in second else torch.ones_like(runs))
        return (runs & (row == column)) * math.log(0.2) + of_second * math.log(4.0)

    return [va.Steer(queries="last", keys="last", weight=0.2), va.Steer(**second, weight=4.0)], bias


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("LlavaForConditionalGeneration", name) for name in PAIRS),
        *((kind, name) for kind in ("LlamaForCausalLM", "Gemma3ForCausalLM") for name in PAIRS if name != "image"),
    ],
)
def test_each_cache_counts_tokens_and_not_its_places(kind: str, name: str) -> None:
    """A cache of fixed length has places behind the prompt before any token is there; one of a sliding window loses the first."""
    model, inputs = decoder(kind)
    inputs["attention_mask"][:] = 1
    edits, bias = of_pair(inputs, name)
    how: Any = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), biased(model, bias):
        expected = torch.stack(list(steps(model, inputs, None)))
    with torch.no_grad():
        plain = torch.stack(model.generate(**inputs, **how).logits)
        for cache in ("static", "dynamic"):
            with va.intervene(model, inputs, edits):
                logits = torch.stack(model.generate(**inputs, **how, cache_implementation=cache).logits)
            torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    assert float((plain.double() - expected).abs().amax((1, 2)).min()) > 1e-3  # in each step
