"""In the front end: the ask of a request is checked as it comes in, and numbers become `completion.attention` as it leaves."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import torch

from vlattn_vllm import counts, limit
from vlattn_vllm.ask import KEY, Ask, Span, check_ask
from vlattn_vllm.attention import Attention, joined
from vlattn_vllm.worker import LAYERS
from vlattn_vllm.wrapping import fault, harmless, wrap

_ASKS = "_vlattn_asks"  # an attribute of the front end's RequestState: seconds of the workers until now
_PARTS = "_vlattn_parts"  # an attribute of the front end's RequestState: chunks that no completion has yet


def install() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    CompletionOutput.attention = None
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(OutputProcessor, "add_request", _add_request)
    wrap(OutputProcessor, "process_outputs", harmless(_process_outputs, _refuse_outputs))
    wrap(RequestState, "_new_completion_output", _new_completion_output)
    wrap(RequestOutput, "add", harmless(_add, _refuse_sum))


def refusals(config: Any) -> list[str]:
    """Why an engine of this configuration cannot answer requests that ask, each with what to do."""
    from vllm.platforms import current_platform

    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    reasons = {
        f"the device is of the kind {current_platform.device_type!r}; use one of {', '.join(LAYERS)}": (
            current_platform.device_type not in LAYERS
        ),
        "the model runs in several pipeline stages; use tensor parallelism": parallel.pipeline_parallel_size > 1,
        "a batch runs in two halves, in other threads (dual-batch overlap); leave out enable_dbo and ubatch_size": (
            parallel.use_ubatching
        ),
        "contexts run in parallel; use tensor parallelism": parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "tokens are guessed ahead (speculative decoding), and the guesses' queries would count; leave out speculative_config": (
            config.speculative_config is not None
        ),
        f"the cache is quantised (kv_cache_dtype={cache.cache_dtype}); use kv_cache_dtype='auto'": cache.cache_dtype
        not in ("auto", "float16", "bfloat16", "float32"),
        "the model has an encoder and a decoder; choose one with a decoder alone": model.is_encoder_decoder,
        "the model has layers without attention; choose one with attention in each layer": model.is_hybrid
        or model.is_attention_free,
        "tokens of a picture see one another in both directions; choose a model with causal attention": model.is_mm_prefix_lm,
    }
    return [reason for reason, holds in reasons.items() if holds]


def warn(config: Any) -> None:
    """Says in vLLM's log, when an engine starts, that it will refuse requests that ask."""
    try:
        if reasons := refusals(config):
            logging.getLogger("vllm.vlattn").warning("requests with %r will be refused: %s", KEY, "; ".join(reasons))
    except Exception as error:
        fault(error)


def _request_refusals(config: Any, params: Any, resumable: bool) -> list[str]:
    """Why a request that asks cannot be answered, whatever it asks for."""
    fused = bool(config.compilation_config.pass_config.fuse_attn_quant)
    reasons = {
        "the request is a session that takes more input; send one request a prompt": resumable,
        "attention is fused with a quantisation of its output, which no edit can reach; set pass_config.fuse_attn_quant=False": (
            fused and _steers(params)
        ),
        "the model has multi-head latent attention (MLA), which is not edited; leave out steer": (
            config.model_config.use_mla and _steers(params)
        ),
        "it is a request for a pooling; ask where tokens are generated": not hasattr(params, "max_tokens"),
    }
    return [reason for reason, holds in reasons.items() if holds]


