"""Input times gradient and integrated gradients at the embeddings, in models with any attention or none."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import lively, vit
from tests.helpers.interpret.decoder_cases import LLAMA, mllama, next_logits
from tests.helpers.interpret.encoder_cases import vilt
from tests.helpers.interpret.stored_maps import with_floats
from tools.tiny_models.inputs import inputs_of
from tools.tiny_models.shrink import small_model
from vlattn_fast.interpret import explain
from vlattn_fast.interpret.relevancy.methods.registry import with_options

pytestmark = pytest.mark.usefixtures("published")

COMBINED = {
    "input_gradient": lambda products: products.sum(-1),
    "input_gradient:absolute": lambda products: products.sum(-1).abs(),
    "input_gradient:norm": lambda products: products.norm(dim=-1),
}


def entered(model, layers, run, scale=1.0) -> list[tuple[Tensor, Tensor]]:
    """The first inputs of `layers` and the gradients there of the score that `run` gives, where the inputs are scaled."""
    values: dict[nn.Module, Tensor] = {}
    scaled: dict[nn.Module, Tensor] = {}

    def keep(module, args, kwargs):
        stream = args[0] if args else kwargs["hidden_states"]
        values[module] = stream.detach()
        scaled[module] = (stream.detach() * scale).requires_grad_()
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (scaled[module] * 1, *args[1:]), rest

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    score = run().sum()
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(score, [scaled[layer] for layer in layers])
    return [(values[layer], grad) for layer, grad in zip(layers, grads, strict=True)]


def close(got: Tensor, want: Tensor) -> None:
    """Rows differ by a hundred thousandth of the largest entry at most: some norms of transformers compute in float32."""
    assert got.shape == want.shape and want.abs().max() > 1e-6
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


LAYERS = {
    "clip": {"text": "text_model.encoder.layers.0", "vision": "vision_model.encoder.layers.0"},
    "vit": {"vision": "vit.layers.0"},
    "bert": {"text": "bert.encoder.layer.0"},
    "uniter": {"joint": "uniter.encoder.layer.0"},
    "llava": {"language": "model.language_model.layers.0"},
    "qwen2_5_vl": {"language": "model.language_model.layers.0"},
}


@pytest.mark.parametrize("case", LAYERS, indirect=True)
def test_each_tower(case, request):
    layers = LAYERS[request.node.callspec.params["case"]]
    model, inputs = case.model.double(), with_floats(case.inputs, torch.float64)
    parts = entered(model, [model.get_submodule(path) for path in layers.values()], lambda: case.score(model(**inputs), inputs))
    for method, combine in COMBINED.items():
        got = explain(model, inputs, method=method)
        assert got.method == method and got.position == {}
        assert set(got.relevancy) == set(layers)
        for name, (values, grad) in zip(layers, parts, strict=True):
            torch.testing.assert_close(got.relevancy[name], combine(values * grad), rtol=1e-9, atol=1e-12)
            assert got.relevancy[name].dtype == torch.float64 and got.relevancy[name].abs().max() > 1e-4
    plain = explain(model, inputs)
    assert (plain.image is None) == (got.image is None) and plain.token_ids == got.token_ids and plain.target == got.target


def test_patches_that_a_model_shuffles_keep_their_places():
    made = vilt()
    model, inputs = lively(made.model).eval().double(), with_floats(made.inputs, torch.float64)
    rows = [explain(model, inputs, method="input_gradient").relevancy["joint"] for _ in range(2)]
    assert torch.equal(*rows)


def test_the_first_layer_that_runs():
    """Layers that see an image do not run without one."""
    sizes = dict(LLAMA, model_type=None, num_hidden_layers=3, cross_attention_layers=[0])
    model = lively(transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**sizes))).eval().double()
    ids = torch.tensor([[1, 5, 9, 20]])
    got = explain(model, {"input_ids": ids}, target=7, method="input_gradient").relevancy["language"]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits[:, -1, 7].sum(), embeddings)
    close(got, (embeddings * grad).sum(-1).detach())


@pytest.mark.filterwarnings("ignore:The relevancy leaves out")  # of the tokens that a layer chooses
def test_several_streams():
    """A model may hand on copies (B, N, streams, C) of its embeddings."""
    model = small_model(transformers.HYV4ForCausalLM).eval().double()
    inputs = next(inputs_of("causal", model))()
    got = explain(model, inputs, target=7, method="input_gradient").relevancy["language"]
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    handle = model.get_input_embeddings().register_forward_hook(lambda *a: embeddings * 1)
    outputs = model(**inputs)
    handle.remove()
    (grad,) = torch.autograd.grad(next_logits(outputs, inputs)[:, 7].sum(), embeddings)
    close(got, (embeddings * grad).sum(-1).detach())


MIXING = [("causal", "InklingForCausalLM"), ("causal", "JambaForCausalLM"), ("image-text", "Qwen3_5ForConditionalGeneration")]


@pytest.mark.parametrize(("mapping", "name"), MIXING)
def test_models_without_attention_in_some_layer(mapping, name):
    model = small_model(getattr(transformers, name)).eval().double()
    inputs = with_floats(next(inputs_of(mapping, model))(), torch.float64)
    if name == "InklingForCausalLM":
        with pytest.raises(ValueError, match=r"that a published rule covers; .*method='input_gradient' supports any module"):
            explain(model, inputs)
    got = explain(model, inputs, method="input_gradient")
    (tower,) = got.relevancy
    layer = next(module for path, module in model.named_modules() if path.endswith("layers.0") and "vis" not in path)
    run = lambda: next_logits(model(**inputs, use_cache=False), inputs).max(-1).values  # noqa: E731
    ((values, grad),) = entered(model, [layer], run)
    close(got.relevancy[tower], (values * grad).sum(-1))
    assert got.relevancy[tower].shape == inputs["input_ids"].shape
    answered = explain(model, inputs, answer=[7, 8], method="input_gradient")
    assert answered.relevancy[tower].shape == (len(inputs["input_ids"]), 2, inputs["input_ids"].shape[1] + 2)
    assert (answered.image is None) == ("image_grid_thw" not in inputs)


IDS = torch.tensor([[2, 17, 42, 8, 3], [2, 23, 3, 1, 1]])


class Words(nn.Module):
    """Embeddings, a recurrence, and a sum over the tokens: no attention, no list of layers."""

    def __init__(self, size: int, middle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.middle, self.head = nn.Embedding(size, 6), middle(), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.middle(self.words(input_ids))
        return self.head(states[0] if isinstance(states, tuple) else states).sum(1) - 4 * self.head.bias


class Sees(nn.Module):
    """Convolutions over a picture, and features, ids and a row of numbers beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 8, 3, 2, 1), nn.Tanh())
        self.words, self.other_words, self.head = nn.Embedding(60, 8), nn.Embedding(60, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, sounds: Tensor | None = None, ids: Tensor | None = None, row: Tensor | None = None) -> Tensor:
        whole = self.convolutions(x).mean((2, 3))
        if sounds is not None:
            whole = whole + sounds.tanh().sum(1)
        if ids is not None:
            whole = whole * self.words(ids).sum(1) + self.other_words(ids).sum(1)
        return self.head(whole if row is None else whole + row.tanh())


