"""Towers that no record names, in torch's own modules, in modules as timm and open_clip write them, and in transformers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")

from tests.interpret.cases import TEXT, VISION, lively, one_hot  # noqa: E402
from tests.interpret.stored_maps import Place, beside, error, rows_of  # noqa: E402
from vlattn_fast.interpret import explain  # noqa: E402
from vlattn_fast.nn import ScoreAttention  # noqa: E402

METHODS = ("gradient", "rollout", "attention", "gradcam")
HEADS = 4


def second(outputs: Tensor) -> Tensor:
    return outputs[:, 1]


def first_rows(size: int, batch: int = 2) -> Tensor:
    return one_hot(torch.zeros(batch, dtype=torch.long), size)


def check(
    model: nn.Module,
    inputs: dict[str, Any],
    places: dict[str, Place],
    read: Any,
    target: Callable[[Any], Tensor] = second,
    methods: tuple[str, ...] = METHODS,
) -> None:
    """In float64 and then in float32, each tower against stored maps."""
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model.to(dtype)
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        for method in methods:
            want = rows_of(model, inputs, target, places, method)
            got = explain(model, inputs, method=method, read=read, target=target).relevancy
            for tower, place in places.items():
                assert error(got[tower], want[tower], place, method) < bound, (dtype, method, tower)


# --- blocks that attend in different ways ---


class Heads(nn.Module):
    """Self-attention of one kind; `visible` (B, N) says which keys are real."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.kind == "one head":
            mask = visible[:, None].expand(-1, x.shape[1], -1)
            return self.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        mask = visible[:, None, None]
        if self.kind == "by name":
            y = scaled_dot_product_attention(q, k, v, mask)
        elif self.kind == "torch":
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
            y = self.weights(scores) @ v
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(self, scores: Tensor) -> Tensor:
        if self.kind == "a layer made on the way":
            return nn.Softmax(-1)(scores)
        if self.kind == "three dimensions":
            return torch.softmax(scores.flatten(0, 1), -1).view_as(scores)
        if self.kind == "exponentials":
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            return weights / weights.sum(-1, keepdim=True)
        return scores.softmax(-1)


class Multihead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(width, HEADS, batch_first=True)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.inside(x, x, x, key_padding_mask=~visible, need_weights=False)[0]


class Scored(nn.Module):
    def __init__(self, score: str, width: int) -> None:
        super().__init__()
        self.inside = ScoreAttention(width, HEADS, score)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.inside(x, key_mask=visible)


class TimmLike(nn.Module):
    """timm's Attention: by hand where `fused_attn` is off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fused_attn, self.qkv, self.proj = False, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.scale = nn.LayerNorm(width // HEADS), (width // HEADS) ** -0.5

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, mask = self.q_norm(q), visible[:, None, None]
        if self.fused_attn:
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        made = {"nn.MultiheadAttention": Multihead, "timm": TimmLike}
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        if kind.startswith("score "):
            self.attend: nn.Module = Scored(kind.removeprefix("score "), width)
        else:
            self.attend = made[kind](width) if kind in made else Heads(kind, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x), visible)
        return x + self.mlp(x)


class Stack(nn.Module):
    """Classifies a sequence by its first token."""

    def __init__(self, *kinds: str, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(10, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Block(kind, width) for kind in kinds)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self.run(block, x, attention_mask.bool())
        return self.head(x[:, 0])

    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        return block(x, visible)


def stack(*kinds: str, make: type[Stack] = Stack) -> nn.Module:
    torch.manual_seed(0)
    return lively(make(*kinds)).eval()


def sequences() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"x": torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(3)), "attention_mask": mask}


SEEN = ["torch", "by name", "one head", "nn.MultiheadAttention", "timm"]


@pytest.mark.parametrize("kind", SEEN)
def test_one_kind_of_attention(kind):
    inputs = sequences()
    target = lambda outputs: -outputs[:, 1]  # noqa: E731 (Grad-CAM of one head is zero where its weight is negative)
    check(stack(kind, kind, kind), inputs, {"tower0": Place("blocks", first_rows(7), inputs["attention_mask"])}, "cls", target)


def test_several_kinds_in_one_tower():
    inputs = sequences()
    check(stack(*SEEN), inputs, {"tower0": Place("blocks", first_rows(7), inputs["attention_mask"])}, {"tower0": "cls"})


@pytest.mark.parametrize("score", ["scaled_dot", "general", "biased_general", "hadamard"])
def test_scores_that_are_products_of_features(score):
    """Torch's attention runs them, in float64 where that costs little, beside layers in float32."""
    model, inputs = stack("torch", f"score {score}", "torch"), sequences()
    place = Place("blocks", first_rows(7), inputs["attention_mask"])
    single = explain(model, inputs, read="cls", target=second).relevancy["tower0"]
    double = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    model.double()
    for method in METHODS:
        want = rows_of(model, double, second, {"tower0": place}, method)["tower0"]
        assert (
            error(explain(model, double, read="cls", target=second, method=method).relevancy["tower0"], want, place, method)
            < 1e-10
        )
    want = rows_of(model, double, second, {"tower0": place}, "gradient")["tower0"]
    assert single.dtype == torch.float32 and error(single.double(), want, place, "gradient") < 1e-5


