"""Answers of decoders, each token by itself and all together, against the published rule on stored maps."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers

from tests.helpers.interpret.cases import LLAMA, in_double, last_real_row, lively
from tests.helpers.interpret.decoder_cases import DECODERS, IMAGE, Decoder, next_logits
from tests.helpers.interpret.small_models import made as small
from tests.helpers.interpret.stored_maps import METHODS, Place, assert_rows, rows_of
from vlattn_fast.interpret import explain

pytestmark = pytest.mark.usefixtures("published")

PROMPTS = torch.tensor([[4, 9, 11, 7, 23, 8], [5, 6, 3, 12, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
ANSWERS = [[17, 30, 21], [14, 40]]


def decoder(dtype=torch.float64):
    torch.manual_seed(0)
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))).eval().to(dtype)


def published(model, prompt, answer):
    """Log-probabilities (T) and the rows (T, N + T) that predict the tokens of one answer, without any padding."""
    ids = torch.tensor([[*prompt, *answer]])
    model.set_attn_implementation("literal")  # eager, with softmax in float64
    outputs = model(input_ids=ids, output_attentions=True)
    scores, rows = [], []
    for place, token in enumerate(answer, start=len(prompt) - 1):
        score = outputs.logits[0, place].log_softmax(-1)[token]
        grads = torch.autograd.grad(score, outputs.attentions, retain_graph=True)
        relevancy = torch.eye(ids.shape[1], dtype=score.dtype)
        for attention, grad in zip(outputs.attentions, grads, strict=True):
            relevancy = relevancy + (attention[0].detach() * grad[0]).clamp(min=0).mean(0) @ relevancy
        scores.append(score.detach())
        rows.append(relevancy[place])
    return torch.stack(scores), torch.stack(rows)


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_token(side):
    model = decoder()
    inputs = {"input_ids": PROMPTS, "attention_mask": REAL}
    if side == "left":
        rolled = [torch.stack([torch.roll(a, 6 - int(r.sum())) for a, r in zip(t, REAL, strict=True)]) for t in (PROMPTS, REAL)]
        positions = (rolled[1].cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": rolled[0], "attention_mask": rolled[1], "position_ids": positions}
    got = explain(model, inputs, answer=ANSWERS)
    assert got.relevancy["language"].shape == (2, 3, 9) and got.scores.shape == (2, 3)
    for row, answer in enumerate(ANSWERS):
        scores, rows = published(model, PROMPTS[row][REAL[row].bool()].tolist(), answer)
        count = len(answer)
        torch.testing.assert_close(got.scores[row, :count], scores, rtol=1e-9, atol=1e-10)
        begin = 2 if side == "left" and row == 1 else 0
        mine = got.relevancy["language"][row]
        assert_rows(mine[:count, begin : begin + rows.shape[1]], rows)
        assert (mine[:count, :begin] == 0).all() and (mine[:count, begin + rows.shape[1] :] == 0).all()
        assert (mine[count:] == 0).all() and (got.scores[row, count:] == 0).all()
        assert got.token_ids[row][-count:] == answer
        first = begin + int(REAL[row].sum()) - 1
        assert got.position["language"][row].tolist() == [first + min(token, count - 1) for token in range(3)]


def test_all_tokens_together():
    model = decoder()
    inputs = {"input_ids": PROMPTS[:1], "attention_mask": REAL[:1]}
    got = explain(model, inputs, answer=ANSWERS[0], per_token=False)
    model.set_attn_implementation("literal")  # eager, with softmax in float64
    outputs = model(input_ids=torch.tensor([[*PROMPTS[0].tolist(), *ANSWERS[0]]]), output_attentions=True)
    score = sum(outputs.logits[0, 5 + t].log_softmax(-1)[token] for t, token in enumerate(ANSWERS[0]))
    relevancy = torch.eye(9, dtype=torch.float64)
    for attention, grad in zip(outputs.attentions, torch.autograd.grad(score, outputs.attentions), strict=True):
        relevancy = relevancy + (attention[0].detach() * grad[0]).clamp(min=0).mean(0) @ relevancy
    assert_rows(got.relevancy["language"][0], relevancy[5:8].sum(0))
    torch.testing.assert_close(got.scores, score.detach()[None], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["llava", "qwen2_5_vl"], indirect=True)
def test_answers_about_images(case, method):
    answer = [[7, 12], [9, 5]]
    got = explain(case.model, case.inputs, answer=answer, method=method)
    batch = len(case.inputs["input_ids"])
    assert got.relevancy["language"].shape[:2] == (batch, 2)
    assert got.text.shape[:2] == (batch, 2)
    first = got.image[0] if isinstance(got.image, tuple) else got.image[0]
    assert first.ndim == 3 and first.shape[0] == 2
    assert got.answer == answer
    place = got.position["language"]
    for row in range(batch):  # each entry of the text is the raw one of its token, and 0 where the row is read
        entries = got.relevancy["language"][row].scatter(1, place[row][:, None], 0.0)[:, got.text_positions[row]]
        assert torch.equal(got.text[row][:, : entries.shape[1]], entries)
        assert got.text_positions[row][-2:] == (place[row] + 1).tolist()
    assert "<canvas" in got.to_html()
    together = explain(case.model, case.inputs, answer=answer, method=method, per_token=False)
    assert together.relevancy["language"].shape == (batch, case.inputs["input_ids"].shape[1] + 2)
    if method in ("rollout", "attention"):
        torch.testing.assert_close(together.relevancy["language"], got.relevancy["language"].sum(1), rtol=1e-4, atol=1e-5)


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}


def test_forms_of_an_answer():
    model, inputs = decoder(), {"input_ids": PROMPTS[:, :4], "attention_mask": REAL[:, :4]}
    want = explain(model, inputs, answer=[[17, 30], [17, 30]])
    for form in (
        [17, 30],
        [torch.tensor(17), torch.tensor(30)],
        torch.tensor([17, 30]),
        torch.tensor([[17, 30], [17, 30]]),
        "17 30",
        ["17 30", "17 30"],
    ):
        got = explain(model, inputs, answer=form, processor=Words())
        assert torch.equal(got.relevancy["language"], want.relevancy["language"])
    ids = {"input_ids": PROMPTS[:, :4]}
    ragged = explain(model, ids, answer=[[17, 30], [17]])
    torch.testing.assert_close(ragged.relevancy["language"][0], want.relevancy["language"][0])
    assert (ragged.relevancy["language"][1, 1] == 0).all()


def test_what_generate_returned_is_an_answer():
    """The prompt in front, and the end with its padding, are no part of it."""
    model, inputs = decoder(), {"input_ids": PROMPTS[:, :4], "attention_mask": REAL[:, :4]}
    model.generation_config.eos_token_id = 2
    generated = torch.cat([PROMPTS[:, :4], torch.tensor([[17, 30, 2], [5, 2, 2]])], 1)
    expected = explain(model, inputs, answer=[[17, 30], [5]])
    for form in (generated, generated.tolist(), SimpleNamespace(sequences=generated)):
        got = explain(model, inputs, answer=form)
        assert got.answer == [[17, 30], [5]]
        assert torch.equal(got.relevancy["language"], expected.relevancy["language"])
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    alone = explain(model, inputs, answer=made)
    assert alone.answer == [row[: row.index(2)] if 2 in row else row for row in made[:, 4:].tolist()]
    kept = torch.cat([PROMPTS[:1, :4], PROMPTS[1:, 1:5]]).tolist()  # not each row begins with its prompt
    assert explain(model, inputs, answer=kept).answer == kept
    with pytest.raises(ValueError, match="each answer must have a token before its end token; got an empty one"):
        explain(model, inputs, answer=torch.cat([PROMPTS[:, :4], torch.tensor([[17], [2]])], 1))


LANGUAGES = dict(lang_to_id={"<|en|>": 51, "<|fr|>": 52}, task_to_id={"transcribe": 53, "translate": 54}, is_multilingual=True)


def whisper(**settings):
    model = small("whisper").model
    model.generation_config.suppress_tokens = [*range(50, 60)] if "return_timestamps" not in settings else None
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


ENGLISH = {"no_timestamps_token_id": 55, "is_multilingual": False}
SEVERAL = {"no_timestamps_token_id": 55, **LANGUAGES}


WHISPERED = {
    "of English": (ENGLISH, {}),
    "told which tokens come first": (ENGLISH | {"forced_decoder_ids": [[1, 55]]}, {}),
    "with times": (ENGLISH | {"return_timestamps": True}, {}),
    "of several languages": (SEVERAL | {"language": "French", "task": "translate"}, {}),
    "of a language by its token": (SEVERAL | {"language": "<|en|>"}, {}),
    "told its language": (SEVERAL | {"forced_decoder_ids": [[1, 52], [2, 53]]}, {}),
    "with its language in the answer": (SEVERAL, {"return_dict_in_generate": True}),
    "asked for a language": (SEVERAL, {"return_dict_in_generate": True, "language": "fr", "task": "translate"}),
}


def test_tokens_that_whisper_leaves_out_of_its_answer():
    """Its `generate` begins with a language, a task and the like, and returns what comes after. The tokens of the answer have the
    scores that they have after what the decoder began with."""
    for case, (settings, options) in WHISPERED.items():
        model, sound = whisper(**settings), {"input_features": torch.randn(2, 4, 10, dtype=torch.float64)}
        begun = []
        handle = model.model.decoder.register_forward_pre_hook(
            lambda *a, of=begun: of.append(a[2]["input_ids"]), with_kwargs=True
        )
        answer = model.generate(**sound, max_new_tokens=4, do_sample=False, **options)
        handle.remove()
        got = explain(model, sound, answer=answer, method="attention")
        start = next(ids for ids in begun if ids.shape[1] > 1 or "return_timestamps" in settings)
        assert start[0, 0] == 50 and not set(sum(got.answer, [])) & {2, 3, *range(50, 56)}, case
        given = explain(model, {**sound, "decoder_input_ids": start}, answer=got.answer, method="attention")
        assert torch.equal(got.scores, given.scores) and got.answer == given.answer, case


def test_answers_of_whisper_that_differ_in_length_and_one_with_a_time_in_it():
    model, sound = whisper(**ENGLISH), {"input_features": torch.randn(2, 4, 10, dtype=torch.float64)}
    got = explain(model, sound, answer=torch.tensor([[57, 7, 8], [9, 3, 3]]), method="attention")  # padding is 3
    start = torch.tensor([[50, 55], [50, 55]])
    given = explain(model, {**sound, "decoder_input_ids": start}, answer=[[57, 7, 8], [9]], method="attention")
    assert got.answer == [[57, 7, 8], [9]] and torch.equal(got.scores, given.scores)


def test_a_language_that_whisper_finds_out_must_be_given():
    model, sound = whisper(no_timestamps_token_id=55, **LANGUAGES), {"input_features": torch.randn(1, 4, 10, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"must contain 'decoder_input_ids' .* got language=None.*return_dict_in_generate=True"):
        explain(model, sound, answer=model.generate(**sound, max_new_tokens=4))
    told = model.generate(**sound, max_new_tokens=4, language="fr", prompt_ids=torch.tensor([7, 8]), return_dict_in_generate=True)
    model.generation_config.language = "fr"
    with pytest.raises(ValueError, match="answer must begin with the start token 50, or not contain it; got other tokens before"):
        explain(model, sound, answer=told)


def test_the_first_token_that_a_translation_model_is_made_to_say_belongs_to_its_prompt():
    sizes = dict(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=60
    )
    model = lively(transformers.MBartForConditionalGeneration(transformers.MBartConfig(**sizes, decoder_start_token_id=2))).eval()
    model.generation_config.forced_bos_token_id = 50
    text = {"input_ids": PROMPTS}
    want = explain(model, {**text, "decoder_input_ids": torch.tensor([[2, 50], [2, 50]])}, answer=[[17, 30], [5, 9]])
    for form in ([[17, 30], [5, 9]], [[2, 50, 17, 30, 2], [2, 50, 5, 9, 2]], ["17 30", "5 9"]):
        got = explain(model, text, answer=form, processor=Words())
        assert got.answer == want.answer and torch.equal(got.scores, want.scores)
    other = explain(model, text, answer=[[2, 49, 17, 30], [2, 49, 5, 9]])  # generate(forced_bos_token_id=49)
    assert other.answer == [[49, 17, 30], [49, 5, 9]]


def test_a_text_that_begins_as_its_prompt_does_is_whole():
    model, inputs = decoder(), {"input_ids": PROMPTS[:1, :2]}
    for text in ("4 9 17", ["4 9 17"]):
        assert explain(model, inputs, answer=text, processor=Words()).answer == [[4, 9, 17]]
    assert explain(model, inputs, answer=[4, 9, 17]).answer == [[17]]  # ids are what `generate` returns
    assert explain(model, inputs, answer=[4, 9, 4, 9, 17]).answer == [[4, 9, 17]]


def test_bad_answers():
    of_answers = "answer must be token ids"
    for asked, error, words in (
        ({"answer": "17"}, ValueError, "processor must have a tokenizer"),
        ({"answer": [[17]]}, ValueError, "one answer for each of the 2 prompts; got 1"),
        ({"answer": [[17], []]}, ValueError, "at least one token"),
        ({"answer": []}, TypeError, of_answers),
        ({"answer": 3.5}, TypeError, of_answers),
        ({"answer": torch.tensor([[17.0, 3.0]] * 2)}, TypeError, rf"{of_answers} .* got \[\[17.0, 3.0\]"),
        ({"answer": [1.7, 3]}, TypeError, of_answers),
        ({"answer": [True]}, TypeError, of_answers),
        ({"answer": [[17, 3], [4, -100]]}, ValueError, "answer must hold token ids from 0 on; got -100"),
        ({"answer": [17, 99]}, ValueError, "answer must hold token ids below 60, the vocabulary of LlamaForCausalLM; got 99"),
        ({"answer": [17], "target": 3}, ValueError, "without target and position"),
        ({"inputs": {"input_ids": PROMPTS[0, :4]}}, ValueError, r"inputs must hold 'input_ids' \(B, N\), even for one text; got"),
    ):
        with pytest.raises(error, match=words):
            explain(decoder(), **{"inputs": {"input_ids": PROMPTS[:, :4], "attention_mask": REAL[:, :4]}, **asked})


def test_a_classifier_answers_nothing():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    with pytest.raises(ValueError, match="model must be a decoder with an adapter"):
        explain(vit, {"pixel_values": torch.randn(1, 3, 224, 224)}, answer=[17])


def double_inputs(decoder: Decoder, side: str = "right") -> dict:
    return in_double(decoder.case(decoder.inputs(side)))


def answered(decoder: Decoder, answers: list[list[int]]) -> dict:
    """The inputs of prompts with answers behind them, by the model's own rules for what each token has."""
    longer = dataclasses.replace(decoder, prompts=[p + a for p, a in zip(decoder.prompts, answers, strict=True)])
    inputs = double_inputs(longer)
    if type(decoder.model).__name__.startswith("PaliGemma"):  # its prefix is 0, its suffix 1
        for types, prompt in zip(inputs["token_type_ids"], decoder.prompts, strict=True):
            types[len(prompt) :] = 1
    return inputs


