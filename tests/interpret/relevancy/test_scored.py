"""Layers with any score function: explain against stored maps of the formula, and without a map a head in memory."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation
from tests.helpers.interpret import linked_maps
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.stored_maps import Kept, Place, assert_rows, check, layer_sums, rows_of
from tests.helpers.interpret.tower_cases import METHODS, Stack, first_rows, second, sequences, stack
from tests.helpers.ops.score_formulas import of_layer
from tests.nn.test_score_attention import CASES
from vlattn_fast.interpret import ADAPTERS, Adapter, Tower, explain
from vlattn_fast.interpret.relevancy import traced_call
from vlattn_fast.nn import ScoreAttention
from vlattn_fast.ops.core_scores import core_lse, core_step


class Written(nn.Module):
    """A ScoreAttention with its map in memory."""

    def __init__(self, layer: ScoreAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, query: Tensor, key: Tensor | None = None, *, key_mask: Any = None, attn_mask: Any = None, is_causal: bool = False
    ) -> Tensor:
        layer, key = self.layer, query if key is None else key
        projected = zip((query, key, key), (layer.q_proj, layer.k_proj, layer.v_proj), strict=True)
        q, k, v = (project(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x, project in projected)
        scores = of_layer(layer, q, k) * (1.0 if layer.scale is None else layer.scale)
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if layer.sink is not None:
            scores = torch.cat([scores, layer.sink[:, None, None].expand(*scores.shape[:3], 1)], -1)
        maps = scores.softmax(-1)
        maps = maps if layer.sink is None else maps[..., :-1]
        return layer.out_proj((maps @ v).transpose(1, 2).flatten(2))


def written(model: nn.Module) -> nn.Module:
    """The same model with maps in memory."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ScoreAttention):
                setattr(module, name, Written(child))
    return model


def negative(outputs: Tensor) -> Tensor:
    return -outputs[:, 1]


def compare(model: nn.Module, inputs: dict[str, Tensor], read: int = 0) -> None:
    """Every method against stored maps."""
    places = {"tower0": Place("blocks", first_rows(7).roll(read, 1), inputs["attention_mask"])}
    stored = rows_of(written(model), inputs, second, places, "gradcam")["tower0"]
    score = second if bool(stored.any()) else negative  # Grad-CAM of the one may be zero throughout
    check(model, inputs, places, score, METHODS, stored=written, position=read, target=score)


class Masked(Stack):
    """Hides from each layer what `mask` says, instead of the padding, and classifies by the last token."""

    mask: str

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(x, attention_mask, -1)

    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        some = torch.rand(2, 1, 7, 7, generator=generator) < 0.7
        options = {
            "causal": {"is_causal": True},
            "bool": {"attn_mask": some | torch.eye(7, dtype=torch.bool)},
            "float": {"attn_mask": torch.randn(4, 7, 7, generator=generator).to(x.dtype)},
            "key": {"key_mask": visible},
        }
        x = x + block.attend.inside(block.norm(x), **options[self.mask])
        return x + block.mlp(x)


def scored(name: str, per_head: bool = False, make: type[Stack] = Stack, **options: Any) -> nn.Module:
    model = stack("score dot", "score dot", "score dot", make=make)
    for block in model.blocks:
        block.attend.inside = ScoreAttention(32, 4, name, per_head=per_head, score_options=options)
    return calm(lively(model).eval())


