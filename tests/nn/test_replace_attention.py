"""replace_attention on models of transformers: in, out again, trained, saved, compiled, exported, explained."""

import copy
import functools
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.nn.models import MODELS, answer, lxmert, visual_bert
from vlattn_fast import explain, scores
from vlattn_fast.backends.reference.score_attention import score_attention
from vlattn_fast.nn import ScoreAttention, replace_attention
from vlattn_fast.nn.score_attention import LearnedScore

COUNTS = {"LXMERT": 2 + 1 + 2 * 3, "CLIP, sdpa": 5, "CLIP, eager": 5}


replacing: Any = importlib.import_module("vlattn_fast.nn.replace_attention")  # the name is also the function's


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # ViLT shuffles patches
    return answer(model(**inputs))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "UNITER"])
def test_in_and_out_again(name: str) -> None:
    model, inputs = MODELS[name]()
    plain, names = run(model.eval(), inputs), list(model.state_dict())
    with replace_attention(model, score="scaled_dot") as replaced:
        torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-5)
        assert len(replaced.scores) == COUNTS.get(name, 2) and list(model.state_dict()) == names
    handle = replace_attention(model, score="additive", per_head=True)
    other = run(model, inputs)
    assert (other - plain).abs().max() > 1e-6
    assert len(model.state_dict()) == len(names) + 4 * len(handle.scores)
    other.sum().backward()
    grads = [p.grad for score in handle.scores.values() for p in score.parameters()]
    assert any(grad is not None and bool(grad.any()) for grad in grads)
    handle.restore()
    handle.restore()
    assert torch.equal(run(model, inputs), plain) and list(model.state_dict()) == names


@pytest.mark.parametrize("name", ["BERT", "LXMERT"])
def test_forwards_of_the_instances_come_back(name: str) -> None:
    """As accelerate's hooks leave them: each forward is replaced on its module, and calls the one before."""
    model, inputs = MODELS[name]()
    model, calls = model.eval(), []
    for module in model.modules():

        def hooked(*args: Any, module: Any = module, **kwargs: Any) -> Any:
            calls.append(module)
            return module._old_forward(*args, **kwargs)

        module._old_forward, module.forward = module.forward, hooked  # type: ignore[assignment]
    plain = run(model, inputs)
    count = len(calls)
    with replace_attention(model, score="dot"):
        assert not torch.equal(run(model, inputs), plain) and len(calls) > count
    calls.clear()
    assert torch.equal(run(model, inputs), plain) and len(calls) == count


@pytest.mark.parametrize("score", scores.layers())
def test_equals_the_formula(score: str) -> None:
    """BERT's last layer with each score, against the formula on its projections."""
    model, inputs = MODELS["BERT"]()
    model.double().eval()
    path = "bert.encoder.layer.1.attention.self"
    module, seen = model.get_submodule(path), {}
    for part in ("query", "key", "value"):
        hook = lambda m, a, out, part=part: seen.__setitem__(part, out.unflatten(-1, (4, 8)).transpose(1, 2))  # noqa: E731
        getattr(module, part).register_forward_hook(hook)
    module.register_forward_hook(lambda m, a, out: seen.__setitem__("out", out[0]))
    handle = replace_attention(model, score=score, layers=-1)
    assert list(handle.scores) == [path]
    model(**inputs)
    held = handle.scores[path]
    made: Any = held() if isinstance(held, nn.Module) else held
    mask = inputs["attention_mask"].bool()[:, None, None]
    made = scores.resolve(made)
    want = score_attention(
        *(seen[part] for part in ("query", "key", "value")), score=made, attn_mask=mask, scale=made.default_scale(8)
    )
    torch.testing.assert_close(seen["out"], want.transpose(1, 2).flatten(2), rtol=1e-9, atol=1e-11)


