"""CLIPMapper, and answers of models whose words attend to an image, against the published rules on stored maps."""

import pytest
import torch
import transformers

from tests.helpers.interpret.cases import TEXT, VISION, lively
from tests.helpers.interpret.linked_maps import METHODS, published, with_gradients
from tests.helpers.interpret.stored_maps import assert_rows, literal_attention
from vlattn_fast.interpret import explain
from vlattn_fast.models import CLIPMapper
from vlattn_fast.models._attention import ProjectedAttention

pytestmark = pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")  # of the published rollout

EOS = 58
# What a text is, and where it is read: padded on the right, with an end-of-text token.
IDS = torch.tensor([[57, 4, 9, 11, 7, 23, EOS], [57, 8, 30, EOS, 0, 0, 0]])
LAYERS = 2


def mapper(dtype=torch.float64, **options):
    torch.manual_seed(0)
    ends = dict(bos_token_id=57, eos_token_id=EOS, pad_token_id=0)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **ends, max_position_embeddings=16))
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**dict(VISION, image_size=24)))
    options = options if "vocab_size" in options else {"num_answers": 5, **options}
    sizes = dict(hidden_size=24, num_layers=LAYERS, num_heads=3, **options)
    model = CLIPMapper(vision, text, freeze_encoders=False, **sizes)  # the published rule takes gradients at their maps
    lively(model)
    with torch.no_grad():  # calmer, so that the error of float32 is the rules' and not that of a deep random model
        for parameter in model.parameters():
            parameter.mul_(0.7 if parameter.ndim > 1 else 1.0)
    return model.eval().to(dtype)


