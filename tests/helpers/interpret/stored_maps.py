"""The oracle of `explain`: the published rules on stored maps, for any model, and the one measure of an error.

Every softmax of a forward pass is kept, with the module that takes it; all methods are computed from this one graph. Nothing of
the package makes the rows. Attention of transformers is "literal", torch's is written out, too. linked_maps.py has the rules for
towers that attend to one another. Tests compare every method in float64, and one in float32.

Chefer et al. (ICCV 2021), equations 5 and 6, as their notebooks run them; rollout and Grad-CAM as in their ExplanationGenerator.
Padding is cut away before anything is averaged over tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast.interpret import explain
from vlattn_fast.interpret.relevancy.method import FREEZABLE
from vlattn_fast.interpret.relevancy.methods.registry import find_method, with_options

Score = Callable[[Any], Tensor]
METHODS = ("gradient", "weighted", "rollout", "attention", "gradcam")
SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax)
NORMS = {functional.layer_norm: True, functional.rms_norm: False}  # whether the mean is taken away
ROOTS = (torch.rsqrt, torch.sqrt, Tensor.rsqrt, Tensor.sqrt, torch.pow, Tensor.pow, Tensor.__pow__)
# of differences from float64; the layers of lively models multiply what float32 rounds away by hundreds
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Place:
    """Where a tower lies, and what of it is read.

    Args:
        prefix: of the paths of the modules that take its softmaxes.
        row: (B, N) weights of the rows that are read, or a function that makes them from N.
        real: bool (B, N), False = padding.
        sums: of each layer the module fed with x, and the one fed with y = x + o, for "weighted".
        pool: prefix of the pooling head's path.
        branch: in `sums`, that no module is fed with y: the second one gives o.
        others: how many keys in front of the tokens', and behind them, are no tokens.
        left_out: bool (B, N) by map, the pooling head's last: the keys whose columns are zero; empty = none.
    """

    prefix: str
    row: Tensor | Callable[[int], Tensor]
    real: Tensor | None = None
    sums: tuple[tuple[str, str], ...] = ()
    pool: str | None = None
    branch: bool = False
    others: tuple[int, int] = (0, 0)
    left_out: tuple[Tensor, ...] = ()

    def rows(self, size: int) -> Tensor:
        return self.row if isinstance(self.row, Tensor) else self.row(size)


def layer_sums(layers: str, count: int, stream: str, summed: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{layers}.{i}{stream and '.'}{stream}", f"{layers}.{i}.{summed}") for i in range(count))


@dataclass
class Kept(TorchFunctionMode):
    """Every softmax over four dimensions, (B, H, N, M), by the path of the module. `held`: these maps, and the denominators of
    norms, are constants for everything behind them."""

    model: nn.Module
    held: bool = False
    maps: list[tuple[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.paths = [""]
        self.names = {module: name for name, module in self.model.named_modules()}
        self.norms = {name for name, module in self.model.named_modules() if "Norm" in type(module).__name__}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            with self:
                return literal(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return literal_multihead(*args, **kwargs)
        if self.held and func in NORMS:
            return literal_norm(NORMS[func], *args, **kwargs)
        result = func(*args, **kwargs)
        if self.held and func in ROOTS and self.paths[-1] in self.norms:
            squares = func in ROOTS[4:] and args[1] not in (0.5, -0.5)
            return result if squares else result.detach()
        if self.held and func in SOFTMAX and result.ndim == 4:
            result = result.detach().requires_grad_()
        if func in SOFTMAX and result.ndim == 4:
            self.maps.append((self.paths[-1], result))
        elif func is Tensor.__getitem__ and self.maps and args[0] is self.maps[-1][1]:
            self.maps[-1] = self.maps[-1][0], result  # without the column of a sink
        return result

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def leave(*_: Any) -> None:
            self.paths.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(lambda m, a: self.paths.append(self.names.get(m, self.paths[-1]))),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def literal_attention(  # type: ignore[no-untyped-def]
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **kwargs
):
    """Attention as the papers write it, in the inputs' precision (transformers' eager form takes the softmax in float32)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        hidden = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if hidden else scores + attention_mask
    if s_aux is None:
        maps = scores.softmax(-1)
    else:
        maps = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return (maps @ value).transpose(1, 2).contiguous(), maps


