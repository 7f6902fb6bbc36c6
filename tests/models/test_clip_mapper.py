"""CLIPMapper as a model: its formula, where it is read, causality, padding, cached states, generation, what it refuses."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, SiglipTextConfig, SiglipTextModel

from vlattn_fast.models import CLIPMapper

EOS = 12
TEXT = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 1,
    "image_size": 8,
    "patch_size": 4,
}
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 4}
IDS = torch.tensor([[1, 5, 6, 7, EOS, 0], [1, 3, EOS, 0, 0, 0]])
MASK = IDS != 0


def clip():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)).eval()


def mapper(**options):
    encoders = clip()
    task = options if {"num_answers", "vocab_size"} & options.keys() else {"num_answers": 5, **options}
    model = CLIPMapper(encoders.vision_model, encoders.text_model, **{**SIZES, **task})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not name.startswith(("vision.", "text.")):  # norms and biases, too, so that none may be left out
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pixels(batch=2):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def formula(model, image_states, text_states, mask, cross_first=False):
    """The mapper written out with stored maps, mask bool (B, T, T)."""
    state = model.state_dict()

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def attend(name, x, context, mask):
        q, k, v = (
            linear(f"{name}.{part}", states).unflatten(-1, (4, 4)).transpose(1, 2)
            for part, states in (("query", x), ("key", context), ("value", context))
        )
        weights = (q @ k.mT / 2).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return linear(f"{name}.output", (weights @ v).transpose(1, 2).flatten(2))

    image = linear("vision_projection", norm("vision_norm", image_states))
    x = linear("text_projection", text_states)
    every = torch.ones(x.shape[0], x.shape[1], image.shape[1], dtype=torch.bool)
    among = torch.ones(x.shape[0], image.shape[1], image.shape[1], dtype=torch.bool)
    for layer in ("layers.0", "layers.1"):
        if model.image_layers:
            normed = norm(f"image_{layer}.self_attention_norm", image)
            image = image + attend(f"image_{layer}.self_attention", normed, normed, among)
        for part in ("cross", "self") if cross_first else ("self", "cross"):
            normed = norm(f"{layer}.{part}_attention_norm", x)
            context, seen = (normed, mask) if part == "self" else (image, every)
            x = x + attend(f"{layer}.{part}_attention", normed, context, seen)
        x = x + linear(f"{layer}.mlp.output", F.gelu(linear(f"{layer}.mlp.intermediate", norm(f"{layer}.mlp_norm", x))))
    x = norm("norm", x)
    return linear("head", x), x


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("task", [{"num_answers": 5}, {"vocab_size": 13}], ids=str)
@pytest.mark.parametrize("image_self_attention", [True, False])
@pytest.mark.parametrize("cross_first", [True, False])
def test_the_forward_pass_is_the_formula(cross_first, image_self_attention, task, masked):
    """Answers are read at the end of the text, and next tokens have a causal mask."""
    model, images = mapper(cross_first=cross_first, image_self_attention=image_self_attention, **task).double(), pixels().double()
    assert len(model.image_layers) == 2 * image_self_attention
    output = model(pixel_values=images, input_ids=IDS, attention_mask=MASK if masked else None)
    text = model.text(input_ids=IDS, attention_mask=MASK.long() if masked else None).last_hidden_state
    answers = "num_answers" in task
    real = MASK if masked or answers else torch.ones_like(MASK)
    seen = real[:, None] & (torch.ones(6, 6) if answers else torch.ones(6, 6).tril()).bool()
    logits, states = formula(model, model.encode_image(images), text, seen, cross_first)
    wanted, got = (logits[[0, 1], [4, 2]], output.logits) if answers else (logits[real], output.logits[real])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.last_hidden_state[real], states[real], rtol=1e-10, atol=1e-10)


def test_padding_on_the_left_is_finite():
    model = mapper(vocab_size=13)
    ids, mask = IDS.flip(1), MASK.flip(1)
    logits = model(pixel_values=pixels(), input_ids=ids, attention_mask=mask).logits
    assert logits.isfinite().all()


def test_where_a_row_is_read():
    model = mapper()
    padded_with_eos = torch.where(MASK, IDS, EOS)  # as CLIP's tokenizer pads: the first one is read
    wanted = model(pixel_values=pixels(), input_ids=IDS).logits
    torch.testing.assert_close(model(pixel_values=pixels(), input_ids=padded_with_eos).logits, wanted)
    with pytest.raises(ValueError, match=r"^input_ids must have the end-of-text token 12 in every sample; got"):
        model(pixel_values=pixels(), input_ids=torch.ones(2, 3, dtype=torch.long))
    model.eos_token_id = 2  # of old configs: the highest id
    torch.testing.assert_close(model(pixel_values=pixels(), input_ids=IDS).logits, wanted)
    model.eos_token_id = [EOS, 11]
    torch.testing.assert_close(model(pixel_values=pixels(), input_ids=IDS).logits, wanted)
    model.eos_token_id = None
    torch.testing.assert_close(model(pixel_values=pixels(), input_ids=IDS, attention_mask=MASK).logits, wanted)
    last = model(pixel_values=pixels()[:1], input_ids=IDS[:1, :5]).logits
    torch.testing.assert_close(last, wanted[:1])
    assert mapper(eos_token_id=7).eos_token_id == 7 and mapper().eos_token_id == EOS


def test_cached_states_take_the_place_of_the_encoders(monkeypatch):
    model, images = mapper(), pixels()
    wanted = model(pixel_values=images, input_ids=IDS, attention_mask=MASK).logits
    image, text = model.encode_image(images), model.encode_text(IDS, MASK)
    assert not image.requires_grad and image.shape == (2, 5, 12) and text.shape == (2, 6, 8)
    for encoder in (model.vision, model.text):
        monkeypatch.setattr(encoder, "forward", lambda **_: pytest.fail("the encoder ran"))
    got = model(input_ids=IDS, attention_mask=MASK, image_states=image, text_states=text).logits
    assert torch.equal(got, wanted)


def test_frozen_encoders_stay_as_they_are():
    model = mapper(dropout=0.5).train()
    assert not model.vision.training and not model.text.training and model.layers.training
    model(pixel_values=pixels(), input_ids=IDS).logits.sum().backward()
    without = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"vision", "text"}
    one, two = (model(pixel_values=pixels(), input_ids=IDS).logits for _ in range(2))
    assert not torch.equal(one, two), "dropout"
    free = mapper(freeze_encoders=False).train()
    assert free.vision.training and free.text.training
    free(pixel_values=pixels(), input_ids=IDS).logits.sum().backward()
    unread = {name for name, parameter in free.named_parameters() if parameter.grad is None}
    assert unread == {"vision.post_layernorm.weight", "vision.post_layernorm.bias"}, "of CLIP's pooled state alone"


def test_any_encoder_with_states_and_a_size_will_do():
    class Encoder(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.config = SimpleNamespace(hidden_size=size)
            self.states = torch.nn.Embedding(20, size)

        def forward(self, pixel_values=None, input_ids=None, attention_mask=None):
            ids = torch.arange(7).expand(len(pixel_values), -1) if input_ids is None else input_ids
            return SimpleNamespace(last_hidden_state=self.states(ids))

    model = CLIPMapper(Encoder(6), Encoder(10), **SIZES, num_answers=3)
    assert model(pixel_values=pixels(), input_ids=IDS).logits.shape == (2, 3)
    torch.manual_seed(0)
    config = {name: size for name, size in TEXT.items() if not name.endswith("token_id")}
    siglip = SiglipTextModel(SiglipTextConfig(**config, eos_token_id=EOS))
    answers = CLIPMapper(clip().vision_model, siglip, **SIZES, num_answers=3)
    assert answers(pixel_values=pixels(), input_ids=IDS).logits.shape == (2, 3)


def greedy(model, images, ids, count):
    """One row, without padding, the whole forward pass anew for each token."""
    for _ in range(count):
        ids = torch.cat([ids, model(pixel_values=images, input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_generate_is_greedy_and_batches_prompts_of_different_lengths():
    model, images = mapper(vocab_size=13), pixels()
    prompts = torch.tensor([[1, 5, 6, 7], [1, 3, 0, 0]])
    mask = prompts != 0
    unstopped = torch.stack([greedy(model, images[i : i + 1], prompts[i : i + 1, :n], 5)[0, n:] for i, n in ((0, 4), (1, 2))])
    never = next(token for token in range(13) if token not in unstopped)
    got = model.generate(images, prompts, mask, max_new_tokens=5, stop_token=never)
    assert torch.equal(got, unstopped)
    states = model.encode_image(images)
    assert torch.equal(model.generate(None, prompts, mask, image_states=states, max_new_tokens=5, stop_token=never), got)
    stop = int(unstopped[0, 1])
    stopped = model.generate(images, prompts, mask, max_new_tokens=5, stop_token=stop)
    for row, whole in zip(stopped, unstopped, strict=True):
        at = whole.tolist().index(stop) if stop in whole else 5
        assert row[:at].tolist() == whole[:at].tolist()[: len(row)] and row[at:].eq(stop).all()
    longest = model.generate(images, prompts, mask, stop_token=never)
    assert longest.shape == (2, 6) and torch.equal(longest[:, :5], unstopped), "nine positions, and the last token is not read"
    alone = model.generate(images[:1], prompts[:1], max_new_tokens=5, stop_token=stop)
    assert alone.shape[1] == unstopped[0].tolist().index(stop) + 1, "it ends where all rows have"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"input_ids": [[1, 2]]}, TypeError),
        ({"input_ids": torch.ones(2, 6)}, ValueError),
        ({"input_ids": torch.full((2, 6), 13)}, ValueError),
        ({"input_ids": torch.ones(2, 10, dtype=torch.long)}, ValueError),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, ValueError),
        ({"pixel_values": None}, ValueError),
        ({"pixel_values": "image"}, TypeError),
        ({"pixel_values": torch.zeros(3, 1, 8, 8)}, ValueError),
        ({"pixel_values": torch.zeros(2, 1, 8, 8, dtype=torch.long)}, ValueError),
        ({"pixel_values": torch.zeros(2, 1, 8, 8), "image_states": torch.zeros(2, 5, 12)}, ValueError),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError),
        ({"attention_mask": torch.ones(2, 6)}, ValueError),
        ({"attention_mask": [True]}, TypeError),
        ({"text_states": torch.zeros(2, 6, 9)}, ValueError),
        ({"image_states": torch.zeros(2, 5, 13), "pixel_values": None}, ValueError),
    ],
)
def test_wrong_input_is_named(changes, error):
    with pytest.raises(error, match=f"^{next(iter(changes))} .*must .*; got "):
        mapper()(**{"pixel_values": pixels(), "input_ids": IDS, "attention_mask": MASK, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"num_answers": 5, "vocab_size": 13}, ValueError, "num_answers"),
        ({"num_answers": None}, ValueError, "num_answers"),
        ({"num_answers": 0}, ValueError, "num_answers"),
        ({"num_answers": 2.0}, TypeError, "num_answers"),
        ({"vocab_size": 14}, ValueError, "vocab_size"),
        ({"hidden_size": 18}, ValueError, "hidden_size"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"num_heads": True}, TypeError, "num_heads"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"vision": None}, TypeError, "vision"),
        ({"text": torch.nn.Linear(2, 2)}, ValueError, "text"),
    ],
)
def test_wrong_options_are_named(changes, error, name):
    encoders = clip()
    options = {"vision": encoders.vision_model, "text": encoders.text_model, **SIZES, **changes}
    if not {"num_answers", "vocab_size"} & changes.keys():
        options["num_answers"] = 5
    with pytest.raises(error, match=f"^{name} .*must .*; got "):
        CLIPMapper(options.pop("vision"), options.pop("text"), **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop_token": 13}, "stop_token"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 7}, "input_ids and max_new_tokens"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "attention_mask"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}, "attention_mask"),
    ],
)
def test_wrong_generation_is_named(changes, words):
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=f"^{words} must .*; got "):
        mapper(vocab_size=13).generate(pixels(), ids, **{"max_new_tokens": 3, **changes})


def test_an_end_that_stands_for_another_one_stops_nothing():
    model, ids = mapper(vocab_size=13, eos_token_id=2), torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="^stop_token must be given if eos_token_id is 2, .*; got None"):
        model.generate(pixels(), ids, max_new_tokens=3)
    assert model.generate(pixels(), ids, max_new_tokens=3, stop_token=2).shape[0] == 2


def test_without_positions_the_length_must_be_given(monkeypatch):
    model = mapper(vocab_size=13)
    monkeypatch.setattr(model.text, "config", SimpleNamespace(hidden_size=8))
    with pytest.raises(ValueError, match="^max_new_tokens must be given .*; got None"):
        model.generate(pixels(), IDS, MASK)


def test_only_a_model_of_texts_generates():
    with pytest.raises(ValueError, match="^generate must .*; got "):
        mapper().generate(pixels(), IDS)


@pytest.mark.slow
def test_compiles_to_one_graph():
    for model in (mapper(), mapper(vocab_size=13)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        inputs = {"pixel_values": pixels(), "input_ids": IDS, "attention_mask": MASK}
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
