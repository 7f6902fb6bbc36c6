"""Recurrent layers beside attention: against the maps that unit impulses make of the model's own functions, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tools.tiny_models.mixers import Mixed, each_within
from tools.tiny_models.shrink import lively
from tools.tiny_models.stored import Double, Maps, in_double, stored_rows
from vlattn_fast.attach.recurrences.reading import Convolution
from vlattn_fast.interpret import explain, explain_layers
from vlattn_fast.interpret.relevancy.mixing_call import MixingCall
from vlattn_fast.interpret.relevancy.traced_call import Recursion
from vlattn_fast.nn import capture_relevancy

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")} | {"linear_num_value_heads": 4}
TYPES = ["linear_attention", "full_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3Next": SIZES
    | LINEAR
    | {"linear_num_key_heads": 2, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 2}
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "layer_types": TYPES},
    "OlmoHybrid": SIZES
    | LINEAR
    | {"linear_num_key_heads": 4, "num_hidden_layers": 3, "layer_types": [*TYPES, "linear_attention"], "pad_token_id": 0},
    "KimiLinear": SIZES
    | {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_hidden_layers": 2,
        "layer_types": TYPES,
        "mlp_layer_types": ["dense"] * 2,
    }
    | {
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
    },
}
MAMBA = {"vocab_size": 60, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
WORDS = torch.randint(3, 58, (2, 9), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
INPUTS = {"input_ids": WORDS, "attention_mask": REAL}


def made(kind: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(KINDS.get(kind, MAMBA) | options), attn_implementation=implementation)
    config._experts_implementation = "eager"  # others have no float64
    return lively(getattr(transformers, f"{kind}ForCausalLM")(config)).to(dtype).eval()


def score_of(outputs: Any) -> Tensor:
    score: Tensor = outputs.logits[:, -1, 7]
    return score


@pytest.fixture
def double() -> Iterator[None]:
    """The recurrences ask for float32."""
    with in_double():
        yield


def shares(rows: Tensor) -> Tensor:
    total = rows.sum(-1, keepdim=True)
    return rows / total.masked_fill(total == 0, 1.0)


def by_attention(maps: Sequence[Tensor | Mixed]) -> list[Tensor]:
    """Abar (B, N, N) of each layer: A, or the shares of |A|, through the convolution in front, without its taps at padding."""
    means = []
    for one in maps:
        of_map, before = parts_of(one)
        means.append(of_map.mean(1) if isinstance(one, Tensor) else shares(of_map.abs()).mean(1))
        if before is not None:
            band = before.abs().mean(1) * REAL[:, None]
            means[-1] = means[-1] @ torch.where(band.sum(-1, keepdim=True) == 0, torch.eye(9), shares(band))
    return means


def parts_of(one: Tensor | Mixed) -> tuple[Tensor, Tensor | None]:
    """A (B, H, N, N) of a layer, and K (B, C, N, N) of the channels of a convolution that became values."""
    if isinstance(one, Tensor):
        return one, None
    return one.maps[0], one.before[0] if one.before else None


def stored(kind: str) -> tuple[list[Tensor | Mixed], Tensor]:
    """The maps, and the scores, of a run of a model with eager attention."""
    model = made(kind, "eager")
    with Maps(model) as kept:
        scores = score_of(model(**INPUTS))
    return kept.with_size(9), scores


def of_last() -> Tensor:
    return nn.functional.one_hot(torch.full((2,), 8), 9).double()


# --- explain ---


def row(model: nn.Module, **options: Any) -> Tensor:
    return explain(model, INPUTS, **options).relevancy["language"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_those_of_unit_impulses(kind: str, double: None) -> None:
    maps, scores = stored(kind)
    assert [isinstance(one, Mixed) and bool(one.before) for one in maps] == [name == TYPES[0] for name in types_of(kind)]
    model = made(kind)
    with each_within(model, Double):
        got = explain(model, INPUTS, target=score_of).relevancy["language"]
    torch.testing.assert_close(got, stored_rows(maps, scores, of_last()), rtol=1e-9, atol=1e-12)
    without = stored_rows([one for one in maps if isinstance(one, Tensor)], scores, of_last())
    assert (got - without).abs().max() > 0.01  # the recurrences have a part in it


def types_of(kind: str) -> list[str]:
    return KINDS[kind]["layer_types"]


@pytest.mark.parametrize("kind", KINDS)
def test_rollout_carries_shares(kind: str, double: None) -> None:
    maps, _ = stored(kind)
    row = of_last()[:, None]
    for mean in reversed(by_attention(maps)):
        row = (row + row @ mean) / 2
    got = explain(made(kind), INPUTS, method="rollout").relevancy["language"]
    torch.testing.assert_close(got, row[:, 0].detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.sum(1), torch.ones(2), rtol=1e-9, atol=1e-12)


def test_attention_reads_a_last_layer_that_recurs(double: None) -> None:
    maps, _ = stored("OlmoHybrid")
    got = explain(made("OlmoHybrid"), INPUTS, method="attention").relevancy["language"]
    torch.testing.assert_close(got, by_attention(maps)[-1][:, -1].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["gradient", "attention"])
def test_each_layer_and_head_has_a_row(method: str, double: None) -> None:
    maps, scores = stored("Qwen3Next")
    model = made("Qwen3Next")
    with each_within(model, Double):
        rows = [
            explain_layers(model, INPUTS, target=score_of, method=method, per=per).relevancy["language"]
            for per in ("layer", "head")
        ]
    torch.testing.assert_close(rows[0], rows[1].mean(1), rtol=1e-9, atol=1e-14)
    if method == "attention":
        want = [mean[:, -1].detach() for mean in by_attention(maps)]
    else:
        want = [stored_rows([one], scores, of_last()) - of_last() for one in maps]
    torch.testing.assert_close(rows[0], torch.stack(want), rtol=1e-9, atol=1e-12)


def test_layers_may_differ_in_their_heads() -> None:
    model = made("Qwen3Next", dtype=torch.float32, linear_num_value_heads=8)
    assert explain_layers(model, INPUTS, per="layer").relevancy["language"].shape == (2, 2, 9)
    assert explain_layers(model, INPUTS, per="head", layers=[0]).relevancy["language"].shape == (1, 8, 2, 9)
    with pytest.raises(ValueError, match=r"layers with the same number of heads.*got \[4, 8\] in 'language'"):
        explain_layers(model, INPUTS, per="head")


@pytest.mark.parametrize("method", ["gradient", "rollout", "attention", "weighted", "gradcam", "tam", "input_gradient"])
def test_padding_changes_nothing(method: str) -> None:
    model = made("KimiLinear" if method == "weighted" else "Qwen3Next", dtype=torch.float32)
    both = explain(model, INPUTS, method=method, target=[7, 7]).relevancy["language"]
    one = explain(model, {"input_ids": WORDS[1:, 3:]}, method=method, target=[7]).relevancy["language"]
    torch.testing.assert_close(both[1, 3:], one[0], rtol=1e-4, atol=1e-4 * float(one[0].abs().max()))
    assert not both[1, :3].any()


def test_weighted_rows_sum_to_one() -> None:
    row = explain(made("OlmoHybrid", dtype=torch.float32), INPUTS, method="weighted").relevancy["language"]
    torch.testing.assert_close(row.sum(1), torch.ones(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["gradient", "rollout"])
def test_bfloat16_stays_near_float32(method: str) -> None:
    rows = [
        explain(made("Qwen3Next", dtype=dtype), INPUTS, target=score_of, method=method).relevancy["language"] for dtype in DTYPES
    ]
    assert rows[1].dtype == torch.float32
    torch.testing.assert_close(rows[1], rows[0], rtol=0.1, atol=0.02)


DTYPES = (torch.float32, torch.bfloat16)


def test_a_cache_of_a_first_run_changes_nothing() -> None:
    model = made("Qwen3Next", dtype=torch.float32)
    want = explain(model, INPUTS, target=score_of).relevancy["language"]
    got = explain(model, {**INPUTS, "use_cache": True}, target=score_of).relevancy["language"]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    short = {"input_ids": WORDS[:, :2]}  # fewer tokens than the convolution has taps
    got, want = (explain(model, {**short, "use_cache": use}, target=score_of).relevancy["language"] for use in (True, False))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_answers_of_several_tokens() -> None:
    model = made("OlmoHybrid", dtype=torch.float32)
    whole = explain(model, INPUTS, answer=torch.tensor([[5, 6], [7, 8]]), per_token=False).relevancy["language"]
    assert whole.shape == (2, 11)
    assert bool((whole[:, 3:9] > 0).all())


def test_functions_are_put_back() -> None:
    model, second = made("Qwen3Next", dtype=torch.float32), made("Qwen3Next", dtype=torch.float32)
    file = transformers.models.qwen3_next.modeling_qwen3_next
    names = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")
    before = [vars(file)[name] for name in names]
    want = explain(model, INPUTS, target=score_of).relevancy["language"]

    def within(*_: Any) -> None:
        assert all(vars(file)[name] is not function for name, function in zip(names, before, strict=True))
        second(**INPUTS)  # the same functions, which this run does not see

    with model.model.norm.register_forward_hook(within):
        torch.testing.assert_close(explain(model, INPUTS, target=score_of).relevancy["language"], want, rtol=0, atol=0)
    assert [vars(file)[name] for name in names] == before
    with model.model.norm.register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        explain(model, INPUTS, target=score_of)
    assert [vars(file)[name] for name in names] == before


# --- capture_relevancy ---

WEIGHTS = torch.linspace(-1, 2, 9)


def captured_row(model: nn.Module, method: str, higher_order: bool = False) -> tuple[Tensor, Tensor]:
    """The rows and the scores of a run that keeps its graph."""
    with capture_relevancy(model, method=method, higher_order=higher_order) as captured:
        scores = score_of(model(**INPUTS))
    rows = captured.relevancy(scores.sum())
    assert isinstance(rows, Tensor)
    return rows, scores


def gradients_of(model: nn.Module) -> Tensor:
    """Also of parameters of layers that recur: their taps, gates and projections."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", ["gradient", "rollout", "weighted"])
