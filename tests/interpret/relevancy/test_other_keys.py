"""Attention to keys that are no tokens, beside those of the tokens: learnt keys, zeros, prefixes; keys of several tokens."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.edited_maps import Cut, hooked
from tests.helpers.interpret.stored_maps import Kept, Place, assert_rows, check, layer_sums
from tests.helpers.interpret.tower_cases import HEADS, METHODS, Stack, first_rows, second, sequences
from vlattn_fast.interpret import explain, explain_layers
from vlattn_fast.nn import RelevancyLoss, capture_relevancy

BLOCKS = 2
SUMS = layer_sums("blocks", BLOCKS, "norm", "mlp")


class Prefixed(nn.Module):
    """Self-attention with `count` further keys."""

    def __init__(self, kind: str, count: int, width: int) -> None:
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(width, 3 * width), nn.Linear(width, width)
        sizes = (1, count, width) if kind == "states" else (2, HEADS, count, width // HEADS)
        self.prefix = nn.Parameter(torch.randn(*sizes))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        size, y = x.shape[1], x
        if self.kind == "states":
            y = torch.concatenate([x, self.prefix.expand_as(x[:, : self.prefix.shape[1]])], axis=1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        q = q[:, :, :size]
        if self.kind == "turned":
            q, k = (torch.cat([-part[..., 4:], part[..., :4]], -1) + part for part in (q, k))
        if self.kind == "one key head":
            k, v = k[:, 1:2], v[:, 1:2]
        if self.kind == "zeros":
            k, v = (functional.pad(part, (0, 0, self.prefix.shape[2], 0)) for part in (k, v))
        elif self.kind != "states":
            prefix = self.prefix[:, None].expand(2, len(x), -1, -1, -1)[:, :, : k.shape[1]]
            k, v = (torch.cat([old, new], -2) for old, new in zip(prefix, (k, v), strict=True))
        more = self.prefix.shape[-2]
        visible = functional.pad(visible, (0, more) if self.kind == "states" else (more, 0), value=True)[:, None, None]
        if self.kind == "by hand":
            y = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out(y.transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    def __init__(self, width: int, **options: bool) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(width, HEADS, batch_first=True, **options)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.inside(x, x, x, key_padding_mask=~visible, need_weights=False)[0]


def with_attention(make) -> nn.Module:
    torch.manual_seed(0)
    model = Stack(*["torch"] * BLOCKS)
    for block in model.blocks:
        block.attend = make(32)
    return lively(model).eval()


# the attention, and how many of its keys in front of the tokens' and behind them are none
KINDS = {
    "learnt key": (lambda width: Multihead(width, add_bias_kv=True), (0, 1)),
    "zero key": (lambda width: Multihead(width, add_zero_attn=True), (0, 1)),
    "both": (lambda width: Multihead(width, add_bias_kv=True, add_zero_attn=True), (0, 2)),
    "prefix": (lambda width: Prefixed("prefix", 3, width), (3, 0)),
    "as many": (lambda width: Prefixed("prefix", 7, width), (7, 0)),
    "turned": (lambda width: Prefixed("turned", 1, width), (1, 0)),
    "states": (lambda width: Prefixed("states", 2, width), (0, 2)),
    "zeros": (lambda width: Prefixed("zeros", 2, width), (2, 0)),
    "by hand": (lambda width: Prefixed("by hand", 3, width), (3, 0)),
    "one key head": (lambda width: Prefixed("one key head", 3, width), (3, 0)),
}


@pytest.mark.filterwarnings("ignore:Tower 'tower0' attends to keys that are not its tokens")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_columns_of_the_tokens(kind):
    make, others = KINDS[kind]
    inputs = sequences()
    place = Place("blocks", first_rows(7), inputs["attention_mask"], sums=SUMS, others=others)
    target = lambda outputs: -outputs[:, 1]  # noqa: E731
    check(with_attention(make), inputs, {"tower0": place}, target, (*METHODS, "weighted"), position="cls", target=target)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if isinstance(KINDS[kind][0](32), Prefixed) and kind != "by hand"])
def test_edits_are_of_the_tokens(kind):
    """Other keys shift neither the queries nor the keys of an edit."""
    make, (before, behind) = KINDS[kind]
    model, inputs = with_attention(make).double(), sequences()
    inputs["x"] = inputs["x"].double()
    queries, keys = torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    queries[:, 2:4], keys[:, 0:3] = True, True
    with Cut(queries, functional.pad(keys, (before, behind))) as cut, torch.no_grad():
        expected = model(**inputs)
    assert cut.count == BLOCKS
    with torch.no_grad():
        with va.intervene(model, inputs, va.Knockout(queries=(2, 4), keys=(0, 3), heads=[0, 1])):
            torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-10)
        assert float((model(**inputs) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["prefix", "by hand", "states"])
def test_outputs_of_heads_are_patched_at_the_tokens(kind):
    model, inputs = with_attention(KINDS[kind][0]).double(), sequences()
    inputs["x"] = inputs["x"].double()
    others = {**inputs, "x": inputs["x"].flip(0)}
    of_others = list[Tensor]()
    projections = [block.attend.out for block in model.blocks]
    with torch.no_grad(), hooked(projections[0], lambda x: of_others.append(x) or x, HEADS):
        model(**others)

    def changed(x: Tensor) -> Tensor:
        x[:, 2:4, 1] = of_others[0][:, 2:4, 1]
        return x

    with torch.no_grad():
        with hooked(projections[0], changed, HEADS):
            expected = model(**inputs)
        run = va.record_heads(model, others)
        with va.intervene(model, inputs, va.Patch(run, {0: [1]}, queries=(2, 4))):
            torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-10)
        assert float((model(**inputs) - expected).abs().max()) > 1e-4


class Numbers(nn.Module):
    """Takes its inputs from a list of numbers."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, numbers: list[list[list[float]]]) -> Tensor:
        x = torch.tensor(numbers)
        return self.inside(x, torch.ones(x.shape[:2]))


