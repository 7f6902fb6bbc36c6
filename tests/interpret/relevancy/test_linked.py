"""Towers that attend to one another: explain against the published rules written out on stored maps."""

import pytest
import torch
import transformers

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.decoder_cases import blip2, instructblip
from tests.helpers.interpret.linked_maps import METHODS, bar, encoder_decoder_maps, published
from tests.helpers.interpret.stored_maps import Kept, assert_rows, with_floats
from vlattn_fast.interpret import explain
from vlattn_fast.interpret.explaining.loading import generate
from vlattn_fast.interpret.relevancy.methods.registry import with_options

pytestmark = pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")  # of the published rollout

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


def lxmert_maps(model, inputs, score, held=False):
    """The maps of the model's own attention, in the order in which they ran, and their gradients; see `Kept`."""
    kept = Kept(model, held)
    with kept.watching():
        outputs = model(**inputs)
    maps = [stored for _, stored in kept.maps]
    kinds = ["tt"] * LXMERT["l_layers"] + ["ii"] * LXMERT["r_layers"] + ["ti", "it", "tt", "ii"] * LXMERT["x_layers"]
    return list(zip(kinds, maps, torch.autograd.grad(score(outputs), maps, allow_unused=True, retain_graph=True), strict=True))


@pytest.mark.parametrize("regions", [7, 9])  # as many as words, too: nothing but the tensors' past tells the two apart then
def test_lxmert(regions):
    model = lively(transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**LXMERT, num_qa_labels=5))).eval()
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"visual_feats": torch.randn(2, regions, 10, dtype=torch.float64), "visual_pos": torch.rand(2, regions, 4).double()}
    model.double()
    score = lambda o: o.question_answering_score.max(-1).values.sum()  # noqa: E731
    got = explain(model, inputs, method=va.methods.Gradient(freeze=("norms", "attention")))
    for row, want in zip(
        got.relevancy.values(), published("gradient", lxmert_maps(model, inputs, score, held=True), [0, 0], mask), strict=True
    ):
        assert_rows(row, want, what="held fixed")
    maps = lxmert_maps(model, inputs, score)
    for dtype, method in (*((torch.float64, method) for method in METHODS), (torch.float32, "gradient")):
        got = explain(model.to(dtype), with_floats(inputs, dtype), method=method)
        assert list(got.relevancy) == ["text", "vision"] and got.relevancy["text"].dtype == dtype
        for row, want in zip(got.relevancy.values(), published(method, maps, [0, 0], mask), strict=True):
            assert_rows(row, want, what=(dtype, method))
    assert got.regions.shape == (2, regions) and got.boxes.shape == (2, regions, 4)
    assert [len(row) for row in got.token_ids] == [7, 4]
    assert (got.relevancy["text"][1, 6:] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6])
def test_small_relevancies_keep_their_digits(scale):
    """Where the score's gradient vanishes, R - I is far below I; equation 9 divides it by its own sums."""
    model = lively(transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**LXMERT, num_qa_labels=5))).eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 9)), "visual_feats": torch.randn(2, 7, 10), "visual_pos": torch.rand(2, 7, 4)}

    def rows(dtype):
        target = lambda outputs: outputs.question_answering_score[:, 2] * scale  # noqa: E731
        return explain(model.to(dtype), with_floats(inputs, dtype), target=target).relevancy

    double, single = rows(torch.float64), rows(torch.float32)
    for tower, want in double.items():
        assert (single[tower] - want).abs().max() < 2e-4 * want.abs().max(), tower


def test_other_classes_of_lxmert():
    config = transformers.LxmertConfig(**LXMERT, num_qa_labels=5)
    answers = lively(transformers.LxmertForQuestionAnswering(config)).eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 6)), "visual_feats": torch.randn(2, 5, 10), "visual_pos": torch.rand(2, 5, 4)}
    want = explain(answers, inputs, target=2)
    head = lambda o: answers.answer_head(o.pooled_output)[:, 2]  # noqa: E731
    pretraining = transformers.LxmertForPreTraining(config).eval()
    pretraining.lxmert, pretraining.answer_head = answers.lxmert, answers.answer_head
    for got in (explain(answers.lxmert, inputs, target=head), explain(pretraining, inputs, target=2)):
        for name, row in want.relevancy.items():
            assert_rows(got.relevancy[name], row, what=name)


def test_weights_of_one_between_towers():
    """No token is read by itself where all have a weight: none has an entry of its own that is set to zero."""
    model = lively(transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**LXMERT, num_qa_labels=5))).eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 6)), "visual_feats": torch.randn(2, 5, 10), "visual_pos": torch.rand(2, 5, 4)}
    mean = explain(model, inputs, position={"text": "mean"}).relevancy
    for name, row in explain(model, inputs, position={"text": torch.ones(6)}).relevancy.items():
        assert_rows(row, 6 * mean[name], what=name)