@pytest.mark.parametrize("decoder", [*DECODERS, "mllama"], indirect=True)
def test_each_token_is_scored_as_the_model_does_that_has_seen_those_before_it(decoder):
    answers = [[7, 12, 9], [9, 5, 30]]
    got = explain(decoder.model, double_inputs(decoder), answer=answers).scores
    decoder.model.set_attn_implementation("literal")  # eager, with softmax in float64
    for t in range(3):
        inputs = answered(decoder, [row[:t] for row in answers])
        want = next_logits(decoder.model(**inputs, use_cache=False), inputs).log_softmax(-1)
        assert (got[:, t] - want[range(2), [row[t] for row in answers]]).abs().max() < 1e-6  # norms and angles are in float32


@pytest.mark.parametrize("decoder", ["PaliGemmaForConditionalGeneration"], indirect=True)
def test_answers_of_paligemma_equal_stored_maps(decoder):
    got = explain(decoder.model, double_inputs(decoder), answer=[7, 12])
    inputs = answered(decoder, [[7, 12]] * 2)
    real = inputs["attention_mask"].bool()
    last = last_real_row(inputs, real.shape[1]).double()
    for t, token in enumerate((7, 12)):
        row = last.roll(t - 2, 1)  # in front of the token
        score = lambda o, row=row, token=token: (o.logits * row[..., None]).sum(1).log_softmax(-1)[:, token]  # noqa: E731
        place = Place("model.language_model.layers", row, real)
        want = rows_of(decoder.model, inputs, score, {"language": place})["language"]
        assert_rows(got.relevancy["language"][:, t], want, place)


