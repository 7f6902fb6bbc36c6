"""A captured layer beside its queries and keys: the model's own scale, mask and causality, and where the image stands."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.nn.models import DEEP, HEAD_DIM, MODELS, PATCHES, WORDS, words
from vlattn_fast.backends.reference.congruence_loss import congruence_loss as formula
from vlattn_fast.nn import CongruenceLoss, QueryKey, capture_attention

IMAGE_TOKEN, PATCH_TOKENS = 95, 16
DECODER: dict[str, Any] = {**DEEP, "vocab_size": 99, "pad_token_id": 0}
SCALE = 0.7  # of Granite here; 1/sqrt(8) is 0.35


def granite() -> hf.GraniteConfig:
    return hf.GraniteConfig(**DECODER, num_key_value_heads=2, attention_multiplier=SCALE, initializer_range=0.3)


def gemma() -> hf.Gemma3TextConfig:
    return hf.Gemma3TextConfig(**DECODER, head_dim=8, num_key_value_heads=2, query_pre_attn_scalar=50, initializer_range=0.3)


def opt() -> hf.OPTConfig:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 37, "num_hidden_layers": 2}
    return hf.OPTConfig(vocab_size=99, word_embed_proj_dim=32, init_std=0.3, **sizes)


def llava(places: list[int]) -> tuple[nn.Module, dict[str, Tensor]]:
    """LLaVA over Granite. In both rows, `places` of 23 are words; the image's 16 tokens stand at the others."""
    vision = hf.CLIPVisionConfig(**DEEP, **PATCHES)
    config = hf.LlavaConfig(vision_config=vision, text_config=granite(), image_token_index=IMAGE_TOKEN)
    ids = torch.full((2, len(places) + PATCH_TOKENS), IMAGE_TOKEN)
    ids[:, places] = torch.randint(5, 90, (2, len(places)))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)}
    return hf.LlavaForConditionalGeneration(config).eval(), inputs


BEHIND = [0, *range(17, 23)]  # the first token, and the words behind the image


def attention_of(pair: QueryKey) -> Tensor:
    """softmax(scale * query key^T + mask), by what the pair tells."""
    scores = pair.scale * pair[0] @ pair[1].mT
    if pair.attn_mask is not None:
        mask = pair.attn_mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if pair.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [granite, gemma, opt, hf.BertConfig])
