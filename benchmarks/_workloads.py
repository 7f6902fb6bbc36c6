"""The sizes of every benchmark: published models' on a GPU, and smaller sizes that two CPU cores can run.

B batch, H heads, N tokens, D head_dim; L text tokens, V image tokens. On a CPU batch and heads are smaller (SCAN: the number of
pairs), and the longest sequence is shorter. A quick run on a CPU is smaller again, and ends in
two minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

Sizes = Mapping[str, int]


class Workload(NamedTuple):
    key: str
    title: str
    full: Sizes
    cpu: Sizes  # sizes that differ on a CPU
    quick: Sizes  # sizes that differ further in a quick run on a CPU

    def sizes(self, device: torch.device, overrides: Sizes | None = None, quick: bool = False) -> dict[str, int]:
        """overrides: the largest value by name, for a trial at small sizes."""
        sizes = dict(self.full)
        if device.type == "cpu":
            sizes |= {**self.cpu, **(self.quick if quick else {})}
        return {name: min(size, (overrides or {}).get(name, size)) for name, size in sizes.items()}


def _sizes(text: str) -> Sizes:
    """Sizes by name, written as "B 64, H 16"."""
    return {name: int(size) for name, size in (pair.split() for pair in text.split(", ") if pair)}


def workload(key: str, title: str, full: str, cpu: str, quick: str) -> Workload:
    return Workload(key, title, _sizes(full), _sizes(cpu), _sizes(quick))


CLIP = workload("clip", "CLIP ViT-L/14@336", "B 64, H 16, N 577, D 64", "B 1, H 4", "H 1")
UNITER = workload("uniter", "UNITER/LXMERT", "B 256, H 12, L 60, V 100, D 64", "B 4", "B 1")
CLIP_ROWS = workload("clip-rows", "CLIP ViT-L/14@336, 256 rows", "B 64, H 16, N 577, D 64, T 256", "B 1, H 12", "H 2")
CLIP_WIDE = workload("wide", "heads of 257 numbers", "B 64, H 4, N 577, D 257", "B 1", "H 1")
UNITER_DENSE = workload("uniter-dense", "UNITER, no padding", "B 256, H 12, L 60, V 100, D 64, dense 1", "B 4", "B 1")
FEW_QUERIES = workload("few-queries", "four queries of a decoder", "B 32, H 32, N 4, M 4096, D 128", "B 1, H 12", "M 1024")
ONE_QUERY = workload("one-query", "one query of a decoder", "B 32, H 32, N 1, M 4096, D 128", "B 1, H 12", "M 1024")
LLAVA = workload("llava", "LLaVA-7B", "B 4, H 32, N 704, D 128, causal 1", "B 1, H 4", "H 1")
LONG_LLAVA = [
    workload("llava-2048", "LLaVA-7B, 2,048 tokens", "B 1, H 32, N 2048, D 128, causal 1", "H 4", "H 1, N 1024"),
    workload("llava-8192", "LLaVA-7B, 8,192 tokens", "B 1, H 32, N 8192, D 128, causal 1", "H 1", "N 2048"),
]
TOKENS_2048 = workload("tokens-2048", "2,048 tokens", "B 1, H 32, N 2048, D 64", "H 4", "H 1, N 512")
PACKED = workload("packed", "16 packed documents", "B 1, H 32, N 4096, D 64, causal 1, documents 16", "H 8", "H 1, N 512")
TOKENS_8192 = workload("tokens-8192", "8,192 tokens", "B 1, H 32, N 8192, D 64", "H 1", "N 512")
TOKENS_16384 = workload("tokens-16384", "16,384 tokens", "B 1, H 8, N 16384, D 64", "H 1", "N 1024")
VIDEO = workload("video", "16 video frames, one head", "B 1, H 1, N 43152, D 128, causal 1", "", "N 1024")
HIGHRES = workload("highres", "high-resolution VLM", "B 1, H 32, N 16384, D 128, causal 1", "H 1, N 4096", "N 1024")
DECODER = workload("decoder", "one token of a decoder", "B 32, Hkv 4, shared 8, M 8192, D 128", "B 1", "M 1024")
DECODER_PLAIN = workload("decoder-plain", "one token, keys of each head", "B 8, Hkv 32, shared 1, M 8192, D 64", "B 1", "M 1024")
DECODER_LONG = workload("decoder-long", "one token, long context", "B 4, Hkv 4, shared 8, M 131072, D 64", "B 1", "M 2048")
PAGED_ANSWERS = workload(
    "paged-answers", "one token of 64 requests", "R 64, Hkv 8, shared 4, N 1, M 4096, D 128", "R 8, Hkv 2", "R 2, M 1024"
)
PAGED_PROMPT = workload(
    "paged-prompt", "half of a prompt", "R 1, Hkv 8, shared 4, N 2048, M 4096, D 128", "Hkv 1, N 1024, M 2048", "N 256, M 512"
)
DELTA_RULE = workload("delta-rule", "Qwen3-Next, 2,048 tokens", "B 1, H 32, N 2048, D 128, causal 1", "H 4", "H 1, N 512")
SCALAR_DECAY = workload("scalar-decay", "Mamba-2, 2,048 tokens", "B 1, H 64, N 2048, D 128, causal 1", "H 4", "H 1, N 512")
SCAN = workload(
    "scan", "SCAN", "images 128, captions 128, R 36, T 20, D 1024", "images 32, captions 32", "images 12, captions 12"
)
COLBERT = workload("colbert", "ColBERT", "A 128, N 32, B 128, M 180, D 128", "A 32, B 32", "A 8, B 8")
COLPALI = workload("colpali", "ColPali", "A 32, N 32, B 32, M 1030, D 128", "A 16, B 16", "A 4, B 4")
DAMSM = workload(
    "damsm", "DAMSM", "images 128, captions 128, R 289, T 18, D 256", "images 16, captions 16", "images 6, captions 6"
)

# C: width
CLIP_STREAM = workload("clip-stream", "CLIP ViT-L/14@336's residual stream", "B 64, N 577, C 1024", "B 1", "N 100")
VIT_STREAM = workload("vit-stream", "ViT-B/16's residual stream", "B 256, N 197, C 768", "B 8", "B 1")