@pytest.mark.filterwarnings("ignore:Tower 'tower0' attends to keys that are not its tokens")
def test_tokens_that_come_from_no_tensor():
    model, x = with_attention(KINDS["both"][0]), sequences()["x"]
    want = explain(model, {"x": x, "attention_mask": torch.ones(2, 7)}, position="cls", target=second).relevancy["tower0"]
    got = explain(Numbers(model), {"numbers": x.tolist()}, position="cls", target=second).relevancy["tower0"]
    assert_rows(got, want)


class PrefixTuned(nn.Module):
    """A decoder of transformers whose cache holds a learnt prefix, as in prefix tuning."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
        self.inside = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
        self.prefix = nn.Parameter(torch.randn(2, 2, 1, 4, 3, 8))

    def forward(self, input_ids: Tensor) -> Tensor:
        cache = transformers.DynamicCache()
        for number, (key, value) in enumerate(self.prefix):
            cache.update(key.expand(len(input_ids), -1, -1, -1), value.expand(len(input_ids), -1, -1, -1), number)
        mask = torch.ones(len(input_ids), 3 + input_ids.shape[1], dtype=torch.long)
        return self.inside(input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]


@pytest.mark.filterwarnings("ignore:Tower 'tower0' attends to keys that are not its tokens")
def test_prefix_tuning():
    model, inputs = lively(PrefixTuned()).eval(), {"input_ids": torch.randint(3, 60, (2, 6))}
    place = Place("inside.model.layers", torch.eye(6)[-1:].expand(2, 6), others=(3, 0))
    check(model, inputs, {"tower0": place}, second, METHODS, position="last", target=second)


def test_their_share_is_named():
    model, inputs = with_attention(KINDS["both"][0]).double(), sequences()
    inputs = {"x": inputs["x"].double(), "attention_mask": torch.ones_like(inputs["attention_mask"])}
    kept = Kept(model)
    with kept.watching():
        model(**inputs)
    share = torch.stack([stored[..., 7:].sum(-1).mean() for _, stored in kept.maps]).mean()
    where = rf"\(2 in 'blocks.0.attend.inside', and in 1 more modules; they take {share:.1%} of the attention there\)"
    with pytest.warns(UserWarning, match=f"Tower 'tower0' attends to keys that are not its tokens {where}"):
        explain(model, inputs, position="cls", target=second)


@pytest.mark.filterwarnings("ignore:Tower 'tower0' attends to keys that are not its tokens")
@pytest.mark.parametrize("kind", ["both", "prefix"])
@pytest.mark.parametrize("method", ["gradient", "attention"])
def test_each_layer_and_each_head(method, kind):
    make, (before, behind) = KINDS[kind]
    model, inputs = with_attention(make).double(), sequences()
    inputs["x"] = inputs["x"].double()
    kept = Kept(model)
    with kept.watching():
        score = second(model(**inputs)).sum()
    maps = [stored for _, stored in kept.maps]
    if method == "gradient":
        maps = [(a * g).relu() for a, g in zip(maps, torch.autograd.grad(score, maps), strict=True)]
    want = torch.stack([stored[:, :, 0, before : before + 7].transpose(0, 1) for stored in maps]).detach()
    assert want.abs().amax((1, 2, 3)).min() > 1e-6
    for per, rows in (("head", want), ("layer", want.mean(1))):
        got = explain_layers(model, inputs, method=method, per=per, position="cls", target=second).relevancy["tower0"]
        torch.testing.assert_close(got, rows, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Tower 'tower0' attends to keys that are not its tokens")
@pytest.mark.parametrize("kind", ["both", "prefix", "states"])
@pytest.mark.parametrize(("method", "higher_order"), [("gradient", False), ("gradient", True), ("rollout", False)])
def test_a_step_of_training_equals_that_on_stored_maps(method, kind, higher_order):
    make, (before, _) = KINDS[kind]
    model, inputs = with_attention(make).double(), sequences()
    inputs["x"] = inputs["x"].double()
    mask = torch.tensor([[1.0, 1, 0, 0, 1, 0, 0]] * 2).double()

    def gradients() -> Tensor:
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    kept = Kept(model)
    with kept.watching():
        score = second(model(**inputs)).sum()
    maps = [stored for _, stored in kept.maps]
    row = torch.eye(7, dtype=torch.float64)[:1].expand(2, 1, 7)
    slopes = torch.autograd.grad(score, maps, create_graph=higher_order, retain_graph=True)
    for stored, slope in reversed(list(zip(maps, slopes, strict=True))):
        whole = stored.mean(1) if method == "rollout" else (stored * slope).relu().mean(1)
        step = row @ whole[:, :, before : before + 7]
        row = (row + step) / 2 if method == "rollout" else row + step
    loss = RelevancyLoss("inside")(row[:, 0], mask)
    loss.backward()
    want = gradients()

    with capture_relevancy(model, method=method, higher_order=higher_order) as captured:
        score = second(model(**inputs)).sum()
    rows = captured.relevancy(None if method == "rollout" else score, position="cls")
    torch.testing.assert_close(rows, row[:, 0], rtol=1e-9, atol=1e-12)
    got = RelevancyLoss("inside")(rows, mask)
    torch.testing.assert_close(got, loss)
    assert got > 0.01
    got.backward()
    assert (gradients() - want).norm() / want.norm() < 1e-8 and want.norm() > 1e-3


class Reduced(nn.Module):
    """Keys of two neighbouring tokens each, as a strided convolution makes them; or one more key, their mean."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.halve = kind, nn.Conv1d(width, width, 2, 2)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        y = self.halve(x.mT).mT if self.kind == "strided" else torch.cat([x, x.mean(1, keepdim=True)], 1)
        return functional.scaled_dot_product_attention(x, y, y)