def calm(model: nn.Module) -> nn.Module:
    """Even maps, of which float32 keeps more digits."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(0.6)
    return model


@pytest.mark.parametrize(("name", "per_head", "options"), CASES)
def test_every_score_with_padding(name, per_head, options):
    compare(scored(name, per_head, **options), sequences())


@pytest.mark.parametrize("name", ["scaled_dot", "cosine", "additive", "activated_general"])
@pytest.mark.parametrize("mask", ["causal", "bool", "float"])
def test_masks(name, mask):
    model = scored(name, make=Masked)
    model.mask = mask
    compare(model, {**sequences(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}, -1)


@pytest.mark.parametrize("name", ["dot", "cosine", "additive", "activated_general"])
def test_a_scale_of_the_layer(name):
    model = scored(name)
    for block in model.blocks:
        block.attend.inside.scale = 0.6
    compare(model, sequences())


@pytest.mark.parametrize(("name", "softcap"), [("scaled_dot", 0.5), ("dot", None), ("biased_general", None), ("additive", None)])
def test_softcaps_and_sinks_of_layers(name, softcap):
    """The bias of a score cancels in a softmax, but not beside a sink."""
    model = scored(name)
    for block in model.blocks:
        block.attend.inside.softcap, block.attend.inside.sink = softcap, nn.Parameter(torch.randn(4))
    compare(model, sequences())


@pytest.mark.parametrize("sink", [False, True])
def test_the_log_sum_exp_of_the_attention_is_passed_on(sink, monkeypatch):
    """Without its sink, of each layer; in 16 bits it saves a pass."""
    model, seen = scored("additive"), []
    for block in model.blocks:
        block.attend.inside.sink = nn.Parameter(torch.randn(4)) if sink else None

    def step(relevancy, core, value, grad_output, *, rule, row_normalize, lse, sink=None, **masks):
        seen.append((lse, core_lse(core, **masks)))
        return core_step(relevancy, core, value, grad_output, rule=rule, row_normalize=row_normalize, sink=sink, **masks)

    monkeypatch.setattr(traced_call, "core_step", step)
    explain(model, sequences(), position="cls", target=second)
    assert len(seen) == 3
    for lse, own in seen:
        torch.testing.assert_close(lse.to(own), own)


def test_beside_torchs_attention():
    model = calm(stack("score additive", "torch", "nn.MultiheadAttention", "score cosine"))
    compare(model, sequences())


def test_weights_of_the_residual_branch_and_layers_to_start_from(monkeypatch):
    model, inputs = scored("additive"), sequences()
    monkeypatch.setitem(ADAPTERS, "Stack", Adapter((Tower("text", "", "blocks", "cls", "text"),), "class"))
    place = Place("blocks", first_rows(7), inputs["attention_mask"], layer_sums("blocks", 3, "", "mlp"))
    for methods, start_layer in ((("gradient", "weighted"), 0), (("gradient",), 2)):
        check(model, inputs, {"text": place}, second, methods, start_layer, written, target=second)


class Reader(nn.Module):
    """Words that attend to patches, each with a score."""

    def __init__(self, score: str, width: int = 32) -> None:
        super().__init__()
        make = lambda: ScoreAttention(width, 4, score)  # noqa: E731
        self.patches = nn.ModuleList(nn.ModuleDict({"attend": make()}) for _ in range(2))
        self.words = nn.ModuleList(nn.ModuleDict({"attend": make(), "look": make()}) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor, text: Tensor, padding: Tensor) -> Tensor:
        for layer in self.patches:
            image = image + layer["attend"](image)
        for layer in self.words:
            text = text + layer["attend"](text, key_mask=~padding)
            text = text + layer["look"](text, image)
        return self.head(text[:, 0])


@pytest.mark.parametrize("score", ["scaled_dot", "cosine", "additive"])
@pytest.mark.parametrize("method", linked_maps.METHODS)
def test_between_towers(score, method):
    model = lively(Reader(score)).eval().double()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True  # as the attention's masks say, and no input by a name that is known
    inputs = {"image": torch.randn(2, 9, 32).double(), "text": torch.randn(2, 6, 32).double(), "padding": padding}
    kept = Kept(written(model))
    with kept.watching():
        outputs = kept.model(**inputs)
    maps = [found for _, found in kept.maps]
    grads = torch.autograd.grad(second(outputs).sum(), maps, allow_unused=True)
    kinds = ["ii", "ii", "tt", "ti", "tt", "ti"]
    want_words, want_patches = linked_maps.published(method, list(zip(kinds, maps, grads, strict=True)), [0, 0], ~padding)
    got = explain(model, inputs, position={"tower1": "cls"}, target=second, method=method).relevancy
    assert_rows(got["tower0"], want_patches)
    assert_rows(got["tower1"], want_words)
    assert (got["tower1"][1, 4:] == 0).all()


class Grouped(nn.Module):
    """The function itself, with shared key heads, and a log-sum-exp that is part of the score."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (project(x).unflatten(-1, (-1, 8)).transpose(1, 2) for project in (self.query, self.key))
        y, lse = va.score_attention(q, k, k, score=va.scores.Additive(self.head.weight[0, :8]), enable_gqa=True, return_lse=True)
        y += 0.0  # in place
        return self.head(y.transpose(1, 2).flatten(2)[:, 0]) + lse[:, :3, 0]


def test_the_function_with_grouped_heads():
    model, x = lively(Grouped()).double(), torch.randn(2, 5, 16).double()
    got = explain(model, {"x": x}, position=0, target=second)
    q, k = (project(x).unflatten(-1, (-1, 8)).transpose(1, 2) for project in (model.query, model.key))
    k = k.repeat_interleave(2, 1)
    vector = model.head.weight[0, :8]
    maps = (torch.tanh(q[:, :, :, None] + k[:, :, None]) * vector).sum(-1).softmax(-1)
    (grad,) = torch.autograd.grad(second(model.head((maps @ k).transpose(1, 2).flatten(2)[:, 0])).sum(), maps)
    want = (maps * grad).clamp(min=0).mean(1)[:, 0]
    want[:, 0] += 1
    assert_rows(got.relevancy["tower0"], want.detach(), Place("", first_rows(5)))
    torch.testing.assert_close(got.scores, second(model(x)).detach())


