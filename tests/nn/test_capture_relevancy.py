"""`capture_relevancy` against maps that are stored, in float64, and against `explain`; what it takes and what it refuses."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad

import vlattn_fast as va
from tests.helpers.nn import divided_relevancy
from tests.helpers.nn.stored_relevancy import MAPS, STORED, stored_row, terms
from tests.helpers.two_ranks import results_of
from vlattn_fast.interpret.explaining.question import UndefinedRelevancy
from vlattn_fast.interpret.relevancy.methods.registry import with_options
from vlattn_fast.nn import RelevancyLoss, capture_relevancy

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
PICTURE = {"image_size": 32, "patch_size": 8}


def vit(implementation: str = "sdpa", **options: Any) -> nn.Module:
    config = transformers.ViTConfig(**SIZES, **PICTURE, num_labels=5, attn_implementation=implementation, **options)
    return transformers.ViTForImageClassification(config)


def clip(implementation: str = "sdpa") -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 0}
    text = {**SIZES, "num_hidden_layers": 2, "vocab_size": 60, "max_position_embeddings": 12, **ends}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SIZES, **PICTURE}, projection_dim=16, attn_implementation=implementation
    )
    return transformers.CLIPModel(config)


def llama(implementation: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, vocab_size=60, num_key_value_heads=2, attn_implementation=implementation)
    return transformers.LlamaForCausalLM(config)


WORDS = torch.randint(3, 58, (2, 7), generator=torch.Generator().manual_seed(0))
WORDS[0, 5] = WORDS[1, 6] = 59
PIXELS = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])

Case = tuple[Callable[[str], nn.Module], dict[str, Tensor], Callable[[Any], Tensor], dict[str, tuple[int, list[int]]]]
CASES: dict[str, Case] = {  # the model, its inputs, the scores (B,), and of each tower its tokens and the rows that are read
    "ViT": (vit, {"pixel_values": PIXELS}, lambda outputs: outputs.logits[:, 1], {"vision": (17, [0, 0])}),
    "CLIP": (
        clip,
        {"pixel_values": PIXELS, "input_ids": WORDS},
        lambda outputs: outputs.logits_per_image.diagonal(),
        {"vision": (17, [0, 0]), "text": (7, [5, 6])},
    ),
    "Llama": (
        llama,
        {"input_ids": WORDS, "attention_mask": REAL},
        lambda outputs: outputs.logits[torch.arange(2), [6, 4], 3],
        {"language": (7, [6, 4])},
    ),
}


def lively(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    return model.double()


def made(name: str, implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return lively(CASES[name][0](implementation))


def checkpoint(model: Any, **options: Any) -> None:
    new = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5
    (new or model.gradient_checkpointing_enable)(options)


def rows_of(captured: Any, score: Tensor) -> Mapping[str, Tensor]:
    rows = captured.relevancy(score.sum())
    return rows if isinstance(rows, dict) else {"": rows}


def weighed(rows: Mapping[str, Tensor]) -> Tensor:
    """A loss on rows, with another weight for each token."""
    return sum((row * torch.linspace(-1, 2, row.shape[1]).to(row)).sum() for row in rows.values())  # type: ignore[return-value]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("how", ["plain", "higher order", "checkpointed"])
@pytest.mark.parametrize("method", ["gradient", "rollout", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_that_on_stored_maps(name: str, method: str, how: str) -> None:
    if (method == "weighted" and name != "ViT") or (method == "rollout" and how == "higher order"):
        pytest.skip("another case has it")
    _, inputs, score_of, towers = CASES[name]
    model, stored = made(name).train(), made(name, STORED).train()
    if how == "checkpointed":
        checkpoint(model, use_reentrant=False)
    MAPS.clear()
    with terms(stored, method == "weighted") as sums:
        outputs = stored(**inputs)
    want = {}
    for tower, (size, places) in towers.items():
        maps = [x for x in MAPS if x.shape[-1] == size]
        start = torch.eye(size, dtype=torch.float64)[places][:, None]
        want[tower] = stored_row(maps, sums, score_of(outputs).sum(), start, method, how == "higher order")
    (weighed(want) + 0.1 * score_of(outputs).square().sum()).backward()

    with capture_relevancy(model, method=method, higher_order=how == "higher order") as captured:
        outputs = model(**inputs)
    rows = rows_of(captured, score_of(outputs))
    for got, row in zip(rows.values(), want.values(), strict=True):
        torch.testing.assert_close(got, row, rtol=1e-9, atol=1e-12)
    (weighed(rows) + 0.1 * score_of(outputs).square().sum()).backward()
    error = (gradients(model) - gradients(stored)).norm() / gradients(stored).norm()
    assert error < 1e-8
    model.zero_grad()
    (0.1 * score_of(model(**inputs)).square().sum()).backward()
    assert (gradients(model) - gradients(stored)).norm() / gradients(stored).norm() > 0.01  # the relevancy has a part in it


CHANGE = torch.sin(7 * PIXELS)


@pytest.fixture
def differentiable() -> nn.Module:
    """A model whose attention has every derivative."""
    model = made("ViT").eval()
    model.set_attn_implementation(va.nn.register_attention("scaled_dot").name)
    return model


@pytest.mark.parametrize("higher_order", [False, True])
@pytest.mark.parametrize("method", ["gradient", "weighted"])
def test_tangents_of_relevancy(differentiable: nn.Module, method: str, higher_order: bool) -> None:
    """<w, tangent> = <gradient of <w, relevancy>, change>, with denominators of norms held fixed."""

    def relevancy(pixels: Tensor) -> Tensor:
        with capture_relevancy(differentiable, method=method, higher_order=higher_order) as captured:
            logits = differentiable(pixel_values=pixels).logits
        row: Tensor = captured.relevancy(logits[:, 1])
        return row

    with forward_ad.dual_level():
        row, tangent = forward_ad.unpack_dual(relevancy(forward_ad.make_dual(PIXELS, CHANGE)))
    pixels = PIXELS.clone().requires_grad_()
    by_pixels = [torch.autograd.grad(relevancy(pixels)[:, n].sum(), pixels)[0] for n in (1, 5)]
    want = torch.stack([(grad * CHANGE).sum((1, 2, 3)) for grad in by_pixels], 1)
    torch.testing.assert_close(tangent[:, [1, 5]], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(row, relevancy(PIXELS))
    (by_func,) = torch.func.grad(lambda x: relevancy(x)[:, 1].sum(), (0,))(PIXELS)
    torch.testing.assert_close(by_func, by_pixels[0])


def test_a_captured_model_has_its_own_derivatives(differentiable: nn.Module) -> None:
    def logits(pixels: Tensor) -> Tensor:
        made: Tensor = differentiable(pixel_values=pixels).logits
        return made

    def captured(pixels: Tensor) -> Tensor:
        with capture_relevancy(differentiable):
            return logits(pixels)

    def dual(f: Callable[[Tensor], Tensor]) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(PIXELS, CHANGE))).tangent

    def product(f: Callable[[Tensor], Tensor]) -> Any:
        return torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum()), (PIXELS,), (CHANGE,))

    for derivative in (dual, lambda f: torch.func.jvp(f, (PIXELS,), (CHANGE,)), product):
        torch.testing.assert_close(derivative(captured), derivative(logits), rtol=1e-9, atol=1e-12)


def test_transforms_that_have_no_relevancy_are_named(differentiable: nn.Module) -> None:
    def relevancy(pixels: Tensor) -> Tensor:
        with capture_relevancy(differentiable) as captured:
            logits = differentiable(pixel_values=pixels).logits
        row: Tensor = captured.relevancy(logits[:, 1])
        return row

    with pytest.raises(RuntimeError, match="Use torch.autograd.forward_ad.dual_level around"):
        torch.func.jvp(relevancy, (PIXELS,), (CHANGE,))
    with pytest.raises(RuntimeError, match="Use va.nn.capture_relevancy"), forward_ad.dual_level():
        va.explain(differentiable, {"pixel_values": PIXELS}, target=1)


@pytest.mark.parametrize("start_layer", [0, 1, -1])
@pytest.mark.parametrize("method", ["gradient", "weighted", "rollout", "gradient:no_aggregation"])
@pytest.mark.parametrize("name", ["ViT", "CLIP"])
def test_values_are_those_of_explain(name: str, method: str, start_layer: int) -> None:
    _, inputs, score_of, _ = CASES[name]
    model = made(name).eval()
    want = va.explain(model, inputs, method=with_options(method, start_layer=start_layer), target=score_of).relevancy
    with capture_relevancy(model, method=with_options(method, start_layer=start_layer)) as captured:
        outputs = model(**inputs)
    for got, row in zip(rows_of(captured, score_of(outputs)).values(), want.values(), strict=True):
        torch.testing.assert_close(got.detach(), row, rtol=1e-6, atol=1e-9)


def lxmert() -> nn.Module:
    layers = {"l_layers": 2, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 8, "visual_pos_dim": 4, "num_qa_labels": 5}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 20}
    return transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(vocab_size=60, **layers, **sizes))


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **PICTURE))


def gemma() -> nn.Module:
    """Eager, as transformers 5.23 has it without being asked; the sdpa of 5.18 leaves the softcap out in silence."""
    sizes = {"vocab_size": 60, "num_key_value_heads": 2, "head_dim": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **sizes, attn_implementation="eager"))


def llava() -> nn.Module:
    text = transformers.LlamaConfig(**SIZES, vocab_size=60, num_key_value_heads=2, pad_token_id=0)
    towers = {"vision_config": transformers.CLIPVisionConfig(**SIZES, **PICTURE), "text_config": text}
    config = transformers.LlavaConfig(**towers, image_token_index=59, vision_feature_layer=-1)
    return transformers.LlavaForConditionalGeneration(config)


PROMPT = torch.cat([WORDS[:, :2], torch.full((2, 16), 59), WORDS[:, 2:5]], 1)
REGIONS = {"visual_feats": PIXELS[:, 0, :4, :8], "visual_pos": PIXELS[:, 1, :4, :4].abs()}
FURTHER: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Callable[[Any], Tensor]]] = {
    "two modalities": (lxmert, {"input_ids": WORDS, **REGIONS}, lambda outputs: outputs.question_answering_score[:, 1]),
    "a pooling head": (siglip, {"pixel_values": PIXELS}, lambda outputs: outputs.pooler_output[:, 3]),
    "an image in a decoder": (llava, {"input_ids": PROMPT, "pixel_values": PIXELS}, lambda outputs: outputs.logits[:, -1, 4]),
    "softcapped scores": (gemma, {"input_ids": WORDS}, lambda outputs: outputs.logits[:, -1, 4]),
    "attention in the eager way": (lambda: vit("eager"), {"pixel_values": PIXELS}, lambda outputs: outputs.logits[:, 1]),
}


@pytest.mark.parametrize("method", ["gradient", "rollout"])
@pytest.mark.parametrize("name", FURTHER)
def test_other_models_equal_explain_and_have_gradients(name: str, method: str) -> None:
    make, inputs, score_of = FURTHER[name]
    torch.manual_seed(0)
    model = lively(make()).eval()
    want = va.explain(model, inputs, method=method, target=score_of).relevancy
    with capture_relevancy(model, method=method) as captured:
        outputs = model(**inputs)
    rows = rows_of(captured, score_of(outputs))
    for got, row in zip(rows.values(), want.values(), strict=True):
        torch.testing.assert_close(got.detach(), row, rtol=1e-6, atol=1e-9)
    weighed(rows).backward()
    grads, step, losses = gradients(model), 1e-3, []
    assert bool(grads.isfinite().all()) and bool((grads != 0).any())
    if method == "rollout":  # no part of it is a constant: a step along the gradient changes the loss by the gradient's norm
        for back_and_forth in (-step, 2 * step):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0 if parameter.grad is None else back_and_forth * parameter.grad / grads.norm()
            with capture_relevancy(model, method=method) as captured:
                outputs = model(**inputs)
            losses.append(weighed(rows_of(captured, score_of(outputs))).detach())
        torch.testing.assert_close((losses[1] - losses[0]) / (2 * step), grads.norm(), rtol=1e-2, atol=0)


def test_a_score_that_leaves_later_layers_out() -> None:
    """They add nothing, as in `explain`."""
    model, inputs = made("ViT").eval(), {"pixel_values": PIXELS, "output_hidden_states": True}

    def score(outputs: Any) -> Tensor:
        return outputs.hidden_states[2][:, 0, 3]

    want = va.explain(model, inputs, target=score).relevancy["vision"]
    with capture_relevancy(model) as captured:
        outputs = model(**inputs)
    torch.testing.assert_close(captured.relevancy(score(outputs).sum()).detach(), want)


def test_dropout_is_the_models_own() -> None:
    model = vit(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2).train()
    pixels = PIXELS.float()
    torch.manual_seed(3)
    plain = model(pixel_values=pixels).logits
    torch.manual_seed(3)
    with capture_relevancy(model) as captured:
        logits = model(pixel_values=pixels).logits
    assert torch.equal(logits, plain)
    row = captured.relevancy(logits[:, 1].sum())
    row[:, 1:].sum().backward()
    assert bool(gradients(model).isfinite().all()) and bool((gradients(model) != 0).any())
    torch.manual_seed(4)
    assert not torch.equal(model(pixel_values=pixels).logits, plain)


@pytest.mark.parametrize("method", ["gradient", "rollout"])
def test_autocast(method: str) -> None:
    model, pixels = lively(vit()).float().train(), PIXELS.float()
    want = va.explain(model, {"pixel_values": pixels}, target=1, method=method).relevancy["vision"]
    with torch.autocast("cpu", torch.bfloat16):
        with capture_relevancy(model, method=method) as captured:
            logits = model(pixel_values=pixels).logits
        row = captured.relevancy(logits[:, 1].sum())
        loss = row[:, 1:].sum() + logits.sum()
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.detach(), want, rtol=0.1, atol=0.02 * float(want[:, 1:].max()))
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "q_proj" in name)


def test_no_tensor_of_queries_times_keys_is_kept() -> None:
    """Neither saved for the backward pass, nor by the capture."""
    model, shapes = made("ViT").train(), []

    def note(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        with capture_relevancy(model) as captured:
            logits = model(pixel_values=PIXELS).logits
        RelevancyLoss()(captured.relevancy(logits[:, 1].sum()), torch.rand(2, 4, 4).double())
    assert shapes and not any(shape[-2:] == (17, 17) for shape in shapes)


def test_fsdp(tmp_path: Path) -> None:
    """Two processes with one input each have the gradients of both inputs on the whole model."""
    expected = divided_relevancy.gradients()
    for grads in results_of(divided_relevancy.__name__, "of_this_rank", tmp_path):
        torch.testing.assert_close(grads, expected)


def captured_vit(**options: Any) -> tuple[Any, Tensor]:
    model = made("ViT").train()
    with capture_relevancy(model, **options) as captured:
        logits = model(pixel_values=PIXELS).logits
    return captured, logits


def test_other_runs_within_the_context_leave_no_trace() -> None:
    model = made("ViT").eval()
    with capture_relevancy(model) as captured:
        with torch.no_grad():
            model(pixel_values=PIXELS.flip(0))
        want = va.explain(model, {"pixel_values": PIXELS}, target=1).relevancy["vision"]
        logits = model(pixel_values=PIXELS).logits
        model.vit(pixel_values=PIXELS.flip(0))  # a part alone
    torch.testing.assert_close(captured.relevancy(logits[:, 1].sum()).detach(), want)
    assert "forward" not in vars(model)


def test_a_context_is_entered_once() -> None:
    model = made("ViT")
    with capture_relevancy(model), pytest.raises(RuntimeError, match="already entered"), capture_relevancy(model):
        pass
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("score", "position", "error", "says"),
    [
        (lambda logits: logits[:, 1].sum().detach(), None, ValueError, "score must depend on"),
        (lambda logits: logits[:, 1] * float("nan"), None, UndefinedRelevancy, "got nan for samples"),
        (lambda logits: torch.ones(2, requires_grad=True).sum(), None, ValueError, "scores without a gradient there"),
        (lambda logits: logits, None, ValueError, r"score must be a floating scalar, or scores \(B,\)"),
        (lambda logits: 1.0, None, TypeError, "score must be a tensor"),
        (lambda logits: None, None, ValueError, "score must be given"),
        (lambda logits: logits[:, 1].sum(), 3, UndefinedRelevancy, "does not depend on the explained token"),
        (lambda logits: logits[:, 1].sum(), 17, ValueError, "position must be from -17 to 16"),
        (lambda logits: logits[:, 1].sum(), torch.ones(2, 16), ValueError, "position must be weights of shape"),
        (lambda logits: logits[:, 1].sum(), {"text": "cls"}, ValueError, "position must name towers among vision"),
        (lambda logits: logits[:, 1].sum(), "first", ValueError, "position must be one of cls, last, mean"),
    ],
)
def test_wrong_scores_and_rows(score: Any, position: Any, error: type[Exception], says: str) -> None:
    captured, logits = captured_vit(method=va.methods.Gradient(start_layer=-1))
    with pytest.raises(error, match=says):
        captured.relevancy(score(logits), position)


def test_passes_that_are_none_or_several_or_freed() -> None:
    model = made("ViT")
    with capture_relevancy(model) as captured, torch.no_grad():
        logits = model(pixel_values=PIXELS).logits
    # an evaluation, as Trainer.evaluate, has no gradients either
    with pytest.raises(ValueError, match=r"traced no forward pass with gradients.*: `if torch.is_grad_enabled\(\):`"):
        captured.relevancy(logits.sum())
    with capture_relevancy(model) as captured:
        logits = model(pixel_values=PIXELS).logits + model(pixel_values=PIXELS).logits
    with pytest.raises(ValueError, match="traced 2 forward passes"):
        captured.relevancy(logits.sum())
    captured, logits = captured_vit()
    logits.sum().backward()
    with pytest.raises(RuntimeError, match="before loss.backward"):
        captured.relevancy(logits.sum())


def test_refused_arguments() -> None:
    model = made("ViT")
    for options, says in (
        ({"method": "gradcam"}, "method must carry relevancy through the layers"),
        ({"method": "rollout", "higher_order": True}, "higher_order must be False for method 'rollout'"),
        ({"method": va.methods.Gradient(sinks="remove")}, "method must have neither sinks= nor through_connector="),
        ({"method": va.methods.Gradient(through_connector=True)}, "method must have neither sinks= nor through_connector="),
        ({"higher_order": 1}, "higher_order must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            capture_relevancy(model, **options)
    captured, logits = captured_vit(method=va.methods.Gradient(start_layer=3))
    with pytest.raises(ValueError, match="start_layer must be from -3 to 2"):
        captured.relevancy(logits.sum())


def test_layers_that_run_twice_must_run_alike() -> None:
    model = made("ViT").train()
    pixels = PIXELS.clone().requires_grad_()

    def run(reentrant: bool, **options: Any) -> None:
        checkpoint(model, use_reentrant=reentrant)
        with capture_relevancy(model, **options):
            model(pixel_values=pixels)

    with pytest.raises(ValueError, match="Pass use_reentrant=False"):
        run(True)
    with pytest.raises(ValueError, match="needs higher_order=False"):
        run(False, higher_order=True)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="needs attn_implementation='sdpa'"):
        run(False)


class Biased(nn.Module):
    """Attention with a bias, learnt or not, and a score."""

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.project, self.bias = nn.Linear(8, 24), nn.Parameter(torch.zeros(6, 6), requires_grad=learnt)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)[:, None].chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)[:, 0] + x


def test_a_learnt_bias_and_other_scores_are_refused() -> None:
    x = torch.randn(2, 6, 8)
    model = nn.Sequential(Biased(False))
    with capture_relevancy(model) as captured:
        output = model(x)
    assert captured.relevancy(output[:, 0, 1].sum(), position=0).requires_grad
    with capture_relevancy(nn.Sequential(Biased(True))) as captured, pytest.raises(ValueError, match="bias of the scores"):
        captured.model(x)
    additive = nn.Sequential(va.nn.ScoreAttention(8, 2, score="additive"))
    with capture_relevancy(additive), pytest.raises(ValueError, match="needs dot products"):
        additive[0](x, x, x)
        additive(x)


def test_dropout_of_attention_that_is_written_out() -> None:
    model = lxmert().double().train()
    with capture_relevancy(model), pytest.raises(ValueError, match="Set its dropout to 0"):
        model(input_ids=WORDS, **REGIONS)


def test_dropout_of_multihead_attention() -> None:
    """It runs by another call than outside of the context, with the same distribution."""
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)])
    model.forward = lambda x: model[0](x, x, x, need_weights=False)[0] + x  # type: ignore[method-assign]
    x = torch.randn(1, 6, 8).expand(2000, -1, -1)
    with capture_relevancy(model) as captured:
        output = model(x)
    assert captured.relevancy(output[:, 0, 1].sum(), position="cls").requires_grad
    with torch.no_grad():
        output, outside, still = output.detach(), model(x), model.eval()(x)
    assert 0.9 < float((output - still).std() / (outside - still).std()) < 1.1
    assert float((output - still).mean(0).abs().max() / (output - still).std()) < 0.1