@pytest.mark.parametrize("decoder", ["PaliGemmaForConditionalGeneration"], indirect=True)
def test_answers_of_paligemma_need_types(decoder):
    inputs = {name: value for name, value in decoder.inputs().items() if name != "token_type_ids"}
    with pytest.raises(ValueError, match=r"inputs must contain 'token_type_ids' \(B, N\) if answer is given"):
        explain(decoder.model, inputs, answer=[7])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "decoder", [f"{kind}ForConditionalGeneration" for kind in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")], indirect=True
)
def test_positions_in_three_axes_count_on_behind_the_image(decoder, side):
    """The model's own positions of prompts with answers; one prompt ends with its image, whose last token has smaller ones."""
    ends_with_image = [*decoder.prompts[1][:2], *[IMAGE] * 8]
    decoder = dataclasses.replace(decoder, prompts=[decoder.prompts[0], ends_with_image])
    inputs = double_inputs(decoder, side)
    named = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
    positions = decoder.model.model.get_rope_index(**named)[0]
    assert positions.shape == (3, *inputs["input_ids"].shape)
    positions = positions.where(inputs["attention_mask"].bool(), 50)  # what padding has is beside the point
    want = explain(decoder.model, inputs, answer=[[7, 12, 9], [9, 5]])
    got = explain(decoder.model, {**inputs, "position_ids": positions}, answer=[[7, 12, 9], [9, 5]])
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.relevancy["language"], want.relevancy["language"], rtol=1e-9, atol=1e-9)


