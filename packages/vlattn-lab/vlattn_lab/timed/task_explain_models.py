"""Explain whole models of transformers by `va.explain`, as a user calls it: models, hooks and preparation included.

Bound: the model's forward and backward pass down to its embeddings, with SDPA. Published (Chefer et al.): every map stored, one
gradient a layer, the whole product; for LXMERT one backward pass with the gradients of all weights, as in the authors' code. A
further variant takes the same maps with one backward pass and no gradient of a weight. An answer has 24 tokens, each explained
by itself; its bound is one forward pass and a backward pass a token, and one of 256 tokens is beside a call for each token, too.
By rollout, which differentiates no score, its bound is a forward pass. The attribution of all edges of attention between three
groups of tokens has one forward pass an edge as its bound, by which the true effects are measured.

Models have published shapes at a size that the machine runs, and random weights. On a CPU each variant has a separate process.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import vlattn_fast as va
from vlattn_fast.benchmarks._bounds import pairs, without
from vlattn_fast.benchmarks._formula import EDGES, EXPLAIN
from vlattn_fast.benchmarks._measure import Benchmark, Problem, Tensors, Variant
from vlattn_fast.benchmarks._workloads import Sizes
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.explaining.answer import prepare_answer
from vlattn_fast.interpret.relevancy.methods import registry
from vlattn_lab.timed.isolated import measure
from vlattn_lab.timed.whole_models import CLIP, LLAVA, LXMERT, QWEN, Whole, lively
from vlattn_lab.timed.workloads import (
    CLIP_MODEL,
    LLAVA_ANSWER,
    LLAVA_EDGES,
    LLAVA_LONG_ANSWER,
    LLAVA_MODEL,
    LXMERT_MODEL,
    QWEN_ANSWER,
    QWEN_MODEL,
)

PLAIN, ONE_BACKWARD, PUBLISHED = "plain forward+backward", "maps stored, one backward", "published"
BACKWARDS = "one forward, a backward a token"
FORWARDS = "one forward pass an edge"
FORWARD, ONE_BY_ONE = "one forward pass", "va.explain for each token alone"
GROUPS = ("image", "question", "last")
Read = dict[str, tuple[int, int]]  # by tower: its tokens, and the token that is read


class _Maps(TorchFunctionMode):
    """Keeps every softmax over maps (B, H, N, M) that has a gradient, in float32, or in float64 for scores in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.softmax and kwargs.get("dtype") is not None:
            kwargs["dtype"] = torch.promote_types(args[0].dtype, torch.float32)  # float64 stays
        result = func(*args, **kwargs)
        if func is functional.softmax and result.ndim == 4 and result.requires_grad:
            self.maps.append(result)
        return result