@pytest.mark.parametrize("kind", ["strided", "mean"])
@pytest.mark.parametrize("read", ["mean", "cls"])
def test_keys_that_are_no_tokens_own_are_refused(kind, read):
    model, inputs = with_attention(lambda width: Reduced(kind, width)), sequences()
    got = {"strided": 3, "mean": 8}[kind]
    message = f"one key for each token of a tower; got 7 queries and {got} keys in 'blocks.0.attend', made from the same tokens"
    with pytest.raises(ValueError, match=message):
        explain(model, inputs, position=read, target=second)
    with pytest.raises(ValueError, match=message), capture_relevancy(model):
        model(**inputs)


def test_edits_of_a_prefix_tuned_model():
    """Its cache counts the prefix, which has no tokens."""
    model, ids = lively(PrefixTuned()).double().eval(), torch.randint(3, 50, (2, 6))
    queries, keys = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    queries[:, 5], keys[:, 4:6] = True, True
    with Cut(queries, keys) as cut, torch.no_grad():
        expected = model(ids)
    assert cut.count == 2
    with torch.no_grad(), va.intervene(model, {"input_ids": ids}, va.Knockout(queries="last", keys=(1, 3), heads=[0, 1])):
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-10)


class Cached(nn.Module):
    """Attends to keys that its caller gives, in front of the tokens'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.past = None

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        y = x if self.past is None else torch.cat([self.past, x], 1)
        return functional.scaled_dot_product_attention(x, y, y)


def test_keys_of_a_cache_are_refused():
    model, inputs = with_attention(Cached), sequences()
    for block in model.blocks:
        block.attend.past = torch.randn(2, 3, 32)
    with pytest.raises(ValueError, match=r"whole sequence in one forward pass; got 3 keys in attention 'blocks.0.attend'"):
        explain(model, inputs, position="cls", target=second)