@pytest.mark.parametrize("read", ["last", "mean", 3, -1, "weights"])
def test_rows_that_are_read(read):
    model, inputs = stack("torch", "torch"), sequences()
    rows = {
        "last": one_hot(torch.tensor([6, 4]), 7),
        "mean": torch.full((2, 7), 1 / 7),
        3: one_hot(torch.tensor([3, 3]), 7),
        -1: one_hot(torch.tensor([6, 6]), 7),
        "weights": torch.rand(2, 7),
    }
    inputs = {**inputs, "attention_mask": inputs["attention_mask"] if read == "last" else torch.ones(2, 7, dtype=torch.long)}
    row = rows[read].double()
    place = Place("blocks", row, inputs["attention_mask"])
    model, inputs["x"] = model.double(), inputs["x"].double()
    want = rows_of(model, inputs, lambda o: o[:, 1], {"tower0": place})["tower0"]
    got = explain(model, inputs, read=row if read == "weights" else read, target=lambda o: o[:, 1]).relevancy["tower0"]
    assert float((got - want).abs().max()) < 1e-6 * float(beside(want, place).abs().max())


# --- refused by name ---


@pytest.mark.parametrize("kind", ["by hand", "a layer made on the way", "three dimensions"])
@pytest.mark.parametrize("alone", [True, False])
def test_attention_by_hand_is_named(kind, alone):
    model = stack(kind, kind) if alone else stack("torch", kind, "torch")
    name = r"blocks\.0\.attend" if alone else r"blocks\.1\.attend"
    with pytest.raises(ValueError, match=rf"got '{name}' \(Heads\), which takes a softmax itself"):
        explain(model, sequences(), read="cls", target=second)


def test_attention_without_a_softmax_is_missed():
    with pytest.raises(ValueError, match=r"got 'blocks\.1' \(Block\), whose attention was not called"):
        explain(stack("torch", "exponentials", "torch"), sequences(), read="cls", target=second)
    with pytest.raises(ValueError, match="got a forward pass of Stack without a call"):
        explain(stack("exponentials", "exponentials"), sequences(), read="cls", target=second)


@pytest.mark.parametrize("score", ["cosine", "additive", "activated_general"])
def test_other_scores_are_named(score):
    with pytest.raises(ValueError, match=r"got 'blocks\.1\.attend\.inside' \(ScoreAttention\)"):
        explain(stack("torch", f"score {score}"), sequences(), read="cls", target=second)


class FlexBlock(Block):
    """A layer of another class than its neighbours, so that nothing else tells that it attends."""

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.attend.qkv(x).chunk(3, -1))
        return x + flex_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_named():
    model = stack("torch", "torch", "torch")
    model.blocks[1] = FlexBlock("torch", 32)
    # On a CPU it has no backward pass, and rollout takes none.
    with pytest.raises(ValueError, match=r"got flex_attention in 'blocks\.1'"):
        explain(model, sequences(), read="cls", target=second, method="rollout")


def test_weights_of_the_residual_branch_need_a_record():
    with pytest.raises(ValueError, match=r"got 'weighted' and 'blocks\.0\.attend'"):
        explain(stack("torch"), sequences(), read="cls", target=second, method="weighted")