def text_encoder_decoder(kind):
    torch.manual_seed(0)
    if kind == "bart":
        heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
        config = transformers.BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, **heads, vocab_size=60)
        model = transformers.BartForConditionalGeneration(config)
    elif kind == "t5gemma":  # a softcap in its attention of every kind
        part = transformers.T5GemmaModuleConfig(
            **dict(hidden_size=32, head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48),
            **dict(num_hidden_layers=2, vocab_size=60, attn_logit_softcapping=0.3, query_pre_attn_scalar=8, sliding_window=4),
        )
        model = transformers.T5GemmaForConditionalGeneration(
            transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=60)
        )
    else:
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    model = lively(model).eval().double()
    model.set_attn_implementation("literal" if kind == "t5gemma" else "eager")  # whose softmax is in float32
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["bart", "t5", "t5gemma"])
def test_text_encoder_decoders(kind):
    model, inputs = text_encoder_decoder(kind)
    inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 5))
    score = lambda o: o.logits[:, -1, 7]  # noqa: E731
    o = model(**inputs, output_attentions=True)
    maps = encoder_decoder_maps(o, score(o).sum())
    for method in METHODS:
        qq, qi = published(method, maps, [4, 4], None, inputs["attention_mask"])
        got = explain(model, inputs, target=score, position="last", method=method)
        assert_rows(got.relevancy["tower0"], qi, what=method)
        assert_rows(got.relevancy["tower1"], qq, what=method)
    with Kept(model, held=True).watching():
        o = model(**inputs, output_attentions=True)
    qq, qi = published("gradient", encoder_decoder_maps(o, score(o).sum()), [4, 4], None, inputs["attention_mask"])
    got = explain(model, inputs, target=score, position="last", method=va.methods.Gradient(freeze=("norms", "attention")))
    assert_rows(got.relevancy["tower0"], qi, what="held fixed")
    assert_rows(got.relevancy["tower1"], qq, what="held fixed")


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_targets_of_encoder_decoders(kind):
    """Without a record, and without `read`: the gradient names the decoder's row, by default that behind its start token."""
    model, inputs = text_encoder_decoder(kind)
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    padded = {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    row = lambda o: torch.stack([o.logits[0, 5, 7], o.logits[1, 8, 7]])  # noqa: E731
    want = explain(model, padded, target=row, position={"tower1": torch.eye(9)[[5, 8]]})
    got = explain(model, padded, target=7)
    assert got.target == [7, 7] and got.position["tower1"].tolist() == [5, 8]
    for name in ("tower0", "tower1"):
        assert_rows(got.relevancy[name], want.relevancy[name], what=name)
    start = torch.full((2, 1), 2 if kind == "bart" else 0)
    want = explain(model, {**inputs, "decoder_input_ids": start}, target=7)
    assert_rows(explain(model, inputs, target=7).relevancy["tower0"], want.relevancy["tower0"])
    assert explain(model, inputs).target == want_largest(model, inputs, start)


def want_largest(model, inputs, start):
    return model(**inputs, decoder_input_ids=start).logits[:, -1].argmax(-1).tolist()


def test_the_last_token_of_a_decoder_is_by_its_own_mask():
    """Also where the encoder has as many tokens, and another padding."""
    model, inputs = text_encoder_decoder("bart")
    inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 9))
    score = lambda o: o.logits[:, -1, 7]  # noqa: E731
    want = explain(model, inputs, target=score, position=8)
    assert_rows(explain(model, inputs, target=score, position="last").relevancy["tower1"], want.relevancy["tower1"])
    padded = {**inputs, "decoder_attention_mask": torch.tensor([[1] * 7 + [0] * 2, [1] * 9])}
    score = lambda o: torch.stack([o.logits[0, 6, 7], o.logits[1, 8, 7]])  # noqa: E731
    rows = torch.eye(9)[[6, 8]]
    want = explain(model, padded, target=score, position={"tower1": rows})
    assert_rows(explain(model, padded, target=score, position="last").relevancy["tower0"], want.relevancy["tower0"])


