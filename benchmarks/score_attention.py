"""score_attention with the score functions that SDPA lacks.

The published procedure is the plain formula in eager mode, which is the reference. FlexAttention expresses the activated score
and the plain one; cosine, additive and Hadamard scores are no function of a dot product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import vlattn_fast as va
from vlattn_fast import scores
from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._bounds import SDPA_BACKWARD, SDPA_FORWARD, pairs, passes, sdpa, standard
from vlattn_fast.benchmarks._formula import ends, whole
from vlattn_fast.benchmarks._measure import (
    QKV,
    Benchmark,
    Pass,
    Problem,
    Tensors,
    Variant,
    finished,
    in_bfloat16,
    operator_problem,
    randoms,
)
from vlattn_fast.benchmarks._workloads import (
    CLIP,
    DECODER,
    DECODER_LONG,
    DECODER_PLAIN,
    HIGHRES,
    LLAVA,
    PACKED,
    TOKENS_2048,
    TOKENS_16384,
    UNITER,
    Sizes,
)
from vlattn_fast.checking.blocks import NUMBERS

FLEX, FLEX_FLASH = "FlexAttention", "FlexAttention FLASH"  # the latter with kernels of FlashAttention-4, if that is installed
ACTIVATIONS = {"general tanh": torch.tanh, "general sigmoid": torch.sigmoid}


def _score(kind: str, t: Tensors) -> scores.Score:
    match kind:
        case "cosine":
            return scores.Cosine()
        case "additive":
            return scores.Additive(t["vector"], t["query_weight"], t["key_weight"])
        case "hadamard relu" | "hadamard tanh":
            return scores.Hadamard(t["vector"], activation=kind.split()[1])
    return scores.General(t["key_weight"], t["vector"], activation=kind.split()[1])


def _floor(kind: str, size: int) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Floors of forward and backward. An activation costs one more exponential per pair, a tanh one per feature; in the additive
    forward pass two tanh share a reciprocal, and the scores need no matrix product."""
    match kind:
        case "additive":
            return (1, 4, 1 + size / 2), (2, 8, 1 + size)
        case "hadamard tanh":
            return (1, 4, 1 + size), (2, 8, 1 + size)
        case "hadamard relu":
            return (3, 4, 1), (8, 8, 1)  # twice the features
        case "cosine":
            return SDPA_FORWARD, SDPA_BACKWARD
    return (2, 4, 2), (5, 8, 2)


