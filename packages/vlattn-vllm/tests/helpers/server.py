"""Scenario: vLLM's OpenAI server. Streams, answers at once, a cancelled stream, a killed client, wrong asks; and the example.

`pooling`: the server of a model of embeddings. `another_version`: the server where the plug-in is for another version of vLLM.
Both refuse every ask. `limits`: one request that asks at a time, and no edits. `alibi`: a model that only the worker refuses;
`chunks`: one of which it refuses some layers; `faults`: each method that the plug-in wraps fails in turn.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.tiny import Maps, close, everything, saved, with_tokenizer
from vlattn_vllm import collect
from vlattn_vllm.attention import Attention, joined
from vlattn_vllm.guard import ANSWERED

PORT = 18357
URL = f"http://127.0.0.1:{PORT}"
WORDS = " ".join(f"w{number}" for number in range(20, 60))
ASK = everything()
EDIT = {"layers": [1], "steer": [{"keys": [0, 4], "weight": 0}]}
ROOT = Path(__file__).resolve().parents[2]
ANOTHER_VERSION = """
import runpy
from vlattn_vllm import plugin
plugin.SUPPORTED = ("0.1.0", "0.2.0")
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
"""
NO_PLACE = "has no place for 'vlattn'; ask at /v1/completions or /v1/chat/completions"
FAULTS = "from tests.helpers import faults"
MORE = {
    "": ["--vlattn-edits"],
    "pooling": ["--runner", "pooling"],
    "limits": ["--vlattn-max-asks", "1"],
    "chunks": ["--vlattn-edits", "--block-size", "32"],
    "faults": ["--vlattn-edits"],
}
CHUNKS = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_hidden_layers": 4, "head_dim": 32, "attention_chunk_size": 32}
MODELS: dict[str, Any] = {"alibi": {"kind": "Bloom"}, "chunks": {"kind": "Llama4Text", "of": "Llama4ForCausalLM", **CHUNKS}}


def main(kind: str = "") -> None:
    folder = with_tokenizer(saved(**MODELS.get(kind, {"kind": "Llama"})))  # Qwen 2 has a class of tokenizers of its own
    start = ["-c", ANOTHER_VERSION] if kind == "another_version" else ["-m", "vllm.entrypoints.openai.api_server"]
    command = [sys.executable, *start, "--model", folder, "--served-model-name", "tiny"]
    options = ["--port", str(PORT), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    log = Path(folder, "server.log")
    with log.open("w") as file:
        variables = {**os.environ, "VLLM_LOG_STATS_INTERVAL": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        if kind == "faults":  # in each of its processes
            Path(folder, "sitecustomize.py").write_text(FAULTS)
            variables |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "VLATTN_FAULT": f"{folder}/fault"}
            variables["TORCHDYNAMO_DISABLE"] = "1"
            fails(folder)
        command += [*options, *MORE.get(kind, ())]
        server = subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)
    parts = {"another_version": another_version, "pooling": pooling, "alibi": alibi, "limits": limits, "chunks": chunked}
    try:
        wait(server)
        {**parts, "faults": lambda: failed(folder), "": lambda: whole(folder)}[kind]()
    finally:
        server.terminate()
        server.wait()
        print(log.read_text())


def another_version() -> None:
    every_endpoint("needs vLLM 0.1.0 or 0.2.0 and found", ())
    assert answer("/v1/completions", prompt=WORDS)["choices"]


def pooling() -> None:
    every_endpoint(NO_PLACE, ANSWERED)
    assert answer("/v1/embeddings", input=WORDS)["data"] and answer("/pooling", input=WORDS)["data"]


def whole(folder: str) -> None:
    every_endpoint(NO_PLACE, ANSWERED)
    maps = Maps(folder)
    completions(maps)
    chats(maps)
    collected(maps)
    many_edits()
    refusals()
    clients_that_go()
    counted = counters()
    assert counted["asks_total"] > 10 and counted["refused_total ask"] > 20 and counted["bytes_total"] > 10_000, counted
    assert counted["refused_total endpoint"] > 20 and counted["seconds_sum"] > 0 and counted["seconds_count"] > 10, counted
    page = Path(folder, "page.html")
    options = f"--model tiny --url {URL} --tokens 5 --page {page}".split()
    example = [sys.executable, str(ROOT / "examples/served_attention.py"), WORDS, *options]
    printed = subprocess.run(example, capture_output=True, text=True, check=True).stdout
    assert printed.count(" w") == 5 and printed.count("▒") > 20 * (len(printed.splitlines()) - 1) > 20, printed
    assert page.read_text().count("<p>") == 5 and "nan" in page.read_text()


def wait(server: subprocess.Popen[bytes]) -> None:
    """Until it answers, or ends."""
    while True:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{URL}/health").close()
            return
        except OSError:
            time.sleep(1)


def posted(path: str, body: bytes = b"", **fields: Any) -> Any:
    """The answer to a request with these fields, or with this body."""
    usual = {"model": "tiny", "temperature": 0, "ignore_eos": True, "max_tokens": 6, "return_token_ids": True}
    body = body or json.dumps({**usual, **fields}).encode()
    return urllib.request.urlopen(urllib.request.Request(URL + path, body, {"Content-Type": "application/json"}))


def answer(path: str, **body: Any) -> Any:
    with posted(path, **body) as response:
        return json.loads(response.read())


def chunks(path: str, **body: Any) -> list[Any]:
    with posted(path, stream=True, **body) as response:
        lines = [line.decode().removeprefix("data: ").strip() for line in response]
    return [json.loads(line) for line in lines if line.startswith("{")]


def completions(maps: Maps) -> None:
    prompt = list(range(20, 60))
    (choice,) = answer("/v1/completions", prompt=WORDS, vlattn=ASK)["choices"]
    checked(maps, choice["vlattn"], prompt, choice["token_ids"])
    (compact,) = answer("/v1/completions", prompt=WORDS, vlattn={**ASK, "top": 5, "compact": True})["choices"]
    some, whole = Attention.from_dict(compact["vlattn"]), Attention.from_dict(choice["vlattn"])
    torch.testing.assert_close(some.mass, whole.mass, rtol=1e-3, atol=1e-7)
    values, tokens = whole.received.topk(5)
    torch.testing.assert_close(some.received, values, rtol=1e-3, atol=0)
    assert torch.equal(some.tokens, tokens) and len(json.dumps(compact["vlattn"])) < len(json.dumps(choice["vlattn"])) / 4
    (plain,) = answer("/v1/completions", prompt=WORDS)["choices"]
    assert "vlattn" not in plain and plain["token_ids"] == choice["token_ids"]
    parts = chunks("/v1/completions", prompt=WORDS, vlattn=ASK)
    spoken = [choice for chunk in parts for choice in chunk["choices"] if choice.get("token_ids")]
    for one in spoken:  # as many as the client was in time for: the server joins the tokens of a slow one
        assert len(one["vlattn"]["mass"]) == len(one["token_ids"]), "the numbers come with their tokens"
    assert not any("received" in one["vlattn"] for one in spoken[:-1])
    whole = joined([Attention.from_dict(one["vlattn"]) for one in spoken])
    checked(maps, whole.to_dict(), prompt, choice["token_ids"], first=whole.queries[0])
    two = chunks("/v1/completions", prompt=[prompt, prompt[:20]], n=2, vlattn=ASK, temperature=1.5, seed=1)
    counts = [
        sum(len(c["vlattn"]["mass"]) for chunk in two for c in chunk["choices"] if c["index"] == i and "vlattn" in c)
        for i in range(4)
    ]
    assert counts == [6] * 4, counts
    both = answer("/v1/completions", prompt=[prompt, prompt[:20]], n=2, best_of=2, vlattn=ASK, temperature=1.5, seed=1)["choices"]
    for number, choice in enumerate(both):
        first = choice["vlattn"]["queries"][0]
        checked(maps, choice["vlattn"], [prompt, prompt[:20]][number // 2], choice["token_ids"], first)
    (echoed,) = answer("/v1/completions", prompt=WORDS, echo=True, return_token_ids=False, vlattn=ASK)["choices"]
    assert echoed["text"].startswith("w20 w21") and len(echoed["vlattn"]["mass"]) == 6
    assert not any("vlattn" in choice for chunk in chunks("/v1/completions", prompt=WORDS) for choice in chunk["choices"])


def chats(maps: Maps) -> None:
    messages, prompt = [{"role": "user", "content": WORDS}], [3, *range(20, 60), 4]
    whole = answer("/v1/chat/completions", messages=messages, vlattn=ASK)
    (choice,) = whole["choices"]
    checked(maps, choice["vlattn"], prompt, choice["token_ids"], first=choice["vlattn"]["queries"][0])
    several = answer("/v1/chat/completions", messages=messages, vlattn=ASK, n=2, temperature=1.5, seed=1)["choices"]
    for one in several:
        checked(maps, one["vlattn"], prompt, one["token_ids"], first=one["vlattn"]["queries"][0])
    assert several[0]["token_ids"] != several[1]["token_ids"]
    parts = [c for chunk in chunks("/v1/chat/completions", messages=messages, vlattn=ASK) for c in chunk["choices"]]
    assert "vlattn" not in parts[0] and parts[0]["delta"]["role"] == "assistant"
    attention = joined([Attention.from_dict(one["vlattn"]) for one in parts if "vlattn" in one])
    checked(maps, attention.to_dict(), prompt, choice["token_ids"], first=attention.queries[0])


def checked(maps: Maps, numbers: dict[str, Any], prompt: list[int], tokens: list[int], first: int = 0) -> None:
    maps.check(SimpleNamespace(attention=Attention.from_dict(numbers), token_ids=tokens), prompt, first)


def collected(maps: Maps) -> None:
    """Texts, token ids and chats; a prompt that is too long; edits; what is there already is not asked again."""
    out = Path(tempfile.mkdtemp()) / "answers"
    some = [WORDS, [*range(30, 50)], [{"role": "user", "content": WORDS}], [5] * 300]
    params = {"max_tokens": 5, "temperature": 1.5, "n": 2, "ignore_eos": True}
    answers = collect(URL, some, out, everything(), params=params, ids=["a", "b", "c", "d"])
    assert answers.ids == ["a/0", "a/1", "b/0", "b/1", "c/0", "c/1"] and [one["id"] for one in answers.failures] == ["d"]
    assert "256" in answers.failures[0]["error"], answers.failures
    assert all(answer.text.split() for answer in answers), [answer.text for answer in answers]
    whole = [*range(20, 60)], [*range(30, 50)], [3, *range(20, 60), 4]
    for answer, prompt in zip(answers, [prompt for prompt in whole for _ in range(2)], strict=True):
        checked(maps, answer.attention.to_dict(), prompt, answer.tokens, answer.attention.queries[0])
    before = counters()["asks_total"]
    assert collect(URL, some, out, everything(), params=params, ids=["a", "b", "c", "d"]).ids == answers.ids
    assert counters()["asks_total"] == before
    cut = everything(steer=[va.Knockout(keys=(3, 5))], compact=True)
    (edited,) = collect(URL, [WORDS], out.with_name("edited"), cut, params={"max_tokens": 5, "temperature": 0})
    assert edited.attention.received[:, :, 3:5].abs().max() == 0 and edited.attention.received[:, :, :3].min() > 0
    with pytest.raises(ValueError, match="earlier runs"):
        collect(URL, some, out, {}, params=params)


def many_edits() -> None:
    """300 edits that add up to one, and more sets of tokens than there may be."""
    many = [{"keys": [3, 5], "heads": [number % 4], "layers": [number // 4 % 2], "weight": 0} for number in range(300)]
    one = [{"keys": [3, 5], "weight": 0}]
    first, second = (answer("/v1/completions", prompt=WORDS, vlattn=everything(steer=each))["choices"][0] for each in (many, one))
    assert first["token_ids"] == second["token_ids"]
    close(*(Attention.from_dict(each["vlattn"]).mass for each in (first, second)))
    sets = [{"keys": [number, number + 1], "weight": 2} for number in range(17)]
    refused("/v1/completions", "at most 16 groups of keys", prompt=WORDS, vlattn={"steer": sets})


def counters() -> dict[str, float]:
    """By name, and after a space the reason of a refusal."""
    with urllib.request.urlopen(f"{URL}/metrics") as response:
        lines = [line.split() for line in response.read().decode().splitlines() if line.startswith("vlattn:")]
    return {re.sub(r'{reason="(.*)"}', r" \1", name.removeprefix("vlattn:")): float(value) for name, value in lines}


def limits() -> None:
    """While one request asks, others with an ask get the status 429, and those without run. Samples count once."""
    busy = {"prompt": WORDS, "max_tokens": 200, "vlattn": ASK}
    stream = posted("/v1/completions", stream=True, n=3, temperature=1, **busy)
    stream.readline()
    for streamed in (False, True):
        refused("/v1/completions", "1 requests with 'vlattn' run already", 429, prompt=WORDS, vlattn=ASK, stream=streamed)
    assert answer("/v1/completions", prompt=WORDS)["choices"]
    assert counters()["asks_total"] == 1 and counters()["refused_total busy"] == 2
    stream.close()
    until_idle()
    assert answer("/v1/completions", prompt=WORDS, vlattn=ASK)["choices"][0]["vlattn"]
    edits = {"steer": [{"keys": [0, 4], "weight": 0}]}
    refused("/v1/completions", "this server allows no edits (it runs without --vlattn-edits)", prompt=WORDS, vlattn=edits)
    messages = [{"role": "user", "content": WORDS}]
    refused("/v1/chat/completions", "--vlattn-edits", messages=messages, vlattn=edits, stream=True)


def chunked() -> None:
    """A request that edits such a layer ends with the status 400; one that edits another layer does not; others see neither."""
    edit = {"keys": [0, 4], "weight": 0}
    (alone,) = answer("/v1/completions", prompt=WORDS)["choices"]
    with ThreadPoolExecutor(3) as pool:
        plain = pool.submit(answer, "/v1/completions", prompt=WORDS)
        words = "model.layers.0.self_attn.attn, which attends within chunks"
        ended = pool.submit(refused, "/v1/completions", words, prompt=WORDS, vlattn={"steer": [edit], "statistics": []})
        some = {"layers": [3], "steer": [{**edit, "layers": [3]}]}
        edited = pool.submit(answer, "/v1/completions", prompt=WORDS, vlattn=some)
        ended.result()
        assert plain.result()["choices"][0]["token_ids"] == alone["token_ids"]
        assert len(edited.result()["choices"][0]["vlattn"]["mass"]) == 6
    until_idle()


def fails(folder: str, name: str = "", after: bool = False) -> None:
    """From now on this fails, in each process of the server."""
    text = json.dumps({"name": name, "after": after})
    Path(folder, "new").write_text(text)
    Path(folder, "new").rename(Path(folder, "fault"))


def failed(folder: str) -> None:
    """Each method that the plug-in wraps fails in turn. Those who ask get numbers or a reason; a plain request beside them gets
    its tokens and their log-probabilities; the server goes on."""
    plain = {"prompt": " ".join(f"w{number}" for number in range(90, 120)), "logprobs": 3}
    asks = [{"vlattn": ask, "prompt": WORDS, "stream": stream} for ask in (ASK, EDIT) for stream in (False, True)]
    alone, refusals = answer("/v1/completions", **plain)["choices"][0], 0
    first = "_execute_model _sample_tokens _process_outputs _update_from_output _preempt_request _add _dispatch"
    names = [*first.split(), "_created", "_completion", "_completion_chunks", "_process_inputs", "_add_request", ""]
    for name, after in [(name, after) for name in names for after in (False, True) if not (after and name == "_created")]:
        fails(folder, name, after)
        with ThreadPoolExecutor(5) as pool:
            others = [pool.submit(ended, **ask) for ask in asks]
            (beside,) = pool.submit(answer, "/v1/completions", **plain).result()["choices"]
            reasons = [other.result() for other in others]
        assert beside["token_ids"] == alone["token_ids"] and "vlattn" not in beside, (name, after)
        close(*(torch.tensor(one["logprobs"]["token_logprobs"]) for one in (beside, alone)))
        silent = name in ("", "_add", "_preempt_request", "_dispatch") or (name, after) == ("_update_from_output", True)
        assert silent or any(reasons), (name, after)
        assert name or not any(reasons), reasons
        refusals += sum(map(bool, reasons))
        until_idle()
    assert refusals > 20, refusals


def ended(**body: Any) -> str:
    """Why a request that asks has no numbers, or only some; empty if it has them."""
    try:
        text = posted("/v1/completions", **body).read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode() or str(error.code)
    return "" if '"vlattn"' in text and '"refused"' not in text and '"error"' not in text else text


def alibi() -> None:
    """Only the worker sees it, when the model runs: no token leaves before the status."""
    for n in (1, 2):
        for stream in (False, True):
            body = {"vlattn": {}, "n": n, "stream": stream, "temperature": 1}
            refused("/v1/completions", "ALiBi", prompt=WORDS, **body)
            refused("/v1/chat/completions", "ALiBi", messages=[{"role": "user", "content": "w9"}], **body)
    until_idle()
    assert len(answer("/v1/completions", prompt=WORDS)["choices"][0]["token_ids"]) == 6


def refused(path: str, words: str, status: int = 400, **body: Any) -> None:
    """This status, with these words in the message."""
    with pytest.raises(urllib.error.HTTPError) as error:
        posted(path, **body).read()
    message = json.loads(error.value.read())["error"]["message"]
    assert error.value.code == status and words in message, (path, body, error.value.code, message)


def every_endpoint(words: str, answered: tuple[str, ...]) -> None:
    """All that the server lists, with a model for it or without."""
    with urllib.request.urlopen(f"{URL}/openapi.json") as response:
        paths = {path for path, methods in json.loads(response.read())["paths"].items() if "post" in methods}
    assert len(paths) > 5, paths
    for path in {*paths, "/v1/responses", "/v1/messages", "/pooling", "/score", *ANSWERED} - {*answered}:
        for stream in (False, True):
            refused(path, words, vlattn={"statistics": ["median"]}, input=WORDS, prompt=WORDS, stream=stream)
        refused(path, words, sampling_params={"extra_args": {"vlattn": ASK}}, token_ids=[5, 6, 7])
        written = json.dumps({"model": "tiny", "input": WORDS, "prompt": WORDS, "vlattn": ASK})
        for body in (written.replace("vlattn", "vl\\u0061ttn").encode(), written.encode("utf-16")):
            refused(path, words, body=body)


def refusals() -> None:
    """Wrong asks, with the same status in streams; beams, which have no numbers."""
    wrong = {
        "must be at most 1; got 7": {"layers": [7]},
        "statistics must be among": {"statistics": ["median"]},
        "groups['a'] must be a list of at least one": {"groups": {"a": []}},
        "must be at least 4; got 3": {"groups": {"a": [[3, 3]]}},
        "tokens of the prompt and its longest answer; got [9000, 9005]": {"groups": {"a": [[9000, 9005]]}},
        "groups must name each once": {"groups": "image|image"},
        "must be a dict": None,
    }
    for path, body in (
        ("/v1/completions", {"prompt": WORDS}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w9"}]}),
    ):
        for stream in (False, True):
            for words, ask in wrong.items():
                refused(path, words, vlattn=ask, stream=stream, **body)
            refused(path, "vlattn must be a dict", vllm_xargs={"vlattn": "mass"}, stream=stream, **body)
        for ask in ({"vlattn": ASK}, {"vllm_xargs": {"vlattn": "mass"}}):
            refused(path, "ask without use_beam_search", use_beam_search=True, n=2, **ask, **body)
        assert len(answer(path, use_beam_search=True, n=2, **body)["choices"]) == 2


def clients_that_go() -> None:
    """A client that closes its connection, and one that is killed, in the middle of a stream."""
    body = {"model": "tiny", "prompt": WORDS, "ignore_eos": True, "max_tokens": 180, "stream": True, "vlattn": ASK}
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    connection.close()
    client = subprocess.Popen(
        ["curl", "-sN", f"{URL}/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)],
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    client.stdout.readline()
    client.kill()  # SIGKILL
    client.wait()
    until_idle()
    (choice,) = answer("/v1/completions", prompt="w9 w8 w7 w6 w5 w4", vlattn=ASK)["choices"]
    assert torch.tensor(choice["vlattn"]["mass"]).shape == (6, 2, 4, 2)


def until_idle() -> None:
    def idle() -> bool:
        with urllib.request.urlopen(f"{URL}/metrics") as response:
            running = [line for line in response.read().decode().splitlines() if line.startswith("vllm:num_requests_running")]
        return all(line.endswith(" 0.0") for line in running)

    until(idle, "an idle server")


def until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(120):
        if holds():
            return
        time.sleep(0.5)
    raise AssertionError(f"no {what} after a minute")


if __name__ == "__main__":
    main(*sys.argv[1:])