def _process_inputs(original: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    if not asks(params):
        return original(processor, request_id, prompt, params, *args, **kwargs)
    if limit.most(limit.ASKS) == 0:
        raise refused_request(f"{KEY} is turned off at this server ({limit.ASKS.option} 0); ask without it", "busy")
    reasons = refusals(processor.vllm_config), _request_refusals(processor.vllm_config, params, bool(kwargs.get("resumable")))
    if any(reasons):
        raise refused_request(f"{KEY} cannot be answered: {'; '.join(sum(reasons, []))}", "engine" if reasons[0] else "ask")
    request = original(processor, request_id, prompt, params, *args, **kwargs)
    if request.prompt_token_ids is None:
        raise refused_request(f"{KEY} cannot be answered: the prompt is one of embeddings; send tokens")
    config, prompt_length = processor.vllm_config.model_config, len(request.prompt_token_ids)
    layers, heads = config.get_total_num_hidden_layers(), config.model_arch_config.total_num_attention_heads
    most = min(prompt_length + (request.sampling_params.max_tokens or 0), config.max_model_len)
    try:
        ask = check_ask(params.extra_args[KEY], layers, heads, prompt_length, _pictures(request.mm_features or ()), most)
    except (TypeError, ValueError) as error:
        raise refused_request(str(error)) from error
    _check_bytes(ask, heads)
    request.sampling_params.extra_args = {**request.sampling_params.extra_args, KEY: ask.written()}
    if ask.steer:  # its keys and values are not those of the same tokens without these edits
        words = json.dumps([request.cache_salt, ask.written()["steer"]])
        request.cache_salt = hashlib.sha256(words.encode()).hexdigest()
    return request


def _check_bytes(ask: Ask, heads: int) -> None:
    """Refuses more numbers than a server gives for each token."""
    numbers = len(ask.layers) * heads * (len(ask.groups) + len({*ask.statistics} - {"mass"}))
    most = limit.most(limit.BYTES)
    if most is not None and (size := numbers * torch.float32.itemsize) > most:
        raise refused_request(
            f"{KEY} must ask for at most {most} bytes of numbers for each token ({limit.BYTES.option}); got {size}, for "
            f"{len(ask.layers)} layers and {heads} heads. Name fewer layers, groups or statistics",
            "bytes",
        )


def asks(params: Any) -> bool:
    """Whether parameters of sampling or pooling ask."""
    return any(KEY in (getattr(params, name, None) or {}) for name in ("extra_args", "extra_kwargs"))


def _steers(params: Any) -> bool:
    asked = (getattr(params, "extra_args", None) or {}).get(KEY)
    return isinstance(asked, Mapping) and "steer" in asked


def refused_request(message: str, reason: str = "ask") -> Exception:
    """A ValueError that the server answers with the status 400. reason: one of `counts.REASONS`."""
    from vllm.exceptions import VLLMValidationError

    counts.count("refused", reason=reason)
    refusal: Exception = type("AskRefused", (VLLMValidationError, ValueError), {})(message)
    return refusal


def _add_request(
    original: Any, processor: Any, request: Any, prompt: Any, parent: Any = None, index: int = 0, *args: Any, **kwargs: Any
) -> Any:
    """Counts a request that asks once, however many samples it has."""
    states, asking = processor.request_states, asks(request.sampling_params)
    if asking and index == 0:
        running, most = {one for state in states.values() if (one := _asking(state))}, limit.most(limit.ASKS)
        if most is not None and len(running) >= most:
            raise _too_many(most)
        counts.count("asks")
    out = original(processor, request, prompt, parent, index, *args, **kwargs)
    if asking:
        states[request.request_id].__dict__[_ASKS] = 0.0
    return out


def _asking(state: Any) -> int:
    """The identity of the request that asks, which its samples share; 0 if it does not ask."""
    return id(state.parent_req or state) if _ASKS in state.__dict__ else 0


def _too_many(most: int) -> Exception:
    """A ValueError that the server answers with the status 429."""
    from vllm.exceptions import GracefulHTTPError

    counts.count("refused", reason="busy")
    message = f"{most} requests with {KEY!r} run already, as many as {limit.ASKS.option} allows; ask again when one has ended"
    error: Exception = type("AskPostponed", (GracefulHTTPError, ValueError), {})(message, HTTPStatus.TOO_MANY_REQUESTS)
    return error


def _pictures(features: Any) -> list[Span]:
    """The spans of tokens that stand for parts of a picture, or of another medium."""
    spans: list[Span] = []
    for place in (feature.mm_position for feature in features):
        parts = [True] * place.length if place.is_embed is None else place.is_embed.tolist()
        for token in itertools.compress(range(place.offset, place.offset + place.length), parts):
            begun = spans.pop()[0] if spans and spans[-1][1] == token else token
            spans.append((begun, token + 1))
    return spans


def _process_outputs(original: Any, processor: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    ended, states = [], [processor.request_states.get(output.request_id) for output in outputs]
    asking = [(state, output) for state, output in zip(states, outputs, strict=True) if state and _ASKS in state.__dict__]
    for state, output in asking:
        if (attention := _taken(output)) is None:
            continue
        state.__dict__[_ASKS] += attention.seconds
        if attention.refused and state.queue is not None and _PARTS not in state.__dict__ and attention.is_empty():
            ended.append(state)
        state.__dict__.setdefault(_PARTS, []).append(attention)
    stopped = _stopped(processor, ended)
    out = original(processor, outputs, *args, **kwargs)
    for state, _ in asking:
        if state.request_id not in processor.request_states:
            counts.count("seconds", state.__dict__[_ASKS])
    out.reqs_to_abort.extend(stopped)
    return out


def _refuse_outputs(reason: str, result: Any, processor: Any, outputs: Any, *args: Any) -> None:
    for output in outputs:
        (output.kv_transfer_params or {}).pop(KEY, None)
        state = processor.request_states.get(output.request_id)
        if state is not None and _ASKS in state.__dict__:
            state.__dict__[_PARTS] = [Attention((), (), refused=reason)]


def _taken(output: Any) -> Attention | None:
    """The numbers of an output, which leave it. A token of a request that asks has some, unless the core or a worker failed."""
    params = output.kv_transfer_params or {}
    packed = params.pop(KEY, None)
    output.kv_transfer_params = params or None
    if packed is None:
        return Attention((), (), refused="a token came without its numbers; the log says why") if output.new_token_ids else None
    try:
        return Attention.from_dict(packed)
    except Exception as error:
        return Attention((), (), refused=fault(error))


def _stopped(processor: Any, states: list[Any]) -> list[str]:
    """The requests to be aborted: those that a worker refuses, which end with an error before their first token."""
    names: list[str] = []
    for state in states:
        if state.request_id in processor.request_states:  # else another sample of the request ended it
            whole, reason = state.parent_req or state, state.__dict__[_PARTS][-1].refused
            names += processor.abort_requests([whole.request_id], internal=True)
            state.queue.put(refused_request(f"{KEY} cannot be answered: {reason}", "worker"))
    return names


def _new_completion_output(original: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    completion = original(state, *args, **kwargs)
    parts = state.__dict__.get(_PARTS)
    if parts:
        try:
            completion.attention = joined(parts)
        except Exception as error:
            completion.attention = parts[0].refusing(fault(error))
        from vllm.sampling_params import RequestOutputKind

        delta = state.output_kind == RequestOutputKind.DELTA
        state.__dict__[_PARTS] = [] if delta else [completion.attention]
    return completion


def _add(original: Any, output: Any, following: Any, aggregate: bool) -> None:
    """vLLM makes one output of chunks that nobody has fetched yet."""
    chunks = [{one.index: one.attention for one in some.outputs} for some in (output, following)]
    original(output, following, aggregate)
    for completion in output.outputs if aggregate else ():
        parts = [part for part in (chunk.get(completion.index) for chunk in chunks) if part is not None]
        if parts and completion.index in chunks[0]:
            completion.attention = joined(parts)


def _refuse_sum(reason: str, result: Any, output: Any, *args: Any) -> None:
    for completion in output.outputs:
        if completion.attention is not None:
            completion.attention = completion.attention.refusing(reason)