def test_pixels_features_and_ids_of_a_model_without_an_adapter():
    model = Sees().double()
    inputs = {"x": torch.randn(2, 3, 8, 12), "sounds": torch.randn(2, 5, 8), "ids": IDS, "row": torch.randn(2, 8)}
    inputs = with_floats(inputs, torch.float64)
    before = {name: value.clone() for name, value in inputs.items()}
    got = explain(model, inputs, target=1, method="input_gradient")
    assert all(torch.equal(inputs[name], value) and not inputs[name].requires_grad for name, value in before.items())
    x, sounds, row = (inputs[name].clone().requires_grad_() for name in ("x", "sounds", "row"))
    words, others = (part(IDS).detach().requires_grad_() for part in (model.words, model.other_words))
    whole = (model.convolutions(x).mean((2, 3)) + sounds.tanh().sum(1)) * words.sum(1) + others.sum(1)
    score = model.head(whole + row.tanh())[:, 1].sum()
    of_x, of_sounds, of_words, of_others, of_row = torch.autograd.grad(score, (x, sounds, words, others, row))
    pixels = (x * of_x).sum(1).detach()
    torch.testing.assert_close(got.relevancy["x"], pixels.flatten(1))
    torch.testing.assert_close(got.relevancy["sounds"], (sounds * of_sounds).sum(-1).detach())
    torch.testing.assert_close(got.relevancy["row"], (row * of_row).detach())
    torch.testing.assert_close(got.relevancy["ids"], (words * of_words + others * of_others).sum(-1).detach())
    assert torch.equal(got.image, got.relevancy["x"].view(2, 8, 12))
    patched = explain(model, inputs, target=1, method="input_gradient", patches=va.PatchGrid(2, 3))
    torch.testing.assert_close(patched.image, pixels.view(2, 2, 4, 3, 4).sum((2, 4)))
    with pytest.raises(ValueError, match="patches must fit an explained tower"):
        explain(model, inputs, target=1, method="input_gradient", patches=va.PatchGrid(3, 3))