def test_types_that_are_embedded_go_on_as_the_prompt_ends():
    """GPT-2 adds the embedding of a type; 0 is no more text than 4 is."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32)
    model = lively(transformers.GPT2LMHeadModel(config)).eval().double()
    inputs = {"input_ids": PROMPTS[:1], "token_type_ids": torch.tensor([[3, 3, 3, 4, 4, 4]])}
    longer = {"input_ids": torch.tensor([[*PROMPTS[0].tolist(), 17]]), "token_type_ids": torch.tensor([[3, 3, 3, 4, 4, 4, 4]])}
    want = model(**longer).logits[0, -1].log_softmax(-1)[30]
    got = explain(model, inputs, answer=[17, 30]).scores[0, 1]
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-9)


def test_inputs_that_no_answer_can_make_longer_are_refused():
    model, inputs = decoder(), {"input_ids": PROMPTS[:, :4]}
    for name, value, words in (
        ("inputs_embeds", torch.randn(2, 4, 32), r"inputs must not contain 'inputs_embeds' if answer is given.*got \(2, 4, 32\)"),
        ("head_mask", torch.ones(3, 2, 4), "inputs must not contain 'head_mask' if answer is given"),
        ("position_ids", torch.arange(4), r"position_ids must have shape \(B, N\), \(1, N\) or \(3, B, N\).*got \(4,\)"),
        ("token_type_ids", torch.zeros(2, 3), r"token_type_ids must have shape \(B, N\) with \(B, N\) = \(2, 4\); got \(2, 3\)"),
        ("attention_mask", torch.ones(2, 1, 4, 4), r"attention_mask must have shape \(B, N\)"),
        ("cross_attention_mask", torch.ones(2, 3, 1, 1), r"cross_attention_mask must have shape \(B, N, images, tiles\)"),
    ):
        with pytest.raises(ValueError, match=words):
            explain(model, {**inputs, name: value}, answer=[17])


def test_inputs_that_change_nothing_beside_an_answer():
    model, inputs = decoder(), {"input_ids": PROMPTS[:, :4]}
    want = explain(model, inputs, answer=[17, 30])
    for more in (
        {"image_sizes": torch.ones(2, 4), "qformer_input_ids": torch.ones(2, 4)},  # sizes that the prompts happen to have
        {"position_ids": torch.arange(4)[None]},
        {"labels": PROMPTS[:, :4]},  # of a loss alone
    ):
        got = explain(model, {**inputs, **more}, answer=[17, 30])
        assert torch.equal(got.relevancy["language"], want.relevancy["language"]), list(more)
        assert torch.equal(got.scores, want.scores), list(more)


def t5():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return lively(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))).eval()


def test_what_stands_beside_an_answer_of_an_encoder_decoder():
    labels = ("labels", ", since an encoder-decoder")
    for (name, because), value in (  # labels of another length than the decoder's tokens, and of theirs
        (labels, torch.full((2, 2), 5)),
        (labels, torch.full((2, 3), 5)),
        (("decoder_inputs_embeds", ""), torch.randn(2, 1, 32)),
    ):
        with pytest.raises(ValueError, match=f"inputs must not contain '{name}' if answer is given{because}"):
            explain(t5(), {"input_ids": PROMPTS, name: value}, answer=[7, 12])


def test_an_answer_to_a_single_token():
    """The row that predicts its first token is of one that sees itself alone."""
    model = decoder()
    got = explain(model, {"input_ids": PROMPTS[:1, :1]}, answer=[17])
    scores, rows = published(model, PROMPTS[0, :1].tolist(), [17])
    assert rows[0, 0] > 1 and rows[0, 1] == 0
    assert_rows(got.relevancy["language"][0], rows)
    torch.testing.assert_close(got.scores[0], scores, rtol=1e-9, atol=1e-10)