def test_layers() -> None:
    model, _ = lxmert()
    cross = replace_attention(model, score="cosine", layers=lambda path: "visual_attention" in path)
    assert len(cross.scores) == 2 and all("visual_attention" in path for path in cross.scores)
    with pytest.raises(ValueError, match="is already replaced: restore it first"):
        replace_attention(model, score="cosine")
    cross.restore()
    assert len(replace_attention(model, score="cosine", layers=[0]).scores) == 1 + 1 + 3
    other, _ = visual_bert()
    for wrong, words in ((2, "from -2 to 1"), ([], "layers must choose"), (lambda path: False, "layers must choose")):
        with pytest.raises(ValueError, match=words):
            replace_attention(other, score="cosine", layers=wrong)
    several: Any
    for several in (["0"], 1.5):
        with pytest.raises(TypeError, match="layers must be None"):
            replace_attention(other, score="cosine", layers=several)
    with pytest.raises(ValueError, match="model must be a transformers model"):
        replace_attention(nn.Linear(2, 2), score="cosine")
    with pytest.raises(ValueError, match="score must be one of"):
        replace_attention(other, score="cosinus")


def test_a_failure_half_way_leaves_nothing_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = MODELS["BERT"]()
    plain, replace, count = run(model, inputs), replacing._replace, []

    def fails(*args: Any) -> None:
        if count:
            raise MemoryError
        count.append(replace(*args))

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(replacing, "_replace", fails)
        replace_attention(model, score="dot")
    assert count and torch.equal(run(model, inputs), plain)
    with replace_attention(model, score="dot") as handle:  # none of its modules is replaced already
        assert len(handle.scores) == 2


def test_a_module_with_heads_that_is_no_attention_is_left_alone() -> None:
    """As a mixer of Mamba beside the attention of its file: its forward does not call transformers' interface."""

    class Mixer(nn.Module):
        num_heads, head_dim = 4, 8

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config

        def forward(self, x: Tensor) -> Tensor:
            return x

    class Called(Mixer):
        forward = functools.partial(print)  # which has no code of its own

    assert ALL_ATTENTION_FUNCTIONS  # a name of this file, as of theirs
    model = BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=30))
    model.encoder.layer[0].mixer, model.encoder.layer[0].called = Mixer(model.config), Called(model.config)
    assert list(replace_attention(model, score="cosine").scores) == ["encoder.layer.0.attention.self"]


def test_a_score_of_ones_own() -> None:
    model, inputs = visual_bert()
    handle = replace_attention(model, score=lambda heads, size: LearnedScore("hadamard", heads, size, activation="tanh"))
    run(model, inputs)
    assert all(isinstance(score, LearnedScore) for score in handle.scores.values())


def test_dropout_is_the_models() -> None:
    model, inputs = visual_bert()
    replace_attention(model, score="cosine")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(run(model, inputs), run(model, inputs))
    model.visual_bert.encoder.layer[1].attention.self.dropout.p = 0.5
    first = answer(model(**inputs))
    assert not torch.equal(first, answer(model(**inputs)))
    model.eval()
    assert torch.equal(run(model, inputs), run(model, inputs))


@pytest.mark.parametrize("make", [MODELS["BERT"], visual_bert], ids=["interface", "by hand"])
@pytest.mark.slow
def test_copied_saved_compiled_exported(make: Any) -> None:
    model, inputs = make()
    model.eval()
    replace_attention(model, score="general", per_head=True)
    wanted = run(model, inputs)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    assert torch.equal(run(twin, inputs), wanted)  # the copy has its own weights
    saved = io.BytesIO()
    torch.save(twin.state_dict(), saved)
    model.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert torch.equal(run(model, inputs), wanted)
    compiled = torch.compile(twin, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), wanted, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(run(exported, inputs), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_quantized_weights(bias: bool) -> None:
    """Those of the last layer are integers; where that has nothing else, all of the model stays as it was."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    model = BertModel(BertConfig(**sizes)).bfloat16()
    attention = model.encoder.layer[1].attention.self
    for projection in (attention.query, attention.key, attention.value):
        projection.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
        projection.bias = projection.bias if bias else None
    if bias:
        replace_attention(model, score="additive")
        assert {parameter.dtype for parameter in attention.attention_score.parameters()} == {torch.bfloat16}
        return
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(TypeError, match="model must have floating-point parameters in its attention; got BertSelfAttention"):
        replace_attention(model, score="additive")
    assert [dict(vars(module)) for module in model.modules()] == before
    assert not any("attention_score" in name for name, _ in model.named_modules())


READ = """
import os, sys, torch, transformers.modeling_utils
for path in sys.argv[1:]:
    if os.fork() == 0:
        model, inputs, wanted = torch.load(path, weights_only=False)
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-6)  # perhaps on other threads
        sys.exit()
