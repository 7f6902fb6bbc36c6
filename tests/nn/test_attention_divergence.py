"""AttentionDivergence against maps that models return, and in training steps: a student's, and of a model with a frozen copy."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.nn.models import DEEP, MODELS, words
from vlattn_fast.nn import AttentionDivergence, capture_attention


def bert(heads: int, layers: int = 2, **options: Any) -> nn.Module:
    sizes = {**DEEP, "num_hidden_layers": layers, "num_attention_heads": heads, "initializer_range": 0.3}
    return hf.BertModel(hf.BertConfig(vocab_size=99, **sizes, **options)).eval()


def llama(heads: int, layers: int = 2) -> nn.Module:
    sizes = {**DEEP, "num_hidden_layers": layers, "num_attention_heads": heads, "initializer_range": 0.3}
    return hf.LlamaModel(hf.LlamaConfig(vocab_size=99, num_key_value_heads=heads // 2, pad_token_id=0, **sizes)).eval()


FAMILIES: dict[str, Callable[..., nn.Module]] = {"BERT": bert, "Llama": llama}


def maps(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """As the model returns them."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return list(model(**inputs, output_attentions=True).attentions)


def kl(a: Tensor, b: Tensor, real: Tensor) -> Tensor:
    """(B, N): the mean over heads; 0 for padding."""
    a, b = a.double(), b.double()
    rows = torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log()), 0.0).sum(-1).mean(1)
    return torch.where(real, rows, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_maps_of_two_models(family: str) -> None:
    """Layers of other depths are mapped to each other; padding does not count."""
    teacher, student, inputs = FAMILIES[family](4, layers=3), FAMILIES[family](4), words()
    with torch.no_grad():
        with capture_attention(teacher, layers=[0, 2]) as target:
            teacher(**inputs)
        with capture_attention(student, layers=[0, 1]) as captured:
            student(**inputs)
        real = inputs["attention_mask"].bool()
        told, seen = maps(teacher, inputs), maps(student, inputs)
        rows = torch.stack([kl(told[i], seen[j], real) for i, j in ((0, 0), (2, 1))]).mean(0)
        want = rows.sum() / real.sum()
        assert want > 0.01
        torch.testing.assert_close(AttentionDivergence()(target, captured), want.float(), rtol=1e-4, atol=0)
        each = AttentionDivergence(reduction="none")(target, captured)
        torch.testing.assert_close(each, rows.float(), rtol=1e-4, atol=1e-7)
        back = AttentionDivergence("reverse_kl")([captured[0], captured[1]], target)
        torch.testing.assert_close(back, want.float(), rtol=1e-4, atol=0)
        chosen = torch.zeros_like(real).index_fill(1, torch.tensor([1, 2]), True)
        part = AttentionDivergence()(target, captured, chosen)
        torch.testing.assert_close(part, (rows * chosen).sum().float() / 4, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_differ_are_compared_by_their_mean(family: str) -> None:
    teacher, student, inputs = FAMILIES[family](4), FAMILIES[family](2), words()
    with torch.no_grad(), capture_attention(teacher) as target:
        teacher(**inputs)
    with torch.no_grad(), capture_attention(student) as captured:
        student(**inputs)
    real = inputs["attention_mask"].bool()
    a, b = (maps(model, inputs)[-1].mean(1, keepdim=True) for model in (teacher, student))
    got = AttentionDivergence()(target, captured)
    torch.testing.assert_close(got, (kl(a, b, real).sum() / real.sum()).float(), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="other_query must have query's 4 heads unless head_mean=True"):
        AttentionDivergence(head_mean=False)(target, captured)
    same = AttentionDivergence(head_mean=True)(captured, captured)
    assert float(same) == 0.0


def test_a_frozen_copy_pulls_a_model_back() -> None:
    """Without a change the divergence and its gradient are 0; after one a step along the gradient shrinks it."""
    model, inputs = FAMILIES["Llama"](4), words()
    frozen = copy.deepcopy(model)
    loss = AttentionDivergence()

    def divergence() -> Tensor:
        with torch.no_grad(), capture_attention(frozen, layers=[0, 1]) as reference:
            frozen(**inputs)
        with capture_attention(model, layers=[0, 1]) as captured:
            model(**inputs)
        return loss(captured, reference)

    value = divergence()
    value.backward()
    assert float(value.detach()) < 1e-10 and all(p.grad is None or float(p.grad.abs().max()) < 1e-5 for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = divergence()
    optimizer.zero_grad()
    before.backward()
    optimizer.step()
    assert 0 < float(divergence().detach()) < float(before.detach())


def test_a_stream_of_two_and_cross_attention() -> None:
    model, inputs = MODELS["LXMERT"]()
    other = copy.deepcopy(model.eval())
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * torch.randn_like(p)
        captures = []
        for each in (model, other):
            with capture_attention(each) as captured:
                each(**inputs)
            captures.append(captured.layer)
    one, two = captures
    loss = AttentionDivergence("js")
    with pytest.raises(ValueError, match="two sequences; read text or image"):
        loss(one, two)
    value = loss([one.text, one.cross[0]], [two.text, two.cross[0]], inputs["attention_mask"].bool())
    want = []
    for a, b in ((one.text, two.text), (one.cross[0], two.cross[0])):
        rows = va.attention_divergence(*a, *b, kind="js", key_mask=a.key_mask).mean(1)
        want.append(rows[inputs["attention_mask"].bool()].mean())
    torch.testing.assert_close(value, torch.stack(want).mean())


def test_a_teacher_in_half_precision() -> None:
    teacher, student, inputs = bert(4), bert(4), words()
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), capture_attention(teacher.to(dtype)) as target:
            teacher(**inputs)
        with capture_attention(student) as captured:
            student(**inputs)
        values.append(AttentionDivergence()(target, captured))
    assert values[1].dtype == torch.float32
    torch.testing.assert_close(*values, rtol=0.1, atol=0)


def test_wrong_arguments() -> None:
    for options, message in (
        ({"kind": "chi"}, "kind must be one of"),
        ({"beta": 0.0}, "beta must be between 0 and 1; got 0.0"),
        ({"reduction": "sum"}, "reduction must be one of"),
        ({"backend": "gpu"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionDivergence(**options)
    with pytest.raises(TypeError, match="head_mean must be True or False"):
        AttentionDivergence(head_mean=1)
    model, inputs = bert(4), words()
    with capture_attention(model, layers=[0, 1]) as captured:
        model(**inputs)
    loss = AttentionDivergence()
    with pytest.raises(ValueError, match="other must have as many layers as attention, 2; got 1"):
        loss(captured, captured[0])
    with pytest.raises(TypeError, match="attention must be a capture, captured layers or their pairs.*takes tensors"):
        loss((captured[0].query, captured[0].key), captured[0])
    with pytest.raises(TypeError, match="query_mask must be bool"):
        loss(captured, captured, inputs["attention_mask"])


def test_a_bias_of_positions_raises_an_error() -> None:
    config = hf.T5Config(vocab_size=99, d_model=32, d_kv=8, num_heads=4, num_layers=1, d_ff=37, dropout_rate=0.0)
    model = hf.T5EncoderModel(config)
    with capture_attention(model, layers=0) as captured:
        model(**words())
    with pytest.raises(ValueError, match="one adds a bias of positions"):
        AttentionDivergence()(captured, captured)