def inputs_of(ids, dtype=torch.float64):
    pixels = torch.randn(len(ids), 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {"pixel_values": pixels.to(dtype), "input_ids": ids, "attention_mask": (ids != 0).long()}


def stored(model, inputs):
    """The outputs, and the maps of every attention in the order in which they ran: image, text, then the mapper's layers."""
    maps, handles = [], []
    keep = lambda m, a, o: maps.append(o[1])  # noqa: E731
    for encoder in (model.vision, model.text):
        encoder.set_attn_implementation("literal")
        handles += [layer.self_attn.register_forward_hook(keep) for layer in encoder.encoder.layers]

    def attend(module, query, key, value, mask, **options):
        if mask is None and module.is_causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        output = literal_attention(module, query, key, value, mask, **options)
        maps.append(output[1])
        return output

    with pytest.MonkeyPatch.context() as patch:
        for module in model.modules():
            if isinstance(module, ProjectedAttention):
                patch.setattr(module, "attention_function", attend)
        outputs = model(**inputs)
    for handle in handles:
        handle.remove()
    for encoder in (model.vision, model.text):
        encoder.set_attn_implementation("sdpa")
    layer = ["ti", "tt"] if model.layers[0].cross_first else ["tt", "ti"]
    layer = ["ii"] * bool(model.image_layers) + layer
    kinds = ["ii"] * VISION["num_hidden_layers"] + ["tt"] * TEXT["num_hidden_layers"] + layer * LAYERS
    assert len(kinds) == len(maps)
    return outputs, kinds, maps


DTYPES_OF_METHODS = (*((torch.float64, method) for method in METHODS), (torch.float32, "gradient"))


ORDERS = {
    "text first": {},
    "image tokens to themselves": {"image_self_attention": True},
    "cross first": {"cross_first": True},
    "both": {"image_self_attention": True, "cross_first": True},
}


@pytest.mark.parametrize("order", ORDERS)
def test_an_answer_among_classes(order):
    model, inputs = mapper(**ORDERS[order]), inputs_of(IDS)
    outputs, kinds, maps = stored(model, inputs)
    maps = with_gradients(kinds, maps, outputs.logits.max(-1).values.sum())
    ends = [6, 3]
    for dtype, method in DTYPES_OF_METHODS:
        got = explain(model.to(dtype), inputs_of(IDS, dtype), method=method)
        assert list(got.relevancy) == ["text", "vision"] and got.relevancy["text"].dtype == dtype
        for row, want in zip(got.relevancy.values(), published(method, maps, ends, inputs["attention_mask"]), strict=True):
            assert_rows(row, want, what=(dtype, method))
    assert (got.relevancy["text"].gather(1, torch.tensor(ends)[:, None]) == 0).all()
    assert (got.relevancy["text"][1, 4:] == 0).all()
    assert got.target == outputs.logits.argmax(-1).tolist() and got.position["text"].tolist() == ends
    assert torch.equal(got.image, got.relevancy["vision"][:, 1:].reshape(2, 4, 4))
    assert got.token_ids == [[4, 9, 11, 7, 23], [8, 30]] and torch.equal(got.text[0], got.relevancy["text"][0, 1:6])


@pytest.mark.parametrize("eos", [EOS, 2, None, 23])
def test_the_row_is_where_the_model_reads_its_answer(eos):
    """Also where the model has another end-of-text token than its text encoder's config: no other row has its gradient."""
    model = mapper()
    model.eos_token_id = eos
    ids = torch.cat([IDS, torch.tensor([[57, 23, 5, 9, EOS, 0, 0]])]) if eos != 23 else torch.tensor([[57, 4, 23, 9, EOS]])
    inputs = inputs_of(ids)
    ends = inputs["attention_mask"].sum(1) - 1 if eos is None else ids.argmax(1) if eos == 2 else (ids == eos).int().argmax(1)
    got = explain(model, inputs)
    assert got.position["text"].tolist() == ends.tolist()
    if eos == EOS:
        bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
        assert torch.equal(explain(model, bare).position["text"], got.position["text"])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_the_next_token(masked, order):
    """Without a mask the mapper's attention is causal by its own flag."""
    model, inputs = mapper(vocab_size=60, **ORDERS[order]), inputs_of(IDS[:, :4])
    if not masked:
        del inputs["attention_mask"]
    outputs, kinds, maps = stored(model, inputs)
    text, vision = published("gradient", with_gradients(kinds, maps, outputs.logits[:, -1].max(-1).values.sum()), [3, 3])
    got = explain(model, inputs)
    assert_rows(got.relevancy["text"], text)
    assert_rows(got.relevancy["vision"], vision)
    assert got.target == outputs.logits[:, -1].argmax(-1).tolist()
    outputs, kinds, maps = stored(model, inputs)
    text, vision = published("gradient", with_gradients(kinds, maps, outputs.logits[:, 1, 5].sum()), [1, 1])
    second = explain(model, inputs, target=lambda o: o.logits[:, 1, 5], position=1).relevancy
    assert (text[:, 2:] == 0).all() and (text[:, 0] > 0).any()
    assert_rows(second["text"], text)
    assert_rows(second["vision"], vision)


PROMPTS, ANSWERS = torch.tensor([[57, 4, 9, 11], [57, 8, 0, 0]]), [[17, 30, EOS], [14, EOS]]


def test_each_token_of_an_answer():
    model = mapper(vocab_size=60)
    stored_maps = []
    for row, answer in enumerate(ANSWERS):
        prompt = [i for i in PROMPTS[row].tolist() if i]
        single = inputs_of(torch.tensor([[*prompt, *answer]]))
        single["pixel_values"] = inputs_of(PROMPTS)["pixel_values"][row : row + 1]
        outputs, kinds, maps = stored(model, single)
        for number, token in enumerate(answer):
            place = len(prompt) - 1 + number
            score = outputs.logits[0, place].log_softmax(-1)[token]
            stored_maps.append((row, number, place, score.detach(), with_gradients(kinds, maps, score)))
    for dtype, method in DTYPES_OF_METHODS:
        got = explain(model.to(dtype), inputs_of(PROMPTS, dtype), answer=ANSWERS, method=method)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        for row, number, place, score, maps in stored_maps:
            torch.testing.assert_close(got.scores[row, number].double(), score, rtol=tolerance, atol=tolerance)
            text, vision = published(method, maps, [place])
            mine = got.relevancy["text"][row, number]
            assert_rows(mine[: text.shape[1]], text[0], what=(dtype, method))
            assert_rows(got.relevancy["vision"][row, number], vision[0], what=(dtype, method))
            assert (mine[text.shape[1] :] == 0).all()
            assert torch.equal(got.image[row, number].flatten(), got.relevancy["vision"][row, number, 1:])
        assert (got.relevancy["vision"][1, 2] == 0).all() and got.scores[1, 2] == 0
    assert got.relevancy["text"].shape == (2, 3, 7) and got.relevancy["vision"].shape == (2, 3, 17)
    assert got.image.shape == (2, 3, 4, 4) and got.scores.shape == (2, 3) and got.answer == ANSWERS
    for row, answer in enumerate(ANSWERS):
        assert got.token_ids[row][-len(answer) :] == answer


def test_an_answer_as_a_whole():
    model, inputs = mapper(vocab_size=60), inputs_of(PROMPTS[:1])
    outputs, kinds, maps = stored(model, inputs_of(torch.tensor([[*PROMPTS[0].tolist(), *ANSWERS[0]]])))
    score = sum(outputs.logits[0, 3 + t].log_softmax(-1)[token] for t, token in enumerate(ANSWERS[0]))
    stored_maps = with_gradients(kinds, maps, score)
    text, vision = (sum(rows) for rows in zip(*(published("gradient", stored_maps, [3 + t]) for t in range(3)), strict=True))
    text[:, 3:6] = 0  # every row that is read leaves out the rows that are read
    got = explain(model, inputs, answer=ANSWERS[:1], per_token=False)
    assert got.relevancy["text"].shape == (1, 7) and got.image.shape == (1, 4, 4)
    assert_rows(got.relevancy["vision"], vision)
    assert_rows(got.relevancy["text"], text)
    torch.testing.assert_close(got.scores, score.detach()[None])


def test_what_is_refused():
    classes, inputs = mapper(), inputs_of(IDS)
    with pytest.raises(ValueError, match=r"model must be a decoder with an adapter, .*; got CLIPMapper\. For a class"):
        explain(classes, inputs, answer=[17])
    states = {"image_states": classes.encode_image(inputs["pixel_values"]), "input_ids": IDS}
    with pytest.raises(ValueError, match="no attention call was traced in layer 'vision.encoder.layers.0' .* of tower 'vision'"):
        explain(classes, states)


def test_batches_without_rows():
    got = explain(mapper(), {name: value[:0] for name, value in inputs_of(IDS).items()})
    assert got.relevancy["text"].shape == (0, 7) and got.relevancy["vision"].shape == (0, 17) and got.target == []


def blip():
    torch.manual_seed(0)
    text = dict(TEXT, encoder_hidden_size=32, max_position_embeddings=16, bos_token_id=57, eos_token_id=2, sep_token_id=EOS,
                pad_token_id=0)  # fmt: skip
    config = transformers.BlipConfig(text_config=text, vision_config=dict(VISION, image_size=24), projection_dim=16)
    return lively(transformers.BlipForConditionalGeneration(config)).eval().double()


def blip_maps(model, inputs):
    """Its attention writes softmax(...) over keys out by hand: image, then self- and cross-attention of each layer."""
    maps, softmax = [], torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda *a, **k: maps.append(softmax(*a, **k)) or maps[-1])
        patch.setattr(torch.nn.Softmax, "forward", lambda self, x: torch.nn.functional.softmax(x, dim=self.dim))
        outputs = model(**inputs)
    kinds = ["ii"] * VISION["num_hidden_layers"] + ["tt", "ti"] * TEXT["num_hidden_layers"]
    assert len(kinds) == len(maps)
    return outputs, kinds, maps


def test_captions_of_blip():
    """Its prompt is one token, whose first word rests on the image alone."""
    model, caption = blip(), [17, 30, 9]
    pixels = inputs_of(torch.tensor([[57]]))["pixel_values"]
    outputs, kinds, maps = blip_maps(model, {"pixel_values": pixels, "input_ids": torch.tensor([[57, *caption]])})
    scores = [outputs.logits[0, place].log_softmax(-1)[token] for place, token in enumerate(caption)]
    stored_maps = [with_gradients(kinds, maps, score) for score in scores]
    for method in METHODS:
        got = explain(model, {"pixel_values": pixels, "input_ids": torch.tensor([[57]])}, answer=caption, method=method)
        assert got.relevancy["text"].shape == (1, 3, 4) and got.image.shape == (1, 3, 4, 4)
        for place, with_grads in enumerate(stored_maps):
            text, vision = published(method, with_grads, [place])
            assert_rows(got.relevancy["vision"][:, place], vision, what=method)
            if place:
                assert_rows(got.relevancy["text"][:, place], text, what=method)
        assert (got.relevancy["text"][0, 0] == 0).all()
