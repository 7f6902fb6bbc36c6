"""In each worker of the engine: the statistics of the requests of a batch that ask for them.

`execute_model` announces a Step where some request of the batch asks. The attention layers find it, and after the engine's own
attention they hand their queries and paged keys to the operator. The numbers leave with the ModelRunnerOutput.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlattn_fast import paged_attention_statistics
from vlattn_vllm.ask import KEY, Ask, groups_of_tokens, inside
from vlattn_vllm.attention import PER_TOKEN, SUMS, Attention
from vlattn_vllm.blocks import contents, keys_in_blocks, tokens_as_blocks
from vlattn_vllm.latent import as_attention
from vlattn_vllm.steering import Edits, edited_attention
from vlattn_vllm.wrapping import fault, harmless, wrap

NUMBERS = "vlattn_numbers"  # an attribute of ModelRunnerOutput: Attention by request, `received` of this step alone
_ASKING = "_vlattn_asking"  # an attribute of the model runner: Asking by request
_NOW = threading.local()  # the Step of the batch that runs in this thread
# vLLM's attention backends whose layers hand over their keys, by the kind of device: modules of vllm.v1.attention.backends
LAYERS = {
    "cpu": {"cpu_attn": "CPUAttentionBackendImpl"},
    "cuda": {"flash_attn": "FlashAttentionImpl", "triton_attn": "TritonAttentionImpl"},
}
_NOT_CAUSAL = ("dynamic_causal", "mm_prefix_query_range_tensor", "mm_prefix_range_tensor", "rswa_prefix_lens")


@dataclass
class Asking:
    """A request that asks. `counted`: how many of its queries are in `received`; the others of a preempted one run twice."""

    ask: Ask
    prompt: int
    groups: Tensor  # (tokens at the most,)
    edits: Edits | None = None
    counted: int = 0
    seconds: float = 0.0  # since its last numbers left
    refused: str = ""  # why it has had no numbers and no edits since then

    @property
    def edited(self) -> frozenset[int]:
        """The layers whose attention it edits."""
        return frozenset() if self.edits is None else self.edits.layers


class Place(NamedTuple):
    """Where a request is in a batch. `length`: of its keys."""

    name: str
    number: int
    first: int
    queries: int
    length: int


class Batch(NamedTuple):
    """The names of the requests of a batch in their order, and how many keys each had before it."""

    req_ids: Sequence[str]
    num_computed_tokens_cpu: Sequence[int]


class Layer(NamedTuple):
    """What a layer hands over. `out` (tokens, heads, D): the engine's attention, in which edited rows are replaced."""

    impl: Any
    module: Any
    query: Tensor
    kv_cache: Tensor
    metadata: Any
    out: Tensor

    @property
    def name(self) -> str:
        return str(self.module.layer_name)

    @property
    def number(self) -> int:
        return layer_number(self.name)

    @property
    def isa(self) -> str | None:
        return getattr(self.module, "isa", None)

    @property
    def window(self) -> int | None:
        return window(self.impl)

    @property
    def logits(self) -> dict[str, Any]:
        return {"scale": self.impl.scale, "softcap": self.impl.logits_soft_cap or None}


class Rows(NamedTuple):
    """The requests of one call of the operator, and their queries, packed one behind another."""

    names: list[str]
    counts: list[bool]  # whether a request's queries count in `received`
    batch_numbers: Tensor  # numbers of the requests in the batch
    tokens: Tensor  # numbers of the queries among the batch's
    starts: Tensor
    lengths: Tensor
    groups: Tensor | None
    num_groups: int
    statistics: list[str]
    images: list[int]  # of these requests, those that ask for image_entropy