class Checkpointed(Stack):
    reentrant = False

    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        return checkpoint(block, x, visible, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Unrecorded(Stack):
    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        with torch.no_grad():
            return block(x, visible)


@pytest.mark.parametrize("method", ["gradient", "rollout"])
def test_checkpointed_layers_are_named(method):
    with pytest.raises(ValueError, match=r"got attention 'blocks\.0\.attend' inside of torch\.utils\.checkpoint"):
        explain(stack("torch", "torch", make=Checkpointed), sequences(), read="cls", target=second, method=method)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", [Reentrant, Unrecorded])
@pytest.mark.parametrize("method", METHODS)
def test_layers_without_gradients_are_refused(make, method):
    model, inputs = stack("torch", "torch", make=make), sequences()
    if method == "attention":  # it takes none
        want = explain(stack("torch", "torch"), inputs, read="cls", target=second, method=method).relevancy["tower0"]
        torch.testing.assert_close(explain(model, inputs, read="cls", target=second, method=method).relevancy["tower0"], want)
        return
    with pytest.raises(ValueError, match="gradient"):
        explain(model, inputs, read="cls", target=second, method=method)


# --- wrappers ---


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_layer(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.blocks[1].forward = torch.compile(model.blocks[1].forward, backend="eager")
    return model


def hooked(model: nn.Module) -> nn.Module:
    """As accelerate's add_hook_to_module does it: each forward is replaced on its module, and calls the one before."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._hf_hook(module._old_forward(*args, **kwargs))

    for module in model.modules():
        module._hf_hook, module._old_forward = (lambda output: output), module.forward
        module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)
    return model


WRAPPERS = [nn.DataParallel, compiled, compiled_in_place, compiled_layer, compiled_forward, hooked]


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_seen_through(wrap):
    model, inputs = stack("torch", "nn.MultiheadAttention", "torch"), sequences()
    want = explain(model, inputs, read="cls", target=second)
    wrapped = wrap(copy.deepcopy(model))
    before = [(module.training, {**vars(module)}) for module in wrapped.modules()]
    got = explain(wrapped, inputs, read="cls", target=second)
    torch.testing.assert_close(got.relevancy["tower0"], want.relevancy["tower0"], rtol=0, atol=0)
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=0)
    for module, (training, state) in zip(wrapped.modules(), before, strict=True):
        assert module.training == training and vars(module).keys() == state.keys()
        assert all(vars(module)[name] is value for name, value in state.items())


def test_gradient_checkpointing_of_transformers():
    torch.manual_seed(0)
    model, inputs = made(transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**T5, num_labels=3))), text()
    want = explain(model, inputs).relevancy["text"]
    model.activation_checkpointing_enable()
    got = explain(model.train(), inputs).relevancy["text"]
    torch.testing.assert_close(got, want)
    assert model.training


def test_flags_of_timm_are_put_back():
    model = stack("timm", "timm")
    explain(model, sequences(), read="cls", target=second)
    assert [block.attend.fused_attn for block in model.blocks] == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_half_precision(dtype):
    model, inputs = stack("torch", "nn.MultiheadAttention", "timm"), sequences()
    want = explain(model, inputs, read="cls", target=second).relevancy["tower0"]
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = explain(model, inputs, read="cls", target=second).relevancy["tower0"]
    else:
        inputs = {**inputs, "x": inputs["x"].to(dtype)}
        got = explain(model.to(dtype), inputs, read="cls", target=second).relevancy["tower0"]
    place = Place("", first_rows(7))
    assert got.dtype == torch.float32 and error(got, want, place, "gradient") < 0.05


class Siamese(nn.Module):
    """One stack that runs over two inputs."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.part = Stack(*["torch"] * layers)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        ones = torch.ones(one.shape[:2]), torch.ones(other.shape[:2])
        return (self.part(one, ones[0]) * self.part(other, ones[1])).sum(-1, keepdim=True).expand(-1, 2)


@pytest.mark.parametrize("size", [7, 5])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_stack_that_runs_twice_is_two_towers(size, layers):
    torch.manual_seed(0)
    model = lively(Siamese(layers)).eval().double()
    inputs = {"one": torch.randn(2, 7, 10).double(), "other": torch.randn(2, size, 10).double()}
    got = explain(model, inputs, read="cls", target=second).relevancy
    assert {name: tuple(row.shape) for name, row in got.items()} == {"tower0": (2, 7), "tower1": (2, size)}
    for name, changed in (("tower0", "one"), ("tower1", "other")):
        # A single input against the other one's constant features is a model with one tower.
        kept = {key: value for key, value in inputs.items() if key != changed}
        with torch.no_grad():
            constant = model.part(next(iter(kept.values())), torch.ones(2, next(iter(kept.values())).shape[1]))
        score = lambda features, constant=constant: (features * constant).sum(-1)  # noqa: E731
        alone = {"x": inputs[changed], "attention_mask": torch.ones(inputs[changed].shape[:2])}
        place = Place("blocks", first_rows(inputs[changed].shape[1]))
        want = rows_of(model.part, alone, score, {"tower": place})["tower"]
        assert error(got[name], want, place, "gradient") < 1e-10


# --- torch's and open_clip's encoders ---


class Encoder(nn.Module):
    def __init__(self, batch_first: bool, norm_first: bool, width: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, HEADS, 48, batch_first=batch_first, norm_first=norm_first)
        self.embed, self.head, self.batch_first = nn.Linear(10, width), nn.Linear(width, 3), batch_first
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first and not norm_first)

    def forward(self, x: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
        x = self.embed(x) if self.batch_first else self.embed(x).transpose(0, 1)
        size = x.shape[1 if self.batch_first else 0]
        mask = nn.Transformer.generate_square_subsequent_mask(size).to(x.dtype) if causal else None
        x = self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=causal)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(x[:, -1 if causal else 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoder(batch_first, norm_first, causal):
    torch.manual_seed(0)
    model, inputs = lively(Encoder(batch_first, norm_first)).eval(), sequences()
    real = None if causal else inputs["attention_mask"].bool()
    inputs = {"x": inputs["x"], "padding": None if real is None else ~real, "causal": causal}
    row = one_hot(torch.tensor([6, 6]), 7) if causal else first_rows(7)
    # Nothing tells that `padding` is a mask, and Grad-CAM's mean would take what is padded.
    methods = METHODS if causal else METHODS[:3]
    check(model, inputs, {"tower0": Place("encoder", row, real)}, -1 if causal else "cls", methods=methods)


class ResidualAttentionBlock(nn.Module):
    """As in open_clip: tokens first or batch first, and a causal mask (N, N)."""

    def __init__(self, width: int, batch_first: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, width)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=None if mask is None else mask.to(y.dtype))[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIPLike(nn.Module):
    def __init__(self, batch_first: bool, width: int = 32) -> None:
        super().__init__()
        self.batch_first, self.visual, self.token = batch_first, nn.Module(), nn.Embedding(60, width)
        self.visual.conv1, self.visual.proj = nn.Conv2d(3, width, 6, stride=6), nn.Linear(width, 16)
        self.visual.cls = nn.Parameter(torch.randn(width))
        self.visual.resblocks = nn.ModuleList(ResidualAttentionBlock(width, batch_first) for _ in range(3))
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, batch_first) for _ in range(2))
        self.text_projection = nn.Linear(width, 16)

    def run(self, layers: nn.ModuleList, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in layers:
            x = layer(x, mask)
        return x if self.batch_first else x.transpose(0, 1)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.visual.conv1(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.visual.cls.expand(len(image), 1, -1), patches], 1)
        seen = self.visual.proj(self.run(self.visual.resblocks, tokens)[:, 0])
        mask = torch.full((text.shape[1],) * 2, -torch.inf).triu(1)
        read = self.run(self.resblocks, self.token(text), mask)[torch.arange(len(text)), text.argmax(-1)]
        return functional.normalize(seen, dim=-1), functional.normalize(self.text_projection(read), dim=-1)


@pytest.mark.parametrize("batch_first", [False, True])
def test_open_clip(batch_first):
    torch.manual_seed(0)
    model = lively(OpenCLIPLike(batch_first)).eval()
    text = torch.randint(3, 50, (2, 9))
    text[0, 8] = text[1, 5] = 59
    end = one_hot(text.argmax(-1), 9)
    places = {"tower0": Place("visual.resblocks", first_rows(17)), "tower1": Place("resblocks", end)}
    inputs = {"image": torch.randn(2, 3, 24, 24), "text": text}
    check(model, inputs, places, {"tower0": "cls", "tower1": end}, lambda outputs: (outputs[0] * outputs[1]).sum(-1))


# --- transformers, without a record ---


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 24, 24)}


