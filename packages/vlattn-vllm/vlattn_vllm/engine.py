"""In the engine's core, between workers and front end: each token's numbers join its output; `received` adds up on the request.

An EngineCoreOutput has one field that takes anything: kv_transfer_params. The numbers travel there, and `front` takes them out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlattn_vllm.ask import KEY
from vlattn_vllm.attention import PER_TOKEN, SUMS, Attention
from vlattn_vllm.worker import NUMBERS
from vlattn_vllm.wrapping import fault, harmless, wrap

_SUM = "_vlattn_received"  # an attribute of the core's Request, so that it ends with the request


def install() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "update_from_output", harmless(_update_from_output))
    wrap(Scheduler, "_preempt_request", harmless(_preempt_request))


def _preempt_request(original: Any, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """In the middle of its prompt, a request that sums what tokens receive runs from its first token again: blocks that another
    request cached meanwhile would stand for queries that it never ran."""
    asked = _asked(request)
    if asked and not {*SUMS}.isdisjoint(asked["statistics"]) and request.num_computed_tokens < request.num_prompt_tokens:
        request.skip_reading_prefix_cache = True
    return original(scheduler, request, *args, **kwargs)


def _asked(request: Any) -> dict[str, Any]:
    asked: dict[str, Any] = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(KEY, {})
    return asked


def _update_from_output(original: Any, scheduler: Any, scheduled: Any, out: Any) -> Any:
    numbers: dict[str, Attention] | None = getattr(out, NUMBERS, None)
    if not numbers:
        return original(scheduler, scheduled, out)
    requests = {name: scheduler.requests.get(name) for name in numbers}  # finished ones leave the scheduler below
    for name, request in requests.items():
        if request is not None:
            numbers[name] = _begun(scheduler, request, numbers[name])
    outputs = original(scheduler, scheduled, out)
    for each in outputs.values():
        for one in each.outputs:
            if one.request_id in numbers:
                _attach(one, numbers[one.request_id], requests[one.request_id])
    return outputs


def _begun(scheduler: Any, request: Any, attention: Attention) -> Attention:
    """Adds `received` up. What is refused leaves no keys without its edits to others with the same edits."""
    try:
        if attention.queries is not None:
            _add(request, attention)
        if attention.refused and _asked(request)["steer"]:
            cache = scheduler.kv_cache_manager
            cache.evict_blocks({block for group in cache.get_block_ids(request.request_id) for block in group})
    except Exception as error:
        attention = request.__dict__[_SUM] = attention.refusing(fault(error))
    return attention


def _add(request: Any, attention: Attention) -> None:
    """Each query counts once: workers leave out those that ran before a preemption. A sum with a gap is none."""
    before, after = request.__dict__.get(_SUM), attention.queries
    assert after is not None
    if before is not None and before.queries is None:
        return
    if before is not None and before.queries[1] < after[0]:
        reason = (
            f"received lacks the queries of positions {before.queries[1]} to {after[0] - 1}: their keys came out of a cache when "
            f"the request had begun; ask again with enable_prefix_caching=False and without a KV connector"
        )
        attention = replace(attention, received=None, received_answer=None, queries=None, refused=reason)
    elif before is not None:
        added: dict[str, Any] = {name: _added(getattr(before, name), getattr(attention, name)) for name in SUMS}
        attention = replace(attention, **added, queries=(before.queries[0], after[1]))
    request.__dict__[_SUM] = attention


def _added(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """(layers, heads, tokens) each, of which the second may have more tokens; None = none."""
    if before is None or after is None:
        return after if before is None else before
    return after + torch.nn.functional.pad(before, (0, after.shape[2] - before.shape[2]))


def _attach(output: Any, attention: Attention, request: Any) -> None:
    try:
        attention = _of_output(output, attention, request)
    except Exception as error:
        attention = attention.refusing(fault(error))
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: attention.to_bytes()}


def _of_output(output: Any, attention: Attention, request: Any) -> Attention:
    """With `received` in the last output of a request alone, and rows for its new tokens alone."""
    if attention.refused:
        return attention
    total = request.__dict__.get(_SUM)
    # The front end alone sees a stop string, and then asks the core for nothing more.
    last = output.finish_reason is not None or bool(request.sampling_params.stop)
    if last and total is not None:
        received, tokens, top = total.received, None, _asked(request).get("top")
        if top is not None and received is not None:
            received, tokens = received.topk(min(top, received.shape[-1]))
        of_answer = total.received_answer
        ended = {"received": received, "received_answer": of_answer, "tokens": tokens, "queries": total.queries}
        attention = replace(attention, **ended, refused=total.refused)
    else:
        attention = replace(attention, received=None, received_answer=None, queries=None)
    if not output.new_token_ids:
        without: dict[str, Any] = dict.fromkeys(PER_TOKEN)
        attention = replace(attention, **without)
    return attention
