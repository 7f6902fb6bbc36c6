"""ScoreAttention against the formula with the layer's own weights, and against torch's own layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from tests.helpers.ops.score_formulas import of_layer
from vlattn_fast import scores
from vlattn_fast.nn import ScoreAttention
from vlattn_fast.nn.score_attention import LearnedScore
from vlattn_fast.ops import core_scores

CASES = [
    *((name, False, {}) for name in scores.layers()),
    *((name, True, {}) for name, layer in scores.layers().items() if layer.learned),
    ("general", False, {"projects": "query"}),
    ("activated_general", True, {"activation": "leaky_relu"}),
    ("hadamard", True, {"activation": "tanh"}),
]


def written_out(layer: ScoreAttention, query, key, value, visible, is_causal):
    """The layer with nothing of the package but its weights."""
    q, k, v = (
        (x @ p.weight.mT + p.bias).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for x, p in ((query, layer.q_proj), (key, layer.k_proj), (value, layer.v_proj))
    )
    s = of_layer(layer, q, k)
    masked = ~visible[:, None, None].expand_as(s)
    if is_causal:
        masked = masked | torch.ones_like(s, dtype=torch.bool).triu(1)
    heads = s.masked_fill(masked, -torch.inf).softmax(-1) @ v
    return heads.transpose(1, 2).flatten(2) @ layer.out_proj.weight.mT + layer.out_proj.bias


@pytest.mark.parametrize(("name", "per_head", "options"), CASES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_the_formula(name, per_head, options, is_causal):
    layer = ScoreAttention(12, 3, name, per_head=per_head, kdim=10, vdim=7, score_options=options).double()
    for path, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=0.5)  # biases too
        if path == "score.sigma":
            nn.init.uniform_(parameter, 0.5, 1.5)
    query, key, value = (torch.randn(2, n, c, dtype=torch.float64) for n, c in ((4, 12), (5, 10), (5, 7)))
    visible = torch.tensor([[True] * 5, [True, True, False, True, False]])
    leaves = [x.requires_grad_() for x in (query, key, value)] + list(layer.parameters())
    got = layer(query, key, value, key_mask=visible, is_causal=is_causal)
    wanted = written_out(layer, query, key, value, visible, is_causal)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    cotangent = torch.randn_like(got)
    grads = (torch.autograd.grad(x, leaves, cotangent, materialize_grads=True, allow_unused=True) for x in (got, wanted))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_defaults_and_dropout():
    layer = ScoreAttention(8, 2, "additive", dropout=0.5)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x, x, x))


def test_a_factory_makes_the_score():
    class Slope(nn.Module):
        def __init__(self, num_heads, head_dim):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(head_dim).expand(num_heads, -1, -1).clone())

        def forward(self):
            return scores.General(self.weight)

    made, plain = ScoreAttention(8, 2, Slope), ScoreAttention(8, 2, "dot")
    made.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 4, 8)
    torch.testing.assert_close(made(x), plain(x))
    made(x).sum().backward()
    assert made.score.weight.grad is not None


def test_parameters_that_torch_puts_something_before():
    layer, x = ScoreAttention(8, 2, "general"), torch.randn(1, 4, 8)
    whole = layer(x)
    prune.l1_unstructured(layer.score, "weight", 0.5)
    pruned = layer(x)
    prune.remove(layer.score, "weight")
    assert torch.equal(pruned, layer(x)) and not torch.equal(pruned, whole)
    spectral_norm(layer.score, "weight")
    layer(x).sum().backward()
    assert layer.score.parametrizations.weight.original.grad is not None


def test_parameters_are_those_of_the_score():
    shapes = {name: tuple(x.shape) for name, x in LearnedScore("additive", 2, 4, per_head=True).named_parameters()}
    assert shapes == {"vector": (2, 4), "query_weight": (2, 4, 4), "key_weight": (2, 4, 4), "bias": (2, 4)}


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((10, 3), {}, "num_heads must divide"),
        ((0, 1), {}, "embed_dim must be at least 1"),
        ((8, 2, "bilinear"), {}, "score must be one of"),
        ((8, 2, "dot"), {"score_options": {"activation": "tanh"}}, "must be None if score is 'dot'"),
        (
            (8, 2, lambda *sizes: LearnedScore("general", *sizes)),
            {"score_options": {"projects": "query"}},
            "must be None if score is a function",
        ),
        ((8, 2), {"dropout": 1.0}, "dropout must be"),
        ((8, 2, "cosine"), {"softcap": 2.0}, "softcap must be None for scores other than"),
        ((8, 2, "additive"), {"softcap": 2.0}, "softcap must be None for scores other than"),
    ],
)
def test_bad_arguments(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        ScoreAttention(*arguments, **options)


def test_bad_input():
    layer = ScoreAttention(8, 2)
    with pytest.raises(ValueError, match="query must have 3 dimensions"):
        layer(torch.randn(5, 8))
    with pytest.raises(ValueError, match="key must have 8 features"):
        layer(torch.randn(1, 5, 8), torch.randn(1, 5, 6))
    with pytest.raises(TypeError, match="must make a torch.nn.Module"):
        ScoreAttention(8, 2, lambda num_heads, head_dim: scores.Dot())


@pytest.mark.parametrize("mask", [torch.ones(3, 3, dtype=torch.bool), torch.ones(3, 3)])
def test_wrong_attn_mask_beside_a_float_padding_mask(mask: Tensor) -> None:
    layer, x = ScoreAttention(16, 4), torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match="attn_mask must broadcast to"):
        layer(x, key_padding_mask=torch.zeros(2, 6), attn_mask=mask)


@pytest.mark.parametrize(
    ("score", "options", "name"),
    [
        ("general", {"foo": 1}, "foo"),
        ("general", {"weight": torch.ones(4, 4)}, "weight"),
        ("general", {"projects": "garbage"}, "projects"),
        ("hadamard", {"activation": "garbage"}, "activation"),
        ("additive", {"method": "garbage"}, "method"),
        ("additive", {"method": "series", "tolerance": -1.0}, "tolerance"),
    ],
)
@pytest.mark.parametrize("per_head", [True, False])
def test_options_of_scores_are_refused_where_the_layer_is_made(
    score: str, options: dict[str, Any], name: str, per_head: bool
) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{name} must be|keyword argument '{name}'"):
        ScoreAttention(16, 4, score, per_head=per_head, score_options=options)


@pytest.mark.parametrize("name", ["scaled_dot", "cosine", "additive", "distance"])
@pytest.mark.parametrize("sink", [False, True])
def test_a_bias_of_groups_is_its_dense_mask(name: str, sink: bool) -> None:
    """In the output and in the attention's head mean; a gate stands in front of the output projection."""
    layer = ScoreAttention(16, 4, name, sink=sink).double()
    x, groups = torch.randn(2, 6, 16).double(), torch.tensor([0, 1, -1, 1, 0, 0])
    bias = torch.randn(4, 2, 2).double()
    has_group = (groups >= 0)[:, None] & (groups >= 0)
    mask = torch.where(has_group, bias[:, groups[:, None], groups], 0.0)
    got = layer(x, need_weights=True, query_groups=groups, key_groups=groups, group_bias=bias)
    torch.testing.assert_close(got, layer(x, need_weights=True, attn_mask=mask))
    gate = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
    got = layer(x, query_groups=groups, key_groups=groups, group_bias=bias, head_gate=gate)
    with torch.no_grad():
        layer.out_proj.weight[:, 8:12] = 0.0
    torch.testing.assert_close(got, layer(x, attn_mask=mask))


@pytest.mark.parametrize("backend, runs", [("auto", "cpu"), ("cuda", "cpu"), ("cpu", "cpu"), ("streaming", "streaming")])
def test_the_head_mean_of_other_scores_runs_on_the_layers_backend(
    backend: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it has no maps."""
    chosen: list[str] = []
    load = core_scores.load
    monkeypatch.setattr(core_scores, "load", lambda backends, name: (chosen.append(name), load(backends, name))[1])
    layer, x = ScoreAttention(16, 4, "additive"), torch.randn(2, 6, 16)
    layer.eval().backend = backend
    q, k = (project(x).unflatten(2, (4, -1)).transpose(1, 2) for project in (layer.q_proj, layer.k_proj))
    masks = {"attn_mask": None, "key_mask": None, "is_causal": False}
    got = layer._weights(q, k, layer.score(), masks)
    assert chosen == [runs]
    torch.testing.assert_close(got, layer.score().formula(q, k).softmax(-1).mean(1))
