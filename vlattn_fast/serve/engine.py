"""In the engine's core, between workers and front end: each token's numbers join its output; `received` adds up on the request.

An EngineCoreOutput has one field that takes anything: kv_transfer_params. The numbers travel there, and `front` takes them out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlattn_fast.serve.attention import Attention, to_bytes
from vlattn_fast.serve.worker import NUMBERS
from vlattn_fast.serve.wrapping import wrap

FIELD = "vlattn"  # in kv_transfer_params
_SUM = "_vlattn_received"  # an attribute of the core's Request, so that it ends with the request


def install() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "update_from_output", _update_from_output)


def _update_from_output(original: Any, scheduler: Any, scheduled: Any, out: Any) -> Any:
    numbers: dict[str, Attention] | None = getattr(out, NUMBERS, None)
    if not numbers:
        return original(scheduler, scheduled, out)
    requests = {name: scheduler.requests.get(name) for name in numbers}  # finished ones leave the scheduler below
    for name, attention in numbers.items():
        if requests[name] is not None and attention.received is not None:
            _add(requests[name], attention)
    outputs = original(scheduler, scheduled, out)
    for each in outputs.values():
        for one in each.outputs:
            if one.request_id in numbers:
                _attach(one, numbers[one.request_id], requests[one.request_id])
    return outputs


def _add(request: Any, attention: Attention) -> None:
    """Each query counts once: workers leave out those that ran before a preemption."""
    assert attention.received is not None and attention.queries is not None
    before = request.__dict__.get(_SUM)
    if before is not None:
        first, received = before.queries[0], before.received + attention.received
        attention = replace(attention, received=received, queries=(first, attention.queries[1]))
    request.__dict__[_SUM] = attention


def _attach(output: Any, attention: Attention, request: Any) -> None:
    total = request.__dict__.get(_SUM)
    # The front end alone sees a stop string, and then asks the core for nothing more.
    last = output.finish_reason is not None or bool(request.sampling_params.stop)
    whole = total if last else None
    attention = replace(
        attention, received=None if whole is None else whole.received, queries=None if whole is None else whole.queries
    )
    if not output.new_token_ids:
        attention = replace(attention, mass=None, entropy=None, maximum=None)
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), FIELD: to_bytes(attention)}
