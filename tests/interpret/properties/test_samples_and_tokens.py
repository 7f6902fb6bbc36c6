"""What stands beside a token, and must not matter to it: padding, other samples, later tokens, further tokens of an answer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.small_models import DECODERS, MODELS, REFUSED, SIDES, Small, assert_close, every, made, method_named
from vlattn_fast.interpret import Explanation
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS, find_method

pytestmark = pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")  # of the published rollout


def assert_rows(got: Explanation, expected: Explanation, small: Small, inputs: dict[str, Tensor], sample: int, what: Any) -> None:
    """A sample has the rows of the same sample alone, and zeros in padding."""
    assert list(got.relevancy) == list(expected.relevancy), what
    for tower, row in expected.relevancy.items():
        real = small.real_tokens(tower, inputs, row.shape[1])[sample]
        whole = torch.zeros(len(real), dtype=row.dtype).masked_scatter_(real, row[0])
        assert_close(got.relevancy[tower][sample], whole, f"{what}, {tower}", 1e-3 * float(expected.scores.abs().max()))
    assert_close(got.scores[sample], expected.scores[0], f"{what}, score")


@every()
def test_padding_and_other_samples_change_nothing(method: str, model: str) -> None:
    """On either side, whatever stands in it, in any order of the samples."""
    small, chosen = made(model), method_named(method)
    alone = [small.explain(small.batch([i]), chosen) for i in (0, 1)]
    for each in alone if method in METHODS else ():
        least = 1e-9 * float(each.scores.abs().max())
        assert all(row.abs().max() > least for row in each.relevancy.values()), "zeros show nothing"
    for side in small.sides or SIDES[:1]:
        for order, more, filler in (((0, 1), 0, 0), ((1, 0, 1), 2, 5)):
            inputs = small.batch(order, side, more, filler)
            together = small.explain(inputs, chosen)
            for sample, i in enumerate(order):
                assert_rows(together, alone[i], small, inputs, sample, f"{side} {order}, sample {sample}")


@pytest.mark.parametrize("method", [method for method in {**METHODS, **ABLATIONS} if REFUSED.get(method)])
def test_what_a_method_refuses(method: str) -> None:
    assert REFUSED[method] < {*MODELS}
    for model in sorted(REFUSED[method]):
        small = made(model)
        with pytest.raises(
            ValueError, match=f"method must (be|support)|method={method!r} does not|for method {method!r}|adapter"
        ):
            small.explain(small.batch([0]), method_named(method))
            pytest.fail(f"{method} explains {model}: take it out of REFUSED")


NO_EMPTY_BATCH = {
    "whisper": "its attention, of transformers, cannot reshape an empty batch",
    "captioner": "the tokens of an own encoder-decoder are found in its first sample",
}


@every(quick=("pooled",), without=NO_EMPTY_BATCH)
def test_an_empty_batch_has_empty_rows(method: str, model: str) -> None:
    small, chosen = made(model), method_named(method)
    inputs = small.batch()
    empty = {name: x[:0] for name, x in inputs.items()}
    full, got = small.explain(inputs, chosen), small.explain(empty, chosen)
    assert len(got) == 0 and got.scores.shape == (0,)
    of_rows = ({t: (row.shape[1:], row.dtype) for t, row in each.relevancy.items()} for each in (got, full))
    assert next(of_rows) == next(of_rows)
    for name in ("target", "token_ids", "image", "image_samples", "text", "regions", "boxes"):
        value = getattr(got, name)
        assert value is None or len(value) == 0, name
        if model != "siglip2":  # the grids of its maps are those of its samples
            assert (value is None) == (getattr(full, name) is None), name
    if chosen.by_layer:
        rows = va.explain_layers(small.model, empty, method=chosen, per="head", **small.options).relevancy
        assert [*rows] == [*full.relevancy] and all(row.shape[2] == 0 for row in rows.values())


DECODING = ("llama", "gemma2", "gpt_oss", "qwen3_next", "llava", "blip2", "t5", "captioner", "whisper")
LATER = {
    "gradcam": "the mean of its head's gradients is over all pairs, as published",
    "glimpse": "the weights of its heads and layers are of all rows, as published",
    "tam": "it explains a token, and no callable: test_each_token_of_an_answer",
    ("rollout", "t5"): "the published map of the encoder is partly of later tokens",
    ("rollout", "captioner"): "the published map of the encoder is partly of later tokens",
    ("rollout", "whisper"): "the published map of the encoder is partly of later tokens",
    "blip2": "its positions are those of its mask",
}


@every(*DECODING, without=LATER)
def test_later_tokens_have_no_part(method: str, model: str) -> None:
    small, chosen = made(model), method_named(method)
    assert small.causal is not None
    name, towers = small.causal
    inputs = small.batch([0])
    size = inputs[name].shape[1]
    at = size - 3
    short = {key: x[:, : at + 1] if x.ndim == 2 and x.shape[1] == size else x for key, x in inputs.items()}

    def target(outputs: Any) -> Tensor:
        return getattr(outputs, "logits", outputs)[:, at, 7]

    position = {"position": {towers[0]: at}} if chosen.uses_position else {}
    got, expected = (small.explain(each, chosen, target=target, **position) for each in (inputs, short))
    for tower, row in expected.relevancy.items():
        zeros = torch.zeros(1, size - at - 1 if tower in towers else 0, dtype=row.dtype)
        assert_close(got.relevancy[tower], torch.cat([row, zeros], 1), tower, 1e-3 * float(expected.scores.abs().max()))


OF_ANSWERS = {name: reason for name, reason in LATER.items() if name not in ("tam", "blip2")} | {
    ("tam", model): "the words of an answer have the weights of where they are predicted, as published"
    for model in ("llava", "blip2")
}
ANSWER = [[11, 12], [14]]


@every(*DECODING, without=OF_ANSWERS)
def test_each_token_of_an_answer_is_as_a_call_for_it_alone(method: str, model: str) -> None:
    """Of prompts of unequal lengths, with answers of unequal lengths; behind an encoder, as the last token of its answer."""
    small, kind = made(model), find_method(method)
    chosen = method_named(method, **({"of": "log_probability"} if "of" in kind.option_names() else {}))
    small = replace(small, options={})
    if model not in DECODERS:  # the token with which answers begin
        start = torch.tensor([[4]])
        small = replace(small, samples=[{**each, "decoder_input_ids": start} for each in small.samples])
    side = (small.sides or SIDES[:1])[-1]
    together = small.explain(small.batch(side=side), chosen, answer=ANSWER)
    least = 1e-3 * float(together.scores.abs().max())
    assert not together.scores[1, 1] and not any(rows[1, 1].any() for rows in together.relevancy.values())
    for sample, step in ((0, 0), (0, 1), (1, 0)):
        answer, alone = ANSWER[sample][: step + 1], small
        if model in DECODERS:
            ids = torch.cat([small.samples[sample]["input_ids"], torch.tensor([answer[:step]]).long()], 1)
            alone = replace(small, samples=[{**small.samples[sample], "input_ids": ids}])
            rows = alone.explain(alone.batch([0]), chosen, target=answer[-1]).relevancy
        else:
            rows = {
                tower: x[:, -1] for tower, x in small.explain(small.batch([sample]), chosen, answer=[answer]).relevancy.items()
            }
        for tower, row in rows.items():
            # prompts are padded, and what an encoder takes
            encoded = model not in DECODERS and tower in small.real
            size = row.shape[1] - (0 if encoded else step)
            longest = max(each["input_ids"].shape[1] for each in small.samples) if side == "left" else size
            before = longest - size if model in DECODERS or encoded else 0
            expected = nn.functional.pad(row[0], (before, together.relevancy[tower].shape[2] - before - row.shape[1]))
            assert_close(together.relevancy[tower][sample, step], expected, f"sample {sample}, token {step} of {tower}", least)