class Step:
    """The statistics of one batch: `see` for each layer, then `numbers`. What goes wrong refuses the requests that it concerns.

    Args:
        batch: has the fields of `Batch`, which are in their order when the first layer runs. Model runner V2 makes its batch
            after the step has begun.
        scheduled: how many queries each request has.
        heads: of this worker, as the model's configuration has them.
    """

    def __init__(self, asking: dict[str, Asking], batch: Any, scheduled: Mapping[str, int], heads: int) -> None:
        self.asking, self.batch, self.scheduled, self.heads = asking, batch, scheduled, heads
        self._starts, self._lengths = [0], list[int]()  # of all requests
        self._checked: list[Any] = []  # metadata whose rows are these requests
        self._layers: dict[int, str] = {}  # that ran
        self._rows: dict[tuple[str, ...], Rows | None] = {}
        self._seen: dict[str, dict[int, dict[str, Tensor]]] = {}

    @cached_property
    def _running(self) -> list[str]:
        return [name for name in self.batch.req_ids if name in self.asking]

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Of those that ask, when the first layer runs."""
        places = {}
        for number, (name, before) in enumerate(zip(self.batch.req_ids, self.batch.num_computed_tokens_cpu, strict=False)):
            first, queries = self._starts[-1], self.scheduled[name]
            self._starts.append(first + queries)
            self._lengths.append(int(before) + queries)
            if name in self.asking:
                places[name] = Place(name, number, first, queries, self._lengths[-1])
        return places

    def see(self, impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any, out: Tensor) -> None:
        """The fields of `Layer`. impl: None for latent attention."""
        begin = time.perf_counter()
        if metadata is not None and (impl is None or impl.attn_type == "decoder"):
            self._tried(self._running, self._see, impl, layer, query, kv_cache, metadata, out)
        self._spent(begin)

    def _tried(self, names: Iterable[str], compute: Callable[..., Any], *args: Any) -> Any:
        try:
            return compute(*args)
        except Exception as error:
            self._refuse(names, fault(error))

    def _refuse(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.asking[name].refused = self.asking[name].refused or reason

    def _spent(self, begin: float) -> None:
        """On a GPU this is the time in which the host hands over the work."""
        running = self._running
        for name in running:
            self.asking[name].seconds += (time.perf_counter() - begin) / len(running)

    def _see(self, impl: Any, module: Any, query: Tensor, kv_cache: Tensor, metadata: Any, out: Tensor) -> None:
        number = layer_number(module.layer_name)
        asks = {
            name: number in one.edited
            for name in self._places
            if not (one := self.asking[name]).refused and (number in one.ask.layers or number in one.edited)
        }
        if not asks:  # as of most layers
            return
        self._layers.setdefault(number, module.layer_name)
        if impl is None:
            impl, query, metadata = as_attention(module, query, metadata, self._lengths)
        layer = Layer(impl, module, query, kv_cache, metadata, out)
        if refused := self._refusal(layer):
            self._refuse(asks, refused)
            return
        for name in (name for name, edited in asks.items() if edited):
            self._tried([name], self._steer, layer, self._places[name])
        names = tuple(name for name, edited in asks.items() if not edited)
        self._tried(names, self._read, layer, names)

    def _refusal(self, layer: Layer) -> str:
        """Why the attention of a layer is not what is computed here; empty where it is."""
        if refused := refusal(layer.impl, layer.module, layer.metadata):
            return refused
        if (before := self._layers[layer.number]) != layer.name:
            return f"layer {layer.number} attends twice, in {before} and {layer.name}; name other layers"
        if (heads := layer.query.shape[1]) != self.heads:
            return f"{layer.name} has {heads} heads, and the model {self.heads}; name other layers"
        metadata, size = layer.metadata, len(self._lengths)
        if not any(metadata is checked for checked in self._checked):
            starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
            starts = starts[: size + 1] + [start for start in starts[size + 1 :] if start != starts[size]]  # filled up on GPUs
            if (starts, lengths[:size]) != (self._starts, self._lengths):
                return f"the rows of {layer.name} are not the requests of the batch; name other layers"
            self._checked.append(metadata)
        return ""

    def _read(self, layer: Layer, names: tuple[str, ...]) -> None:
        """The numbers of requests without edits in this layer."""
        if names not in self._rows:
            self._rows[names] = self._packed(names, layer.query.device)
        rows = self._rows[names]
        if rows is None:
            return
        keys, table = keys_in_blocks(layer.kv_cache, layer.isa, layer.metadata.block_table[rows.batch_numbers])
        queries, last = layer.query[rows.tokens], rows.starts[1:] - 1
        results = None
        if rows.statistics:
            results = paged_attention_statistics(
                queries,
                keys,
                table,
                rows.lengths,
                rows.starts,
                key_groups=rows.groups,
                num_groups=rows.num_groups,
                statistics=rows.statistics,
                window=layer.window,
                **layer.logits,
            )
        per_token = {name: getattr(results, name)[last] for name in PER_TOKEN if name in rows.statistics}
        of_images = self._of_images(layer, rows, queries[last[rows.images]], keys, table) if rows.images else {}
        for number, name in enumerate(rows.names):
            one = self.asking[name]
            kept = {key: value[number] for key, value in per_token.items() if key in one.ask.statistics}
            if "mass" in kept:
                kept["mass"] = kept["mass"][:, : len(one.ask.groups)]
            if number in of_images:
                kept["image_entropy"] = of_images[number]
            if results is not None and rows.counts[number]:
                kept |= sums(one, results.received[number], self._places[name].length)
            self._seen.setdefault(name, {})[layer.number] = kept

    def _of_images(self, layer: Layer, rows: Rows, last: Tensor, keys: Tensor, table: Tensor) -> dict[int, Tensor]:
        """The entropy of the newest queries over the image tokens that they see."""
        images = [self._image_tokens(rows.names[number], layer.window) for number in rows.images]
        positions = pad_sequence(images, batch_first=True).to(last.device)
        lengths = torch.tensor([len(some) for some in images], device=last.device)
        starts = torch.arange(len(images) + 1, device=last.device)
        where = tokens_as_blocks(keys, table[rows.images], positions)
        results = paged_attention_statistics(last, *where, lengths, starts, statistics=["entropy"], **layer.logits)
        return dict(zip(rows.images, results.entropy, strict=True))

    def _image_tokens(self, name: str, seen: int | None, low: int = 0) -> Tensor:
        """Positions from `low` on that the newest query of a request sees."""
        length = self._places[name].length
        positions = torch.arange(max(low, length - seen if seen else 0), length)
        return positions[inside(self.asking[name].ask.images, positions)]

    def _new(self, place: Place) -> tuple[int, bool]:
        """How many queries of a request ran before a preemption, and whether the others count in its sums."""
        one = self.asking[place.name]
        old = max(0, one.counted - (place.length - place.queries))
        return old, not {*SUMS}.isdisjoint(one.ask.statistics) and old < place.queries

    def _steer(self, layer: Layer, place: Place) -> None:
        """The rows of one request, with edits; and its numbers, which the operator cannot know."""
        name, row, first, queries, length = place
        one, size, number, seen = self.asking[name], layer.kv_cache.shape[2], layer.number, layer.window
        assert one.edits is not None
        start = length - queries
        low = 0 if seen is None else max(0, start - seen + 1) // size  # blocks before it may be another request's by now
        blocks, low = layer.metadata.block_table[row, low : -(-length // size)], low * size
        keys, values = (each[: length - low] for each in contents(layer.kv_cache, layer.isa, blocks))
        old, all_new = self._new(place)
        edits = one.edits.bias(number), one.edits.queries[start:length], one.edits.keys[low:length]
        rows, last, received = edited_attention(
            layer.query[first : first + queries],
            keys,
            values,
            *(part.to(layer.query.device) for part in edits),
            start=start,
            first_key=low,
            window=seen,
            counted_from=old,
            **layer.logits,
        )
        layer.out[first : first + queries] = rows.view_as(layer.out[first : first + queries])
        if number not in one.ask.layers or not (all_new or length >= one.prompt):
            return
        groups = one.groups[low:length].to(last.device)
        groups = torch.nn.functional.pad(groups, (0, last.shape[1] - len(groups)), value=-1)
        values_of = {
            "mass": lambda: torch.stack([last[:, groups == group].sum(-1) for group in range(len(one.ask.groups))], -1),
            "entropy": lambda: torch.special.entr(last).sum(-1),
            "image_entropy": lambda: entropy_of_parts(last[:, self._image_tokens(name, seen, low) - low]),
            "maximum": lambda: last.amax(-1),
            "diagonal": lambda: last[:, length - 1 - low],
        }
        kept = {key: value() for key, value in values_of.items() if key in one.ask.statistics}
        if all_new:
            kept |= sums(one, torch.nn.functional.pad(received, (low, 0)), length)
        self._seen.setdefault(name, {})[number] = kept

    def _packed(self, names: tuple[str, ...], device: torch.device) -> Rows | None:
        """A request that asks for `received` has all its new queries here. Any other one has its last query, and none in the
        middle of its prompt, where no token is chosen."""
        places: list[Place] = []
        counts: list[bool] = []
        tokens: list[int] = []
        starts = [0]
        for place in (self._places[name] for name in names):
            old, all_new = self._new(place)
            if all_new or place.length >= self.asking[place.name].prompt:
                places.append(place)
                counts.append(all_new)
                tokens += range(place.first + (old if all_new else place.queries - 1), place.first + place.queries)
                starts.append(len(tokens))
        if not places:
            return None
        asks = [self.asking[place.name].ask for place in places]
        statistics = [name for name in PER_TOKEN if name != "image_entropy" and any(name in ask.statistics for ask in asks)]
        statistics += ["received"] if any(counts) else []
        groups = None
        if "mass" in statistics:
            of_tokens = [self.asking[place.name].groups[: place.length] for place in places]
            groups = pad_sequence(of_tokens, batch_first=True, padding_value=-1).to(device)
        values = [place.number for place in places], tokens, starts, [place.length for place in places]
        batch, queries, ends, lengths = (torch.tensor(some, device=device) for some in values)
        images = [number for number, ask in enumerate(asks) if ask.images]
        most = max(len(ask.groups) for ask in asks)
        return Rows([place.name for place in places], counts, batch, queries, ends, lengths, groups, most, statistics, images)

    def numbers(self, gathered: Callable[[Tensor], Tensor]) -> dict[str, Attention]:
        """Attention by request. `gathered` takes (heads of this rank, columns) and returns those of all heads."""
        begin, running = time.perf_counter(), self._running
        for name in running:
            one = self.asking[name]
            if missing := sorted({*one.ask.layers, *one.edited}.difference(self._layers)):
                self._refuse([name], f"layers {missing} have no attention that can be seen; name other layers")
        stacks = self._stacks(running)
        # what one rank alone refuses, all leave out: they gather the same
        refused = gathered(torch.tensor([[bool(self.asking[name].refused) for name in running]], dtype=torch.float32)).amax(0)
        self._refuse((name for name, flag in zip(running, refused.tolist(), strict=True) if flag), "another rank refused it")
        stacks = {(name, key): stack for (name, key), stack in stacks.items() if not self.asking[name].refused}
        if stacks:
            columns = gathered(torch.cat([stack.flatten(1) for stack in stacks.values()], 1)).cpu()
            parts = columns.split([stack[0].numel() for stack in stacks.values()], 1)
            stacks = {key: part.view(-1, *stacks[key].shape[1:]).transpose(0, 1) for key, part in zip(stacks, parts, strict=True)}
        self._spent(begin)
        numbers = {}
        for name in running:
            one = self.asking[name]
            attention = None if one.refused else self._tried([name], self._attention, name, stacks)
            if one.refused:
                attention = nothing(one)
            if attention is not None:
                numbers[name], one.seconds = replace(attention, seconds=one.seconds), 0.0
        return numbers

    def _stacks(self, running: list[str]) -> dict[tuple[str, str], Tensor]:
        """(heads, layers, ...) by request and statistic."""
        stacks: dict[tuple[str, str], Tensor] = {}
        for name in running:
            if not self.asking[name].refused and name in self._seen:
                stacks |= self._tried([name], self._stacks_of, name) or {}
        return stacks

    def _stacks_of(self, name: str) -> dict[tuple[str, str], Tensor]:
        by_layer = [self._seen[name][layer] for layer in self.asking[name].ask.layers]
        return {(name, key): torch.stack([each[key] for each in by_layer], 1) for key in (by_layer or [{}])[0]}

    def _attention(self, name: str, stacks: dict[tuple[str, str], Tensor]) -> Attention | None:
        """None in the middle of a prompt, where no token is chosen and no query counts."""
        one, place = self.asking[name], self._places[name]
        if not one.ask.layers:  # it edits, and asks for no numbers
            return Attention((), ()) if place.length >= one.prompt else None
        values: dict[str, Any] = {key: stack for (of, key), stack in stacks.items() if of == name}
        adds, queries = self._new(place)[1], None
        if not values and not adds:
            return None
        if adds:
            queries, one.counted = (max(place.length - place.queries, one.counted), place.length), place.length
        values = {key: value if key in SUMS else value[None].contiguous() for key, value in values.items()}
        return Attention(one.ask.layers, tuple(group for group, _ in one.ask.groups), queries=queries, **values)


def entropy_of_parts(weights: Tensor) -> Tensor:
    return torch.special.entr(weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)).sum(-1)


def sums(one: Asking, received: Tensor, length: int) -> dict[str, Tensor]:
    """Of what each token gets (heads, tokens), what a request asks for: of its prompt, and of its answer if it has one."""
    of_prompt = received[:, : min(one.prompt, length)]
    of_prompt = torch.nn.functional.pad(of_prompt, (0, one.prompt - of_prompt.shape[1]))
    parts = {"received": of_prompt, "received_answer": received[:, one.prompt : length]}
    return {name: part for name, part in parts.items() if name in one.ask.statistics and part.shape[1]}


def nothing(one: Asking) -> Attention:
    """For a request that is refused."""
    return Attention(one.ask.layers, tuple(group for group, _ in one.ask.groups), refused=one.refused)


def refusal(impl: Any, layer: Any, metadata: Any) -> str:
    """Why the attention of a layer is not what the operator computes; empty where it is."""
    reasons = {
        "attention statistics are not computed where a layer is as this one: {latent}; name other layers": has(impl, "refused"),
        "the attention backend must be one of {backends}; got {kind}": (
            not hasattr(metadata, "block_table") or not hasattr(impl, "logits_soft_cap")
        ),
        "attention statistics of ALiBi are not computed; choose a model without it": has(impl, "alibi_slopes"),
        "attention statistics of attention sinks are not computed; choose a model without them": has(impl, "sinks"),
        "attention statistics of {layer}, which attends within chunks, are not computed; name other layers": (
            has(layer, "attention_chunk_size")
        ),
        "attention statistics are those of causal attention; this model's attention is not causal": (
            getattr(metadata, "causal", None) is not True or has(metadata, *_NOT_CAUSAL)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            backends = ", ".join(name.upper() for on_device in LAYERS.values() for name in on_device)
            names = {"latent": getattr(impl, "refused", None), "layer": getattr(layer, "layer_name", None), "backends": backends}
            return reason.format(**names, kind=type(impl).__name__)
    return ""


def has(owner: Any, *names: str) -> bool:
    return any([getattr(owner, name, None) is not None for name in names])


def window(impl: Any) -> int | None:
    """How many keys a query sees at most, itself among them. Backends of GPUs keep those before it and behind it, -1 for all."""
    kept = impl.sliding_window
    size = kept[0] + 1 if isinstance(kept, tuple) else kept
    return size if size > 0 else None


@cache
def layer_number(name: str) -> int:
    """The number in a layer's name, such as model.layers.3.self_attn.attn."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def install(device: str, v2: bool) -> None:
    """Wraps the model runner and the attention layers of this process, whose device is of this kind. v2: the model runner is that
    of version 2."""
    if v2:
        from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        wrap(CudaGraphManager, "dispatch", harmless(_dispatch_v2))
        wrap(GPUModelRunner, "prepare_inputs", harmless(_prepare_inputs))
    else:
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        wrap(CudagraphDispatcher, "dispatch", harmless(_dispatch))
    wrap(GPUModelRunner, "execute_model", harmless(_execute_model, _refuse_all))
    wrap(GPUModelRunner, "sample_tokens", harmless(_sample_tokens, _refuse_all))
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    wrap(MLAAttention, "forward_impl", _forward_latent)
    for module, kind in LAYERS[device].items():
        wrap(getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), kind), "forward", _forward)