transformers.AttentionInterface.register("literal", literal_attention)
transformers.AttentionMaskInterface.register("literal", transformers.masking_utils.eager_mask)


def literal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    one_head = query.ndim == 3
    if one_head:
        query, key, value = query[:, None], key[:, None], value[:, None]
        attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    output = scores.softmax(-1) @ value
    return output[:, 0] if one_head else output


def literal_norm(
    centred: bool, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """A norm of torch whose denominator is a constant."""
    dims = tuple(range(-len(shape), 0))
    x = x - x.mean(dims, keepdim=True) if centred else x
    small = (1e-5 if centred else torch.finfo(x.dtype).eps) if eps is None else eps
    squares = x.square().mean(dims, keepdim=True) + small
    y = x / squares.sqrt().detach()
    return ((y if weight is None else y * weight) + (0.0 if bias is None else bias)).contiguous()


def literal_multihead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """F.multi_head_attention_forward, (N, B, C), whose bool masks say which keys are masked."""
    assert not kwargs.get("use_separate_proj_weight")
    projected = zip((query, key, value), in_proj_weight.chunk(3), in_proj_bias.chunk(3), strict=True)
    states = [x @ w.T + b for x, w, b in projected]
    for number, bias in ((1, bias_k), (2, bias_v)):
        more = [] if bias is None else [bias.expand(1, states[0].shape[1], embed_dim)]
        more += [torch.zeros_like(states[0][:1])] if add_zero_attn else []
        states[number] = torch.cat([states[number], *more])
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in states)
    total = q.new_zeros(q.shape[0], num_heads, q.shape[2], k.shape[2])
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            mask = mask.unflatten(0, (-1, num_heads)) if mask.ndim == 3 else mask
            mask = functional.pad(mask, (0, k.shape[2] - mask.shape[-1]))
            total = total.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else total + mask
    output = literal(q, k, v, total).permute(2, 0, 1, 3).flatten(2)
    return output @ out_proj_weight.T + out_proj_bias, None


def rows_of(
    model: nn.Module, inputs: dict[str, Any], score: Score, places: dict[str, Place], method: str = "gradient"
) -> dict[str, Tensor]:
    """The relevancy row (B, N) of each tower by one method."""
    return rows_by_method(model, inputs, score, places, (method,))[method]


