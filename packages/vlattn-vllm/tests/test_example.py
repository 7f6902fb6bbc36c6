"""The example's client, without vLLM and its server."""

from __future__ import annotations

import json
import runpy
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "served_attention.py"


@pytest.mark.parametrize("status", [200, 400])
def test_an_error_is_printed(status: int) -> None:
    """One with a status of its own, and one in the middle of a stream."""
    script = runpy.run_path(str(EXAMPLE))
    error = {"error": {"message": "vlattn cannot be answered", "code": 400}}

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(f"data: {json.dumps(error)}\n\n".encode() if status == 200 else json.dumps(error).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(SystemExit, match="vlattn cannot be answered"):
            script["main"](["Where?", "--model", "tiny", "--url", f"http://127.0.0.1:{server.server_port}"])
        server.shutdown()


def test_served_attention(capsys: pytest.CaptureFixture[str]) -> None:
    """A server replays chunks as vLLM's writes them; tests/helpers/server.py runs the client with vLLM's."""
    script = runpy.run_path(str(EXAMPLE))
    chunks = [
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"content": "two words"}, "vlattn": {"mass": [[[[0.5, 0.5, 0.0]]], [[[0.1, 0.9, 0.0]]]]}},
        {"delta": {"content": " end"}, "vlattn": {"mass": [[[[0.0, 0.4, 0.6], [0.2, 0.2, 0.6]]]]}},
        {"delta": {}, "vlattn": {"received": [[[1.0]]]}},
    ]
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(f"data: {json.dumps({'choices': [chunk]})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        script["main"](["Where?", "--model", "tiny", "--url", f"http://127.0.0.1:{server.server_port}"])
        server.shutdown()
    lines = capsys.readouterr().out.splitlines()
    assert asked[0]["vlattn"] == {"statistics": ["mass"], "groups": "image|question|answer"} and asked[0]["stream"]
    assert [line.split() for line in lines[1:]] == [["two", "words", "▉" * 9 + "▒" * 21], ["end", "▉" * 3 + "▒" * 9 + "░" * 18]]
