"""Towers that attend to one another: explain against the published rules written out on stored maps."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.interpret.cases import lively
from tests.interpret.stored_maps import Kept
from vlattn_fast.interpret import explain

LXMERT = dict(
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    l_layers=3,
    x_layers=3,
    r_layers=2,
    vocab_size=60,
    visual_feat_dim=10,
)


def abar(attention, grad):
    return (attention * grad).clamp(min=0).mean(1)


def bar(relevancy):
    """Equations 8 and 9; a zero row stays zero."""
    eye = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype)
    beside = relevancy - eye
    total = beside.sum(-1, keepdim=True)
    return torch.where(total == 0, beside, beside / total) + eye


def eyes(batch, *sizes):
    return [torch.eye(size, dtype=torch.float64).expand(batch, -1, -1) for size in sizes]


def lxmert_published(model, inputs, score):
    """Rows 0 of R_tt and R_ti, in the order of LXMERT's ExplanationGenerator, from maps of the model's own attention."""
    maps = []
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda *a, **k: maps.append(softmax(*a, **k)) or maps[-1])
        outputs = model(**inputs)
    grads = torch.autograd.grad(score(outputs), maps, allow_unused=True)
    bars = (abar(a.detach(), torch.zeros_like(a) if g is None else g) for a, g in zip(maps, grads, strict=True))

    batch, texts = inputs["input_ids"].shape
    images = inputs["visual_feats"].shape[1]
    tt, ii = eyes(batch, texts, images)
    ti, it = torch.zeros(batch, texts, images).double(), torch.zeros(batch, images, texts).double()
    for _ in range(LXMERT["l_layers"]):
        a = next(bars)
        tt, ti = tt + a @ tt, ti + a @ ti
    for _ in range(LXMERT["r_layers"]):
        a = next(bars)
        ii, it = ii + a @ ii, it + a @ it
    for _ in range(LXMERT["x_layers"]):
        a_ti, a_it = next(bars), next(bars)
        add_ti, add_tt = bar(tt).transpose(1, 2) @ a_ti @ bar(ii), a_ti @ it
        add_it, add_ii = bar(ii).transpose(1, 2) @ a_it @ bar(tt), a_it @ ti
        tt, ti, it, ii = tt + add_tt, ti + add_ti, it + add_it, ii + add_ii
        a = next(bars)
        tt, ti = tt + a @ tt, ti + a @ ti
        a = next(bars)
        ii, it = ii + a @ ii, it + a @ it
    row = tt[:, 0].clone()
    row[:, 0] = 0
    return row, ti[:, 0]


@pytest.mark.parametrize("regions", [7, 9])  # as many as words, too: nothing but the tensors' past tells the two apart then
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lxmert(regions, dtype):
    torch.manual_seed(0)
    model = lively(transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**LXMERT, num_qa_labels=5))).eval()
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"visual_feats": torch.randn(2, regions, 10, dtype=torch.float64), "visual_pos": torch.rand(2, regions, 4).double()}
    model.double()
    want = lxmert_published(model, inputs, lambda o: o.question_answering_score.max(-1).values.sum())
    model.to(dtype)
    got = explain(model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    assert list(got.relevancy) == ["text", "vision"] and got.relevancy["text"].dtype == dtype
    for row, wanted in zip(got.relevancy.values(), want, strict=True):
        assert (row - wanted).abs().max() < (1e-4 if dtype == torch.float32 else 1e-10) * wanted.abs().max()
    assert got.regions.shape == (2, regions) and got.boxes.shape == (2, regions, 4)
    assert [len(row) for row in got.token_ids] == [7, 4]
    assert (got.relevancy["text"][1, 6:] == 0).all()


def test_other_classes_of_lxmert():
    torch.manual_seed(0)
    config = transformers.LxmertConfig(**LXMERT, num_qa_labels=5)
    answers = lively(transformers.LxmertForQuestionAnswering(config)).eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 6)), "visual_feats": torch.randn(2, 5, 10), "visual_pos": torch.rand(2, 5, 4)}
    want = explain(answers, inputs, target=2)
    head = lambda o: answers.answer_head(o.pooled_output)[:, 2]  # noqa: E731
    pretraining = transformers.LxmertForPreTraining(config).eval()
    pretraining.lxmert, pretraining.answer_head = answers.lxmert, answers.answer_head
    for got in (explain(answers.lxmert, inputs, target=head), explain(pretraining, inputs, target=2)):
        for name, row in want.relevancy.items():
            torch.testing.assert_close(got.relevancy[name], row, rtol=1e-4, atol=1e-5)


def encoder_decoder_published(outputs, score, encoder, decoder, cross):
    """R_qq and R_qi of an encoder-decoder: rule 11 plays no part, since the encoder does not see the decoder."""
    maps = [*encoder, *decoder, *cross]
    grads = torch.autograd.grad(score, maps, allow_unused=True)
    bars = [abar(a.detach(), torch.zeros_like(a) if g is None else g) for a, g in zip(maps, grads, strict=True)]
    first, second = len(encoder), len(encoder) + len(decoder)
    ii, qq = eyes(len(maps[0]), encoder[0].shape[-1], decoder[0].shape[-1])
    qi = torch.zeros(len(maps[0]), qq.shape[-1], ii.shape[-1]).double()
    for a in bars[:first]:
        ii = ii + a @ ii
    for a, c in zip(bars[first:second], bars[second:], strict=True):
        qq, qi = qq + a @ qq, qi + a @ qi
        qi = qi + bar(qq).transpose(1, 2) @ c @ bar(ii)
    return qq, qi


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_text_encoder_decoders(kind):
    torch.manual_seed(0)
    if kind == "bart":
        heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
        config = transformers.BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, **heads, vocab_size=60)
        model = transformers.BartForConditionalGeneration(config)
    else:
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    model = lively(model).eval().double()
    model.set_attn_implementation("eager")
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 60, (2, 5))}
    score = lambda o: o.logits[:, -1, 7]  # noqa: E731
    o = model(**inputs, output_attentions=True)
    qq, qi = encoder_decoder_published(o, score(o).sum(), o.encoder_attentions, o.decoder_attentions, o.cross_attentions)
    got = explain(model, inputs, target=score, read="last")
    torch.testing.assert_close(got.relevancy["tower0"], qi[:, -1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got.relevancy["tower1"][:, :-1], qq[:, -1, :-1], rtol=1e-9, atol=1e-10)
    assert qi[:, -1].abs().max() > 1e-4


def test_other_methods_are_refused_between_towers():
    torch.manual_seed(0)
    model = transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**LXMERT, num_qa_labels=5))
    inputs = {"input_ids": torch.randint(3, 60, (1, 4)), "visual_feats": torch.randn(1, 5, 10), "visual_pos": torch.rand(1, 5, 4)}
    for method in ("rollout", "gradcam", "attention", "weighted"):
        with pytest.raises(ValueError, match="method must be"):
            explain(model, inputs, method=method)


def florence():
    torch.manual_seed(0)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
    text = dict(model_type="bart", d_model=32, encoder_layers=2, decoder_layers=2, **heads, vocab_size=60)
    stages = dict(patch_size=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True], window_size=2)
    vision = dict(stages, depths=[1, 1], embed_dim=[16, 32], num_heads=[2, 4], num_groups=[2, 4], projection_dim=32)
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=59)
    return lively(transformers.Florence2ForConditionalGeneration(config)).eval()


def test_florence_explains_the_prompt_and_the_image_tokens():
    model = florence().double()
    ids = torch.randint(3, 50, (2, 20))
    ids[:, :13], mask = 59, torch.ones(2, 20, dtype=torch.long)  # the mean of the features, then 3 x 4 of them
    mask[1, 17:] = 0
    decoded = torch.randint(3, 50, (2, 4))
    inputs = {"pixel_values": torch.randn(2, 3, 24, 32).double(), "input_ids": ids, "attention_mask": mask}
    inputs |= {"decoder_input_ids": decoded, "decoder_attention_mask": torch.ones_like(decoded)}
    inputs["decoder_attention_mask"][1, 3:] = 0
    got = explain(model, inputs)

    score = lambda o: o.logits[torch.arange(2), torch.tensor([3, 2])].max(-1).values  # noqa: E731
    model.model.language_model.set_attn_implementation("literal")
    o = model(**inputs, output_attentions=True)
    qq, qi = encoder_decoder_published(o, score(o).sum(), o.encoder_attentions, o.decoder_attentions, o.cross_attentions)
    rows = torch.arange(2), torch.tensor([3, 2])
    qq[(*rows, rows[1])] = 0
    torch.testing.assert_close(got.scores, score(o).detach())
    torch.testing.assert_close(got.relevancy["language"], qq[rows], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.relevancy["prompt"], qi[rows], rtol=1e-9, atol=1e-11)
    assert qi[rows].abs().max() > 1e-4 and (got.relevancy["prompt"][1, 17:] == 0).all()
    assert torch.equal(got.image, got.relevancy["prompt"][:, 1:13].view(2, 3, 4)) and got.image_rows == [0, 1]
    assert got.token_ids == [ids[0, 13:].tolist(), ids[1, 13:17].tolist()] and got.position["language"].tolist() == [3, 2]
    assert got.target == o.logits[rows].argmax(-1).tolist() and "<canvas" in got.to_html()


def test_florence_begins_by_itself_and_refuses_what_it_cannot():
    model = florence()
    ids = torch.full((1, 15), 7)
    ids[:, :13] = 59
    inputs = {"pixel_values": torch.randn(1, 3, 24, 32), "input_ids": ids}
    assert explain(model, inputs).relevancy["language"].shape == (1, 1)  # the start token alone
    with pytest.raises(ValueError, match="answer must be the decoder_input_ids"):
        explain(model, inputs, answer=[5])
    with pytest.raises(ValueError, match="without a record of its connector; got Florence2"):
        explain(model, inputs, through_connector=True)


class Merging(torch.nn.Module):
    """Two streams whose layers attend to themselves, and then to the other as it was in front of the layer (as METER's do)."""

    def __init__(self, width=32):
        super().__init__()
        kinds = ("self", "cross")
        make = lambda: torch.nn.MultiheadAttention(width, 4, batch_first=True)  # noqa: E731
        layers = lambda: torch.nn.ModuleList(torch.nn.ModuleDict({k: make() for k in kinds[: 1 + (i > 0)]}) for i in range(3))  # noqa: E731
        self.text, self.image = layers(), layers()
        self.head = torch.nn.Linear(width, 3)

    def forward(self, text, image):
        for number, (of_text, of_image) in enumerate(zip(self.text, self.image, strict=True)):
            if number == 0:  # each by itself
                text = text + of_text["self"](text, text, text, need_weights=False)[0]
                image = image + of_image["self"](image, image, image, need_weights=False)[0]
                continue
            before = text
            text = text + of_text["self"](text, text, text, need_weights=False)[0]
            text = text + of_text["cross"](text, image, image, need_weights=False)[0]
            image = image + of_image["self"](image, image, image, need_weights=False)[0]
            image = image + of_image["cross"](image, before, before, need_weights=False)[0]
        return self.head(text[:, 0])


@pytest.mark.parametrize("patches", [6, 8])
def test_streams_that_read_one_another_as_they_were(patches):
    torch.manual_seed(0)
    model = lively(Merging()).eval().double()
    inputs = {"text": torch.randn(2, 6, 32).double(), "image": torch.randn(2, patches, 32).double()}
    kept = Kept(model)
    with kept.watching():
        score = model(**inputs)[:, 1]
    maps = [found for _, found in kept.maps]
    grads = torch.autograd.grad(score.sum(), maps, allow_unused=True)
    bars = iter([abar(a.detach(), torch.zeros_like(a) if g is None else g) for a, g in zip(maps, grads, strict=True)])
    tt, ii = eyes(2, 6, patches)
    ti, it = torch.zeros(2, 6, patches).double(), torch.zeros(2, patches, 6).double()
    tt, ii = tt + next(bars) @ tt, ii + next(bars) @ ii
    for _ in range(2):
        old_tt, old_ti = tt, ti
        a = next(bars)
        tt, ti = tt + a @ tt, ti + a @ ti
        c = next(bars)
        ti, tt = ti + bar(tt).transpose(1, 2) @ c @ bar(ii), tt + c @ it
        a = next(bars)
        ii, it = ii + a @ ii, it + a @ it
        c = next(bars)
        it, ii = it + bar(ii).transpose(1, 2) @ c @ bar(old_tt), ii + c @ old_ti
    row = tt[:, 0].clone()
    row[:, 0] = 0
    got = explain(model, inputs, read={"tower0": "cls"}, target=lambda outputs: outputs[:, 1]).relevancy
    torch.testing.assert_close(got["tower0"], row, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got["tower1"], ti[:, 0], rtol=1e-9, atol=1e-11)
