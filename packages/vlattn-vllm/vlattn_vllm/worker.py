"""In each worker of the engine: the statistics of the requests of a batch that ask for them.

`execute_model` announces a Step where some request of the batch asks. The attention layers find it, and after the engine's own
attention they hand their queries and paged keys to the operator. The numbers leave with the ModelRunnerOutput.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast import paged_attention_statistics
from vlattn_vllm.ask import KEY, Ask, Edit, groups_of_tokens
from vlattn_vllm.attention import PER_TOKEN, Attention
from vlattn_vllm.blocks import contents, keys_in_blocks
from vlattn_vllm.steering import edited_attention
from vlattn_vllm.wrapping import wrap

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
    counted: int = 0
    seconds: float = 0.0  # since its last numbers left


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


class Step:
    """The statistics of one batch: `see` for each layer, then `numbers`."""

    def __init__(self, asking: dict[str, Asking], batch: Any, rank: int = 0) -> None:
        self.rank = rank  # of this worker among those that share the heads
        self.asking, self.batch = asking, batch  # its req_ids are in their order when the first layer runs
        self._rows: dict[tuple[str, ...], Rows | None] = {}
        self._places: list[tuple[str, int, int, int]] | None = None  # name, number, first query, queries
        self._lengths: dict[str, int] = {}
        self._seen: dict[str, dict[int, dict[str, Tensor]]] = {}
        self._refused = ""

    def see(self, impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any, out: Tensor) -> None:
        """`out` (tokens, heads, D): the engine's attention, in which edited rows are replaced."""
        begin = time.perf_counter()
        self._see(impl, layer, query, kv_cache, metadata, out)
        self._spent(begin)

    def _spent(self, begin: float) -> None:
        """On a GPU this is the time in which the host hands over the work."""
        running = [self.asking[name] for name in self.batch.req_ids if name in self.asking]
        for one in running:
            one.seconds += (time.perf_counter() - begin) / len(running)

    def _see(self, impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any, out: Tensor) -> None:
        if self._refused or (refused := refusal(impl, metadata)):
            self._refused = self._refused or refused
            return
        if self._places is None:
            self._places = self._placed(metadata)
        number = layer_number(layer.layer_name)
        steered = set()
        for place in self._places:
            if edits := [edit for edit in self.asking[place[0]].ask.steer if number in edit.layers]:
                steered.add(place[0])
                self._steer(number, edits, place, impl, layer, query, kv_cache, metadata, out)
        names = tuple(name for name, *_ in self._places if number in self.asking[name].ask.layers and name not in steered)
        if names not in self._rows:
            self._rows[names] = self._packed(names, query.device)
        rows = self._rows[names]
        if rows is None:
            return
        keys, table = keys_in_blocks(kv_cache, getattr(layer, "isa", None), metadata.block_table[rows.batch_numbers])
        results = paged_attention_statistics(
            query[rows.tokens],
            keys,
            table,
            rows.lengths,
            rows.starts,
            key_groups=rows.groups,
            num_groups=rows.num_groups,
            statistics=rows.statistics,
            scale=impl.scale,
            softcap=impl.logits_soft_cap or None,
            window=window(impl),
        )
        self._keep(number, rows, results)

    def _placed(self, metadata: Any) -> list[tuple[str, int, int, int]]:
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        places = []
        for number, name in enumerate(self.batch.req_ids):
            if name in self.asking:
                self._lengths[name] = lengths[number]
                places.append((name, number, starts[number], starts[number + 1] - starts[number]))
        return places

    def _new(self, name: str, queries: int) -> tuple[int, bool]:
        """How many queries of a request ran before a preemption, and whether the others count in its `received`."""
        one = self.asking[name]
        old = max(0, one.counted - (self._lengths[name] - queries))
        return old, "received" in one.ask.statistics and old < queries

    def _steer(
        self,
        number: int,
        edits: list[Edit],
        place: tuple[str, int, int, int],
        impl: Any,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        out: Tensor,
    ) -> None:
        """The rows of one request, with edits; and its numbers, which the operator cannot know."""
        name, row, first, queries = place
        one, length, size = self.asking[name], self._lengths[name], kv_cache.shape[2]
        start, seen = length - queries, window(impl)
        low = 0 if seen is None else max(0, start - seen + 1) // size  # blocks before it may be another request's by now
        blocks = metadata.block_table[row, low : -(-length // size)]
        keys, values = (each[: length - low * size] for each in contents(kv_cache, getattr(layer, "isa", None), blocks))
        old, all_new = self._new(name, queries)
        rows, last, received = edited_attention(
            query[first : first + queries],
            keys,
            values,
            edits,
            start=start,
            first_key=low * size,
            first_head=self.rank * query.shape[1],
            scale=impl.scale,
            softcap=impl.logits_soft_cap or None,
            window=seen,
            counted_from=old,
        )
        out[first : first + queries] = rows.view_as(out[first : first + queries])
        if number not in one.ask.layers or not (all_new or length >= one.prompt):
            return
        groups = one.groups[low * size : length].to(last.device)
        groups = torch.nn.functional.pad(groups, (0, last.shape[1] - len(groups)), value=-1)
        values_of = {
            "mass": lambda: torch.stack([last[:, groups == group].sum(-1) for group in range(len(one.ask.groups))], -1),
            "entropy": lambda: -torch.special.xlogy(last, last).sum(-1),
            "maximum": lambda: last.amax(-1),
        }
        kept = {key: value() for key, value in values_of.items() if key in one.ask.statistics}
        if all_new:
            received = torch.nn.functional.pad(received, (low * size, 0))[:, : one.prompt]
            kept["received"] = torch.nn.functional.pad(received, (0, one.prompt - received.shape[1]))
        self._seen.setdefault(name, {})[number] = kept

    def _packed(self, names: tuple[str, ...], device: torch.device) -> Rows | None:
        """A request that asks for `received` has all its new queries here. Any other one has its last query, and none in the
        middle of its prompt, where no token is chosen."""
        chosen: list[str] = []
        counts: list[bool] = []
        batch_numbers: list[int] = []
        tokens: list[int] = []
        starts = [0]
        for name, number, first, queries in self._places or ():
            if name not in names:
                continue
            old, all_new = self._new(name, queries)
            if not all_new and self._lengths[name] < self.asking[name].prompt:
                continue
            chosen.append(name)
            counts.append(all_new)
            batch_numbers.append(number)
            tokens += range(first + (old if all_new else queries - 1), first + queries)
            starts.append(len(tokens))
        if not chosen:
            return None
        asks = [self.asking[name].ask for name in chosen]
        statistics = [name for name in (*PER_TOKEN, "received") if any(name in ask.statistics for ask in asks)]
        lengths = [self._lengths[name] for name in chosen]
        groups = None
        if "mass" in statistics:
            groups = torch.full((len(chosen), max(lengths)), -1, dtype=torch.int32)
            for row, name, length in zip(groups, chosen, lengths, strict=True):
                token_groups = self.asking[name].groups[:length]
                row[: len(token_groups)] = token_groups
        most = max(len(ask.groups) for ask in asks)
        groups = None if groups is None else groups.to(device)
        batch, queries_of, ends, keys = (
            torch.tensor(values, device=device) for values in (batch_numbers, tokens, starts, lengths)
        )
        return Rows(chosen, counts, batch, queries_of, ends, keys, groups, most, statistics)

    def _keep(self, layer: int, rows: Rows, results: Any) -> None:
        last = rows.starts[1:] - 1
        per_token = {name: getattr(results, name)[last] for name in PER_TOKEN if name in rows.statistics}
        for number, name in enumerate(rows.names):
            one = self.asking[name]
            kept = {key: value[number] for key, value in per_token.items() if key in one.ask.statistics}
            if "mass" in kept:
                kept["mass"] = kept["mass"][:, : len(one.ask.groups)]
            if rows.counts[number]:
                received = results.received[number, :, : min(one.prompt, self._lengths[name])]
                kept["received"] = torch.nn.functional.pad(received, (0, one.prompt - received.shape[1]))
            self._seen.setdefault(name, {})[layer] = kept

    def numbers(self, gathered: Callable[[Tensor], Tensor]) -> dict[str, Attention]:
        """Attention by request. `gathered` takes (heads of this rank, columns) and returns those of all heads."""
        begin = time.perf_counter()
        numbers = self._numbers(gathered)
        self._spent(begin)
        for name, attention in numbers.items():
            numbers[name] = replace(attention, seconds=self.asking[name].seconds)
            self.asking[name].seconds = 0.0
        return numbers

    def _numbers(self, gathered: Callable[[Tensor], Tensor]) -> dict[str, Attention]:
        if self._refused:
            nothing = {name: self.asking[name].ask for name in self.batch.req_ids if name in self.asking}
            return {
                name: Attention(ask.layers, tuple(group for group, _ in ask.groups), refused=self._refused)
                for name, ask in nothing.items()
            }
        stacks = {
            (name, key): torch.stack([by_layer[layer][key] for layer in self.asking[name].ask.layers], 1)
            for name, by_layer in self._seen.items()
            for key in next(iter(by_layer.values()))
        }  # (heads, layers, ...)
        if stacks:
            columns = gathered(torch.cat([stack.flatten(1) for stack in stacks.values()], 1)).cpu()
            parts = columns.split([stack[0].numel() for stack in stacks.values()], 1)
            stacks = {key: part.view(-1, *stacks[key].shape[1:]).transpose(0, 1) for key, part in zip(stacks, parts, strict=True)}
        edited = {name for name in self._lengths if not self.asking[name].ask.layers}  # and ask for no numbers
        return {
            **{name: Attention((), ()) for name in edited if self._lengths[name] >= self.asking[name].prompt},
            **{name: self._attention(name, stacks) for name in self._seen},
        }

    def _attention(self, name: str, stacks: dict[tuple[str, str], Tensor]) -> Attention:
        one, length = self.asking[name], self._lengths[name]
        values = {key: stack for (of, key), stack in stacks.items() if of == name}
        received = values.pop("received", None)
        queries = None
        if received is not None:
            first = next(length - count for of, _, _, count in self._places or () if of == name)
            queries, one.counted = (max(first, one.counted), length), length
        mass, entropy, maximum = (None if key not in values else values[key][None].contiguous() for key in PER_TOKEN)
        groups = tuple(group for group, _ in one.ask.groups)
        return Attention(one.ask.layers, groups, mass, entropy, maximum, received, queries)


def refusal(impl: Any, metadata: Any) -> str:
    """Why the attention of a layer is not what the operator computes; empty where it is."""
    if not hasattr(metadata, "block_table") or not hasattr(impl, "logits_soft_cap"):
        names = ", ".join(name.upper() for on_device in LAYERS.values() for name in on_device)
        return f"the attention backend must be one of {names}; got {type(impl).__name__}"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "attention statistics of ALiBi are not computed; choose a model without it"
    if getattr(impl, "sinks", None) is not None:
        return "attention statistics of attention sinks are not computed; choose a model without them"
    if metadata.causal is not True or any(getattr(metadata, name, None) is not None for name in _NOT_CAUSAL):
        return "attention statistics are those of causal attention; this model's attention is not causal"
    return ""


def window(impl: Any) -> int | None:
    """How many keys a query sees at most, itself among them. Backends of GPUs keep those before it and behind it, -1 for all."""
    kept = impl.sliding_window
    size = kept[0] + 1 if isinstance(kept, tuple) else kept
    return size if size > 0 else None


def layer_number(name: str) -> int:
    """The number in a layer's name, such as model.layers.3.self_attn.attn."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def install(device: str) -> None:
    """Wraps the model runner and the attention layers of this process, whose device is of this kind."""
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(CudagraphDispatcher, "dispatch", _dispatch)
    wrap(GPUModelRunner, "execute_model", _execute_model)
    wrap(GPUModelRunner, "sample_tokens", _sample_tokens)
    for module, kind in LAYERS[device].items():
        wrap(getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), kind), "forward", _forward)


def _forward(
    original: Any, impl: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, *args: Any, **rest: Any
) -> Any:
    out = original(impl, layer, query, key, value, kv_cache, metadata, *args, **rest)
    step = getattr(_NOW, "step", None)
    if step is not None and metadata is not None and impl.attn_type == "decoder":
        step.see(impl, layer, query, kv_cache, metadata, out)
    return out


def _dispatch(original: Any, dispatcher: Any, *args: Any, **kwargs: Any) -> Any:
    """No layer can be seen in a full CUDA graph. So a batch that asks runs in graphs that leave attention out, or in none."""
    if getattr(_NOW, "step", None) is not None:
        from vllm.config import CUDAGraphMode

        kwargs["invalid_modes"] = {CUDAGraphMode.FULL, *(kwargs.get("invalid_modes") or ())}
    return original(dispatcher, *args, **kwargs)


def _execute_model(original: Any, runner: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    asking: dict[str, Asking] = runner.__dict__.setdefault(_ASKING, {})
    for name in scheduled.finished_req_ids if asking else ():
        asking.pop(name, None)
    for new in scheduled.scheduled_new_reqs:
        extra = None if new.sampling_params is None else new.sampling_params.extra_args
        if extra and KEY in extra and new.req_id not in asking:
            ask = Ask.read(extra[KEY])
            most = new.prompt_len + (new.sampling_params.max_tokens or 0)
            asking[new.req_id] = Asking(ask, new.prompt_len, groups_of_tokens(ask, most))
    if asking.keys().isdisjoint(scheduled.num_scheduled_tokens):
        return original(runner, scheduled, *args, **kwargs)
    step = Step(asking, runner.input_batch, _rank() if any(one.ask.steer for one in asking.values()) else 0)
    _NOW.step = step
    try:
        out = original(runner, scheduled, *args, **kwargs)
    finally:
        _NOW.step = None
    runner.__dict__[NUMBERS] = step.numbers(_gathered)
    return out


def _rank() -> int:
    from vllm.distributed.parallel_state import get_tp_group

    rank: int = get_tp_group().rank_in_group
    return rank


def _gathered(columns: Tensor) -> Tensor:
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().all_gather(columns, 0)


def _sample_tokens(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    out = original(runner, *args, **kwargs)
    numbers = runner.__dict__.pop(NUMBERS, None)
    if numbers:
        setattr(getattr(out, "_model_runner_output", out), NUMBERS, numbers)
    return out