def rows_by_method(
    model: nn.Module,
    inputs: dict[str, Any],
    score: Score,
    places: dict[str, Place],
    methods: Sequence[str],
    start_layer: int = 0,
    held: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """By each method the relevancy row (B, N) of each tower: one forward pass with stored maps, their gradients, and full matrix
    products, a sample at a time."""
    kept, streams, handles = Kept(model, held), {}, []
    for place in places.values():
        for number, path in dict.fromkeys((n, path) for pair in place.sums for n, path in enumerate(pair)):
            if path in streams:
                continue
            into, module = streams.setdefault(path, []), model.get_submodule(path)
            if number and place.branch:
                gives = lambda m, a, o, into=into: into.append(o if isinstance(o, Tensor) else o[0])  # noqa: E731
                handles.append(module.register_forward_hook(gives))
            else:
                fed = lambda m, a, k, into=into: into.append(a[0] if a else k["hidden_states"])  # noqa: E731
                handles.append(module.register_forward_pre_hook(fed, with_kwargs=True))
    switches = hasattr(model, "set_attn_implementation")
    before = model.config._attn_implementation if switches else None
    if switches:
        model.set_attn_implementation("literal")
    try:
        with kept.watching():
            scores = score(model(**inputs))
    finally:
        for handle in handles:
            handle.remove()
        if switches:
            model.set_attn_implementation(before)
    results: dict[str, dict[str, Tensor]] = {method: {} for method in methods}
    for name, place in places.items():
        for method, rows in rows_of_a_place(kept, streams, scores, place, methods, start_layer).items():
            results[method][name] = rows
    return results


def rows_of_a_place(
    kept: Kept, streams: dict[str, list[Tensor]], scores: Tensor, place: Place, methods: Sequence[str], start_layer: int
) -> dict[str, Tensor]:
    maps = [stored for path, stored in kept.maps if path.startswith(place.prefix) and path != place.pool]
    assert maps, [path for path, _ in kept.maps]
    pools = [stored for path, stored in kept.maps if path == place.pool]
    paths = zip(*place.sums, strict=True) if place.sums else ((), ())
    xs, ys = ([t for path in dict.fromkeys(of_layers) for t in streams[path]] for of_layers in paths)
    wanted = [*maps, *ys, *pools]
    grads = torch.autograd.grad(scores.sum(), wanted, retain_graph=True, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    map_grads, y_grads, pool_grads = grads[: len(maps)], grads[len(maps) : len(maps) + len(ys)], grads[len(maps) + len(ys) :]
    if place.branch:
        ys = [x + o for x, o in zip(xs, ys, strict=True)]  # whose gradient is that of the branch
    (before, behind), batch, size = place.others, maps[0].shape[0], maps[0].shape[-2]
    starts = place.rows(1 if pools else size).to(maps[0])
    results = {method: maps[0].new_zeros(batch, size) for method in methods}
    for b in range(batch):
        real = torch.ones(size, dtype=torch.bool) if place.real is None else place.real[b].bool()
        keys = functional.pad(real, (before, behind), value=True)
        whole = [[t[b][:, real][:, :, keys] for t in ts] for ts in (maps, map_grads)]
        sums = [[t[b][real] for t in ts] for ts in (xs, ys, y_grads)]
        row = starts[b][None] if pools else starts[b][None, real]
        pool = (pools[0][b][:, :, real], pool_grads[0][b][:, :, real]) if pools else None
        columns = slice(before, before + int(real.sum()))
        for method in methods:
            (stored, slopes), of_pool = whole, pool
            if place.left_out:
                out = [keys_left_out[b][real] for keys_left_out in place.left_out]
                stored = [without(a, c, method) for a, c in zip(stored, out, strict=False)]
                of_pool = pool and (without(pool[0], out[-1], method), pool[1])
            results[method][b, real] = one_sample(method, start_layer, stored, slopes, *sums, row, of_pool, columns).detach()
    return results


def without(stored: Tensor, left_out: Tensor, method: str) -> Tensor:
    """Maps (..., H, N, M) whose columns `left_out`, bool (..., M), are zero. Of methods without gradients each row keeps the sum
    that its mean over the heads had, unless nothing is left."""
    rest = stored.masked_fill(left_out[..., None, None, :], 0.0)
    if method not in ("rollout", "attention"):
        return rest
    before, behind = (maps.mean(-3, keepdim=True).sum(-1, keepdim=True) for maps in (stored, rest))
    return rest * torch.where(behind > 0, before / behind, 0.0)


def one_sample(method, start_layer, maps, grads, streams, sums, sum_grads, row, pool, columns):  # type: ignore[no-untyped-def]
    """One sample's row: maps (H, N, M), of whose keys the tokens have the `columns`, streams x and sums y (N, C), row (1, N) or
    with a pooling head (1, 1). Other keys count in sums over rows, and in means."""
    last_map, last_grad = (maps[-1], grads[-1]) if pool is None else pool
    if method == "attention":
        return (row @ last_map.mean(0))[0, columns]
    if method == "gradcam":
        weights = last_grad.mean((-2, -1), keepdim=True)
        return (row @ (weights * last_map).mean(0).clamp(min=0))[0, columns]
    eye = torch.eye(maps[0].shape[-2], dtype=maps[0].dtype)
    relevancy = eye
    for layer in range(len(maps) - 1 if start_layer == -1 else start_layer, len(maps)):
        if method == "rollout":
            mean = maps[layer].mean(0)
            relevancy = (mean[:, columns] + eye) / (1 + mean.sum(-1, keepdim=True)) @ relevancy
            continue
        step = (grads[layer] * maps[layer]).clamp(min=0).mean(0)
        if method.startswith("gradient"):
            step = step[:, columns]
            relevancy = step @ relevancy if method == "gradient:no_aggregation" else relevancy + step @ relevancy
            continue
        step = (step if method == "weighted:no_normalization" else normalised(step))[:, columns]
        x, o, g = streams[layer], sums[layer] - streams[layer], sum_grads[layer]
        before, after = (g * x).sum(-1).abs(), (g * o).sum(-1).abs()
        share = torch.where(before + after > 0, before / (before + after), 0.5)
        relevancy = share[:, None] * relevancy + (1 - share)[:, None] * (step @ relevancy)
    if pool is not None:
        read = pool[0].mean(0) if method == "rollout" else (pool[0] * pool[1]).clamp(min=0).mean(0)
        row = row @ (normalised(read) if method == "weighted" else read)
    return (row @ relevancy)[0]


def normalised(step: torch.Tensor) -> torch.Tensor:
    sums = step.sum(-1, keepdim=True)
    return torch.where(sums > 0, step / sums, 0.0)


def assert_rows(
    got: Tensor, want: Tensor, place: Place | None = None, method: str = "gradient", what: object = "", bound: float | None = None
) -> None:
    """Each row (..., N) is that of `want`, which may be in a finer dtype: the largest difference is a share of at most `bound`
    (by default BOUNDS) of the row's largest value beside the identity (which rollout scales, and two methods lack)."""
    assert got.shape == want.shape, f"{what}: shape must be {tuple(want.shape)}; got {tuple(got.shape)}"
    start = place.rows(want.shape[-1]) if place is not None and method == "gradient" else None
    signal = want if start is None or start.shape != want.shape else want - start.to(want)
    assert signal.abs().max() > 1e-4 * want.abs().max() or not want.any(), f"{what}: a map without a signal"
    largest, difference = signal.abs().amax(-1), (got.to(want) - want).abs().amax(-1)
    allowed = (BOUNDS[got.dtype] if bound is None else bound) * largest
    assert (difference <= allowed).all(), f"{what}: rows differ by shares of {(difference / largest).tolist()}"


def with_floats(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs, their floats in `dtype`."""
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def check(
    model: nn.Module,
    inputs: dict[str, Any],
    places: dict[str, Place],
    score: Score,
    methods: Sequence[str] = METHODS,
    start_layer: int = 0,
    stored: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> None:
    """What `explain` gives by each method in float64, and by the first in float32, is what one stored graph gives, and so is what
    the first gives with norms and attention held fixed. The model is left in float32. `stored` makes the model whose maps are
    kept; `options` go to `explain`."""
    started = {"start_layer": start_layer} if start_layer else {}  # which not every method has
    exact = with_floats(inputs, torch.float64)
    kept = stored(model.double())
    want = rows_by_method(kept, exact, score, places, methods, start_layer)
    if find_method(methods[0]).needs_score:
        held = rows_by_method(kept, exact, score, places, methods[:1], start_layer, held=True)[methods[0]]
        got = explain(model, exact, method=with_options(methods[0], freeze=FREEZABLE, **started), **options).relevancy
        for tower, place in places.items():
            assert_rows(got[tower], held[tower], place, methods[0], ("held", methods[0], tower))
        assert any(not torch.allclose(held[tower], want[methods[0]][tower]) for tower in places), "nothing is held fixed"
    for dtype, asked in ((torch.float64, methods), (torch.float32, methods[:1])):
        model = model.double() if dtype == torch.float64 else model.float()  # `to` would cast complex numbers, too
        for method in asked:
            got = explain(model, with_floats(inputs, dtype), method=with_options(method, **started), **options).relevancy
            for tower, place in places.items():
                assert got[tower].dtype == dtype
                assert_rows(got[tower], want[method][tower], place, method, (dtype, method, tower))
