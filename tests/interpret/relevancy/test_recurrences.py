"""Layers that recur: heads, precision, training, edits, refusals; test_recurrences_of_models.py has their rows."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.interpret.relevancy.test_recurrences_of_models import IDS, INPUTS, MASK, by_attention, made, of_last, shares, stored
from tools.tiny_models.mixers import each_within
from tools.tiny_models.stored import Double, stored_rows
from vlattn_fast.attach.recurrences.reading import Convolution
from vlattn_fast.interpret import explain, explain_layers
from vlattn_fast.interpret.relevancy.mixing_call import MixingCall
from vlattn_fast.interpret.relevancy.traced_call import Recursion
from vlattn_fast.nn import capture_relevancy

DTYPES = (torch.float32, torch.bfloat16)


def score_of(outputs: Any) -> Tensor:
    score: Tensor = outputs.logits[:, -1, 7]
    return score


def row(model: Any, **options: Any) -> Tensor:
    return explain(model, INPUTS, target=7, **options).relevancy["language"]


def test_attention_reads_a_last_layer_that_recurs(double: None) -> None:
    maps, _ = stored("OlmoHybrid")
    got = explain(made("OlmoHybrid"), INPUTS, method="attention").relevancy["language"]
    torch.testing.assert_close(got, by_attention(maps, MASK)[-1][:, -1].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["gradient", "attention"])
def test_each_layer_and_head_has_a_row(method: str, double: None) -> None:
    maps, scores = stored("Qwen3Next")
    model = made("Qwen3Next")
    with each_within(model, Double):
        rows = [
            explain_layers(model, INPUTS, target=7, method=method, per=per).relevancy["language"] for per in ("layer", "head")
        ]
    torch.testing.assert_close(rows[0], rows[1].mean(1), rtol=1e-9, atol=1e-14)
    if method == "attention":
        want = [mean[:, -1].detach() for mean in by_attention(maps, MASK)]
    else:
        want = [stored_rows([one], scores, of_last()) - of_last() for one in maps]
    torch.testing.assert_close(rows[0], torch.stack(want), rtol=1e-9, atol=1e-12)


def test_layers_may_differ_in_their_heads() -> None:
    model = made("Qwen3Next", linear_num_value_heads=8)
    assert explain_layers(model, INPUTS, per="layer").relevancy["language"].shape == (2, 2, 9)
    assert explain_layers(model, INPUTS, per="head", layers=[0]).relevancy["language"].shape == (1, 8, 2, 9)
    with pytest.raises(ValueError, match=r"layers with the same number of heads.*got \[4, 8\] in 'language'"):
        explain_layers(model, INPUTS, per="head")


def test_weighted_rows_sum_to_one() -> None:
    row = explain(made("OlmoHybrid"), INPUTS, method="weighted").relevancy["language"]
    torch.testing.assert_close(row.sum(1), torch.ones(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["gradient", "rollout"])
def test_bfloat16_stays_near_float32(method: str) -> None:
    rows = [row(made("Qwen3Next").to(dtype), method=method) for dtype in DTYPES]
    assert rows[1].dtype == torch.float32
    torch.testing.assert_close(rows[1], rows[0], rtol=0.1, atol=0.02)


def test_a_cache_of_a_first_run_changes_nothing() -> None:
    model = made("Qwen3Next")
    want = explain(model, INPUTS, target=7).relevancy["language"]
    got = explain(model, {**INPUTS, "use_cache": True}, target=7).relevancy["language"]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    short = {"input_ids": IDS[:, :2]}  # fewer tokens than the convolution has taps
    got, want = (explain(model, {**short, "use_cache": use}, target=7).relevancy["language"] for use in (True, False))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_functions_are_put_back() -> None:
    model, second = made("Qwen3Next"), made("Qwen3Next")
    file = transformers.models.qwen3_next.modeling_qwen3_next
    names = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")
    before = [vars(file)[name] for name in names]
    want = explain(model, INPUTS, target=7).relevancy["language"]

    def within(*_: Any) -> None:
        assert all(vars(file)[name] is not function for name, function in zip(names, before, strict=True))
        second(**INPUTS)  # the same functions, which this run does not see

    with model.model.norm.register_forward_hook(within):
        torch.testing.assert_close(explain(model, INPUTS, target=7).relevancy["language"], want, rtol=0, atol=0)
    assert [vars(file)[name] for name in names] == before
    with model.model.norm.register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        explain(model, INPUTS, target=7)
    assert [vars(file)[name] for name in names] == before


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
    model, again = (made(kind).train() for _ in range(2))
    again.activation_checkpointing_enable({"use_reentrant": False})
    for each in (model, again):
        rows, scores = captured_row(each, "gradient")
        ((rows * WEIGHTS).sum() + scores.square().sum()).backward()
    torch.testing.assert_close(gradients_of(again), gradients_of(model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_gradients_in_low_precision(dtype: torch.dtype) -> None:
    model = made("Qwen3Next").to(dtype)
    rows, _ = captured_row(model, "gradient")
    (rows * WEIGHTS).sum().backward()
    assert bool(gradients_of(model).isfinite().all())
    assert bool(model.model.layers[0].linear_attn.conv1d.weight.grad.any())


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


def test_edges_are_those_of_attention() -> None:
    model, groups = made("OlmoHybrid"), {"first": (3, 5), "last": (8, 9)}
    table = va.attribute_edges(model, INPUTS, groups, target=7)
    assert {edge.layer for edge in table} == {1}
    assert table.without_edges == (0, 2)
    assert repr(table).endswith("no edges in layers 0, 2, which take no softmax")
    assert len(va.intervene_each(model, INPUTS, table.top(2))) == 2


def test_edits_of_a_recurrence_are_refused() -> None:
    model = made("OlmoHybrid")
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
    model = made("Mamba")
    with pytest.raises(ValueError, match=r"model must have layers with a softmax.*got none"):
        va.attribute_edges(model, INPUTS, {"first": (3, 5), "last": (8, 9)}, target=7)


def test_info_tells_of_them() -> None:
    from vlattn_fast.interpret.explaining.description import described

    lines = [line for line in described(made("OlmoHybrid")) if "mixers" in line]
    assert lines == ["  mixers    2 OlmoHybridGatedDeltaNet: as maps over their values"]


PLACE = r"'model\.layers\.0\.linear_attn' \(Qwen3NextGatedDeltaNet\)"


def test_heads_of_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlattn_fast.interpret.relevancy.recurrent_calls.has_dtensors", lambda module: True)
    with pytest.raises(ValueError, match=rf"got {PLACE}, which has its heads in several processes. Run it in one"):
        explain(made("Qwen3Next"), INPUTS, target=7)


@pytest.mark.parametrize("method", ["glimpse", "gradcam"])
def test_methods_without_a_rule_refuse(method: str) -> None:
    with pytest.raises(ValueError, match=rf"method must support recurrences.*got '{method}' and 'model\.layers\."):
        explain(made("OlmoHybrid"), INPUTS, method=method)


def test_a_state_of_an_earlier_pass_is_refused() -> None:
    model = made("Qwen3Next")
    cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=rf"got {PLACE}, which continues from the state of an earlier pass"):
        with capture_relevancy(model, method="gradient"):
            model(input_ids=IDS[:, 5:], past_key_values=cache)


def test_a_recurrence_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Qwen3Next")
    kind = type(model.model.layers[0].linear_attn)

    def forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states.cumsum(1)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.linear_attn' \(Qwen3NextGatedDeltaNet\), whose recurrence cannot be traced"
    ):
        explain(model, INPUTS, target=7)


def test_a_recurrence_of_a_users_class_beside_attention_is_refused() -> None:
    model = made("FalconH1")

    class Mine(type(model.model.layers[0].mamba)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
            return hidden_states.cumsum(1)

    model.model.layers[0].mamba.__class__ = Mine
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mamba' \(Mine\), whose recurrence cannot be traced"):
        explain(model, INPUTS, target=7)


def test_a_convolution_in_front_of_a_recurrence_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own map alone would leave out the recurrence."""
    monkeypatch.setattr("vlattn_fast.interpret.relevancy.recurrent_calls.FUNCTIONS", {})
    with pytest.raises(
        ValueError, match=rf"got {PLACE}, whose short convolution comes before attention or an unsupported recurrence"
    ):
        explain(made("Qwen3Next"), INPUTS, target=7)