FURTHER = [
    *("BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "M2M100", "MBart", "Mvp", "PLBart", "Pegasus"),
    *("LED", "ProphetNet", "T5"),
]


SEQUENCES = [  # whose tables of positions take a shape, or ids
    ("MarianMTModel", False),
    ("BartForConditionalGeneration", False),
    ("BartForConditionalGeneration", True),  # its decoder begins with the very ids of its encoder
    *(
        pytest.param(f"{kind}ForConditionalGeneration", copies, marks=pytest.mark.slow)
        for kind in FURTHER
        for copies in (False, True)
    ),
]


@pytest.mark.parametrize(("name", "copies"), SEQUENCES)
def test_only_words_count(name, copies):
    """Rows of each method are those of embeddings that enter by hand: positions, whose numbers may equal ids, are no words."""
    config = transformers.LEDConfig(**LED) if name.startswith("LED") else None
    model = getattr(transformers, name)(config) if config else small_model(getattr(transformers, name))
    model = lively(model).eval().double()
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4]]) + 2
    inputs = {"input_ids": ids, "decoder_input_ids": ids if copies else ids[:, 2:]}
    words = [model.get_input_embeddings()(part).detach() for part in inputs.values()]
    last = lambda outputs: outputs.logits[:, -1, 7]  # noqa: E731

    def score(read, said):
        return last(model(inputs_embeds=read, decoder_inputs_embeds=said, use_cache=False))

    def products(scale):
        scaled = [(part * scale).requires_grad_() for part in words]
        grads = torch.autograd.grad(score(*scaled).sum(), scaled)
        return [(part * grad).sum(-1) for part, grad in zip(words, grads, strict=True)]

    drops = [torch.zeros(part.shape, dtype=torch.float64) for part in inputs.values()]
    with torch.no_grad():
        for number, part in enumerate(words):
            for token in range(part.shape[1]):
                cut = [part.index_fill(1, torch.tensor(token), 0.0) if other is part else other for other in words]
                drops[number][:, token] = score(*words) - score(*cut)
    plain, steps = products(1.0), [products(scale) for scale in (0.25, 0.75)]
    expected = {
        va.methods.InputGradient(freeze=()): plain,
        va.methods.SmoothGrad(1, noise=0.0): plain,
        va.methods.IntegratedGradients(2): [(first + second) / 2 for first, second in zip(*steps, strict=True)],
        va.methods.Occlusion(): drops,
    }
    for method, rows in expected.items():
        got = explain(model, inputs, target=last, method=method).relevancy
        assert set(got) == set(inputs)
        for part, row in zip(inputs, rows, strict=True):
            close(got[part], row)


LED = dict(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24) | dict(
    encoder_attention_heads=2, decoder_attention_heads=2, attention_window=4, max_encoder_position_embeddings=32
)