@pytest.mark.parametrize("prompt", [None, [[0, 9], [0, 8]]])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_answers_of_encoder_decoders(kind, prompt):
    """Each token's rows are those that predict it; the answer stands behind the decoder's start token, or its prompt."""
    model, inputs = text_encoder_decoder(kind)
    start = [[2 if kind == "bart" else 0]] * 2 if prompt is None else prompt
    if prompt is not None:
        inputs["decoder_input_ids"] = torch.tensor(prompt)
    answers, count = [[17, 30, 21], [14, 40]], len(start[0])
    stored = []
    for row, answer in enumerate(answers):
        size = int(inputs["attention_mask"][row].sum())
        single = {"input_ids": inputs["input_ids"][row : row + 1, :size]}
        o = model(**single, decoder_input_ids=torch.tensor([start[row] + answer]), output_attentions=True)
        for number, token in enumerate(answer):
            score = o.logits[0, count - 1 + number].log_softmax(-1)[token]
            stored.append((row, number, size, score.detach(), encoder_decoder_maps(o, score)))
    for method in METHODS:
        got = explain(model, inputs, answer=answers, method=method)
        assert got.relevancy["tower1"].shape == (2, 3, count + 3) and got.relevancy["tower0"].shape == (2, 3, 9)
        assert got.token_ids == answers and got.scores.shape == (2, 3)
        for row, number, size, score, maps in stored:
            qq, qi = published(method, maps, [count - 1 + number])
            torch.testing.assert_close(got.scores[row, number], score, rtol=1e-9, atol=1e-10)
            assert_rows(got.relevancy["tower0"][row, number, :size], qi[0], what=method)
            mine = got.relevancy["tower1"][row, number]
            if count + number == 1:  # the start token sees itself alone, and its own entry is zero
                assert not qq.any() and not mine.any()
            else:
                assert_rows(mine[: qq.shape[1]], qq[0], what=method)
            assert (mine[qq.shape[1] :] == 0).all() and (got.relevancy["tower0"][row, number, size:] == 0).all()
            length = len(answers[row])
            assert torch.equal(got.text[row, number, :length], mine[count : count + length])
        assert (got.relevancy["tower0"][1, 2:] == 0).all() and (got.scores[1, 2:] == 0).all()
        together = explain(model, inputs, answer=answers, method=method, per_token=False)
        assert together.relevancy["tower0"].shape == (2, 9) and together.scores.shape == (2,)
        torch.testing.assert_close(together.scores, got.scores.sum(1))
    assert "<canvas" in got.to_html()


@pytest.mark.parametrize("kind", ["Blip2", "InstructBlip"])
def test_answers_of_blip_2_over_t5(kind):
    """The Q-Former is a tower that none attends to, too, and of as many tokens as the answer with its start token."""
    t5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    words = dict(t5, model_type="t5")
    decoder = blip2(words=words) if kind == "Blip2" else instructblip(words)
    model, inputs = lively(decoder.model).eval().double(), decoder.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    for part in (model.vision_model, model.qformer, model.language_model):
        part.set_attn_implementation("eager")
    answer = torch.tensor([[17, 30, 21], [14, 40, 9]])
    got = explain(model, inputs, answer=answer)
    of_words, of_prompt = got.relevancy.values()
    assert of_words.shape == (2, 3, 4) and of_prompt.shape == (2, 3, inputs["input_ids"].shape[1])
    ids = torch.cat([torch.zeros(2, 1, dtype=torch.long), answer], 1)
    o = model(**inputs, decoder_input_ids=ids, output_attentions=True)
    for place in range(3):
        score = o.logits[:, place].log_softmax(-1).gather(1, answer[:, place, None])
        maps = encoder_decoder_maps(o.language_model_outputs, score.sum())
        qq, qi = published("gradient", maps, [place, place], None, inputs["attention_mask"])
        assert_rows(of_prompt[:, place], qi)
        if place:  # the start token sees itself alone
            assert_rows(of_words[:, place], qq)
    first = explain(model, inputs, target=17)  # behind the start token
    maps = encoder_decoder_maps(o.language_model_outputs, o.logits[:, 0, 17].sum())
    assert_rows([*first.relevancy.values()][1], published("gradient", maps, [0, 0], None, inputs["attention_mask"])[1])


def test_what_is_refused_between_towers():
    model = transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**LXMERT, num_qa_labels=5))
    inputs = {"input_ids": torch.randint(3, 60, (1, 4)), "visual_feats": torch.randn(1, 5, 10), "visual_pos": torch.rand(1, 5, 4)}
    for method in ("gradient", "rollout"):
        with pytest.raises(ValueError, match="start_layer must be 0 for towers that attend to one another; got -1"):
            explain(model, inputs, method=with_options(method, start_layer=-1))
    bart, texts = text_encoder_decoder("bart")
    with pytest.raises(ValueError, match="start_layer must be 0 for towers that attend"):
        explain(bart, {**texts, "decoder_input_ids": texts["input_ids"]}, target=lambda o: o.logits[:, -1, 7], position="last",
                method=va.methods.Gradient(start_layer=1))  # fmt: skip
    bart.config.decoder_start_token_id = bart.generation_config.decoder_start_token_id = None
    classes = transformers.BartForSequenceClassification(bart.config).eval()
    asked = {"input_ids": torch.tensor([[5, 7, 2]]), "decoder_input_ids": torch.tensor([[2, 5]])}
    for model, got in ((classes, r"\(1, 3\)"), (classes.model, "none")):
        with pytest.raises(ValueError, match=f"model must return logits .* if answer is given; got logits {got}"):
            explain(model, asked, answer=[2])
    with pytest.raises(ValueError, match="inputs must contain 'decoder_input_ids' .* if the config has no"):
        explain(bart, texts, answer=[7])


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
    qq, qi = published("gradient", encoder_decoder_maps(o, score(o).sum()), [3, 2])
    torch.testing.assert_close(got.scores, score(o).detach())
    assert_rows(got.relevancy["language"], qq)
    assert_rows(got.relevancy["prompt"], qi)
    assert (got.relevancy["prompt"][1, 17:] == 0).all()
    assert torch.equal(got.image, got.relevancy["prompt"][:, 1:13].view(2, 3, 4)) and got.image_samples == [0, 1]
    assert got.token_ids == [ids[0, 13:].tolist(), ids[1, 13:17].tolist()] and got.position["language"].tolist() == [3, 2]
    assert got.target == o.logits[torch.arange(2), torch.tensor([3, 2])].argmax(-1).tolist() and "<canvas" in got.to_html()


