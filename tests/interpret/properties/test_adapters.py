"""What every class with an adapter must keep: a tiny model of it, on the inputs that `tools.tiny_models` finds for it."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.small_models import assert_close
from tests.helpers.interpret.traces import assert_same, state_of
from tools.tiny_models.inputs import inputs_of
from tools.tiny_models.shrink import small_model
from vlattn_fast.interpret.adapters.encoders import ENCODERS

WITHOUT = {
    "UNITER": "a model of this package: test_samples_and_tokens.py",
    "CLIPMapper": "a model of this package: tests/interpret/adapters/test_clip_mapper.py",
    **dict.fromkeys(("LxmertForQuestionAnswering", "LxmertForPreTraining", "LxmertModel"), "it takes regions"),
    **dict.fromkeys(("DetrForObjectDetection", "ConditionalDetrForObjectDetection"), "its backbone needs timm"),
    **dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), "its texts need an end: CLIPModel's have one"),
    **dict.fromkeys(("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"), "its tiny models do not run"),
    "PI0ForConditionalGeneration": "it takes an action: tests/interpret/adapters/test_policies.py",
}
ELSEWHERE = {  # encoders whose record is compared with stored maps alone: tests/interpret/adapters/test_encoders.py
    "GitForCausalLM": "it reads the last token, as decoders do",
    "DeiTForImageClassificationWithTeacher": "its score reads two tokens, and its record the first",
    **dict.fromkeys(("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"), "it reads a token and a mean"),
}
POOLED = ("pooler_output", "text_embeds", "image_embeds", "last_hidden_state", "multimodal_embeddings")


def target_of(outputs: Any) -> Tensor:
    """A number of a model without logits."""
    states: Tensor = next(getattr(outputs, name) for name in POOLED if getattr(outputs, name, None) is not None)
    return (states if states.ndim == 2 else states[:, 0])[:, 3]


def cases() -> list[Any]:
    """The first class of each combination of kinds of tokens and positions is quick."""
    seen, rows = set(), []
    for name, adapter in va.interpret.ADAPTERS.items():
        kind = (adapter.score, *((tower.tokens, tower.position) for tower in adapter.towers))
        if name not in WITHOUT:
            slow = kind in seen or name.startswith("Florence")  # whose inputs take seconds to find
            rows.append(pytest.param(name, marks=[pytest.mark.slow] if slow else []))
            seen.add(kind)
    return rows


@functools.cache
def found(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A model with its inputs and the options of `explain`, once for all tests of a class."""
    model, errors = small_model(getattr(transformers, name)).double(), []
    first = ("zero-shot", "image-text") if va.interpret.ADAPTERS[name].score == "pair" else ("image-text", "zero-shot")
    for mapping in (*first, "text", "image"):
        for make in inputs_of(mapping, model):
            inputs = {key: x.double() if x.is_floating_point() else x for key, x in make().items()}
            if not inputs.get("attention_mask", torch.ones(1, 1))[:, 0].all():
                continue  # padding on the left, where some of these classes have the token that they read
            for options in ({}, {"target": target_of}):
                try:
                    va.explain(model, inputs, **options)
                except Exception as error:  # inputs of another kind of model
                    errors.append(f"{mapping} {[*inputs]}: {error!r}")
                else:
                    return model, inputs, options
    raise AssertionError(f"{name} runs on no inputs; say in WITHOUT why. " + "\n".join(errors))


@pytest.mark.filterwarnings("ignore:.*")  # of random models
@pytest.mark.parametrize("name", cases())
def test_a_sample_of_a_batch_is_explained_as_alone_whatever_its_padding_holds(name: str) -> None:
    model, inputs, options = found(name)
    batch, before = len(next(iter(inputs.values()))), state_of(model)
    together = va.explain(model, inputs, **options)
    assert_same(model, before, name)
    changed, mask = dict(inputs), inputs.get("attention_mask")
    if mask is not None:
        changed["input_ids"] = torch.where(mask.bool(), inputs["input_ids"], 7)
    others = va.explain(model, changed, **options)
    reads_padding = not torch.allclose(others.scores, together.scores)  # as SigLIP does
    for tower, rows in together.relevancy.items():
        assert rows.any(), tower
        if reads_padding:
            continue
        assert_close(others.relevancy[tower], rows, f"{tower}: other padding")
        if mask is not None and rows.shape == mask.shape and tower != "vision":
            assert not rows[~mask.bool()].any(), f"{tower}: padding"
    for sample in range(batch):
        one = {key: x[sample : sample + 1] for key, x in inputs.items()}
        alone = va.explain(model, one, **options)
        for tower, rows in together.relevancy.items():
            assert_close(alone.relevancy[tower][0], rows[sample], f"{tower} of sample {sample}")
        assert together.token_ids is None or alone.token_ids == [together.token_ids[sample]]
        if va.interpret.ADAPTERS[name].score not in ("pair", "query") and together.target is not None:
            assert alone.target == [together.target[sample]]


@pytest.mark.filterwarnings("ignore:.*")  # of random models
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in {**WITHOUT, **ELSEWHERE}])
def test_the_record_of_an_encoder_reads_where_its_score_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the score names the token that it is read from."""
    model, inputs, options = found(name)
    adapter = va.interpret.ADAPTERS[name]
    if options:  # without logits: methods without a gradient read where the record says
        read = {tower: positions[:, None] for tower, positions in va.explain(model, inputs, **options).position.items()}
        by_record = va.explain(model, inputs, method="attention").relevancy
        sizes = {tower: by_record[tower].shape[1] for tower in read}
        rows = {tower: torch.zeros(len(at), sizes[tower]).scatter_(1, at, 1.0) for tower, at in read.items()}
        by_score = va.explain(model, inputs, method="attention", position=rows or None).relevancy
    else:
        target = None if adapter.score == "pair" else 0
        by_record = va.explain(model, inputs, target=target).relevancy
        found_out = tuple(tower if tower.pooling else replace(tower, position="gradient") for tower in adapter.towers)
        monkeypatch.setitem(va.interpret.ADAPTERS, name, replace(adapter, towers=found_out))
        by_score = va.explain(model, inputs, target=target).relevancy
    for tower, rows_of_record in by_record.items():
        assert_close(by_score[tower], rows_of_record, tower)
