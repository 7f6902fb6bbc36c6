"""In front of the endpoints of vLLM's server: an ask is answered where `server` answers it, and refused everywhere else.

An endpoint leaves out fields that it does not know. So the bodies of requests to other endpoints are read here first.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from vlattn_vllm import counts
from vlattn_vllm.ask import KEY
from vlattn_vllm.wrapping import wrap

_FIELD = re.compile(rf'\bname="?{KEY}"?\s*[;\r\n]|(^|&){KEY}='.encode())  # of a form in parts, and of one in a line
ANSWERED = ("/v1/completions", "/v1/chat/completions")


def install(refused: str = "") -> None:
    """Guards the server of this process, if it has one. `refused`: why no endpoint answers; empty: those of ANSWERED do."""
    if "fastapi" not in sys.modules:
        return
    from fastapi import FastAPI

    wrap(FastAPI, "build_middleware_stack", functools.partial(_guarded, refused))


def _guarded(refused: str, original: Any, app: Any) -> Any:
    """As the innermost middleware, behind the check of keys. A stack may be built more than once."""
    from starlette.middleware import Middleware

    if not any(each.cls is Guard for each in app.user_middleware):
        app.user_middleware.append(Middleware(Guard, refused))
    return original(app)


class Guard:
    """An ASGI application around another one, which answers requests that ask with the status 400 and the reason."""

    def __init__(self, app: Any, refused: str = "") -> None:
        self.app, self.refused = app, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        is_vllms = scope["type"] == "http" and hasattr(
            scope["app"].state, "vllm_config"
        )  # a program with an engine may have a server
        if not is_vllms or (path in ANSWERED and not self.refused):
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        if asks(b"".join(message.get("body", b"") for message in messages)):
            await _refuse(send, self.refused or f"{path} has no place for {KEY!r}; ask at {' or '.join(ANSWERED)}")
            return
        read = iter(messages)

        async def receive_again() -> Any:
            return next(read, None) or await receive()

        await self.app(scope, receive_again, send)


def asks(body: bytes) -> bool:
    """Whether a request's body, JSON or a form, asks: by the field, or in the parameters of vLLM that take anything."""
    try:
        value = json.loads(body)  # as the endpoint reads it, in any encoding and with any escapes
    except (ValueError, RecursionError):
        return _FIELD.search(body) is not None
    return isinstance(value, Mapping) and any(
        KEY in part or any(KEY in _dict(part.get(name)) for name in ("extra_args", "vllm_xargs"))
        for part in (value, _dict(value.get("sampling_params")))
    )


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


async def _refuse(send: Any, reason: str) -> None:
    """In the form of the server's own errors."""
    counts.count("refused", reason="endpoint")
    body = json.dumps({"error": {"message": reason, "type": "BadRequestError", "param": KEY, "code": 400}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