@pytest.mark.parametrize("kind", ["Bart", "RoFormer", "MBart", "T5"])  # BART shifts the ids themselves into the decoder
def test_every_use_of_a_word_counts(kind):
    """The gradient at a row of the table is that of all its uses."""
    model = lively(small_model(getattr(transformers, f"{kind}ForSequenceClassification"))).eval().double()
    ids = torch.tensor([[10, 11, 12, 13, 14, model.config.eos_token_id or 15]])
    got = explain(model, {"input_ids": ids}, target=1, method=va.methods.InputGradient(freeze=()))
    table = model.get_input_embeddings().weight
    (grad,) = torch.autograd.grad(model(input_ids=ids).logits[0, 1], table)
    close(got.relevancy["input_ids"][:, :5], (table * grad).sum(-1)[ids[:, :5]].detach())


class Rearranged(nn.Module):
    """Looks words up in two halves, the second one backwards and after padding, one of them as another word."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places, self.head = nn.Embedding(60, 6), nn.Embedding(60, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        first, second = ids.chunk(2, 1)
        second = nn.functional.pad(second.flip(1), (1, 0), value=1).contiguous()
        second[:, -1] = 5
        states = torch.cat([self.words(first.t()).transpose(0, 1), self.words(second)], 1)
        places = nn.functional.pad(self.places(ids.ne(60).long().cumsum(1)), (0, 0, 1, 0))  # of what is no padding
        same = self.head(self.words(first.clone().fill_(5))).sum(1)  # of no input
        return self.head((states + places).tanh() * torch.arange(1, states.shape[1] + 1)[:, None]).sum(1) + same


def test_words_that_a_model_rearranges():
    """Padding is no word, and neither is what the model puts in a word's place: here the first of the second half."""
    model = Rearranged().double()
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4]])
    got = explain(model, {"ids": ids}, target=1, method="input_gradient").relevancy["ids"]
    words = model.words(ids).detach().requires_grad_()
    padding, instead = (model.words(torch.full((2, 1), word)) for word in (1, 5))
    places = torch.cat([torch.zeros(1, 6), model.places(torch.arange(1, 7))])
    states = torch.cat([words[:, :3], padding, words[:, 4:].flip(1), instead], 1) + places
    logits = model.head(states.tanh() * torch.arange(1, 8)[:, None]).sum(1)
    (grad,) = torch.autograd.grad(logits[:, 1].sum(), words)
    close(got, (words * grad).sum(-1).detach())
    assert (got[:, 3] == 0).all()