def test_answers_of_florence():
    """The prompt's words and the answer are one text, and each word of the answer has its map."""
    model = florence().double()
    ids = torch.randint(3, 50, (1, 20))
    ids[:, :13] = 59
    inputs = {"pixel_values": torch.randn(1, 3, 24, 32).double(), "input_ids": ids}
    answer = [17, 30]
    model.model.language_model.set_attn_implementation("literal")
    o = model(**inputs, decoder_input_ids=torch.tensor([[2, *answer]]), output_attentions=True)
    scores = [o.logits[0, place].log_softmax(-1)[token] for place, token in enumerate(answer)]
    stored = [encoder_decoder_maps(o, score) for score in scores]
    model.model.language_model.set_attn_implementation("sdpa")
    for method in METHODS:
        got = explain(model, inputs, answer=answer, method=method)
        assert got.relevancy["language"].shape == (1, 2, 3) and got.image.shape == (1, 2, 3, 4)
        assert got.token_ids == [[*ids[0, 13:].tolist(), *answer]] and got.text.shape == (1, 2, 9)
        for place, maps in enumerate(stored):
            qq, qi = published(method, maps, [place])
            assert_rows(got.relevancy["prompt"][:, place], qi, what=method)
            if place:  # the start token sees itself alone
                assert_rows(got.relevancy["language"][:, place], qq, what=method)
            assert_rows(got.text[:, place], torch.cat([qi[:, 13:], qq[:, 1:]], 1), what=method)
    page = got.to_html()
    assert "<canvas" in page and page.count('role="radio"') == 2


def test_florence_begins_by_itself_and_refuses_what_it_cannot():
    model = florence()
    ids = torch.full((1, 15), 7)
    ids[:, :13] = 59
    inputs = {"pixel_values": torch.randn(1, 3, 24, 32), "input_ids": ids}
    assert explain(model, inputs).relevancy["language"].shape == (1, 1)  # the start token alone
    with pytest.raises(ValueError, match="must have an adapter with a connector for through_connector=True; got Florence2"):
        explain(model, inputs, method=va.methods.Gradient(through_connector=True))


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
    model = lively(Merging()).eval().double()
    inputs = {"text": torch.randn(2, 6, 32).double(), "image": torch.randn(2, patches, 32).double()}
    kept = Kept(model)
    with kept.watching():
        score = model(**inputs)[:, 1]
    maps = [found for _, found in kept.maps]
    grads = torch.autograd.grad(score.sum(), maps, allow_unused=True)
    steps = [a.detach() * (torch.zeros_like(a) if g is None else g) for a, g in zip(maps, grads, strict=True)]
    bars = iter([step.clamp(min=0).mean(1) for step in steps])
    tt, ii = (torch.eye(size, dtype=torch.float64).expand(2, -1, -1) for size in (6, patches))
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
    got = explain(model, inputs, position={"tower0": "cls"}, target=lambda outputs: outputs[:, 1]).relevancy
    assert_rows(got["tower0"], row)
    assert_rows(got["tower1"], ti[:, 0])


def test_an_answer_of_florence_begins_behind_its_start_token():
    """What `vlattn explain --generate` explains."""
    model, ids = florence(), torch.randint(3, 50, (1, 20))
    ids[:, :13] = 59
    inputs = {"pixel_values": torch.randn(1, 3, 24, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (answer,) = generate(model, inputs, 3)
    start = torch.full((1, 1), 2)
    with torch.no_grad():
        for token in answer:
            logits = model(**inputs, decoder_input_ids=start).logits[0, -1]
            logits[59] = -torch.inf  # the image token is no word
            assert int(logits.argmax()) == token
            start = torch.cat([start, torch.tensor([[token]])], 1)
    assert answer and explain(model, inputs, answer=[answer]).scores.shape == (1, len(answer))