def text(batch: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (batch, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


T5 = dict(TEXT, max_position_embeddings=32)


def made(model: nn.Module) -> nn.Module:
    return lively(model).eval()


def test_beit_with_position_bias():
    torch.manual_seed(0)
    config = transformers.BeitConfig(**VISION, num_labels=3, use_relative_position_bias=True)
    place = Place("beit.layers", torch.full((2, 17), 1 / 17).double())
    model, inputs = (
        made(transformers.BeitForImageClassification(config)).double(),
        {"pixel_values": pixels()["pixel_values"].double()},
    )
    for method in METHODS:
        want = rows_of(model, inputs, lambda o: o.logits[:, 1], {"tower0": place}, method)["tower0"]
        got = explain(model, inputs, read="mean", target=1, method=method).relevancy["tower0"]
        assert float((got - want).abs().max()) < 1e-6 * float(beside(want, place).abs().max())


def test_vit_mae_with_a_noise_of_its_own():
    torch.manual_seed(0)
    model = made(transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION, mask_ratio=0.5)))
    inputs = {**pixels(), "noise": torch.rand(2, 16)}
    score = lambda outputs: outputs.last_hidden_state[:, 0, 3]  # noqa: E731
    check(model, inputs, {"tower0": Place("layers", first_rows(9))}, "cls", score)


