"""vLLM's OpenAI server: `"vlattn": {...}` in a request is its ask, and `"vlattn"` in the choices of the answer has the numbers.

A stream has them in the chunk of the tokens that they belong to. Endpoints without a place for them are the matter of `guard`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from vlattn_vllm import counts, limit
from vlattn_vllm.ask import KEY
from vlattn_vllm.attention import Attention, joined
from vlattn_vllm.front import refused_request
from vlattn_vllm.limit import EDITS
from vlattn_vllm.wrapping import wrap

_DATA = "data: "


def install() -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    limit.serve()
    wrap(OpenAIServingCompletion, "completion_stream_generator", _completion_chunks)
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", _completion)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", _chat_chunks)
    wrap(OpenAIServingChat, "chat_completion_full_generator", _chat)
    wrap(OpenAIServingCompletion, "create_completion", _created)
    wrap(OpenAIServingChat, "create_chat_completion", _created)


def _asks(request: Any) -> bool:
    """By its field; or among vLLM's own parameters for plug-ins, whose values cannot say what is asked for."""
    return KEY in (request.model_extra or {}) or KEY in (request.vllm_xargs or {})


def _compact(request: Any) -> bool:
    asked = (request.model_extra or {}).get(KEY)
    return isinstance(asked, Mapping) and bool(asked.get("compact"))


def _written(attention: Attention, compact: bool) -> dict[str, Any]:
    numbers = attention.to_dict(compact)
    counts.count("bytes", len(json.dumps(numbers, separators=(",", ":"))))
    return numbers


def _hand_on(request: Any) -> None:
    """The ask becomes one of vLLM's own parameters for plug-ins, which the engine gets as `extra_args`."""
    if request.use_beam_search:
        raise refused_request(f"{KEY} is not answered for beams, whose tokens change places; ask without use_beam_search")
    if KEY in (request.model_extra or {}):
        asked = request.model_extra[KEY]
        if isinstance(asked, Mapping) and "steer" in asked and not limit.most(EDITS):
            raise refused_request(
                f"steer must be left out: this server allows no edits (it runs without {EDITS.option})", "edits"
            )
        request.vllm_xargs = {**(request.vllm_xargs or {}), KEY: asked}


async def _created(original: Any, serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """The engine checks a stream's request when the stream is read. So the first chunk of one that asks is read here, and an
    error is answered with its own status."""
    if not _asks(request):
        return await original(serving, request, *args, **kwargs)
    _hand_on(request)
    answer = await original(serving, request, *args, **kwargs)
    if not hasattr(answer, "__anext__"):
        return answer
    first = await anext(answer, "")
    refused = json.loads(first.removeprefix(_DATA)).get("error") if first.startswith(_DATA + "{") else None
    if refused is None:
        return _continued(first, answer)
    await answer.aclose()
    return serving.create_error_response(refused["message"], refused["type"], HTTPStatus(refused["code"]), refused.get("param"))


async def _continued(first: str, rest: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with aclosing(rest):
        yield first
        async for line in rest:
            yield line


class Waiting:
    """Numbers by choice, from the engine's outputs until a chunk of their choice is written."""

    def __init__(self, compact: bool = False) -> None:
        self._compact = compact
        self._parts: dict[int, list[Attention]] = {}

    async def through(self, outputs: AsyncIterator[Any], output_of: Callable[[Any], tuple[int, Any]]) -> AsyncIterator[Any]:
        """The same outputs. `output_of` returns the number of an output's first choice and its RequestOutput."""
        async for one in outputs:
            first, output = output_of(one)
            for completion in output.outputs:
                if completion.attention is not None:
                    self._parts.setdefault(first + completion.index, []).append(completion.attention)
            yield one

    def take(self, choice: int) -> dict[str, Any] | None:
        parts = self._parts.pop(choice, None)
        return None if parts is None else _written(joined(parts), self._compact)

    async def into(self, lines: AsyncIterator[str]) -> AsyncIterator[str]:
        """The chunks of a stream, with numbers in their choices."""
        async for line in lines:
            if not line.startswith(_DATA + "{"):
                yield line
                continue
            chunk = json.loads(line.removeprefix(_DATA))
            for choice in chunk.get("choices", ()):
                if _says_something(choice) and (numbers := self.take(choice["index"])) is not None:
                    choice[KEY] = numbers
            yield f"{_DATA}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _says_something(choice: dict[str, Any]) -> bool:
    """The first chunk of a chat names the role alone."""
    parts = {"text": choice.get("text"), "end": choice.get("finish_reason"), **choice.get("delta", {}), "role": None}
    return any(parts.values())


def _completion_chunks(original: Any, serving: Any, request: Any, inputs: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    if not _asks(request):
        return original(serving, request, inputs, outputs, *args, **kwargs)
    waiting, choices = Waiting(_compact(request)), request.n or 1
    outputs = waiting.through(outputs, lambda one: (one[0] * choices, one[1]))
    return waiting.into(original(serving, request, inputs, outputs, *args, **kwargs))


def _chat_chunks(original: Any, serving: Any, request: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    if not _asks(request):
        return original(serving, request, outputs, *args, **kwargs)
    waiting = Waiting(_compact(request))
    outputs = waiting.through(outputs, lambda one: (0, one))
    return waiting.into(original(serving, request, outputs, *args, **kwargs))


def _completion(original: Any, serving: Any, outputs: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    response = original(serving, outputs, request, *args, **kwargs)
    if _asks(request):
        completions = [completion for output in outputs for completion in output.outputs]
        for choice, completion in zip(response.choices, completions, strict=True):
            if completion.attention is not None:
                setattr(choice, KEY, _written(completion.attention, _compact(request)))
    return response


async def _chat(original: Any, serving: Any, request: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    if not _asks(request):
        return await original(serving, request, outputs, *args, **kwargs)
    waiting = Waiting(_compact(request))
    response = await original(serving, request, waiting.through(outputs, lambda one: (0, one)), *args, **kwargs)
    for choice in getattr(response, "choices", ()):  # an error has none
        if (numbers := waiting.take(choice.index)) is not None:
            setattr(choice, KEY, numbers)
    return response