def _forward(
    original: Any, impl: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, *args: Any, **rest: Any
) -> Any:
    out = original(impl, layer, query, key, value, kv_cache, metadata, *args, **rest)
    step: Step | None = getattr(_NOW, "step", None)
    if step is not None:
        step.see(impl, layer, query, kv_cache, metadata, out)
    return out


def _forward_latent(
    original: Any, layer: Any, query: Any, latent: Any, key: Any, cache: Any, metadata: Any, output: Any, *args: Any, **rest: Any
) -> Any:
    returned = original(layer, query, latent, key, cache, metadata, output, *args, **rest)
    step: Step | None = getattr(_NOW, "step", None)
    if step is not None:
        step.see(None, layer, query, cache, metadata, output)
    return returned


def _dispatch(original: Any, dispatcher: Any, *args: Any, **kwargs: Any) -> Any:
    """No layer can be seen in a full CUDA graph. So a batch that asks runs in graphs that leave attention out, or in none."""
    if getattr(_NOW, "step", None) is not None:
        from vllm.config import CUDAGraphMode

        kwargs["invalid_modes"] = {CUDAGraphMode.FULL, *(kwargs.get("invalid_modes") or ())}
    return original(dispatcher, *args, **kwargs)


def _dispatch_v2(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for model runner V2, whose manager chooses among its candidates."""
    from vllm.config import CUDAGraphMode

    chosen = original(manager, *args, **kwargs)
    if getattr(_NOW, "step", None) is None or chosen.cg_mode != CUDAGraphMode.FULL:
        return chosen
    candidates = manager._candidates
    manager._candidates = {
        size: [each for each in graphs if each.cg_mode != CUDAGraphMode.FULL] for size, graphs in candidates.items()
    }
    try:
        return original(manager, *args, **kwargs)
    finally:
        manager._candidates = candidates


def _prepare_inputs(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Model runner V2 makes the batch here."""
    batch = original(runner, *args, **kwargs)
    step: Step | None = getattr(_NOW, "step", None)
    if step is not None:
        step.batch = Batch(batch.req_ids, batch.num_computed_tokens_np)
    return batch


def _execute_model(original: Any, runner: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    asking: dict[str, Asking] = runner.__dict__.setdefault(_ASKING, {})
    for name in scheduled.finished_req_ids if asking else ():
        asking.pop(name, None)
    for new in scheduled.scheduled_new_reqs:
        extra = None if new.sampling_params is None else new.sampling_params.extra_args
        if extra and KEY in extra and new.req_id not in asking:
            asking[new.req_id] = _begun(new, extra[KEY], runner)
    if asking.keys().isdisjoint(scheduled.num_scheduled_tokens):
        return original(runner, scheduled, *args, **kwargs)
    batch = getattr(runner, "input_batch", Batch((), ()))
    step = Step(asking, batch, scheduled.num_scheduled_tokens, _heads(runner))
    _NOW.step = step
    try:
        out = original(runner, scheduled, *args, **kwargs)
    finally:
        _NOW.step = None
    runner.__dict__[NUMBERS] = step.numbers(_gathered)
    return out


def _begun(new: Any, written: Mapping[str, Any], runner: Any) -> Asking:
    try:
        ask = Ask.read(written)
        most = min(new.prompt_len + (new.sampling_params.max_tokens or 0), runner.max_model_len)
        edits = Edits(ask.steer, most, _heads_here(runner)) if ask.steer else None
        return Asking(ask, new.prompt_len, groups_of_tokens(ask, most), edits)
    except Exception as error:
        return Asking(Ask((), (), ()), new.prompt_len, torch.empty(0), refused=fault(error))


def _refuse_all(reason: str, result: Any, runner: Any, *args: Any) -> None:
    asking: dict[str, Asking] = runner.__dict__.get(_ASKING, {})
    for one in asking.values():
        one.refused = one.refused or reason
    runner.__dict__[NUMBERS] = {name: nothing(one) for name, one in asking.items()}


def _heads(runner: Any) -> int:
    heads: int = runner.model_config.get_num_attention_heads(runner.parallel_config)
    return heads


def _heads_here(runner: Any) -> range:
    from vllm.distributed.parallel_state import get_tp_group

    heads = _heads(runner)
    first = get_tp_group().rank_in_group * heads
    return range(first, first + heads)


def _gathered(columns: Tensor) -> Tensor:
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return group.all_gather(columns.to(group.device), 0)


def _sample_tokens(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    out = original(runner, *args, **kwargs)
    numbers = runner.__dict__.pop(NUMBERS, None)
    if numbers:
        within = getattr(out, "_model_runner_output", None) or getattr(out, "model_runner_output", out)  # of V1 and of V2
        setattr(within, NUMBERS, numbers)
    return out
