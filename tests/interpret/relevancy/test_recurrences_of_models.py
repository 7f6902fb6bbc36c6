"""State spaces and other recurrences in `explain`: against the maps that unit impulses make of the models' own functions."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.interpret.decoder_cases import next_logits
from tools.tiny_models.mixers import Mixed, each_within
from tools.tiny_models.shrink import lively, small_model
from tools.tiny_models.stored import Double, Maps, in_double, stored_rows
from vlattn_fast.attach.session import overridden
from vlattn_fast.interpret import explain, explain_layers
from vlattn_fast.interpret.relevancy.recurrent_calls import replacements
from vlattn_fast.nn import capture_relevancy

KINDS = [
    *("Mamba", "FalconMamba", "Jamba", "Zamba", "Mamba2", "FalconH1", "NemotronH", "RecurrentGemma", "Rwkv", "xLSTM", "MiniMax"),
    *("Lfm3", "Qwen3Next", "OlmoHybrid", "KimiLinear"),
]
CONFIGS: dict[str, dict[str, Any]] = {  # beside small sizes: values that share a key's head, a last layer that recurs
    "Qwen3Next": {"linear_num_key_heads": 2},
    "OlmoHybrid": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}
NO_MASK = {"Rwkv", "xLSTM", "RecurrentGemma"}  # padding reaches the tokens behind it
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def made(kind: str, implementation: str | None = None, **config: Any) -> Any:
    model: Any = small_model(getattr(transformers, f"{kind}ForCausalLM"), attention=implementation)
    if changes := CONFIGS.get(kind, {}) | config:
        for name, value in changes.items():
            setattr(model.config, name, value)
        model = lively(type(model)(model.config)).eval().to(torch.get_default_dtype())
    return model


def row(model: nn.Module, **options: Any) -> Tensor:
    with each_within(model, Double):
        return explain(model, INPUTS, target=7, **options).relevancy["language"]


def stored(kind: str) -> tuple[list[Tensor | Mixed], Tensor]:
    """The maps, and the scores, of a run of a model with eager attention."""
    model = made(kind, "eager")
    with Maps(model) as kept:
        scores = next_logits(model(**INPUTS, use_cache=False), INPUTS)[:, 7]
    return kept.with_size(9), scores


def of_last() -> Tensor:
    return nn.functional.one_hot(torch.full((2,), 8), 9).double()


def near(one: Tensor, another: Tensor) -> None:
    torch.testing.assert_close(one, another, rtol=0, atol=1e-9 * float((another - of_last()).abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_those_of_unit_impulses(kind: str, double: None) -> None:
    maps, scores = stored(kind)
    expected = stored_rows(maps, scores, of_last())
    assert float((expected - of_last()).abs().amax(-1).min()) > 1e-6
    near(row(made(kind)), expected)


# The stored map of RecurrentGemma is one of gated values: relu(A * dA) is the same, shares are not (tests/attach has its A).
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "RecurrentGemma"])
def test_rollout_carries_shares(kind: str, double: None) -> None:
    maps, _ = stored(kind)
    real = MASK.bool() | (kind in NO_MASK)
    carried = of_last()[:, None]
    if kind == "FalconH1":
        for pair in reversed([*zip(maps[::2], maps[1::2], strict=True)]):
            carried = (carried + sum(carried @ one for one in by_attention(pair, real))) / 3
    else:
        for one in reversed(by_attention(maps, real)):
            carried = (carried + carried @ one) / 2
    near(row(made(kind), method="rollout") * real, carried[:, 0] * real)


def test_both_mixers_of_a_layer_have_their_share(double: None) -> None:
    """One layer and four words of FalconH1, whose attention and state space take the same tokens, so that it takes no time."""
    config, words = made("FalconH1", "eager").config, {"input_ids": IDS[:1, :4]}
    config.num_hidden_layers = 1
    model = lively(transformers.FalconH1ForCausalLM(config)).eval()
    with Maps(model) as kept:
        scores = model(**words, use_cache=False).logits[:, -1, 7]
    maps, last = kept.with_size(4), torch.eye(4)[3:]
    expected = {"gradient": stored_rows(maps, scores, last)}
    expected["rollout"] = (last + sum(last @ one[0] for one in by_attention(maps, torch.ones(1, 4)))) / 3
    model.set_attn_implementation("sdpa")
    for method, want in expected.items():
        with each_within(model, Double):
            got = explain(model, words, target=7, method=method).relevancy["language"]
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-9)
        assert (want[0, :3] > 1e-4).all()


def by_attention(maps: Sequence[Tensor | Mixed], real: Tensor) -> list[Tensor]:
    """The mean over the heads of each layer's map: of a recurrence |A|, rows over their sums, times that of its convolution.
    Padding, whose values are zero, counts for nothing."""
    means = []
    for one in maps:
        if isinstance(one, Tensor):
            means.append(one.detach().mean(1))
            continue
        means.append(shares(torch.cat(one.maps, 1).detach().abs() * real[:, None, None]).mean(1))
        if one.before:
            band = torch.cat(one.before, 1).detach().abs().mean(1) * real[:, None]
            means[-1] = means[-1] @ torch.where(band.sum(-1, keepdim=True) == 0, torch.eye(band.shape[-1]), shares(band))
    return means


def shares(rows: Tensor) -> Tensor:
    total = rows.sum(-1, keepdim=True)
    return rows / total.masked_fill(total == 0, 1.0)


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "gradient") for kind in KINDS if kind not in NO_MASK), ("Mamba", "rollout")]
)
def test_padding_changes_nothing(kind: str, method: str, double: None) -> None:
    model = made(kind)
    padded = row(model, method=method)[1]
    with each_within(model, Double):
        alone = explain(model, {"input_ids": IDS[1:, 3:]}, target=7, method=method).relevancy["language"][0]
    torch.testing.assert_close(padded, nn.functional.pad(alone, (3, 0)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_near(kind: str) -> None:
    with in_double():
        model = made(kind)
        expected = row(model)
    rows = explain(model.float(), INPUTS, target=7).relevancy["language"]
    torch.testing.assert_close(rows.double(), expected, rtol=0, atol=1e-3 * float((expected - of_last()).abs().max()))


@pytest.mark.parametrize("kind", ["MiniMax", "RecurrentGemma", "Rwkv", "Zamba"])
def test_other_runs_have_the_models_own_forward(kind: str) -> None:
    model = made(kind)
    model.config.use_cache = True
    before = model(**INPUTS).logits
    with overridden(replacements(model)):
        assert any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(**INPUTS).logits, before)


CAPTURED = [*((kind, "gradient") for kind in KINDS), *((kind, "rollout") for kind in ("Mamba", "FalconH1", "Qwen3Next"))]


@pytest.mark.parametrize(("kind", "method"), [*CAPTURED, ("OlmoHybrid", "weighted")])
def test_captured_rows_are_those_of_explain(kind: str, method: str, double: None) -> None:
    model = made(kind)
    expected = row(model, method=method)
    with each_within(model, Double):
        with capture_relevancy(model, method=method) as captured:
            scores = next_logits(model(**INPUTS, use_cache=False), INPUTS)[:, 7]
        rows = captured.relevancy(scores.sum())
    assert isinstance(rows, Tensor)
    near(rows.detach(), expected)


@pytest.mark.parametrize("method", ["attention", "weighted", "gradcam"])
def test_attention_beside_a_recurrence_has_no_other_rule(method: str) -> None:
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn' in parallel to 'model.layers.0.mamba'|method must support recurrences"
    ):
        explain(made("FalconH1"), INPUTS, method=method)


def test_attention_beside_a_recurrence_has_no_row_of_a_layer() -> None:
    with pytest.raises(ValueError, match="'model.layers.0.self_attn' in parallel to 'model.layers.0.mamba'"):
        explain_layers(made("FalconH1"), INPUTS, per="layer")
    model = made("FalconH1")
    captured = capture_relevancy(model, method="weighted")
    with pytest.raises(ValueError, match="'model.layers.0.self_attn' in parallel to 'model.layers.0.mamba'"), captured:
        model(**INPUTS, use_cache=False)
