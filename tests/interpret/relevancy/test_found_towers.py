"""Towers that no record names: layers that attend in different ways, what is refused by name, and wrappers around models."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from tests.helpers.interpret.cases import lively, one_hot
from tests.helpers.interpret.stored_maps import Place, assert_rows, check, rows_of
from tests.helpers.interpret.tower_cases import (
    HEADS,
    METHODS,
    Block,
    Heads,
    Stack,
    first_rows,
    made,
    second,
    sequences,
    stack,
    text,
)
from vlattn_fast.attach import token_kinds
from vlattn_fast.interpret import explain
from vlattn_fast.interpret.relevancy import model_trace

SEEN = ["torch", "by name", "one head", "one key head", "nn.MultiheadAttention", "timm"]
WRITTEN = [
    "by hand",
    "a layer made on the way",
    "keywords",
    "einsum",
    "einsum of a list",
    "its shape is read",
]  # a softmax of a module's own, times values


@pytest.mark.parametrize("kind", [*SEEN, *WRITTEN])
def test_one_kind_of_attention(kind):
    inputs = sequences()
    target = lambda outputs: -outputs[:, 1]  # noqa: E731 (Grad-CAM of one head is zero where its weight is negative)
    place = Place("blocks", first_rows(7), inputs["attention_mask"])
    check(stack(kind, kind, kind), inputs, {"tower0": place}, target, METHODS, position="cls", target=target)


def test_several_kinds_in_one_tower():
    inputs = sequences()
    place = Place("blocks", first_rows(7), inputs["attention_mask"])
    check(stack(*SEEN, *WRITTEN), inputs, {"tower0": place}, second, METHODS, position={"tower0": "cls"}, target=second)


@pytest.mark.parametrize("read", ["last", "mean", 3, -1, "weights", "weights of all"])
def test_rows_that_are_read(read):
    model, inputs = stack("torch", "torch"), sequences()
    rows = {
        "last": one_hot(torch.tensor([6, 4]), 7),
        "mean": torch.full((2, 7), 1 / 7, dtype=torch.float64),
        3: one_hot(torch.tensor([3, 3]), 7),
        -1: one_hot(torch.tensor([6, 6]), 7),
        "weights": torch.rand(2, 7),
        "weights of all": torch.rand(7).expand(2, 7),
    }
    inputs = {**inputs, "attention_mask": inputs["attention_mask"] if read == "last" else torch.ones(2, 7, dtype=torch.long)}
    row = rows[read].double()
    place = Place("blocks", row, inputs["attention_mask"])
    asked = {"weights": row, "weights of all": row[0]}.get(read, read)
    check(model, inputs, {"tower0": place}, second, METHODS[:1], position=asked, target=second)


@pytest.mark.parametrize("alone", [True, False])
def test_attention_by_hand_without_a_dimension_of_heads_is_named(alone):
    kind = "three dimensions"
    model = stack(kind, kind) if alone else stack("torch", kind, "torch")
    name = r"blocks\.0\.attend" if alone else r"blocks\.1\.attend"
    with pytest.raises(ValueError, match=rf"got '{name}' \(Heads\), which computes a softmax itself"):
        explain(model, sequences(), position="cls", target=second)


def test_attention_without_a_softmax_is_missed():
    with pytest.raises(ValueError, match=r"no attention call was traced in layer 'blocks\.1' \(Block\)"):
        explain(stack("torch", "exponentials", "torch"), sequences(), position="cls", target=second)
    with pytest.raises(ValueError, match="got a forward pass of Stack without a call. Call scaled_dot_product_attention there"):
        explain(stack("exponentials", "exponentials"), sequences(), position="cls", target=second)


class Einsum(torch.nn.Module):
    """Attention by einsum in the model itself, without a module of its own."""

    def __init__(self):
        super().__init__()
        self.query, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)

    def forward(self, x):
        weights = torch.einsum("bnd,bmd->bnm", self.query(x), x).softmax(-1)
        return self.head(x + torch.einsum("bnm,bmd->bnd", weights, x))[:, 0]


@pytest.mark.parametrize("options", [{}, {"position": "cls", "target": 1}])
def test_attention_by_einsum_has_a_way_out(options):
    words = r"Einsum, which computes a softmax itself. .* va.relevancy_attention, .*in_your_transformer.py.* va.relevancy_step"
    with pytest.raises(ValueError, match=rf"^model must compute attention through .*{words}"):
        explain(Einsum(), {"x": torch.randn(2, 5, 16)}, **options)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # the model's own error
        explain(Einsum(), {"x": torch.randn(2, 5, 7)}, **options)


class FlexBlock(Block):
    """A layer of another class than its neighbours, so that nothing else tells that it attends."""

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.attend.qkv(x).chunk(3, -1))
        return x + flex_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_named():
    model = stack("torch", "torch", "torch")
    model.blocks[1] = FlexBlock("torch", 32)
    # On a CPU it has no backward pass, and rollout takes none.
    with pytest.raises(ValueError, match=r"got flex_attention in 'blocks\.1'"):
        explain(model, sequences(), position="cls", target=second, method="rollout")


class InChunks(nn.Module):
    """Attends to three tokens at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2).split(3, 2) for part in self.qkv(x).chunk(3, -1))
        parts = [nn.functional.scaled_dot_product_attention(*part) for part in zip(q, k, v, strict=True)]
        return self.out(torch.cat(parts, 2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", ["attention", "gradcam"])
def test_a_last_attention_in_chunks_is_refused(method):
    model = stack("torch", "torch", "torch")
    for block in model.blocks:
        block.attend = lively(InChunks())
    assert explain(model, sequences(), position="cls", target=second).relevancy["tower0"].shape == (2, 7)
    with pytest.raises(ValueError, match=f"in chunks; got '{method}' and 'blocks.2.attend'"):
        explain(model, sequences(), position="cls", target=second, method=method)


class Checkpointed(Stack):
    reentrant = False

    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        return checkpoint(block, x, visible, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Unrecorded(Stack):
    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        with torch.no_grad():
            return block(x, visible)


@pytest.mark.parametrize("method", ["gradient", "rollout"])
def test_checkpointed_layers_are_named(method):
    with pytest.raises(ValueError, match=r"without torch\.utils\.checkpoint.*; got attention 'blocks\.0\.attend'"):
        explain(stack("torch", "torch", make=Checkpointed), sequences(), position="cls", target=second, method=method)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", [Reentrant, Unrecorded])
@pytest.mark.parametrize("method", METHODS)
def test_layers_without_gradients_are_refused(make, method):
    model, inputs = stack("torch", "torch", make=make), sequences()
    if method == "attention":  # it takes none
        want = explain(stack("torch", "torch"), inputs, position="cls", target=second, method=method).relevancy["tower0"]
        torch.testing.assert_close(explain(model, inputs, position="cls", target=second, method=method).relevancy["tower0"], want)
        return
    with pytest.raises(ValueError, match="gradient"):
        explain(model, inputs, position="cls", target=second, method=method)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_layer(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.blocks[1].forward = torch.compile(model.blocks[1].forward, backend="eager")
    return model


def hooked(model: nn.Module) -> nn.Module:
    """As accelerate's add_hook_to_module does it: each forward is replaced on its module, and calls the one before."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._hf_hook(module._old_forward(*args, **kwargs))

    for module in model.modules():
        module._hf_hook, module._old_forward = (lambda output: output), module.forward
        module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)
    return model


WRAPPERS = [nn.DataParallel, compiled, compiled_in_place, compiled_layer, compiled_forward, hooked]


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_seen_through(wrap):
    model, inputs = stack("torch", "nn.MultiheadAttention", "torch"), sequences()
    want = explain(model, inputs, position="cls", target=second)
    wrapped = wrap(copy.deepcopy(model))
    before = [(module.training, {**vars(module)}) for module in wrapped.modules()]
    got = explain(wrapped, inputs, position="cls", target=second)
    torch.testing.assert_close(got.relevancy["tower0"], want.relevancy["tower0"], rtol=0, atol=0)
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=0)
    for module, (training, state) in zip(wrapped.modules(), before, strict=True):
        assert module.training == training and vars(module).keys() == state.keys()
        assert all(vars(module)[name] is value for name, value in state.items())


def test_flags_of_timm_are_put_back():
    model = stack("timm", "timm")
    explain(model, sequences(), position="cls", target=second)
    assert [block.attend.fused_attn for block in model.blocks] == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_half_precision(dtype):
    model, inputs = stack("torch", "nn.MultiheadAttention", "timm"), sequences()
    want = explain(model, inputs, position="cls", target=second).relevancy["tower0"]
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = explain(model, inputs, position="cls", target=second).relevancy["tower0"]
    else:
        inputs = {**inputs, "x": inputs["x"].to(dtype)}
        got = explain(model.to(dtype), inputs, position="cls", target=second).relevancy["tower0"]
    place = Place("", first_rows(7))
    assert got.dtype == torch.float32
    assert_rows(got, want, place, bound=0.05)


class Siamese(nn.Module):
    """One stack that runs over two inputs."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.part = Stack(*["torch"] * layers)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        ones = torch.ones(one.shape[:2]), torch.ones(other.shape[:2])
        return (self.part(one, ones[0]) * self.part(other, ones[1])).sum(-1, keepdim=True).expand(-1, 2)


@pytest.mark.parametrize("size", [7, 5])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_stack_that_runs_twice_is_two_towers(size, layers):
    model = lively(Siamese(layers)).eval().double()
    inputs = {"one": torch.randn(2, 7, 10).double(), "other": torch.randn(2, size, 10).double()}
    got = explain(model, inputs, position="cls", target=second).relevancy
    assert {name: tuple(row.shape) for name, row in got.items()} == {"tower0": (2, 7), "tower1": (2, size)}
    for name, changed in (("tower0", "one"), ("tower1", "other")):
        # A single input against the other one's constant features is a model with one tower.
        kept = {key: value for key, value in inputs.items() if key != changed}
        with torch.no_grad():
            constant = model.part(next(iter(kept.values())), torch.ones(2, next(iter(kept.values())).shape[1]))
        score = lambda features, constant=constant: (features * constant).sum(-1)  # noqa: E731
        alone = {"x": inputs[changed], "attention_mask": torch.ones(inputs[changed].shape[:2])}
        place = Place("blocks", first_rows(inputs[changed].shape[1]))
        want = rows_of(model.part, alone, score, {"tower": place})["tower"]
        assert_rows(got[name], want, place, what=name)


class Remembers(Stack):
    """Reads what it gave the last time beside its input."""

    last: Any = None

    def run(self, block: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
        x = block(x if self.last is None else x + self.last, visible)
        self.last = x.detach()
        return x


def test_states_that_a_model_keeps_bear_no_marks_of_the_next_run(monkeypatch):
    for module in (model_trace, token_kinds):  # as it may be once an object is gone
        monkeypatch.setattr(module, "id", lambda x: 7, raising=False)
    model, inputs = stack("torch", make=Remembers), sequences()
    explain(model, inputs, position="cls", target=second)
    unmarked = copy.deepcopy(model)
    unmarked.last = model.last.clone()
    again, first = (explain(one, inputs, position="cls", target=second).relevancy for one in (model, unmarked))
    torch.testing.assert_close(again, first)
    marks = {token_kinds.TokenKinds(model, {})._records.name for _ in range(2)}
    assert len(marks) == 2


class TwoBranches(Block):
    """Adds up two attentions over the same tokens, in one module or in two beside one another."""

    def __init__(self, inside: bool) -> None:
        super().__init__("torch", 32)
        self.attend = Summed(32) if inside else self.attend
        self.beside = None if inside else Heads("torch", 32)

    def forward(self, x, visible):
        normed = self.norm(x)
        more = 0 if self.beside is None else self.beside(normed, visible)
        return x + self.attend(normed, visible) + more


class Summed(Heads):
    def __init__(self, width: int) -> None:
        super().__init__("torch", width)
        self.more = nn.Linear(width, 3 * width)

    def forward(self, x, visible):
        parts = []
        for project in (self.qkv, self.more):
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in project(x).chunk(3, -1))
            parts.append(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None]))
        return self.out(sum(parts).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside", [True, False], ids=["in one module", "in two modules"])
def test_two_attentions_over_the_same_tokens_are_refused(inside, method):
    model = stack("torch", "torch")
    model.blocks.extend([lively(TwoBranches(inside))])
    model.eval()
    words = (
        "in a call of a module; got 28 queries"
        if inside
        else "layers of a tower one after another; got 'blocks.2.attend' in parallel to"
    )
    with pytest.raises(ValueError, match=words):
        explain(model, sequences(), method=method, position="cls", target=second)


def test_a_difference_of_two_softmaxes_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = made(transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)))
    with pytest.raises(ValueError, match="each token once in a call of a module; got .*DiffLlama.*Attention"):
        explain(model, text(), position="last", target=lambda outputs: outputs.logits[:, -1, 7])
