"""Layers and heads weighted as GLIMPSE has them, against its equations on stored maps."""

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES, lively
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.stored_maps import assert_rows, with_floats
from vlattn_fast.interpret import explain, explain_layers


def head_weights(a: Tensor, g: Tensor) -> Tensor:
    """Equation 6 for maps (H, N, M)."""
    reached, slopes = (g * a).clamp(min=0).sum((1, 2)), g.clamp(min=0).sum((1, 2))
    return (torch.where(slopes > 0, reached / slopes, 0.0) / 0.5).softmax(0)


def edges(a: Tensor, g: Tensor) -> Tensor:
    """Equation 7: E (N, M)."""
    mixed = torch.einsum("h,hnm->nm", head_weights(a, g), (g * a).clamp(min=0))
    return torch.where(mixed.sum(-1, keepdim=True) > 0, mixed / mixed.sum(-1, keepdim=True), 0.0)


def published(maps: list[Tensor], grads: list[Tensor], start_layer: int = 0) -> Tensor:
    """R of one sample from maps (H, N, N) without padding, divided by 2 to the number of layers."""
    first = len(maps) - 1 if start_layer == -1 else start_layer
    norms = torch.stack([g.sum(0).abs().sum() for g in grads[first:]])
    depth = (0.2 * torch.arange(first + 1, len(maps) + 1, dtype=norms.dtype)).softmax(0)
    shares = norms * depth / (norms * depth).sum()
    eye = relevancy = torch.eye(maps[0].shape[-1], dtype=norms.dtype)
    for a, g, share in zip(maps[first:], grads[first:], shares, strict=True):
        relevancy = relevancy + (eye + share * edges(a, g)) @ relevancy
    return relevancy / 2 ** len(norms)


def rows_of(model, inputs, score, row: Tensor, real: Tensor, start_layer: int = 0, prefix: str = "") -> Tensor:
    """The rows (B, N) that weights `row` (B, N) read, of samples whose real tokens are `real` (B, N)."""
    model.set_attn_implementation("literal")  # eager, with softmax in float64
    outputs = model(**inputs, output_attentions=True)
    maps = getattr(outputs, prefix).attentions if prefix else outputs.attentions
    grads = torch.autograd.grad(score(outputs).sum(), maps)
    model.set_attn_implementation("sdpa")
    result = torch.zeros(real.shape, dtype=maps[0].dtype)
    for b, some in enumerate(real.bool()):
        cut = [[one[b][:, some][:, :, some].detach() for one in ones] for ones in (maps, grads)]
        result[b, some] = row[b, some].to(result) @ published(*cut, start_layer)
    return result


@pytest.mark.parametrize("start_layer", [0, 1, -1])
@pytest.mark.parametrize("case", ["vit", "clip", "bert"], indirect=True)
def test_each_tower(case, request, start_layer):
    model, inputs = case.model.double(), with_floats(case.inputs, torch.float64)
    got = explain(model, inputs, method=va.methods.Glimpse(start_layer=start_layer))
    assert (got.method, got.start_layer) == (va.methods.Glimpse(start_layer=start_layer).label, start_layer)
    prefixes = {"vision": "vision_model_output", "text": "text_model_output"} if "clip" in request.node.name else {}
    for tower, row in got.relevancy.items():
        start = torch.nn.functional.one_hot(got.position[tower], row.shape[1])
        real = case.towers[tower].real
        real = torch.ones_like(start) if real is None or tower == "vision" else real(inputs)
        score = lambda outputs: case.score(outputs, inputs)  # noqa: E731
        want = rows_of(model, inputs, score, start, real, start_layer, prefixes.get(tower, ""))
        assert_rows(row, want)
        beside = want.scatter(1, got.position[tower][:, None], 0.0)
        assert (beside.amax(-1) > 1e-3).all()


def test_each_token_of_an_answer():
    model = lively(DECODERS["LlamaForCausalLM"]().model).eval().double()
    prompt, answer = [1, 4, 9, 11], [17, 30]
    got = explain(model, {"input_ids": torch.tensor([prompt])}, answer=answer, method="glimpse")
    whole = {"input_ids": torch.tensor([[*prompt, *answer]])}
    for number, token in enumerate(answer):
        start = torch.eye(6)[3 + number][None]
        score = lambda o, n=number, t=token: o.logits[:, 3 + n].log_softmax(-1)[:, t]  # noqa: E731
        want = rows_of(model, whole, score, start, torch.ones(1, 6))
        assert_rows(got.relevancy["language"][:, number], want)


@pytest.mark.parametrize("case", ["siglip"], indirect=True)
def test_behind_a_pooling_head(case):
    """Where each layer has a weight: the pooling head's E, then the layers."""
    model, inputs = case.model.double(), with_floats(case.inputs, torch.float64)
    got = explain(model, inputs, method="glimpse").relevancy["vision"]
    kept: list[tuple[Tensor, Tensor]] = []
    head = model.vision_model.head.attention
    probe = model.vision_model.head.probe

    def stored(module, args, kwargs):
        """The head's output by hand, from a map that keeps its gradient."""
        query, key, value = (
            kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(("query", "key", "value"))
        )
        weights = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        q, k, v = (torch.nn.functional.linear(x, w, b) for x, w, b in zip((query, key, value), *weights, strict=True))
        q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        a = a if a.requires_grad else a.requires_grad_()
        kept.append((a, v))
        return module.out_proj((a @ v).transpose(1, 2).flatten(2)), None

    forward = head.forward
    head.forward = lambda *args, **kwargs: stored(head, args, kwargs)
    model.set_attn_implementation("literal")
    try:
        outputs = model(**inputs, output_attentions=True)
        maps = outputs.vision_model_output.attentions
        a = kept[0][0]
        *grads, g = torch.autograd.grad(case.score(outputs, inputs).sum(), [*maps, a])
    finally:
        head.forward = forward
        model.set_attn_implementation("sdpa")
    assert probe.shape[1] == 1
    for sample in range(len(got)):
        row = edges(a[sample].detach(), g[sample])[0]
        stack = [[one[sample].detach() for one in ones] for ones in (maps, grads)]
        assert_rows(got[sample], row @ published(*stack))


def test_one_backward_pass_and_no_map(monkeypatch):
    """Nothing larger than a few rows of the maps is made, of a sequence that is longer than these."""
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.manual_seed(0)
    config = dict(CASES["bert"]().model.config.to_dict(), max_position_embeddings=700)
    import transformers

    model = lively(transformers.BertForSequenceClassification(transformers.BertConfig(**config))).eval()
    ids = torch.randint(5, 50, (1, 640))
    backwards, largest = [], [0]
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (backwards.append(1), grad(*a, **k))[1])

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and backwards:  # after the forward pass, whose attention is torch's
                largest[0] = max(largest[0], result.numel())
            return result

    with Largest():
        explain(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, target=1, method="glimpse")
    assert len(backwards) == 1
    heads = model.config.num_attention_heads
    assert 640 * 128 < largest[0] <= heads * 128 * 640 < heads * 640 * 640


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_bad_options(case):
    with pytest.raises(ValueError, match="start_layer must be from -3 to 2"):
        explain(case.model, case.inputs, method=va.methods.Glimpse(start_layer=3))
    with pytest.raises(ValueError, match="method must be 'gradient' or 'attention', .*; got 'glimpse'"):
        explain_layers(case.model, case.inputs, method="glimpse", per="layer")
