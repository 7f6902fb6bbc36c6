"""Ask a served model where it looks: the attention on image, question and answer beside each word, while the words arrive; and a
page that colours the words by their numbers of grounding.

The server is vLLM's own, where vlattn_vllm is installed (README.md). On this side vlattn_vllm needs no vLLM.

    python -m vllm.entrypoints.openai.api_server --model MODEL
    python examples/served_attention.py "What is on the table?" --image photo.png --model MODEL --page answer.html
"""

import argparse
import base64
import html
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from vlattn_vllm.attention import Attention, joined

GROUPS = ("image", "question", "answer")
MARKS = "▉▒░"  # one for each group
WIDTH = 30


def streamed(url: str, model: str, question: str, image: str | None = None, tokens: int = 64) -> Iterator[tuple[str, Attention]]:
    """(text, numbers) of each chunk of the answer."""
    statistics, content = ["mass", "diagonal", "received_answer"], [{"type": "text", "text": question}]
    if image is not None:
        data = base64.b64encode(Path(image).read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/{Path(image).suffix[1:]};base64,{data}"}})
        statistics.append("image_entropy")
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "stream": True,
        "vlattn": {"statistics": statistics, "groups": "|".join(GROUPS), "compact": True},
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
            if "error" in chunk:  # after the first tokens, with no status of its own
                raise SystemExit(f"the server stopped: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                if "vlattn" in choice:
                    yield choice["delta"].get("content") or "", Attention.from_dict(choice["vlattn"])


def bar(numbers: dict[str, Tensor]) -> str:
    shares = [float(numbers[f"share_{group}"].mean()) for group in GROUPS]
    return "".join(mark * round(share * WIDTH) for mark, share in zip(MARKS, shares, strict=True))


def page(words: list[tuple[str, int]], numbers: dict[str, Tensor]) -> str:
    """The answer once for each number of grounding, its words (texts with their counts of tokens) the redder, the more."""
    paragraphs = []
    for name, values in numbers.items():
        low, high = (float(x) for x in values[~values.isnan()].aminmax()) if not values.isnan().all() else (0.0, 0.0)
        spans = []
        for (text, _), some in zip(words, values.split([count for _, count in words]), strict=True):
            value = float(some.nanmean())  # NaN for the last token, which has no query of its own
            alpha = (value - low) / (high - low) if high > low and value == value else 0.0
            spans.append(f'<span style="background: rgb(220 50 47 / {alpha:.2f})" title="{value:.3f}">{html.escape(text)}</span>')
        paragraphs.append(f"<p><b>{name}</b>, {low:.3f} to {high:.3f}<br>{''.join(spans)}</p>")
    return '<!doctype html><meta charset="utf-8">' + "\n".join(paragraphs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--model", required=True)
    parser.add_argument("--image", help="a file")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--page", type=Path, help="where the page goes")
    options = parser.parse_args(arguments)
    print(" ".join(f"{mark} {name}" for mark, name in zip(MARKS, GROUPS, strict=True)))
    words, parts = [], []
    for text, part in streamed(options.url, options.model, options.question, options.image, options.tokens):
        parts.append(part)
        if part.mass is not None:  # what tokens receive may come by itself
            words.append((text, len(part.mass)))
            print(f"{text.strip():>16} {bar(part.grounding())}", flush=True)
    if options.page and words:
        options.page.write_text(page(words, joined(parts).grounding()), encoding="utf-8")


if __name__ == "__main__":
    main()
