"""Relevancy of Chefer et al. (ICCV 2021): their rules on maps, and their generators on LXMERT with ablations and baselines."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import vlattn_fast as va
from tests.helpers.published.authors import assert_equal, defined, on_cpu, published
from vlattn_fast.interpret.relevancy.methods.registry import published as as_published

pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

transformers = pytest.importorskip("transformers")

REPOSITORY, FILE = "hila-chefer/Transformer-MM-Explainability", "lxmert/lxmert/src/ExplanationGenerator.py"
RULES = ("compute_rollout_attention", "avg_heads", "apply_self_attention_rules", "apply_mm_attention_rules", "handle_residual")
GENERATORS = ("GeneratorOurs", "GeneratorOursAblationNoAggregation", "GeneratorBaselines")
PLAIN = {"use_lrp": False}
METHODS: dict[str, tuple[str, str, dict[str, bool]]] = {  # of `explain`: their generator, its method and options
    "gradient": ("GeneratorOurs", "generate_ours", PLAIN),
    "gradient:no_normalization": ("GeneratorOurs", "generate_ours", PLAIN | {"normalize_self_attention": False}),
    "gradient:no_self_attention": ("GeneratorOurs", "generate_ours", PLAIN | {"apply_self_in_rule_10": False}),
    "gradient:no_aggregation": (
        "GeneratorOursAblationNoAggregation",
        "generate_ours_no_agg",
        PLAIN | {"normalize_self_attention": False},
    ),
    "attention": ("GeneratorBaselines", "generate_raw_attn", {}),
    "gradcam": ("GeneratorBaselines", "generate_attn_gradcam", {}),
    "rollout": ("GeneratorBaselines", "generate_rollout", {}),
}
LAYERS, HEADS, TOKENS, SIZE = 4, 3, 7, 5


def theirs() -> SimpleNamespace:
    return defined(REPOSITORY, FILE, *RULES, *GENERATORS, torch=torch, np=np, copy=copy)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, "streaming"), (torch.float64, "reference"), (torch.float32, "auto")]
)
def test_rules(dtype: torch.dtype, backend: str) -> None:
    """Equations 5 and 6 over four layers, their rollout, and one layer's map."""
    layers = [[torch.randn(1, HEADS, TOKENS, SIZE, dtype=torch.float64) for _ in range(3)] for _ in range(LAYERS)]
    weights = torch.randn(LAYERS, 1, HEADS, TOKENS, SIZE, dtype=torch.float64)
    maps = [torch.softmax(q @ k.mT / SIZE**0.5, -1).requires_grad_() for q, k, _ in layers]
    sum(((a @ v) * w).sum() for a, (_, _, v), w in zip(maps, layers, weights, strict=True)).backward()

    def compute() -> dict[str, Tensor]:
        rules, nothing = theirs(), torch.zeros(TOKENS, 4, dtype=torch.float64)
        relevancy = torch.eye(TOKENS, dtype=torch.float64)
        for a in maps:
            relevancy = relevancy + rules.apply_self_attention_rules(relevancy, nothing, rules.avg_heads(a.detach(), a.grad))[0]
        rollout = rules.compute_rollout_attention([a.detach().mean(1) for a in maps])[0]
        return {"relevancy": relevancy, "rollout": rollout, "map": rules.avg_heads(maps[0].detach(), maps[0].grad)}

    wanted = published("relevancy rules", compute)
    ours = [[x.to(dtype).requires_grad_() for x in layer] for layer in layers]
    start = torch.zeros(1, TOKENS, TOKENS, dtype=dtype, requires_grad=True)
    rows = torch.eye(TOKENS, dtype=dtype)[None]
    carrier, score = start, torch.zeros((), dtype=dtype)
    for layer, w in zip(ours, weights, strict=True):
        out, carrier = va.relevancy_attention(*layer, carrier, backend=backend)
        score = score + (out * w.to(dtype)).sum()
    (relevancy,) = torch.autograd.grad([score, carrier], start, [torch.ones_like(score), rows])
    assert_equal(relevancy[0], wanted["relevancy"], "relevancy")
    carrier, halves = start, {"residual_weight": 0.5, "attention_weight": 0.5}
    for layer in ours:
        carrier = va.relevancy_attention(*layer, carrier, rule="attention", **halves, backend=backend)[1]
    assert_equal(torch.autograd.grad(carrier, start, rows)[0][0], wanted["rollout"], "rollout")
    q, k, v = (x.detach() for x in ours[0])
    abar = va.attention_map(q, k, v, weights[0].to(dtype), rule="gradient", backend=backend)[0]
    assert_equal(abar, wanted["map"], "map")