class Biased(nn.Module):
    """The function with a bias of two groups and gates of heads, or with the dense mask of that bias."""

    def __init__(self, score: str) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 3)
        self.score, self.dense, self.gate = score, False, torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
        self.groups, self.bias = torch.tensor([0, 1, 1, -1, 0]), torch.randn(4, 2, 2, dtype=torch.float64)
        self.bias[2, 0, 1] = -torch.inf

    def forward(self, x: Tensor) -> Tensor:
        q, k = (project(x).unflatten(-1, (-1, 8)).transpose(1, 2) for project in (self.query, self.key))
        groups = {"query_groups": self.groups, "key_groups": self.groups, "group_bias": self.bias}
        if self.dense:
            pairs = self.bias[:, self.groups[:, None], self.groups]
            groups = {"attn_mask": torch.where((self.groups >= 0)[:, None] & (self.groups >= 0), pairs, 0.0)}
        y = va.score_attention(q, k, k, score=self.score, head_gate=self.gate, **groups)
        return self.head(y.transpose(1, 2).flatten(2)[:, 0])


@pytest.mark.parametrize("method", ["gradient", "rollout", "attention", "gradcam", "glimpse"])
@pytest.mark.parametrize("score", ["scaled_dot", "cosine"])
def test_a_bias_of_groups_is_explained_as_its_dense_mask(score: str, method: str):
    model, x = lively(Biased(score)).double(), torch.randn(2, 5, 16).double()
    got = explain(model, {"x": x}, position=0, target=second, method=method)
    model.dense = True
    want = explain(model, {"x": x}, position=0, target=second, method=method)
    torch.testing.assert_close(got.relevancy["tower0"], want.relevancy["tower0"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.scores, want.scores)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cosine", "additive"])
def test_no_map_is_held(name, method):
    model, size = lively(Stack(f"score {name}", width=16)).eval(), 1100
    inputs = {"x": torch.randn(1, size, 10), "attention_mask": torch.ones(1, size)}
    with LargestAllocation() as allocated:
        explain(model, inputs, position="cls", target=second, method=method)
    assert 4 * size < allocated.bytes < 2 * size * size, allocated.by


def test_whole_maps_are_named():
    model = scored("additive")
    model.blocks[1].attend.inside.backend = "reference"
    with pytest.raises(ValueError, match=r"got 'blocks\.1\.attend\.inside' \(ScoreAttention\), which computes a softmax itself"):
        explain(model, sequences(), position="cls", target=second)


def cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Parts in dtypes of their own, which hooks bring their inputs to, as those of a device_map do with devices."""
    for path, dtype in dtypes.items():
        part = model.get_submodule(path).to(dtype)
        move = lambda x, dtype=dtype: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        hook = lambda m, a, k, move=move: (tuple(map(move, a)), {n: move(x) for n, x in k.items()})  # noqa: E731
        part.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["torch", "score additive"])
def test_parts_of_a_tower_that_are_moved(kind, method):
    model, inputs = stack(kind, kind, kind), sequences()
    exact = copy.deepcopy(model).double()
    want = explain(exact, {**inputs, "x": inputs["x"].double()}, position="cls", target=second, method=method)
    cast(model, {"blocks.1": torch.float64, "blocks.2": torch.float32, "head": torch.float32})
    got = explain(model, inputs, position="cls", target=second, method=method).relevancy["tower0"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want.relevancy["tower0"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wide", ["patches", "words"])
def test_towers_that_are_moved(wide):
    model = lively(Reader("scaled_dot")).eval()
    inputs = {"image": torch.randn(2, 9, 32), "text": torch.randn(2, 6, 32), "padding": torch.zeros(2, 6, dtype=torch.bool)}
    want = explain(model, inputs, position={"tower1": "cls"}, target=second).relevancy
    others = {"patches": "words", "words": "patches"}
    attends = [(part, dtype) for part, dtype in ((wide, torch.float64), (others[wide], torch.float32))]
    paths = [(path, dtype) for part, dtype in attends for path, m in model.named_modules()
             if path.startswith(part) and isinstance(m, ScoreAttention)]  # fmt: skip
    cast(model, {**dict(paths), "words.1.look": torch.float32, "head": torch.float32})
    got = explain(model, inputs, position={"tower1": "cls"}, target=second).relevancy
    for name, row in want.items():
        torch.testing.assert_close(got[name].float(), row, rtol=1e-4, atol=1e-5)