def test_attention_of_the_model(config: Any, implementation: str, padded: bool) -> None:
    """Against the model's own maps, which eager attention gives: Granite, Gemma and OPT have scales of their own."""
    made = hf.BertConfig(vocab_size=99, initializer_range=0.3, **DEEP) if config is hf.BertConfig else config()
    model = (hf.AutoModel if config is hf.BertConfig else hf.AutoModelForCausalLM).from_config(made).eval()
    model.set_attn_implementation(implementation)
    inputs = words()
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with capture_attention(model) as captured:
        model(**inputs)
    model.set_attn_implementation("eager")
    want = model(**inputs, output_attentions=True).attentions[-1]
    real = inputs["attention_mask"].bool()
    got = attention_of(captured.layer.sequence)
    torch.testing.assert_close(got.transpose(1, 2)[real], want.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
    assert captured.is_causal == captured.layer.is_causal == (config is not hf.BertConfig)
    assert captured.scale == captured.layer.scale == captured.text.scale
    assert captured.layer.query is captured.query is captured.text[0] and captured.layer.key is captured.key
    if padded:
        assert torch.equal(captured.text.key_mask, real)


@pytest.mark.parametrize("name", ["VisualBERT", "ViLT", "LXMERT"])
def test_attention_that_is_written_out_by_hand(name: str) -> None:
    model, inputs = MODELS[name]()
    with capture_attention(model.eval()) as captured:
        outputs = model(**inputs, output_attentions=True)
    pair = captured.text if name == "LXMERT" else captured.joint
    want = outputs.language_attentions[-1] if name == "LXMERT" else outputs.attentions[-1]
    assert captured.scale == pytest.approx(HEAD_DIM**-0.5) and not pair.is_causal
    assert pair.key_mask is not None and torch.equal(pair.key_mask[:, :WORDS], inputs["attention_mask"].bool())
    if name != "LXMERT":  # of which the maps are those of the layers in front of cross-attention
        torch.testing.assert_close(attention_of(pair), want, rtol=1e-4, atol=1e-6)


class Written(nn.Module):
    """Attention of one head over words and image tokens, by hand in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, text: Tensor, image: Tensor, keep: Tensor) -> Tensor:
        x = torch.cat([image, text], dim=1)[:, None]
        scores = x @ x.mT
        if self.way == "in place":
            scores *= 0.25
            scores += torch.where(keep, 0.0, -torch.inf)[:, None, None]
        elif self.way == "fill":
            scores = (2.0 * scores.float() / 8).masked_fill(~keep[:, None, None], -1e9)
        elif self.way == "soft cap":
            scores = 3 * torch.tanh(scores / 3)
        elif self.way == "scaled mask":
            scores = (scores * 0.5 + torch.where(keep, 1.0, -3.0)[:, None, None]) * 0.5
        elif self.way == "cap over a mask":
            scores = (scores + torch.where(keep, 1.0, -3.0)[:, None, None]).tanh()
        elif self.way == "divisor":
            scores = torch.tensor(1.0) / scores
        elif self.way == "set":
            scores = scores / 4
            scores[:, :, :, :2] = -torch.inf
        return scores.softmax(-1) @ x


def written(way: str) -> tuple[Any, Tensor, Tensor]:
    """The capture, the output of the module, and the mask of its keys."""
    text, image, keep = torch.randn(2, 5, 8), torch.randn(2, 3, 8), torch.ones(2, 8, dtype=torch.bool)
    keep[0, 6:] = False
    with capture_attention(Written(way)) as captured:
        return captured, captured.model(text, image, keep), keep


def test_scale_and_mask_of_a_module_of_ones_own() -> None:
    for way in ("in place", "fill"):
        captured, out, keep = written(way)
        torch.testing.assert_close(attention_of(captured.joint) @ captured.query, out)
        assert captured.scale == 0.25 and torch.equal(captured.joint.key_mask, keep)
        parts = captured.split()
        assert torch.equal(parts[0].key_mask, keep[:, 3:]) and torch.equal(parts[1].key_mask, keep[:, :3])
        with pytest.raises(ValueError, match="num_text_tokens must be the number of words before the image; got 5"):
            captured.split(5)


def test_scores_that_are_not_scaled_and_then_masked_have_no_scale() -> None:
    for way in ("soft cap", "scaled mask", "cap over a mask", "divisor", "set"):
        captured, _, _ = written(way)
        for name in ("scale", "is_causal", "attn_mask"):
            with pytest.raises(ValueError, match=f"a layer has {name} only if it does no more than scale and mask"):
                getattr(captured, name)
        assert captured.split()[0][0].shape == (2, 1, 5, 8)
        if way == "soft cap":
            maps = (3 * torch.tanh(captured.query @ captured.key.mT / 3)).softmax(-1)
            torch.testing.assert_close(captured.joint.token_scores(queries="all"), maps.mean((1, 2)))


@pytest.mark.parametrize(
    ("score", "options", "name"),
    [
        ("additive", {}, "the score 'additive'"),
        ("scaled_dot", {"softcap": 2.0}, "a softcap"),
        ("scaled_dot", {"sink": True, "softcap": 2.0}, "a softcap and a sink"),
        ("biased_general", {"sink": True}, "the score 'dot with an offset and a sink'"),
    ],
)
def test_a_score_that_is_no_dot_product_has_no_scale(score: str, options: dict[str, Any], name: str) -> None:
    layer = va.nn.ScoreAttention(16, 2, score, **options)
    with capture_attention(layer, modality={"query": "text"}) as captured:
        layer(torch.randn(2, 5, 16))
    with pytest.raises(ValueError, match=f"a layer has scale only if .* this one has {name}: pass"):
        _ = captured.scale


@pytest.mark.parametrize("fast", [True, False])
def test_masks_of_torchs_layer(fast: bool) -> None:
    layer, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with capture_attention(layer.eval(), modality={"query": "text"}) as captured:
        _, maps = layer(x, x, x, key_padding_mask=padding.float() * -1e9, attn_mask=causal, average_attn_weights=False)
    torch.testing.assert_close(attention_of(captured.text), maps)
    assert captured.is_causal and torch.equal(captured.text.key_mask, ~padding)
    with capture_attention(layer.train(not fast), modality={"query": "text"}) as captured:
        layer(x, x, x, need_weights=False)
    assert captured.attn_mask is None and captured.text.key_mask is None and not captured.is_causal


def test_a_call_of_one_head_without_a_dimension_of_heads() -> None:
    class OneHead(nn.Module):
        def forward(self, text: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(text, text, text, attn_mask=mask)

    text, mask = torch.randn(2, 5, 8), torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 1, 2:], mask[1, :, 4] = False, False
    with capture_attention(OneHead()) as captured:
        out = captured.model(text, mask)
    torch.testing.assert_close((attention_of(captured.text) @ text[:, None])[:, 0], out)


def test_a_layer_of_torch_with_weights_of_its_own_for_each_input_and_one_without_a_batch() -> None:
    x, values, padding = torch.randn(2, 5, 16), torch.randn(2, 5, 12), torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    for layer, value, part in (
        (nn.MultiheadAttention(16, 2, vdim=12, batch_first=True), values, slice(None)),
        (nn.MultiheadAttention(16, 2, batch_first=True), x, 1),
    ):
        with capture_attention(layer, modality={"query": "text", "key": "text"}) as captured:
            inputs = {"query": x[part], "key": x[part], "value": value[part], "key_padding_mask": padding[part]}
            _, maps = layer(**inputs, average_attn_weights=False)
        torch.testing.assert_close(attention_of(captured.text), maps if maps.ndim == 4 else maps[None])


def test_a_layer_of_torch_with_one_more_key_has_no_scale() -> None:
    """The captured keys are those of tokens, which share the attention with that key."""
    x = torch.randn(2, 5, 16)
    for key in ("add_zero_attn", "add_bias_kv"):
        layer = nn.MultiheadAttention(16, 2, batch_first=True, **{key: True})
        with capture_attention(layer, modality={"query": "text"}) as captured:
            layer(x, x, x)
        assert captured.key.shape == (2, 2, 5, 8)
        with pytest.raises(ValueError, match="a layer has scale only if it does no more than scale and mask"):
            _ = captured.scale


@pytest.mark.parametrize("name", ["VisualBERT", "LXMERT", "UNITER"])
@pytest.mark.parametrize("kind", ["cacr", "iais_distributed"])
def test_the_loss_takes_the_padding_of_the_layer(name: str, kind: str) -> None:
    model, inputs = MODELS[name]()
    for key in ("visual_attention_mask", "region_mask"):
        if key == "region_mask" and name == "UNITER" or key in inputs:
            inputs[key] = torch.ones(2, 7, dtype=torch.bool if name == "UNITER" else torch.float32)
            inputs[key][0, 4:] = 0
    with capture_attention(model.eval()) as captured:
        model(**inputs)
    text_mask, image_mask = inputs["attention_mask"].bool(), torch.ones(2, 7, dtype=torch.bool)
    image_mask[0, 4:] = name == "LXMERT"
    loss = CongruenceLoss(kind)
    torch.testing.assert_close(loss(captured), loss(captured, text_mask=text_mask, image_mask=image_mask))
    no_padding = torch.ones_like(text_mask)
    assert not torch.allclose(loss(captured), loss(captured, text_mask=no_padding, image_mask=no_padding), rtol=1e-3, atol=0)


def test_the_loss_of_a_decoder() -> None:
    """The loss with Granite's own scale, with words and image tokens told apart, against the formula."""
    model, inputs = llava(BEHIND)
    with capture_attention(model) as captured:
        model(**inputs)
    of_image = inputs["input_ids"][0] == IMAGE_TOKEN
    parts = [(captured.query[:, :, x], captured.key[:, :, x]) for x in (~of_image, of_image)]
    text_mask = inputs["attention_mask"][:, ~of_image].bool()
    options: dict[str, Any] = {"kind": "iais_distributed", "text_mask": text_mask}
    want = formula(*parts, scale=SCALE, **options)
    torch.testing.assert_close(CongruenceLoss("iais_distributed")(captured), want)
    torch.testing.assert_close(CongruenceLoss("iais_distributed")(captured, text_mask=text_mask), want)
    text, image, cross = captured.split()
    torch.testing.assert_close(va.congruence_loss(text, image, cross, scale=captured.scale, **options), want)
    other = formula(*parts, scale=None, **options)
    assert not torch.allclose(want, other, rtol=0.02)  # a scale of 1/sqrt(D) is another attention
    torch.testing.assert_close(CongruenceLoss("iais_distributed", scale=HEAD_DIM**-0.5)(captured), other)


@pytest.mark.parametrize("places", [BEHIND, [0, 1, 18, 19, 20, 21, 22]])
def test_parts_of_a_decoder(places: list[int]) -> None:
    model, inputs = llava(places)
    with capture_attention(model) as captured:
        model(**inputs)
    of_text = inputs["input_ids"] != IMAGE_TOKEN
    assert captured.is_image is not None and torch.equal(captured.is_image, ~of_text)
    ways: list[dict[str, Any]] = [
        {},
        {"text": places},
        {"text": torch.tensor(places)},
        {"text": of_text},
        {"image": ~of_text},
        {"image": ~of_text[0]},
        {"text": of_text[0].tolist(), "image": ~of_text},
    ]
    for way in ways:
        text, image, cross = captured.split(**way)
        assert cross is None and text.scale == SCALE and text.is_causal and image.is_causal
        for part, where in ((text, of_text[0]), (image, ~of_text[0])):
            assert torch.equal(part[0], captured.query[:, :, where]) and torch.equal(part[1], captured.key[:, :, where])
        assert torch.equal(text.key_mask, inputs["attention_mask"][:, of_text[0]].bool()) and bool(image.key_mask.all())
    with pytest.raises(ValueError, match="num_text_tokens must be .* got 7, and an image token at [12]:"):
        captured.split(7)


def test_bad_parts() -> None:
    model, inputs = llava(BEHIND)
    with capture_attention(model) as captured:
        model(**inputs)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"text": [0, 23]}, "text must be positions from 0 to 22"),
        ({"image": torch.ones(2, 5, dtype=torch.bool)}, "image must be positions"),
        ({"image": torch.ones(23)}, "image must be positions"),
        ({"text": [0, 3], "image": [3, 4]}, "text and image must have no token in common"),
        ({"num_text_tokens": 3, "text": [0]}, "text and image must be None if num_text_tokens is given"),
        ({"num_text_tokens": 2.5}, "num_text_tokens must be from 0 to 23"),
        ({"text": torch.arange(46).view(2, 23) < 25}, "must have as many tokens in each sample; got 2 to 23"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            captured.split(**options)
    with pytest.raises(TypeError, match="text must be positions"):
        captured.split(text="words")


def test_positions_that_the_run_does_not_show() -> None:
    """Words and image tokens that are one tensor already: the caller says how many words there are."""

    class Mixed(nn.Module):
        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            x = torch.cat([text[:, None], image[:, None]], dim=2)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model = Mixed()
    with capture_attention(model) as captured:
        model(torch.randn(2, 4, 8), torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="num_text_tokens, text or image must be given"):
        captured.split()
    with pytest.raises(ValueError, match="text_mask .* must be given, to tell how many"):
        CongruenceLoss()(captured)
    text, image, _ = captured.split(4)
    assert text[0].shape == (2, 1, 4, 8) and torch.equal(image[0], captured.joint[0][:, :, 4:])
    assert captured.joint[0] is captured.query


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_pair(copied: Any) -> None:
    model, inputs = llava(BEHIND)
    with torch.no_grad(), capture_attention(model) as captured:
        model(**inputs)
    pair = copied(captured.joint)
    assert torch.equal(pair[0], captured.query) and pair.scale == SCALE and pair.is_causal