class Attention:
    """A module of their LXMERT, as far as their generators read it."""

    def __init__(self, probabilities: Tensor) -> None:
        self.get_attn = lambda: probabilities
        self.get_attn_gradients = lambda: probabilities.grad


def usage(model: Any, inputs: dict[str, Tensor]) -> SimpleNamespace:
    """The model of transformers with the parts of theirs: every softmax over maps is kept, in their order of modules."""
    encoder = SimpleNamespace()
    parts = SimpleNamespace(device="cpu", zero_grad=lambda: None, lxmert=SimpleNamespace(encoder=encoder))

    def forward(_: Any) -> Any:
        kept: list[Tensor] = []
        softmax = functional.softmax

        def keeping(x: Tensor, dim: int | None = None, **options: Any) -> Tensor:
            y = softmax(x, dim=dim)
            if y.ndim == 4:
                y.retain_grad()
                kept.append(y)
            return y

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "softmax", keeping)
            output = model(**inputs)
        maps, config = iter(kept), model.config

        def layer(name: str) -> SimpleNamespace:
            return SimpleNamespace(**{name: Attention(next(maps))})

        encoder.layer = [SimpleNamespace(attention=layer("self")) for _ in range(config.l_layers)]
        encoder.r_layers = [SimpleNamespace(attention=layer("self")) for _ in range(config.r_layers)]
        encoder.x_layers = []
        for _ in range(config.x_layers):
            crossed = {"visual_attention": layer("att"), "visual_attention_copy": layer("att")}
            encoder.x_layers.append(SimpleNamespace(**crossed, lang_self_att=layer("self"), visn_self_att=layer("self")))
        assert next(maps, None) is None
        return output

    words, boxes = inputs["input_ids"].shape[1], inputs["visual_feats"].shape[1]
    return SimpleNamespace(model=parts, forward=forward, text_len=words, image_boxes_len=boxes)


def lively(build: Callable[[], Any]) -> Any:
    """With random weights as large as those of a trained model, in float64."""
    model = build().eval().double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.25) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_lxmert(method: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40, "num_qa_labels": 6}
    config = transformers.LxmertConfig(**sizes, l_layers=3, r_layers=2, x_layers=3, visual_feat_dim=10)
    model = lively(lambda: transformers.LxmertForQuestionAnswering(config))
    features, positions = torch.randn(1, 9, 10, dtype=torch.float64), torch.rand(1, 9, 4, dtype=torch.float64)
    inputs = {"input_ids": torch.randint(1, 40, (1, 7)), "visual_feats": features, "visual_pos": positions}
    generator, generate, options = METHODS[method]

    def compute() -> dict[str, Tensor]:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # their maps begin as torch.eye(n)
        try:
            with on_cpu():
                found = getattr(getattr(theirs(), generator)(usage(model, inputs)), generate)(None, **options)
        finally:
            torch.set_default_dtype(default)
        return {tower: relevancy[0] for tower, relevancy in zip(("text", "vision"), found, strict=True)}

    wanted = published(f"lxmert {method}", compute)
    for dtype in (torch.float64, torch.float32):
        ours = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
        explanation = va.explain(copy.deepcopy(model).to(dtype), ours, method=as_published(method))
        for tower, relevancy in wanted.items():
            assert_equal(explanation.relevancy[tower][0], relevancy, f"{tower} {dtype}")