class Hears(nn.Module):
    """Convolves features (B, C, N), or (B, N, C) after a transposition."""

    def __init__(self, transposes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transposes, self.convolution, self.head = transposes, nn.Conv1d(4, 6, 3, 2, 1), nn.Linear(6, 3)

    def forward(self, sound: Tensor) -> Tensor:
        sound = (sound - 0.1) / 2
        sound = nn.functional.pad(sound.transpose(1, 2).contiguous() if self.transposes else sound, (1, 1))
        return self.head(self.convolution(sound).tanh().sum(2))


@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("count", [4, 7])  # as many tokens as features, or others
def test_tokens_of_sound_lie_along_its_convolution(transposes, count):
    model, features = Hears(transposes).double(), 2 if transposes else 1
    sound = torch.randn(2, count, 4) if transposes else torch.randn(2, 4, count)
    x = sound.double().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    got = explain(model, {"sound": x.detach()}, target=1, method="input_gradient").relevancy["sound"]
    close(got, (x * grad).sum(features).detach())
    drops = explain(model, {"sound": x.detach()}, target=1, method="occlusion").relevancy["sound"]
    for token in range(count):
        cut = x.detach().index_fill(3 - features, torch.tensor(token), 0.0)
        torch.testing.assert_close(drops[:, token], (model(x) - model(cut))[:, 1].detach())


def test_a_module_in_which_the_gradient_ends_is_named():
    class Cut(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    case = vit()
    inner = case.model.vit.layers[1].mlp
    name = next(name for name, part in inner.named_children() if isinstance(part, nn.Linear))
    old = getattr(inner, name)
    setattr(inner, name, Cut(old.in_features, old.out_features))
    with pytest.warns(UserWarning, match=rf"relevancy leaves out what goes through 'vit\.layers\.1\.mlp\.{name}' \(Cut\)"):
        explain(lively(case.model).eval(), case.inputs, method="input_gradient")


class Square(nn.Module):
    """The score of tokens x is (sum of all numbers)^2, or the sum of their third powers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.sum((1, 2)) ** 2, (x**3).sum((1, 2))], 1)


def test_integrated_gradients_worked_by_hand():
    """Tokens (1, 2) and (-1, 3): the sum is 5, so the first score is 25, of which 3/5 and 2/5 are theirs at any number of steps.
    Of the second one it is 9 and 26; two steps are at 1/4 and 3/4, where 3 (1/16 + 9/16) / 2 = 15/16 takes the place of 1."""
    x = torch.tensor([[[1.0, 2.0], [-1.0, 3.0]]], dtype=torch.float64)
    for steps in (1, 2, 7):
        got = explain(Square(), {"x": x}, target=0, method=va.methods.IntegratedGradients(n_steps=steps))
        torch.testing.assert_close(got.relevancy["x"], torch.tensor([[15.0, 10.0]], dtype=torch.float64))
    got = explain(Square(), {"x": x}, target=1, method=va.methods.IntegratedGradients(n_steps=2))
    torch.testing.assert_close(got.relevancy["x"], torch.tensor([[9.0, 26.0]], dtype=torch.float64) * 15 / 16)
    assert got.scores.tolist() == [35.0]


@pytest.mark.parametrize("case", ["clip", "llava"], indirect=True)
def test_all_towers_are_scaled_together(case, request):
    layers = LAYERS[request.node.callspec.params["case"]]
    model, inputs = case.model.double(), with_floats(case.inputs, torch.float64)
    got = explain(model, inputs, method=va.methods.IntegratedGradients(n_steps=4))
    modules = [model.get_submodule(path) for path in layers.values()]
    fixed = torch.tensor(got.target)

    def score():
        outputs = model(**inputs)
        if hasattr(outputs, "logits_per_image"):
            return outputs.logits_per_image.diagonal()
        return next_logits(outputs, inputs).gather(1, fixed[:, None])[:, 0]

    sums = {name: torch.zeros_like(row) for name, row in got.relevancy.items()}
    for step in range(4):
        for name, (values, grad) in zip(layers, entered(model, modules, score, (step + 0.5) / 4), strict=True):
            sums[name] += (values * grad).sum(-1) / 4
    for name, row in got.relevancy.items():
        close(row, sums[name])


def test_no_step_outlives_the_next(monkeypatch):
    """However many the steps, as many graphs of them live."""
    import gc
    import weakref

    kept: list[weakref.ref] = []
    most: list[int] = []

    class Watched(Square):
        def forward(self, x: Tensor) -> Tensor:
            most.append(sum(one() is not None for one in kept))
            outputs = super().forward(x)
            kept.append(weakref.ref(outputs))
            return outputs

    gc.disable()
    try:
        explain(Watched(), {"x": torch.randn(1, 4, 2)}, target=0, method=va.methods.IntegratedGradients(n_steps=9))
    finally:
        gc.enable()
    assert len(most) == 11 and max(most) <= 2


@pytest.mark.parametrize("case", ["vit"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_layer": -1}, "start_layer must be an option of method 'input_gradient', which has freeze, of, baseline; got -1"),
        ({"n_steps": 4}, "n_steps must be an option of method 'input_gradient', which has freeze, of, baseline; got 4"),
        ({"name": "integrated_gradients", "n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"name": "gradient", "through_connector": True}, "must have an adapter with a connector for through_connector=True"),
    ],
)
def test_bad_options(case, options, message):
    with pytest.raises(ValueError, match=message):
        explain(case.model, case.inputs, method=with_options(**{"name": "input_gradient", **options}))


def test_a_model_that_embeds_nothing():
    class Counts(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.one_hot(ids, 60).double().sum(1)

    with pytest.raises(ValueError, match="model must embed an input: ids with nn.Embedding, .*; got Counts, which embeds none"):
        explain(Counts(), {"ids": IDS}, target=0, method="input_gradient")


def test_a_tower_without_layers_is_refused():
    """Mllama's cross-attention takes what the vision model ends with, which its adapter does not go into."""
    decoder = mllama()
    with pytest.raises(ValueError, match="method must use attention if an adapter names no layers of a tower.* tower 'vision'"):
        explain(decoder.model.eval(), decoder.inputs(), method="input_gradient")