@pytest.mark.parametrize("kind", ["Qwen3Next", "OlmoHybrid"])
def test_captured_rows_are_those_of_explain(kind: str, method: str, double: None) -> None:
    model = made(kind)
    with each_within(model, Double):
        want = explain(model, INPUTS, target=score_of, method=method).relevancy["language"]
        got, _ = captured_row(model, method)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "method"), [("Qwen3Next", "gradient"), ("Qwen3Next", "rollout"), ("KimiLinear", "gradient")])
def test_gradients_equal_finite_differences(kind: str, method: str, double: None) -> None:
    """Along random directions. The rows depend on the weights also by the score's gradient, with a gradient of a higher order."""
    model = made(kind)

    def loss() -> Tensor:
        rows, _ = captured_row(model, method, higher_order=method == "gradient")
        return (rows * WEIGHTS).sum()

    with each_within(model, Double):
        loss().backward()
        for module in (model, model.model.layers[0]):
            parameters = [p for p in module.parameters() if p.grad is not None]
            directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in parameters]
            slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
            values = []
            for step in (1e-6, -1e-6):
                _shift(parameters, directions, step)
                values.append(float(loss().detach()))
                _shift(parameters, directions, -step)
            torch.testing.assert_close((values[0] - values[1]) / 2e-6, float(slope), rtol=1e-4, atol=1e-7)


