"""Ask a served model where it looks: the mass on image, question and answer beside each word, while the words arrive.

The server is vLLM's own, where vlattn_vllm is installed (README.md):

    python -m vllm.entrypoints.openai.api_server --model MODEL
    python examples/served_attention.py "What is on the table?" --model MODEL
"""

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator

GROUPS = ("image", "question", "answer")
MARKS = "▉▒░"  # one for each group
WIDTH = 30


def streamed(url: str, model: str, question: str, tokens: int = 64) -> Iterator[tuple[str, dict]]:
    """(text, numbers) of each chunk of the answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "stream": True,
        "vlattn": {"statistics": ["mass"], "groups": "|".join(GROUPS)},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        response = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"the server refused the request: {error.read().decode()}") from None
    with response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if not data.startswith("{"):
                continue
            chunk = json.loads(data)
            if "error" in chunk:  # behind the first tokens, with no status of its own
                raise SystemExit(f"the server stopped: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                if "vlattn" in choice:
                    yield choice["delta"].get("content") or "", choice["vlattn"]


def mean(values: list) -> list[float]:
    """The mean over all axes of nested lists but the last: tokens, layers and heads."""
    if not isinstance(values[0], list):
        return values
    parts = [mean(value) for value in values]
    return [sum(column) / len(parts) for column in zip(*parts, strict=True)]


def bar(masses: list[float]) -> str:
    return "".join(mark * round(mass * WIDTH) for mark, mass in zip(MARKS, masses, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    print(" ".join(f"{mark} {name}" for mark, name in zip(MARKS, GROUPS, strict=True)))
    for text, numbers in streamed(options.url, options.model, options.question, options.tokens):
        if numbers.get("mass"):
            print(f"{text.strip():>16} {bar(mean(numbers['mass']))}", flush=True)


if __name__ == "__main__":
    main()