def build(kind: str, both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    randn, causal, d = randoms(device, dtype), bool(sizes.get("causal")), sizes["D"]
    tensors = standard(sizes, randn)
    tensors |= {"vector": randn(d, std=d**-0.5), **{name: randn(d, d, std=d**-0.5) for name in ("query_weight", "key_weight")}}
    used = {
        "cosine": (),
        "additive": ("vector", "query_weight", "key_weight"),
        "hadamard relu": ("vector",),
        "hadamard tanh": ("vector",),
    }.get(kind, ("key_weight", "vector"))

    def arguments(t: Tensors) -> dict[str, Any]:
        return {**{name: t[name] for name in QKV}, "score": _score(kind, t), "is_causal": causal}

    # gradients of shared parameters are sums over the batch, and only a part of the batch is compared
    finish, plain = finished(both, (*QKV, *used), ("grad_output",), used), finished(both, QKV, ("grad_output",))
    maps = 4 if both else 2
    maps *= d if kind in ("additive", "hadamard relu", "hadamard tanh") else 1  # the formula holds features for every pair
    bound, floor = plain(partial(sdpa, is_causal=causal)), passes(sizes, dtype, *_floor(kind, d)[: 1 + both])
    baselines = dict[str, Variant]()
    if kind in ACTIVATIONS:
        baselines = _flex(ACTIVATIONS[kind], 1.0, causal, tensors["query"].shape[2], device, finish)
    return operator_problem(
        "score_attention", arguments, tensors, finish, maps, bound, _part, pairs(sizes), floor, baselines=baselines
    )


def build_token(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """Scaled dot products of one token with a cache, in which several query heads share a head."""
    b, kv, m, d = (sizes[name] for name in ("B", "Hkv", "M", "D"))
    h = kv * sizes["shared"]
    randn = randoms(device, dtype)
    tensors = {"query": randn(b, h, 1, d), "key": randn(b, kv, m, d), "value": randn(b, kv, m, d)}
    arguments = _measure.taking(*QKV, enable_gqa=True)
    bound = _measure.forward(lambda t: F.scaled_dot_product_attention(**arguments(t)))
    floor = (Pass(4 * b * h * m * d, 2 * b * kv * m * d * dtype.itemsize, b * h * m),)
    return operator_problem("score_attention", arguments, tensors, _measure.forward, 2, bound, whole, b * h * m, floor)


def build_dot(padding: bool, both: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """Scaled dot products, with `padding` where a quarter of the keys is padding."""
    tensors, causal = standard(sizes, randoms(device, dtype)), bool(sizes.get("causal"))
    b, _, n, d = tensors["query"].shape
    finish = finished(both, QKV, ("grad_output",))
    visible, baselines = 1.0, dict[str, Variant]()
    arguments, bound = _measure.taking(*QKV, is_causal=causal), finish(partial(sdpa, is_causal=causal))
    if padding:
        tensors["key_mask"] = (torch.arange(n, device=device) < n - n // 4).expand(b, n).contiguous()
        arguments, visible = _measure.taking(*QKV, "key_mask"), 1 - (n // 4) / n
    else:
        baselines = _flex(None, d**-0.5, causal, n, device, finish)
    floor = passes(sizes, dtype, (2 * visible, 4, visible), (5 * visible, 8, visible))[: 1 + both]
    maps = 4 if both else 2
    return operator_problem(
        "score_attention", arguments, tensors, finish, maps, bound, _part, pairs(sizes), floor, baselines=baselines
    )


def build_packed(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """Documents of equal lengths in one row. The bound has them as a batch; baselines and the formula have a mask."""
    tensors, n = standard(sizes, randoms(device, dtype)), sizes["N"]
    count = math.gcd(n, sizes["documents"])
    document = torch.arange(n, device=device) // (n // count)
    tensors["attn_mask"] = document[:, None] == document
    finish = finished(True, QKV, ("grad_output",))
    packed = _measure.taking(*QKV, is_causal=True, cu_seqlens=torch.arange(count + 1) * (n // count))

    def batch(t: Tensors) -> Tensor:
        documents = {name: t[name][0].unflatten(1, (count, -1)).transpose(0, 1) for name in QKV}
        return sdpa(documents, is_causal=True).transpose(0, 1).flatten(1, 2)[None]

    def ours(name: str) -> Variant:
        return Variant(finish(lambda t: va.score_attention(**packed(t), backend=name)))

    variants = {name: ours(name) for name in _measure.backends("score_attention", _measure.taking(*QKV, is_causal=True)(tensors))}
    masked = _measure.taking(*QKV, "attn_mask", is_causal=True)
    variants["SDPA, mask"] = Variant(
        finish(lambda t: F.scaled_dot_product_attention(t["query"], t["key"], t["value"], t["causal"]))
    )
    if device.type == "cuda":  # whose backward pass no CPU has
        blocks = create_block_mask(lambda b, h, i, j: (i >= j) & (document[i] == document[j]), None, None, n, n, device="cuda")
        flex = _measure.compile_later(lambda t: flex_attention(t["query"], t["key"], t["value"], block_mask=blocks))
        variants[FLEX] = Variant(finish(flex), compiled=True)
    tensors["causal"] = tensors["attn_mask"].tril()
    floor = passes(sizes, dtype, (2 / count, 4, 1 / count), (5 / count, 8, 1 / count))
    options: dict[str, Any] = {"baselines": variants, "names": ()}
    problem = operator_problem(
        "score_attention", masked, tensors, finish, 4, finish(batch), _part, pairs(sizes), floor, **options
    )
    return problem._replace(truth=problem.variants["reference"].run, in_blocks=False)


def build_second(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """Scaled dot products forward, backward, and the backward pass of that: as a penalty of gradients has them."""
    randn = randoms(device, dtype)
    tensors, seeds = standard(sizes, randn), [f"gradient by {name}" for name in QKV]
    tensors |= {seed: randn(*tensors[name].shape) for seed, name in zip(seeds, QKV, strict=True)}
    inputs = (*QKV, "grad_output")

    def finish(call: Callable[[Tensors], Any]) -> _measure.Run:
        def run(t: Tensors) -> Tensors:
            leaves = {name: t[name].detach().requires_grad_() for name in inputs}
            differentiated = [leaves[name] for name in QKV]
            grads = torch.autograd.grad(call({**t, **leaves}), differentiated, leaves["grad_output"], create_graph=True)
            seconds = torch.autograd.grad(grads, list(leaves.values()), [t[seed] for seed in seeds])
            return {f"second derivative by {name}": x for name, x in zip(inputs, seconds, strict=True)}

        return run

    arguments, bound = _measure.taking(*QKV), _measure.backward(QKV, ("grad_output",))(sdpa)
    names = [name for name in _measure.backends("score_attention", arguments(tensors)) if name != "sdpa"]  # it has none
    floor = passes(sizes, dtype, SDPA_FORWARD, SDPA_BACKWARD, (12, 12, 1))
    return operator_problem("score_attention", arguments, tensors, finish, 12, bound, _part, pairs(sizes), floor, names=names)


def build_derivative(mode: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """Derivatives of scaled dot products by torch.func, with tangents of query, key and value: "jvp" of the output; "hvp", the
    Hessian's product for a loss that is square in the output; "reverse over forward", the gradient of a loss on the jvp."""
    randn, causal = randoms(device, dtype), bool(sizes.get("causal"))
    tensors, tangents = standard(sizes, randn), [f"tangent of {name}" for name in QKV]
    tensors |= {tangent: randn(*tensors[name].shape) for tangent, name in zip(tangents, QKV, strict=True)}

    def finish(call: Callable[[Tensors], Any]) -> _measure.Run:
        def run(t: Tensors) -> Tensors:
            x, u = (tuple([t[name] for name in names]) for names in (QKV, tangents))

            def output(*qkv: Tensor) -> Tensor:
                out: Tensor = call({**t, **dict(zip(QKV, qkv, strict=True))})
                return out

            def loss(*qkv: Tensor) -> Tensor:
                return (output(*qkv).square() * t["grad_output"]).sum()

            def loss_on_jvp(*qkv: Tensor) -> Tensor:
                out, tangent, *_ = torch.func.jvp(output, qkv, u)
                return (out * tangent * t["grad_output"]).sum()

            if mode == "jvp":
                return dict(zip(("output", "tangent of output"), torch.func.jvp(output, x, u), strict=True))
            if mode == "hvp":
                made = torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), x, u)[1]
            else:
                made = torch.func.grad(loss_on_jvp, (0, 1, 2))(*x)
            return {f"{mode} by {name}": each for name, each in zip(QKV, made, strict=True)}

        return run

    arguments, both = _measure.taking(*QKV, is_causal=causal), mode != "jvp"
    bound = finished(both, QKV, ("grad_output",))(partial(sdpa, is_causal=causal))
    names = [name for name in _measure.backends("score_attention", arguments(tensors)) if name != "sdpa"]  # it has none
    floor = passes(sizes, dtype, SDPA_FORWARD, (5, 7, 1), *([SDPA_BACKWARD, (10, 10, 1)] if both else []))
    problem = operator_problem(
        "score_attention", arguments, tensors, finish, 20 if both else 6, bound, _part, pairs(sizes), floor, names=names
    )
    # torch.func does not go into compiled code, so all of it is compiled
    formula = finish(lambda t: va.reference.score_attention(**arguments(t)))
    compiled = problem.variants["reference compiled"]._replace(run=_measure.compile_later(formula))
    truth = formula if causal else partial(_by_blocks, formula)
    return problem._replace(variants={**problem.variants, "reference compiled": compiled}, truth=truth)


def _by_blocks(run: _measure.Run, t: Tensors) -> Tensors:
    """Runs a derivative for blocks of queries, whose maps fit into memory: those by keys and values are sums over the blocks."""
    (_, heads, queries, _), keys = t["query"].shape, t["key"].shape[2]
    size = max(1, NUMBERS // (8 * heads * keys))
    by_query = ("query", "tangent of query", "grad_output")
    pieces = [run({**t, **{name: t[name][:, :, i : i + size] for name in by_query}}) for i in range(0, queries, size)]
    joined = {name: [piece[name] for piece in pieces] for name in pieces[0]}
    return {name: torch.stack(x).sum(0) if name.endswith(("key", "value")) else torch.cat(x, 2) for name, x in joined.items()}


def _part(name: str, x: Tensor) -> Tensor:
    return ends(x, 2) if x.dim() == 4 else ends(x) if name == "key_mask" else x


def _flex(
    activation: Callable[[Tensor], Tensor] | None,
    scale: float,
    causal: bool,
    n: int,
    device: torch.device,
    finish: _measure.Finish,
) -> dict[str, Variant]:
    """FlexAttention; with an activation as score_mod, over projected keys. On a GPU it is autotuned, when it is compiled."""
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=device.type) if causal else None

    def call(t: Tensors, **options: Any) -> Tensor:
        if activation is None:
            plain: Tensor = flex_attention(t["query"], t["key"], t["value"], scale=scale, block_mask=block_mask, **options)
            return plain
        key = t["key"] @ t["key_weight"].mT + t["vector"]
        modified: dict[str, Any] = {"score_mod": lambda score, b, h, i, j: activation(score), "block_mask": block_mask, **options}
        return flex_attention(t["query"], key, t["value"], scale=scale, **modified)

    on_gpu = device.type == "cuda"
    mode = "max-autotune-no-cudagraphs" if on_gpu else None
    variants = {FLEX: Variant(finish(_measure.compile_later(call, mode)), compiled=True)}
    if on_gpu and find_spec("flash_attn") and find_spec("flash_attn.cute"):
        flash = partial(call, kernel_options={"BACKEND": "FLASH"})
        variants[FLEX_FLASH] = Variant(finish(_measure.compile_later(flash)), compiled=True)
    return variants


BENCHMARKS = [
    Benchmark(
        __name__,
        f"{kind}, {'forward+backward' if both else 'forward'}",
        workload,
        partial(build, kind, both),
        compile_when_quick=kind == "general tanh" and both and workload is CLIP,
    )
    for workload, kinds in (
        (CLIP, ("cosine", "general tanh", "additive", "hadamard relu", "hadamard tanh")),
        (UNITER, ("general tanh", "additive")),
        (LLAVA, ("general sigmoid",)),
    )
    for kind in kinds
    for both in (False, True)
    if both or workload is CLIP
] + [
    Benchmark(__name__, "scaled dot, padding, forward", CLIP, partial(build_dot, True, False)),
    Benchmark(__name__, "scaled dot, padding, forward+backward", CLIP, partial(build_dot, True, True)),
    *(Benchmark(__name__, "scaled dot, one token", one, build_token) for one in (DECODER, DECODER_PLAIN, DECODER_LONG)),
    Benchmark(__name__, "scaled dot, packed, forward+backward", PACKED, build_packed),
    Benchmark(__name__, "scaled dot, second derivatives", CLIP, build_second),
    *(
        Benchmark(__name__, f"scaled dot, {mode}", workload, partial(build_derivative, mode))
        for mode in ("jvp", "hvp", "reverse over forward")
        for workload in (CLIP, LLAVA, TOKENS_2048, TOKENS_16384)
    ),
]
BENCHMARKS += in_bfloat16(*(one for one in BENCHMARKS if one.what.startswith(("general tanh", "scaled dot"))))
BENCHMARKS += [
    *(Benchmark(__name__, "scaled dot, forward", one, partial(build_dot, False, False)) for one in (CLIP, LLAVA, HIGHRES)),
    *(Benchmark(__name__, "scaled dot, forward+backward", one, partial(build_dot, False, True)) for one in (CLIP, LLAVA)),
    Benchmark(__name__, "scaled dot, padding, forward+backward", UNITER, partial(build_dot, True, True)),
]