@torch.no_grad()
def _shift(parameters: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> None:
    for parameter, direction in zip(parameters, directions, strict=True):
        parameter += step * direction


@pytest.mark.parametrize("kind", ["Qwen3Next", "Mamba"])  # the second has no attention
def test_checkpointed_layers_have_the_same_gradients(kind: str) -> None:
    model, again = (made(kind, "sdpa" if kind in KINDS else "eager").train() for _ in range(2))
    again.activation_checkpointing_enable({"use_reentrant": False})
    for each in (model, again):
        rows, scores = captured_row(each, "gradient")
        ((rows * WEIGHTS).sum() + scores.square().sum()).backward()
    torch.testing.assert_close(gradients_of(again), gradients_of(model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_gradients_in_low_precision(dtype: torch.dtype) -> None:
    model = made("Qwen3Next", dtype=dtype)
    rows, _ = captured_row(model, "gradient")
    (rows * WEIGHTS).sum().backward()
    assert bool(gradients_of(model).isfinite().all())
    assert bool(model.model.layers[0].linear_attn.conv1d.weight.grad.any())


# --- convolutions ---


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("rule", ["gradient", "attention"])
def test_a_convolution_is_a_banded_map(rule: str, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    value, gate, grad = torch.randn(3, 2, 5, count, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    relevancy = torch.rand(2, 3, count, dtype=torch.float64, generator=generator)
    gate.requires_grad_()

    def dense(weight: Tensor, gate: Tensor) -> Tensor:
        back = torch.arange(count)[:, None] - torch.arange(count)
        taps = weight.flip(1)[:, back.clamp(0, 3)] * ((back >= 0) & (back < 4))
        of_map = gate[..., None] * taps
        if rule == "gradient":
            return relevancy @ (of_map * grad[..., None] * value[:, :, None]).relu().mean(1)
        return relevancy @ shares(of_map.abs()).mean(1)

    def banded(weight: Tensor, gate: Tensor) -> Tensor:
        tensors = (value[..., None],) * 3
        call = MixingCall("", *tensors, {"attn_mask": None}, mixer=Convolution(value, weight, gate))
        return call.step(relevancy, grad[..., None], Recursion(rule))

    torch.testing.assert_close(banded(weight, gate), dense(weight, gate))
    assert torch.autograd.gradcheck(banded, (weight, gate))


# --- edits ---


def test_edges_are_those_of_attention() -> None:
    model, groups = made("OlmoHybrid", dtype=torch.float32), {"first": (3, 5), "last": (8, 9)}
    table = va.attribute_edges(model, INPUTS, groups, target=7)
    assert {edge.layer for edge in table} == {1}
    assert table.without_edges == (0, 2)
    assert repr(table).endswith("no edges in layers 0, 2, which take no softmax")
    assert len(va.intervene_each(model, INPUTS, table.top(2))) == 2


def test_edits_of_a_recurrence_are_refused() -> None:
    model = made("OlmoHybrid", dtype=torch.float32)
    cut = {"queries": (8, 9), "keys": (3, 5)}
    place = r"'model\.layers\.0\.linear_attn' \(OlmoHybridGatedDeltaNet\)"
    for edit, why in (
        (va.Knockout(**cut), rf"Knockout needs layers=.*got None, and layer 0, {place}"),
        (va.Knockout(**cut, layers=[0]), rf"layers must be among \[1\], which have attention; got 0, {place}"),
        (va.ScaleHeads({0: [1]}, 0.0), rf"layers must be among \[1\], which have attention; got 0, {place}"),
    ):
        with pytest.raises(ValueError, match=why), va.intervene(model, INPUTS, [edit]):
            pass
    want = model(**INPUTS).logits[:, -1]
    with va.intervene(model, INPUTS, [va.Knockout(**cut, layers=[1])]):
        cut_off = model(**INPUTS).logits[:, -1]
        row = explain(model, INPUTS, method="rollout").relevancy["language"]
    assert (cut_off - want).abs().max() > 1e-3
    assert (row - explain(model, INPUTS, method="rollout").relevancy["language"]).abs().max() > 1e-3


def test_a_model_without_attention_has_no_edges() -> None:
    model = made("Mamba", "eager", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"model must have layers with a softmax.*got none"):
        va.attribute_edges(model, INPUTS, {"first": (3, 5), "last": (8, 9)}, target=7)


def test_info_tells_of_them() -> None:
    from vlattn_fast.interpret.explaining.description import described

    lines = [line for line in described(made("OlmoHybrid", dtype=torch.float32)) if "mixers" in line]
    assert lines == ["  mixers    2 OlmoHybridGatedDeltaNet: as maps over their values"]