@contextlib.contextmanager
def _starting(model: nn.Module, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """The outputs of the modules at `paths`, at which the graph begins."""
    kept: list[Tensor] = []

    def begin(module: nn.Module, args: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            kept.append(part.requires_grad_())

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(model.get_submodule(path).register_forward_hook(begin))
        yield kept


@contextlib.contextmanager
def _eager(model: Any, whole: Whole) -> Iterator[None]:
    if whole.eager is None:
        yield
        return
    model.set_attn_implementation(whole.eager)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa" if isinstance(whole.eager, str) else dict.fromkeys(whole.eager, "sdpa"))


def _model(whole: Whole, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with device:  # one thread of a CPU takes minutes to draw billions of weights
        model = whole.make(sizes)
    return lively(model, device, dtype)


def _in(model: nn.Module, wide: bool) -> nn.Module:
    """A copy of the model in float64, or the model as it is."""
    return copy.deepcopy(model).double() if wide else model


def _run(model: nn.Module, whole: Whole, t: Tensors) -> Tensor:
    return whole.score(model(**t, **whole.options))


def _with_maps(model: nn.Module, whole: Whole, run: Callable[[nn.Module], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result of `run` on the model in eager attention, and the maps of this run."""
    with _eager(model, whole), _starting(model, whole.embeddings), _Maps() as kept:
        return run(model), kept.maps


def _stored(model: nn.Module, whole: Whole, read: Read, one_backward: bool, t: Tensors) -> Tensors:
    score, maps = _with_maps(model, whole, lambda model: _run(model, whole, t).sum())
    if one_backward:
        return _relevancy(maps, torch.autograd.grad(score, maps, allow_unused=True), read)
    return _relevancy(maps, (torch.autograd.grad(score, one, retain_graph=True)[0] for one in maps), read)


def _with_weights(model: nn.Module, whole: Whole, read: Read, t: Tensors) -> Tensors:
    """The LXMERT authors' procedure, whose backward pass also takes the gradients of weights."""
    model.requires_grad_(True)
    try:
        with _Maps() as kept:
            score = _run(model, whole, t).sum()
        for one in kept.maps:
            one.retain_grad()
        score.backward(retain_graph=True)
        return _relevancy(kept.maps, (one.grad for one in kept.maps), read)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)


def _relevancy(maps: Sequence[Tensor], grads: Iterable[Tensor | None], read: Read) -> Tensors:
    """The relevancies that are read, by the equations for one or two modalities of Chefer et al. (ICCV 2021)."""
    names = {tokens: name for name, (tokens, _) in read.items()}
    linked = any(one.shape[2] != one.shape[3] for one in maps)
    related: dict[tuple[str, str], Tensor] = {}
    for name, (tokens, _) in read.items():
        for partner, (partner_tokens, _) in read.items() if linked else [(name, read[name])]:
            related[name, partner] = maps[0].new_zeros(len(maps[0]), tokens, partner_tokens)
        related[name, name].diagonal(dim1=1, dim2=2).fill_(1)
    waiting: list[tuple[tuple[str, str], Tensor]] = []
    crossings = 0
    for one, grad in zip(maps, grads, strict=True):
        s, q = names[one.shape[2]], names[one.shape[3]]
        crossings += s != q
        if grad is not None:
            abar = (grad * one.detach()).clamp(min=0).mean(dim=1)
            if s == q:
                related |= {(s, name): related[s, name] + abar @ related[s, name] for of, name in list(related) if of == s}
            else:  # equations 10 and 11
                waiting.append(((s, q), _normalized(related[s, s]).mT @ abar @ _normalized(related[q, q])))
                waiting.append(((s, s), abar @ related[q, s]))
        if crossings == 2:  # both directions of a layer read the relevancies before the layer
            for pair, addition in waiting:
                related[pair] = related[pair] + addition
            waiting, crossings = [], 0
    first = next(iter(read))
    maps_read = {}
    for name, (_, token) in read.items():
        one = related[first, name][:, read[first][1]] if linked else related[name, name][:, token]
        maps_read[f"relevancy {name}"] = without(one, token)
    return maps_read


def _normalized(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9."""
    eye = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)
    beside = relevancy - eye
    total = beside.sum(-1, keepdim=True)
    return beside / torch.where(total == 0, 1.0, total) + eye


def _part(name: str, x: Tensor) -> Tensor:
    return x[:1] if name != "pixel_values" or x.ndim == 4 else x  # Qwen's patches are packed, for a batch of one


def _problem(
    whole: Whole,
    variants: dict[str, Variant],
    bound: str,
    formula: Callable[[bool, Tensors], Tensors],
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
) -> Problem:
    """formula(wide, inputs): by the model in float64, or as it is."""
    if importlib.util.find_spec("transformers") is None:
        return Problem({}, {}, bound, lambda t: {}, _part, 0, (), {"whole model": "transformers is not installed"})
    inputs = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in whole.inputs(sizes).items()}
    return Problem(inputs, variants, bound, partial(formula, True), _part, pairs(sizes), (), plain=partial(formula, False))


def build(whole: Whole, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    make = functools.cache(lambda: _model(whole, sizes, device, dtype))  # made by the first variant that runs
    read, layers = whole.read(sizes), sizes["layers"]

    def formula(wide: bool, t: Tensors) -> Tensors:
        return _stored(_in(make(), wide), whole, read, True, t)

    def published(t: Tensors) -> Tensors:
        return _with_weights(make(), whole, read, t) if whole.eager is None else _stored(make(), whole, read, False, t)

    def ours(t: Tensors) -> Tensors:
        relevancy = va.explain(make(), t, method=registry.published("gradient"), **whole.explained).relevancy
        return {f"relevancy {name}": without(relevancy[name], token) for name, (_, token) in read.items()}

    def plain(t: Tensors) -> Tensors:
        with _starting(make(), whole.embeddings) as kept:
            torch.autograd.grad(_run(make(), whole, t).sum(), kept)
        return {}

    variants = {
        EXPLAIN: Variant(ours),
        ONE_BACKWARD: Variant(partial(formula, False), 4 * layers),
        PUBLISHED: Variant(published, 4 * layers),
        PLAIN: Variant(plain),
    }
    return _problem(whole, variants, PLAIN, formula, sizes, device, dtype)


# --- every token of an answer ---


def build_answer(whole: Whole, method: str, one_by_one: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """method: "gradient" or "rollout"."""
    make = functools.cache(lambda: _model(whole, sizes, device, dtype))
    answer = list(range(10, 10 + sizes["T"]))

    def forward(model: nn.Module, t: Tensors) -> Tensor:
        """The log-probabilities (B, T) of the answer's tokens."""
        family = find_adapter(model)
        assert family is not None  # the models of this benchmark are decoders with a record
        said = prepare_answer(answer, None, t, family, model)
        kept = said.answer_positions.unique().to(device)
        return said.scores(model(**said.arguments, use_cache=False, logits_to_keep=kept).logits, kept)

    def plain(t: Tensors) -> Tensors:
        model = make()
        with _starting(model, whole.embeddings) as kept:
            scores = forward(model, t)
        for token in range(scores.shape[1]):
            torch.autograd.grad(scores[:, token].sum(), kept, retain_graph=token + 1 < scores.shape[1])
        return {}

    def read_forward(t: Tensors) -> Tensors:
        with torch.no_grad():
            forward(make(), t)
        return {}

    def ours(t: Tensors) -> Tensors:
        relevancy = va.explain(make(), t, answer=answer, method=registry.published(method)).relevancy["language"]
        return {name: without(relevancy[:, token], place) for name, (token, place) in places.items()}

    def alone(t: Tensors) -> Tensors:
        """A prompt for each token, of those in front of it."""
        relevancy: Tensors = {}
        names = {token: name for name, (token, _) in places.items()}
        for token in range(len(answer)):
            before = torch.tensor([answer[:token]], dtype=torch.long, device=device).expand(len(t["input_ids"]), -1)
            longer = {**t, "input_ids": torch.cat([t["input_ids"], before], 1)}
            longer["attention_mask"] = torch.ones_like(longer["input_ids"])
            said = answer[token : token + 1]
            row = va.explain(make(), longer, answer=said, method=registry.published(method)).relevancy["language"][:, 0]
            if token in names:
                row = torch.nn.functional.pad(row, (0, sizes["N"] + sizes["T"] - row.shape[1]))
                relevancy[names[token]] = without(row, places[names[token]][1])
        return relevancy

    last = sizes["N"] + sizes["T"] - 2  # the place that predicts the last token
    places = {"relevancy, first token": (0, sizes["N"] - 1), "relevancy, last token": (sizes["T"] - 1, last)}

    def formula(wide: bool, t: Tensors) -> Tensors:
        scores, maps = _with_maps(_in(make(), wide), whole, lambda model: forward(model, t))
        relevancy: Tensors = {}
        for name, (token, place) in places.items():
            if method == "rollout":
                relevancy[name] = without(_rolled(maps, place), place)
                continue
            grads = torch.autograd.grad(scores[:, token].sum(), maps, retain_graph=True)
            (relevancy[name],) = _relevancy(maps, grads, {name: (sizes["N"] + sizes["T"], place)}).values()
        return relevancy

    bound, run = (BACKWARDS, plain) if method == "gradient" else (FORWARD, read_forward)
    variants = {EXPLAIN: Variant(ours), **({ONE_BY_ONE: Variant(alone)} if one_by_one else {}), bound: Variant(run)}
    return _problem(whole, variants, bound, formula, sizes, device, dtype)


def _rolled(maps: Sequence[Tensor], place: int) -> Tensor:
    """The row (B, N) of rollout's product at `place`."""
    row = torch.zeros_like(maps[0][:, 0, :1]).index_fill(2, torch.tensor(place, device=maps[0].device), 1.0)
    for one in reversed(maps):
        row = (row + row @ one.detach().mean(1)) / 2
    return row[:, 0]


# --- all edges between groups of tokens ---


def build_edges(whole: Whole, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    make = functools.cache(lambda: _model(whole, sizes, device, dtype))

    def ours(t: Tensors) -> Tensors:
        return {"effects": va.attribute_edges(make(), t, GROUPS, **whole.explained).effects.T}

    def formula(wide: bool, t: Tensors) -> Tensors:
        """A (dA - sum_j A dA), summed over the pairs of each two groups."""
        score, maps = _with_maps(_in(make(), wide), whole, lambda model: _run(model, whole, t).sum())
        image = t["input_ids"][0] == sizes["vocabulary"] - 1
        last = torch.arange(sizes["N"], device=device) == sizes["N"] - 1
        members = torch.stack([image, ~image & ~last, last]).to(maps[0].dtype)
        effects = []
        for prob, grad in zip(maps, torch.autograd.grad(score, maps), strict=True):
            logits = prob.detach() * (grad - (prob.detach() * grad).sum(-1, keepdim=True))
            effects.append((members @ logits.mT @ members.mT).flatten(1))  # by head, keys and queries
        return {"effects": torch.cat(effects, 1)}

    def each(t: Tensors) -> Tensors:
        edges = itertools.product(range(sizes["layers"]), range(sizes["H"]), GROUPS, GROUPS)
        va.intervene_each(make(), t, edges, groups=GROUPS, batch_size=1, **whole.explained)
        return {}

    variants = {
        EDGES: Variant(ours),
        ONE_BACKWARD: Variant(partial(formula, False), 4 * sizes["layers"]),
        FORWARDS: Variant(each),
    }
    return _problem(whole, variants, FORWARDS, formula, sizes, device, dtype)


BENCHMARKS = [
    *(
        Benchmark(__name__, "relevancy", workload, partial(build, whole), isolated=measure)
        for workload, whole in ((CLIP_MODEL, CLIP), (LLAVA_MODEL, LLAVA), (LXMERT_MODEL, LXMERT), (QWEN_MODEL, QWEN))
    ),
    *(
        Benchmark(
            __name__, "each token of an answer", workload, partial(build_answer, whole, "gradient", one_by_one), isolated=measure
        )
        for workload, whole, one_by_one in (
            (LLAVA_ANSWER, LLAVA, False),
            (LLAVA_LONG_ANSWER, LLAVA, True),
            (QWEN_ANSWER, QWEN, False),
        )
    ),
    Benchmark(
        __name__,
        "each token of an answer, rollout",
        LLAVA_LONG_ANSWER,
        partial(build_answer, LLAVA, "rollout", True),
        isolated=measure,
    ),
    Benchmark(__name__, "all edges", LLAVA_EDGES, partial(build_edges, LLAVA), isolated=measure),
]