sys.exit(any([os.wait()[1] for _ in sys.argv[1:]]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_another_process_reads_a_whole_model(tmp_path: Path) -> None:
    """Where nothing was replaced before: a fork for each model; the score is a name, so that no class of ours says where to
    look. The first is replaced through the interface, the second by hand."""
    paths = []
    for make in (MODELS["BERT"], visual_bert):
        model, inputs = make()
        replace_attention(model.eval(), score="cosine")
        paths.append(str(tmp_path / f"{type(model).__name__}.pt"))
        torch.save((model, inputs, run(model, inputs)), paths[-1])
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("first", "then"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_another_implementation_is_set_afterwards(first: str, then: str) -> None:
    """Masks of the one hold causality, and the other has none."""
    model, inputs = MODELS[f"Llama, {first}"]()
    inputs = {"input_ids": inputs["input_ids"]}
    plain = run(model.eval(), inputs)
    replace_attention(model, score="scaled_dot")
    model.set_attn_implementation(then)
    torch.testing.assert_close(run(model, inputs), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["VisualBERT", "LXMERT", "ViLT", "CLIP, sdpa", "CLIP, eager", "BERT", "ViT", "Llama, eager"])
def test_explained(name: str) -> None:
    """With the scaled dot product a replaced model has the relevancy that it has without; with another score it has some."""
    model, inputs = MODELS[name]()
    model.double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    torch.manual_seed(0)
    wanted = explain(model, inputs)
    with replace_attention(model, score="scaled_dot"):
        torch.manual_seed(0)
        got = explain(model, inputs)
    torch.testing.assert_close(got.relevancy, wanted.relevancy, rtol=1e-8, atol=1e-10)
    with replace_attention(model, score="additive"):
        torch.manual_seed(0)
        other = explain(model, inputs)
    assert other.relevancy.keys() == wanted.relevancy.keys()
    assert any((other.relevancy[tower] - row).abs().max() > 1e-9 for tower, row in wanted.relevancy.items())


def test_masks_of_flash_attention_and_flex() -> None:
    """A mask (B, N) of real tokens is taken; one that is no tensor is refused with the line that helps."""
    model, inputs = MODELS["BERT"]()
    module = model.bert.encoder.layer[0].attention.self
    replace_attention(model, score="additive", layers=0)
    states = torch.randn(2, 7, 32)
    visible = inputs["attention_mask"].bool()
    got = module.eval()(states, visible)[0]
    torch.testing.assert_close(got, module(states, visible[:, None, None])[0])
    with pytest.raises(ValueError, match=r"got a mask of str: set_attn_implementation\('sdpa'\)"):
        module(states, "blocks")


@pytest.mark.parametrize("starts", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("replaced", [True, False])
def test_packed_sequences(starts: str, replaced: bool) -> None:
    """Two texts in one row: the last token is explained by its own text, as without the other one."""
    model, _ = MODELS["Llama, sdpa"]()
    if replaced:
        replace_attention(model.eval(), score="scaled_dot")
    texts = torch.randint(0, 20, (1, 5)), torch.randint(0, 20, (1, 7))
    ends, places = torch.tensor([0, 5, 12], dtype=torch.int32), torch.cat([torch.arange(5), torch.arange(7)])[None]
    options = {"position_ids": places}
    if starts == "cu_seq_lens":
        options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    alone = {"input_ids": texts[1], "position_ids": torch.arange(7)[None] + (0 if starts == "position_ids" else 5)}
    packed = {"input_ids": torch.cat(texts, 1), "use_cache": False, **options}
    (found,), (expected,) = (explain(model.eval(), x, target=3).relevancy.values() for x in (packed, alone))
    assert not found[:, :5].any()
    torch.testing.assert_close(found[:, 5:], expected)


@pytest.mark.parametrize("kdim", [None, 10])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_state_and_arguments_of_multihead_attention(kdim: int | None, bias: bool, batch_first: bool) -> None:
    options: dict[str, Any] = {"kdim": kdim, "vdim": kdim, "bias": bias, "batch_first": batch_first}
    theirs = nn.MultiheadAttention(12, 3, **options).double()
    ours = ScoreAttention(12, 3, **options).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    query, key = torch.randn(2, 4, 12), torch.randn(2, 5, kdim or 12)
    query, key = (x.double() if batch_first else x.double().transpose(0, 1) for x in (query, key))
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    added = torch.randn(4, 5, dtype=torch.float64)
    for mask, pad in (
        (None, None),
        (None, padding),
        (added, None),
        (added, torch.zeros(2, 5).double().masked_fill(padding, -1e9)),
    ):
        want, maps = theirs(query, key, key, key_padding_mask=pad, attn_mask=mask)
        got, weights = ours(query, key, key, pad, True, mask)
        torch.testing.assert_close((got, weights), (want, maps), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(ours(query, key, key_padding_mask=pad, attn_mask=mask), want, rtol=1e-9, atol=1e-11)
    ours.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="bias_k"):
        ScoreAttention(12, 3).load_state_dict(nn.MultiheadAttention(12, 3, add_bias_kv=True).state_dict())


@pytest.mark.parametrize("score", scores.layers())
@pytest.mark.parametrize("per_head", [True, False])
def test_weights_of_each_score(score: str, per_head: bool) -> None:
    """One sweep over all names; the weights are the head mean of the softmax that makes the output."""
    layer = ScoreAttention(12, 3, score, per_head=per_head).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    visible = torch.tensor([[True] * 5, [True, True, False, True, False]])
    out, weights = layer(x, key_mask=visible, need_weights=True)
    assert weights.shape == (2, 5, 5) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert not weights[1][:, ~visible[1]].any()
    # With values that name the keys, the output of each head is its row of the map.
    one_head = ScoreAttention(5, 1, score, per_head=per_head).double()
    for linear, weight in ((one_head.v_proj, torch.eye(5)), (one_head.out_proj, torch.eye(5))):
        linear.weight.data.copy_(weight)
        linear.bias.data.zero_()
    states, names = torch.randn(2, 5, 5).double(), torch.eye(5).double().expand(2, 5, 5)
    out, weights = one_head(states, states, names, key_mask=visible, need_weights=True)
    torch.testing.assert_close(weights, out.detach(), rtol=1e-9, atol=1e-11)


def test_weights_of_a_series_beside_padding() -> None:
    """A series is fitted to the range of what can be seen."""
    layer = ScoreAttention(12, 3, "additive", score_options={"method": "series", "tolerance": 1e-2})
    visible = torch.tensor([[True, True, False]])
    query, key = torch.randn(1, 4, 12), torch.randn(1, 3, 12).masked_fill(~visible[..., None], torch.nan)
    weights = layer(query, key, key_mask=visible, need_weights=True)[1]
    torch.testing.assert_close(weights[..., :2], layer(query, key[:, :2], need_weights=True)[1])


def test_wrong_padding() -> None:
    layer, x = ScoreAttention(12, 3), torch.randn(2, 5, 12)
    for padding, error, words in (
        (torch.zeros(2, 4, dtype=torch.bool), ValueError, r"key_padding_mask must have shape \(2, 5\)"),
        (torch.zeros(2, 5, dtype=torch.int64), TypeError, "key_padding_mask must be bool or float"),
    ):
        with pytest.raises(error, match=words):
            layer(x, key_padding_mask=padding)
    for mask in (torch.ones(5, 5, dtype=torch.int64), [[1.0] * 5] * 5):
        with pytest.raises(TypeError, match="attn_mask must be"):
            layer(x, key_padding_mask=torch.zeros(2, 5), attn_mask=mask)
    with pytest.raises(ValueError, match="key_mask must be None if key_padding_mask is given"):
        layer(x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool), key_mask=torch.ones(2, 5, dtype=torch.bool))