def test_blip_image_text_retrieval_without_cross_attention():
    torch.manual_seed(0)
    words = dict(T5, encoder_hidden_size=32, bos_token_id=1, eos_token_id=2, sep_token_id=3)
    config = transformers.BlipConfig(text_config=words, vision_config=VISION, image_text_hidden_size=16)
    model, inputs = made(transformers.BlipForImageTextRetrieval(config)), {**text(), **pixels(), "use_itm_head": False}
    places = {
        "tower0": Place("vision_model", first_rows(17)),
        "tower1": Place("text_encoder", first_rows(9), inputs["attention_mask"]),
    }
    check(model, inputs, places, "cls", lambda outputs: outputs.itm_score.diagonal())


def test_owlvit_detects_by_one_patch():
    """Several queries an image: the image's tower is read, at CLS and at the patch."""
    torch.manual_seed(0)
    config = transformers.OwlViTConfig(text_config=T5, vision_config=VISION, projection_dim=32)
    model, inputs = made(transformers.OwlViTForObjectDetection(config)), {**text(4), **pixels()}
    row = one_hot(torch.tensor([6, 6]), 17)
    score = lambda outputs: outputs.logits[:, 5, 1]  # noqa: E731
    check(model, inputs, {"tower0": Place("owlvit.vision_model", row)}, {"tower0": 6}, score)
    with pytest.raises(ValueError, match=r"tower 'tower1' on whole inputs; got a batch of 4 for 2 scores"):
        explain(model, inputs, read="cls", target=score)


def test_xclip_reads_the_text_and_refuses_frames():
    torch.manual_seed(0)
    frames = dict(num_frames=2, mit_hidden_size=32, mit_intermediate_size=48, mit_num_attention_heads=4, mit_num_hidden_layers=1)
    config = transformers.XCLIPConfig(
        text_config=dict(T5, eos_token_id=58), vision_config={**VISION, **frames}, projection_dim=32
    )
    model, inputs = made(transformers.XCLIPModel(config)), {**text(), "pixel_values": torch.randn(2, 2, 3, 24, 24)}
    inputs["input_ids"][0, 8] = inputs["input_ids"][1, 5] = 58
    end = (inputs["input_ids"] == 58).float()
    score = lambda outputs: outputs.logits_per_video.diagonal()  # noqa: E731
    check(model, inputs, {"tower3": Place("text_model", end, inputs["attention_mask"])}, {"tower3": end}, score)
    with pytest.raises(ValueError, match="on whole inputs; got a batch of 4 for 2 scores"):
        explain(model, inputs, read={"tower1": "cls"}, target=score)


def test_clipseg_reads_the_decoder_behind_frozen_towers():
    """Its CLIP runs without gradients, so that only the decoder can be read."""
    torch.manual_seed(0)
    decoder = dict(reduce_dim=16, decoder_num_attention_heads=4, decoder_intermediate_size=20, extract_layers=[0, 1])
    config = transformers.CLIPSegConfig(text_config=dict(T5, eos_token_id=58), vision_config=VISION, projection_dim=32, **decoder)
    model, inputs = made(transformers.CLIPSegForImageSegmentation(config)), {**text(), **pixels()}
    inputs["input_ids"][0, 8] = inputs["input_ids"][1, 5] = 58
    model.decoder.reduces[0].weight.data.mul_(0.2)  # even maps: float32 keeps their gradients apart
    model.decoder.reduces[1].weight.data.mul_(0.2)
    score = lambda outputs: outputs.logits.flatten(1)[:, 5]  # noqa: E731
    row = one_hot(torch.tensor([1, 1]), 17)
    check(model, inputs, {"tower2": Place("decoder", row)}, {"tower2": 1}, score)
    with pytest.raises(ValueError, match=r"tower 'tower0' with gradients on; got attention 'clip\.vision_model"):
        explain(model, inputs, read={"tower0": "cls"}, target=score)
