"""A running server, as `collect` asks it. It needs no vLLM on this side."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from vlattn_fast._ground.checks import check_integer, check_number, describe
from vlattn_vllm.ask import KEY
from vlattn_vllm.attention import Answer, Attention

_AT_ONCE = 32  # requests
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_LOCKED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)  # whatever the prompt
_WAIT = 0.5  # seconds


class Server:
    """vLLM's OpenAI server at an address, with the fields of each request."""

    def __init__(
        self,
        url: str,
        ask: dict[str, Any],
        params: Any,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        if not (params is None or isinstance(params, Mapping)):
            raise TypeError(f"params must be a dict of fields of a request to the server; got {describe(params)}")
        self.url, self.fields = url.rstrip("/"), dict(params or {})
        self.n = self.fields.get("n", 1)
        check_integer("n", self.n, low=1)
        if timeout is not None:
            check_number("timeout", timeout, low=0.001)
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.timeout = timeout
        with self._open("/v1/models") as response:
            self.model = self.fields.setdefault("model", json.load(response)["data"][0]["id"])
        self.params = json.dumps(self.fields, sort_keys=True)
        self.fields |= {KEY: ask, "return_token_ids": True}

    def _open(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(self.url + path, body, self.headers)
        return urllib.request.urlopen(request, timeout=self.timeout)

    def answers(self, prompts: list[Any]) -> list[list[Answer] | str]:
        """The answers to each prompt, or why the server refuses it."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._answers, prompts))

    def _answers(self, prompt: Any) -> list[Answer] | str:
        """While the server is busy, the request is sent again.

        Raises:
            OSError: the server cannot be reached, or fails.
        """
        chat = isinstance(prompt, list) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        path, name = ("/v1/chat/completions", "messages") if chat else ("/v1/completions", "prompt")
        body = json.dumps({**self.fields, name: prompt}).encode()
        while True:
            try:
                with self._open(path, body) as response:
                    choices = json.load(response)["choices"]
            except urllib.error.HTTPError as error:
                if error.code in _BUSY:
                    time.sleep(_WAIT)
                    continue
                if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code in _LOCKED:
                    raise
                return str(json.load(error)["error"]["message"])
            return [_answer(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]


def _answer(choice: dict[str, Any]) -> Answer:
    if KEY not in choice:
        raise OSError(f"the server answers without {KEY!r}: install vlattn_vllm where it runs")
    text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
    return Answer("", choice["token_ids"], text, Attention.from_dict(choice[KEY]))
