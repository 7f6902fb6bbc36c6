"""Bytes of the numbers in an answer of 300 tokens, 3 layers and 4 heads, in each form that a request can ask for.

    python -m tests.helpers.answer_bytes

Rows go to results/answer-bytes.json.
"""

from __future__ import annotations

from tests.helpers.tiny import engine, prompts, sampling, saved

# isort: split
import json
from dataclasses import replace
from pathlib import Path

from vlattn_fast.benchmarks._records import append, provenance
from vlattn_vllm.attention import PER_TOKEN, Attention

RESULTS = Path(__file__).resolve().parents[2] / "results" / "answer-bytes.json"
TOKENS, PROMPT = 300, 300
ASKS = {
    "mass of 3 groups": {},
    "entropy": {"statistics": ["entropy"]},
    "received": {"statistics": ["received"]},
    "received, top 8": {"statistics": ["received"], "top": 8},
}


def main() -> None:
    llm = engine(saved("Llama", num_hidden_layers=3, max_position_embeddings=1024), max_model_len=1024)
    (prompt,) = prompts(PROMPT)
    origin, rows = provenance("python -m tests.helpers.answer_bytes"), []
    for name, ask in ASKS.items():
        attention = llm.generate([prompt], sampling(TOKENS, ask), use_tqdm=False)[0].outputs[0].attention
        chunks = in_chunks(attention) if "received" not in name else [attention]
        for compact in (False, True):
            row = {"answer": name, "compact": compact, "tokens": TOKENS, "prompt": PROMPT, "layers": 3, "heads": 4}
            rows.append(
                {**row, "bytes": size(attention, compact), "bytes_in_a_stream": sum(size(one, compact) for one in chunks)}
            )
            print(f"{name:18} {'compact' if compact else 'lists':8} {rows[-1]['bytes']:>8} {rows[-1]['bytes_in_a_stream']:>8}")
    append([{**row, **origin} for row in rows], RESULTS)


def in_chunks(attention: Attention) -> list[Attention]:
    """One for each token, as a stream has them if its client is in time."""
    given = {name: value for name in PER_TOKEN if (value := getattr(attention, name)) is not None}
    return [replace(attention, **{name: value[t : t + 1] for name, value in given.items()}) for t in range(TOKENS)]


def size(attention: Attention, compact: bool) -> int:
    return len(json.dumps(attention.to_dict(compact), separators=(",", ":")))


if __name__ == "__main__":
    main()