def test_a_convolution_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Qwen3Next")
    monkeypatch.setattr("vlattn_fast.interpret.relevancy.recurrent_calls.CONVOLUTIONS", {})
    with pytest.raises(ValueError, match=r"short convolutions with causal_conv1d_fn; got 'model\.layers\.0\.linear_attn'"):
        explain(model, INPUTS, target=7)


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "causal_conv1d_fn"])
def test_a_function_of_a_known_name_computes_what_the_name_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of a user may have something else under the name."""
    model, file = made("Qwen3Next"), transformers.models.qwen3_next.modeling_qwen3_next
    want = explain(model, INPUTS, target=7).relevancy["language"]
    original = getattr(file, name)

    def same(*args: Any, **options: Any) -> Any:
        return original(*args, **options)

    same.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(file, name, same)
    torch.testing.assert_close(explain(model, INPUTS, target=7).relevancy["language"], want, rtol=0, atol=0)

    def halved(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        return result / 2 if isinstance(result, Tensor) else (result[0] / 2, *result[1:])

    def renamed(x: Tensor, *args: Any, **options: Any) -> Any:
        return original(x, *args, **options)

    halved.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    for other in (halved, renamed):
        monkeypatch.setattr(file, name, other)
        with pytest.raises(ValueError, match=rf"got {PLACE}, whose function has the name of one in transformers, but other"):
            explain(model, INPUTS, target=7)
