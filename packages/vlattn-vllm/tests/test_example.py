"""The example's client, without vLLM and its server."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "served_attention.py"
MAIN = runpy.run_path(str(EXAMPLE))["main"]


@contextlib.contextmanager
def serving(*lines: str, status: int = 200) -> Iterator[tuple[list[str], list[Any]]]:
    """Arguments of the example for a server that answers with these lines, and the requests that it gets."""
    asked: list[Any] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write("\n\n".join(lines).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield ["Where?", "--model", "tiny", "--url", f"http://127.0.0.1:{server.server_port}"], asked
        server.shutdown()


@pytest.mark.parametrize("status", [200, 400])
def test_an_error_is_printed(status: int) -> None:
    """One with a status of its own, and one in the middle of a stream."""
    error = json.dumps({"error": {"message": "vlattn cannot be answered", "code": 400}})
    with serving(f"data: {error}" if status == 200 else error, status=status) as (arguments, _):
        with pytest.raises(SystemExit, match="vlattn cannot be answered"):
            MAIN(arguments)


def test_served_attention(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A server replays chunks as vLLM's writes them; tests/helpers/server.py runs the client with vLLM's."""
    ask = {"layers": [0], "groups": ["image", "question", "answer"]}
    masses = [[[[0.5, 0.5, 0.0]] * 2], [[[0.1, 0.9, 0.0]] * 2]], [[[[0.0, 0.4, 0.6], [0.2, 0.2, 0.6]]]]
    chunks = [
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"content": "two <words>"}, "vlattn": {**ask, "mass": masses[0], "diagonal": [[[0.5] * 2], [[0.2, 0.3]]]}},
        {"delta": {"content": " end"}, "vlattn": {**ask, "mass": masses[1], "diagonal": [[[0.5] * 2]]}},
        {"delta": {}, "vlattn": {**ask, "received_answer": [[[1.5, 0.75]] * 2], "queries": [3, 6]}},
    ]
    (tmp_path / "photo.png").write_bytes(b"a photo")
    more = ["--image", str(tmp_path / "photo.png"), "--page", str(tmp_path / "page.html")]
    with serving(*[f"data: {json.dumps({'choices': [chunk]})}" for chunk in chunks], "data: [DONE]") as (arguments, asked):
        MAIN([*arguments, *more])
    lines = capsys.readouterr().out.splitlines()
    statistics = ["mass", "diagonal", "received_answer", "image_entropy"]
    assert asked[0]["vlattn"] == {"statistics": statistics, "groups": "image|question|answer", "compact": True}
    assert asked[0]["stream"] and asked[0]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,YSBwaG90bw=="}},
        {"type": "text", "text": "Where?"},
    ]
    assert [line.split() for line in lines[1:]] == [["two", "<words>", "▉" * 9 + "▒" * 21], ["end", "▉" * 3 + "▒" * 9 + "░" * 18]]
    page = (tmp_path / "page.html").read_text()
    words = re.findall(r"/ ([\d.]+)\)\" title=\"([^\"]*)\">([^<]*)", page)
    assert re.findall(r"<b>(\w+)", page) == [
        "share_image",
        "share_question",
        "share_answer",
        "diagonal",
        "received_less_diagonal",
    ]
    assert words[:2] == [("0.50", "0.300", "two &lt;words&gt;"), ("0.00", "0.100", " end")]  # between 0.1 and 0.5
    # of the first token 1.5 / 2 - 0.25, of the second 0.75 - 0.5
    assert [value for _, value, _ in words[6:]] == ["0.375", "nan", "0.375", "nan"] and "0.250 to 0.500" in page
