"""Models whose tokens move, drop out or come back between their layers, beside stored maps that are composed token by token."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.interpret.stored_maps import BOUNDS, Kept
from vlattn_fast.interpret import explain, explain_layers
from vlattn_fast.interpret.relevancy.methods.registry import with_options
from vlattn_fast.nn import capture_relevancy

HEADS, WIDTH, SIZE = 2, 16, 12
METHODS = ("gradient", "gradient:no_aggregation", "rollout", "weighted", "attention", "gradcam")


class Layer(nn.Module):
    """Attention in which each token of `x` attends to those of `keys`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.out = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def attend(self, x: Tensor, keys: Tensor) -> Tensor:
        parts = self.q(x), self.k(keys), self.v(keys)
        y = functional.scaled_dot_product_attention(*(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts))
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        self.stream = x
        self.branch = self.attend(self.norm(x), self.norm(x if keys is None else keys))
        self.sum = x + self.branch
        return self.sum + self.mlp(self.sum)


class Moving(nn.Module):
    """Layers with moves in front of and behind each; a move takes and gives any tensor (B, N, ...)."""

    def __init__(self, before, after, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            x = self.after(number, layer(self.before(number, x)))
        return self.head(x[:, 1])


def leave(number: int, x: Tensor) -> Tensor:
    return x


def on(numbers, move):
    return lambda number, x: move(x) if number in numbers else x


def flip(x: Tensor) -> Tensor:
    return x.flip(1)


def permuted(order: Tensor, x: Tensor) -> Tensor:
    return x[:, order]


def grid_rolled(shift: int, x: Tensor) -> Tensor:
    return x.unflatten(1, (3, 4)).roll((shift, shift), (1, 2)).flatten(1, 2)


def windows(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 6, *x.shape[2:]).flatten(0, 1)


def whole(x: Tensor) -> Tensor:
    return x.reshape(len(x) // 2, 12, *x.shape[2:])


def gathered(x: Tensor) -> Tensor:
    index = torch.tensor([[3, 1, 0, 7, 9, 2], [8, 6, 11, 5, 4, 0]])
    return x.gather(1, index.view(2, 6, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


ORDER = torch.tensor([4, 7, 1, 0, 9, 3, 11, 2, 5, 6, 10, 8])
MOVES = {
    "none": (leave, leave),
    "a flip that stays": (on([1], flip), leave),
    "a flip in every layer": (leave, lambda number, x: flip(x)),
    "a flip and back": (on([1, 3], flip), on([1, 3], flip)),
    "a flip of the first layer and back": (on([0, 2], flip), on([0, 2], flip)),
    "a roll": (on([2], lambda x: x.roll(5, 1)), leave),
    "a roll of a grid and back": (on([1, 3], lambda x: grid_rolled(1, x)), on([1, 3], lambda x: grid_rolled(-1, x))),
    "an order": (on([1], lambda x: permuted(ORDER, x)), leave),
    "an order and back": (on([1], lambda x: permuted(ORDER, x)), on([2], lambda x: permuted(ORDER.argsort(), x))),
    "an index_select": (on([2], lambda x: x.index_select(1, ORDER)), leave),
    "other samples": (on([1], lambda x: x.flip(0)), leave),
    "other samples and back": (on([1], lambda x: x[[1, 0]]), on([2], lambda x: x[[1, 0]])),
    "a transposition": (on([2], lambda x: x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)), leave),
    "windows": (on([1, 3], windows), on([1, 3], whole)),
    "windows in the first layer": (on([0, 2], windows), on([0, 2], whole)),
    "shifted windows": (
        lambda number, x: windows(x.roll(3, 1) if number % 2 else x),
        lambda number, x: whole(x).roll(-3, 1) if number % 2 else whole(x),
    ),
    "pruning": (on([2], lambda x: x[:, :8]), leave),
    "pruning twice": (on([1, 3], lambda x: x[:, ::2] if x.shape[1] == SIZE else x[:, :3]), leave),
    "pruning by a gather": (on([2], gathered), leave),
    "narrow and cat": (on([1], lambda x: torch.cat([x.narrow(1, 5, 7), x.narrow(1, 0, 5)], 1)), leave),
    "split and cat": (on([1], lambda x: torch.cat(x.split([5, 7], 1)[::-1], 1)), leave),
    "masked to zero": (on([2], lambda x: x.masked_fill(x.new_zeros(2, SIZE, *[1] * (x.ndim - 2)).bool(), 0.0)), leave),
}


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(2, SIZE, WIDTH, generator=torch.Generator().manual_seed(3))}


def made(kind, *args, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = kind(*args, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def target(outputs: Tensor) -> Tensor:
    return outputs[:, 2]


def steps_of(model: nn.Module, x: Tensor) -> tuple[list, list, list]:
    """Maps (B', H, N, M) of the layers with their gradients, and the terms of the sums with theirs."""
    kept = Kept(model)
    terms = []
    handles = [layer.register_forward_hook(lambda m, a, o: terms.append((m.stream, m.branch, m.sum))) for layer in model.layers]
    with kept.watching():
        score = target(model(x)).sum()
    for handle in handles:
        handle.remove()
    maps = [a for _, a in kept.maps]
    grads = torch.autograd.grad(score, [*maps, *(y for *_, y in terms)], allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*maps, *(y for *_, y in terms)], strict=True)]
    return maps, grads[: len(maps)], [(x, o, g) for (x, o, _), g in zip(terms, grads[len(maps) :], strict=True)]


def relevancies(method: str, a: Tensor, g: Tensor, term, r: Tensor) -> Tensor:
    """R (B', N, T) behind a layer whose tokens are all queries and keys."""
    if method == "rollout":
        return (r + a.mean(1) @ r) / 2
    step = (a * g).clamp(min=0).mean(1)
    if method == "gradient:no_aggregation":
        return step @ r
    if method != "weighted":
        return r + step @ r
    sums = step.sum(-1, keepdim=True)
    step = torch.where(sums > 0, step / sums, 0.0)
    x, o, slope = term
    before, behind = (slope * x).sum(-1, keepdim=True).abs(), (slope * o).sum(-1, keepdim=True).abs()
    share = torch.where(before + behind > 0, before / (before + behind), 0.5)
    return share * r + (1 - share) * (step @ r)


def expected(model: Moving, method: str, read: int = 1, start_layer: int = 0) -> Tensor:
    """Rows (B, N): R is moved as the tokens are."""
    x = inputs()["x"].double()
    maps, grads, terms = steps_of(model, x)
    identity = torch.eye(2 * SIZE, dtype=torch.float64).view(2, SIZE, 2 * SIZE)
    r = identity
    for number, (a, g, term) in enumerate(zip(maps, grads, terms, strict=True)):
        r = model.before(number, r)
        if method == "attention" and number == len(maps) - 1:
            r = a.mean(1) @ r
        elif method == "gradcam" and number == len(maps) - 1:
            r = (g.mean((-2, -1), keepdim=True) * a).mean(1).clamp(min=0) @ r
        elif method not in ("attention", "gradcam") and number >= start_layer:
            r = relevancies(method, a, g, term, r)
        r = model.after(number, r)
    return r[:, read].sum(0).view(2, SIZE)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert want.abs().max() > 0
    assert (got - want).abs().max() <= BOUNDS[torch.float64] * want.abs().max(), (got, want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("moves", MOVES)
def test_tokens_that_move(moves, method):
    model = made(Moving, *MOVES[moves]).double()
    exact = {"x": inputs()["x"].double()}
    got = explain(model, exact, position=1, target=target, method=method)
    assert list(got.relevancy) == ["tower0"]
    assert_close(got.relevancy["tower0"], expected(model, method))


@pytest.mark.parametrize("method", ["gradient", "weighted", "rollout"])
@pytest.mark.parametrize(
    "moves", ["a flip that stays", "shifted windows", "other samples", "pruning twice", "pruning by a gather"]
)
def test_a_captured_row_is_that_of_explain(moves, method):
    model = made(Moving, *MOVES[moves]).double()
    with capture_relevancy(model, method=with_options(method, start_layer=1)) as captured:
        score = target(model(inputs()["x"].double())).sum()
    row = captured.relevancy(None if method == "rollout" else score, position=1)
    assert row.requires_grad
    if moves != "shifted windows":  # whose first layer is no other
        assert_close(row, expected(model, method, start_layer=1))
    got = explain(model, {"x": inputs()["x"].double()}, position=1, target=target, method=with_options(method, start_layer=1))
    assert_close(row.detach(), got.relevancy["tower0"])


@pytest.mark.parametrize("moves", ["a flip that stays", "windows in the first layer", "pruning"])
def test_each_layer_and_head_by_itself(moves):
    model = made(Moving, *MOVES[moves]).double()
    got = explain_layers(model, {"x": inputs()["x"].double()}, position=1, target=target, per="head").relevancy["tower0"]
    maps, grads, _ = steps_of(model, inputs()["x"].double())
    for layer in range(4):
        r = torch.eye(2 * SIZE, dtype=torch.float64).view(2, 1, SIZE, 2 * SIZE)
        for number in range(4):
            r = model.before(number, r.transpose(1, 2)).transpose(1, 2)
            r = (maps[number] * grads[number]).clamp(min=0) @ r if number == layer else r
            r = model.after(number, r.transpose(1, 2)).transpose(1, 2)
        for head in range(HEADS):
            assert_close(got[layer, head], r[:, head, 1].sum(0).view(2, SIZE).detach())


class Planned(nn.Module):
    """Layers that take their tokens as a plan says: plan(attend, x), with attend(layer, queries, keys) and the first state."""

    def __init__(self, plan, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.plan(lambda layer, q, k=None, first=False: self.layers[layer](q, x if first else k), x)[:, 1])


def with_first_state(attend, x):
    for layer in range(3):
        x = attend(layer, x, first=True)
    return x


def with_first_state_and_a_flip(attend, x):
    return attend(2, attend(1, attend(0, x).flip(1)).flip(1), first=True)


def mixture_of_depths(attend, x):
    x, chosen = attend(0, x), torch.tensor([1, 4, 6, 9, 3])
    x = x.index_copy(1, chosen, attend(1, x.index_select(1, chosen)))
    return attend(2, x)


def mixture_by_scatter(attend, x):
    x, chosen = attend(0, x), torch.tensor([[1, 4, 6, 9, 3], [0, 1, 2, 10, 11]])
    index = chosen[..., None].expand(-1, -1, x.shape[-1])
    x = x.scatter(1, index, attend(1, x.gather(1, index)))
    return attend(2, x)


def mixture_in_place(attend, x):
    x = attend(0, x)
    chosen = torch.tensor([7, 1, 2])
    y = x.clone()
    y[:, chosen] = attend(1, x[:, chosen])
    return attend(2, y)


def dilated_halves(attend, x):
    x = attend(0, x)
    y = x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1)
    y = attend(1, y)
    x = y.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return attend(2, x)


def joint(attend, x):
    """Some tokens attend to the others of their sequence."""
    x = attend(0, x)
    x = torch.cat([attend(1, x[:, :5], x[:, 5:]), x[:, 5:]], 1)
    return attend(2, x)


def one_query(attend, x):
    """The last layer computes the row that is read alone."""
    x = attend(1, attend(0, x))
    return torch.cat([x[:, :1], attend(2, x[:, 1:2], x)], 1)


def neighbours(attend, x):
    """Windows that see the windows beside them."""
    x = attend(0, x)
    parts = x.unflatten(1, (3, 4))
    keys = torch.cat([parts.roll(1, 1), parts, parts.roll(-1, 1)], 2)
    return attend(2, attend(1, parts.flatten(0, 1), keys.flatten(0, 1)).unflatten(0, (-1, 3)).flatten(1, 2))


PLANS = (with_first_state, with_first_state_and_a_flip, mixture_of_depths, mixture_by_scatter, mixture_in_place, dilated_halves,
         joint, one_query, neighbours)  # fmt: skip


def composed(model: Planned, method: str) -> Tensor:
    maps, grads, terms = steps_of(model, inputs()["x"].double())
    each = iter(zip(maps, grads, terms, strict=True))

    def attend(layer: int, r: Tensor, keys: Tensor | None = None, first: bool = False) -> Tensor:
        a, g, term = next(each)
        r, keys = r.detach(), r if keys is None else keys
        if method == "rollout":
            return (r + a.mean(1) @ keys) / 2
        step = (a * g).clamp(min=0).mean(1)
        if method == "gradient":
            return r + step @ keys
        step = step / step.sum(-1, keepdim=True).clamp(min=1e-300)
        x, o, slope = term
        before, behind = (slope * x).sum(-1, keepdim=True).abs(), (slope * o).sum(-1, keepdim=True).abs()
        share = torch.where(before + behind > 0, before / (before + behind), 0.5)
        return share * r + (1 - share) * (step @ keys)

    r = model.plan(attend, torch.eye(2 * SIZE, dtype=torch.float64).view(2, SIZE, 2 * SIZE))
    return r[:, 1].sum(0).view(2, SIZE).detach()


def padded_windows(attend, x):
    """Windows of five and of seven, the last one with padding, after attention over all: padding is none of the model's tokens.
    Padded features are the same tokens."""
    x = attend(0, x)
    for layer, size in ((1, 5), (2, 7)):
        x = functional.pad(x, (0, 4, 0, -SIZE % size))[..., :-4]
        x = attend(layer, x.unflatten(1, (-1, size)).flatten(0, 1)).unflatten(0, (2, -1)).flatten(1, 2)[:, :SIZE]
    return x


def test_windows_may_have_padding():
    """The tokens of features that enter from outside are numbered from 0 on."""
    model = made(Planned, padded_windows).double()
    for method in ("gradient", "rollout"):
        got = explain(model, {"x": inputs()["x"].double()}, position=1, target=target, method=method)
        assert_close(got.relevancy["tower0"], composed(model, method))


@pytest.mark.parametrize("method", ["gradient", "weighted", "rollout"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.__name__)
def test_tokens_that_do_not_all_attend(plan, method):
    model = made(Planned, plan).double()
    got = explain(model, {"x": inputs()["x"].double()}, position=1, target=target, method=method)
    want = composed(model, method)
    assert_close(got.relevancy["tower0"], want)
    assert list(got.relevancy) == ["tower0"]
    with capture_relevancy(model, method=method) as captured:
        score = target(model(inputs()["x"].double())).sum()
    assert_close(captured.relevancy(None if method == "rollout" else score, position=1).detach(), want)


def merged(attend, x):
    """As ToMe: pairs of tokens become one."""
    x = attend(0, x)
    source, index = x[:, 1::2], torch.arange(6)[None, :, None].expand(2, -1, x.shape[-1])
    return attend(1, x[:, ::2].scatter_reduce(1, index, source, reduce="mean"))


def averaged(attend, x):
    x = attend(0, x)
    return attend(1, (x[:, ::2] + x[:, 1::2]) / 2)


def folded(attend, x):
    x = attend(0, x)
    return attend(1, x + x.flip(1))


def by_a_matrix(attend, x):
    return attend(1, torch.eye(SIZE, dtype=x.dtype).roll(3, 0) @ attend(0, x))


def features_of_several(attend, x):
    """A position has each of its features from another token."""
    x = attend(0, x)
    index = (torch.arange(SIZE)[:, None] + torch.arange(x.shape[-1])) % SIZE
    return attend(1, x.gather(1, index.expand_as(x)))


def repeated(attend, x):
    return attend(1, attend(0, x).repeat_interleave(2, 1))


def some_first(attend, x):
    return attend(1, torch.cat([attend(0, x[:, :5]), x[:, 5:]], 1))


def halves_first(attend, x):
    return attend(1, torch.stack([attend(0, x[:, ::2]), attend(0, x[:, 1::2])], 2).flatten(1, 2))


def joint_first(attend, x):
    return attend(1, torch.cat([attend(0, x[:, :5], x[:, 5:]), x[:, 5:]], 1))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (some_first, "got 'layers.0' over 5 tokens, and 'layers.1' over 12, which include some of these"),
        (halves_first, "got 'layers.0' over 6 tokens, and 'layers.1' over 12, which include some of these"),
        (joint_first, "got 'layers.0' over 5 tokens, and 'layers.1' over 12, which include some of these"),
        (merged, "merge tokens; got attention 'layers.1' over tokens that scatter_reduce in '' merges"),
        (averaged, "over tokens that add in '' merges"),
        (folded, "over tokens that add in '' merges"),
        (by_a_matrix, "over tokens that matmul in '' merges"),
        (features_of_several, "over tokens that gather in '' merges"),
        (repeated, "got a token at several positions in attention 'layers.1'"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_tokens_that_cannot_be_followed_are_refused(plan, words):
    model = made(Planned, plan, 2)
    with pytest.raises(ValueError, match=words):
        explain(model, inputs(), position=1, target=target)
    with capture_relevancy(model) as captured:
        score = target(model(inputs()["x"])).sum()
    with pytest.raises(ValueError, match=words):
        captured.relevancy(score, position=1)


def with_new_tokens(attend, x):
    """Learnt tokens come in front of the last layers, and leave behind them."""
    x = attend(0, x)
    new = torch.ones(1, 2, 1, dtype=x.dtype).expand(len(x), -1, x.shape[-1])
    return attend(2, attend(1, torch.cat([x, new], 1)))[:, :SIZE]


def test_tokens_that_are_added_between_layers():
    model = made(Planned, with_new_tokens).double()
    got = explain(model, {"x": inputs()["x"].double()}, position=1, target=target)
    maps, grads, _ = steps_of(model, inputs()["x"].double())
    r = torch.eye(2 * SIZE, dtype=torch.float64).view(2, SIZE, 2 * SIZE)
    for number, (a, g) in enumerate(zip(maps, grads, strict=True)):
        r = torch.cat([r, torch.zeros(2, 2, 2 * SIZE, dtype=torch.float64)], 1) if number == 1 else r
        r = r + (a * g).clamp(min=0).mean(1) @ r
    assert_close(got.relevancy["tower0"], r[:, 1].sum(0).view(2, SIZE).detach())


def and_new_ones(attend, x):
    """Learnt tokens come in front of the last layer, and stay."""
    x = attend(1, attend(0, x))
    return attend(2, torch.cat([x, torch.ones(1, 2, 1, dtype=x.dtype).expand(len(x), -1, x.shape[-1])], 1))


@pytest.mark.parametrize("read", ["mean", "last"])
def test_a_position_by_name_is_of_the_real_tokens_that_entered(read):
    model, real = made(Planned, and_new_ones).double(), torch.ones(2, SIZE)
    real[1, 8:] = 0
    given = {"x": inputs()["x"].double(), "attention_mask": real}
    model.register_forward_pre_hook(lambda _, __, named: ((), {"x": named["x"]}), with_kwargs=True)
    weights = real.double() / real.sum(1, keepdim=True)
    if read == "last":
        weights = functional.one_hot(torch.tensor([SIZE - 1, 7]), SIZE).double()
    weights = functional.pad(weights, (0, 2))
    got, want = (explain(model, given, position=each, target=target).relevancy["tower0"] for each in (read, weights))
    assert_close(got, want)
