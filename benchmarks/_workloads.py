"""The sizes of every benchmark: published models' on a GPU, and smaller sizes that two CPU cores can run.

B batch, H heads, N tokens, D head_dim; L text tokens, V image tokens. On a CPU batch and heads are smaller (SCAN: the number of
pairs; whole models: depth and width), and the longest sequence is shorter. A quick run on a CPU is smaller again, and ends in
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


def _workload(key: str, title: str, full: str, cpu: str, quick: str) -> Workload:
    return Workload(key, title, _sizes(full), _sizes(cpu), _sizes(quick))


CLIP = _workload("clip", "CLIP ViT-L/14@336", "B 64, H 16, N 577, D 64", "B 1, H 4", "H 1")
UNITER = _workload("uniter", "UNITER/LXMERT", "B 256, H 12, L 60, V 100, D 64", "B 4", "B 1")
CLIP_ROWS = _workload("clip-rows", "CLIP ViT-L/14@336, 256 rows", "B 64, H 16, N 577, D 64, T 256", "B 1, H 12", "H 2")
CLIP_WIDE = _workload("wide", "heads of 257 numbers", "B 64, H 4, N 577, D 257", "B 1", "H 1")
UNITER_DENSE = _workload("uniter-dense", "UNITER, no padding", "B 256, H 12, L 60, V 100, D 64, dense 1", "B 4", "B 1")
FEW_QUERIES = _workload("few-queries", "four queries of a decoder", "B 32, H 32, N 4, M 4096, D 128", "B 1, H 12", "M 1024")
ONE_QUERY = _workload("one-query", "one query of a decoder", "B 32, H 32, N 1, M 4096, D 128", "B 1, H 12", "M 1024")
LLAVA = _workload("llava", "LLaVA-7B", "B 4, H 32, N 704, D 128, causal 1", "B 1, H 4", "H 1")
# One layer of a decoder whose edges are cut or attributed
KNOCKOUTS = [
    LLAVA,
    _workload("llava-2048", "LLaVA-7B, 2,048 tokens", "B 1, H 32, N 2048, D 128, causal 1", "H 4", "H 1, N 1024"),
    _workload("llava-8192", "LLaVA-7B, 8,192 tokens", "B 1, H 32, N 8192, D 128, causal 1", "H 1", "N 2048"),
]
# One layer of a decoder over a long input, see task_long.py
_OF_QWEN = "B 1, H 28, Hkv 4, N {}, D 128, causal 1"
LONG = [
    _workload(f"long-{n}", f"Qwen2.5-VL-7B, {what}", _OF_QWEN.format(n), f"H {heads}, Hkv 1", "H 2, N 512")
    for n, what, heads in (
        *((n, f"{n:,} tokens", 7) for n in (8192, 16384, 32768)),
        (43152, "16 video frames", 7),
        (131072, "131,072 tokens", 1),
    )
]
TOKENS_2048 = _workload("tokens-2048", "2,048 tokens", "B 1, H 32, N 2048, D 64", "H 4", "H 1, N 512")
PACKED = _workload("packed", "16 packed documents", "B 1, H 32, N 4096, D 64, causal 1, documents 16", "H 8", "H 1, N 512")
TOKENS_8192 = _workload("tokens-8192", "8,192 tokens", "B 1, H 32, N 8192, D 64", "H 1", "N 512")
TOKENS_16384 = _workload("tokens-16384", "16,384 tokens", "B 1, H 8, N 16384, D 64", "H 1", "N 1024")
VIDEO = _workload("video", "16 video frames, one head", "B 1, H 1, N 43152, D 128, causal 1", "", "N 1024")
HIGHRES = _workload("highres", "high-resolution VLM", "B 1, H 32, N 16384, D 128, causal 1", "H 1, N 4096", "N 1024")
DECODER = _workload("decoder", "one token of a decoder", "B 32, Hkv 4, shared 8, M 8192, D 128", "B 1", "M 1024")
DECODER_PLAIN = _workload("decoder-plain", "one token, keys of each head", "B 8, Hkv 32, shared 1, M 8192, D 64", "B 1", "M 1024")
DECODER_LONG = _workload("decoder-long", "one token, long context", "B 4, Hkv 4, shared 8, M 131072, D 64", "B 1", "M 2048")
PAGED_ANSWERS = _workload(
    "paged-answers", "one token of 64 requests", "R 64, Hkv 8, shared 4, N 1, M 4096, D 128", "R 8, Hkv 2", "R 2, M 1024"
)
PAGED_PROMPT = _workload(
    "paged-prompt", "half of a prompt", "R 1, Hkv 8, shared 4, N 2048, M 4096, D 128", "Hkv 1, N 1024, M 2048", "N 256, M 512"
)
DELTA_RULE = _workload("delta-rule", "Qwen3-Next, 2,048 tokens", "B 1, H 32, N 2048, D 128, causal 1", "H 4", "H 1, N 512")
SCALAR_DECAY = _workload("scalar-decay", "Mamba-2, 2,048 tokens", "B 1, H 64, N 2048, D 128, causal 1", "H 4", "H 1, N 512")
SCAN = _workload(
    "scan", "SCAN", "images 128, captions 128, R 36, T 20, D 1024", "images 32, captions 32", "images 12, captions 12"
)
COLBERT = _workload("colbert", "ColBERT", "A 128, N 32, B 128, M 180, D 128", "A 32, B 32", "A 8, B 8")
COLPALI = _workload("colpali", "ColPali", "A 32, N 32, B 32, M 1030, D 128", "A 16, B 16", "A 4, B 4")
DAMSM = _workload(
    "damsm", "DAMSM", "images 128, captions 128, R 289, T 18, D 256", "images 16, captions 16", "images 6, captions 6"
)

# Whole models: C width; `every` = 3: the loss on every third sample, as IAIS takes the matched pairs among hard negatives.
CLIP_STREAM = _workload("clip-stream", "CLIP ViT-L/14@336's residual stream", "B 64, N 577, C 1024", "B 1", "N 100")
VIT_STREAM = _workload("vit-stream", "ViT-B/16's residual stream", "B 256, N 197, C 768", "B 8", "B 1")
CLIP_TOWER = _workload("clip-tower", "CLIP ViT-L/14@336's tower", "layers 24, B 64, H 16, N 577, D 64, C 1024", "B 1", "layers 1")
LLAVA_DECODER = _workload(
    "llava-decoder",
    "LLaVA-7B's decoder",
    "layers 32, B 4, H 32, N 704, D 128, causal 1, C 4096",
    "layers 4, B 1, H 4, C 512",
    "layers 1",
)
UNITER_ENCODER = _workload(
    "uniter-encoder", "UNITER-base", "layers 12, B 256, H 12, L 60, V 100, D 64, C 768, every 3", "layers 3, B 6", "layers 1, B 3"
)
# Training steps of ViT-B/16 on pictures of 224, 384, 512 and 1,024 pixels a side, with as many tokens a batch on a GPU
VIT_STEPS = [
    _workload(
        f"vit-{n}",
        f"ViT-B/16, {n} tokens",
        f"layers 12, B {-(-32 * 197 // n)}, H 12, N {n}, D 64, C 768",
        cpu,
        "layers 1, B 1, N 65, H 3, C 192",
    )
    for n, cpu in ((197, "B 2"), (577, "B 1"), (1025, "B 1, layers 6"), (4097, "B 1, layers 2"))
]
SCAN_BATCH = Workload("scan-batch", "SCAN, a training batch", SCAN.full, {}, _sizes("images 24, captions 24"))

# Whole models of transformers: on a CPU a reduced depth and width of decoders. CLIP's text tower has half the depth and three
# quarters of the heads, LXMERT's boxes and cross-attention half the layers, and T tokens are those of an answer.
CLIP_MODEL = _workload(
    "clip-model",
    "CLIP ViT-L/14@336, both towers",
    "layers 24, B 8, H 16, N 577, L 77, D 64, C 1024, vocabulary 49408",
    "B 1",
    "layers 2, H 4, C 256, vocabulary 1000",
)
LXMERT_MODEL = _workload(
    "lxmert-model",
    "LXMERT",
    "layers 9, B 64, H 12, L 20, V 36, D 64, C 768, vocabulary 30522",
    "B 8",
    "layers 1, B 2, vocabulary 1000",
)
LLAVA_MODEL = _workload(
    "llava-model",
    "LLaVA-7B, whole",
    "layers 32, vision_layers 24, B 1, H 32, N 704, D 128, C 4096, vocabulary 32000",
    "layers 12, vision_layers 4, H 8, C 1024",
    "layers 1, vision_layers 1, H 2, C 256, vocabulary 1000",
)
QWEN_MODEL = _workload(
    "qwen-model",
    "Qwen2.5-VL-3B, whole",
    "layers 36, vision_layers 32, B 1, H 16, N 704, D 128, C 2048, vocabulary 151936",
    "layers 16, vision_layers 4, H 8, C 1024, vocabulary 32000",
    "layers 1, vision_layers 1, H 2, C 256, vocabulary 1000",
)
# One forward pass an edge is slow, so the decoder has two layers on a GPU, too.
LLAVA_EDGES = LLAVA_MODEL._replace(
    key="llava-edges",
    title="LLaVA-7B, two layers",
    full={**LLAVA_MODEL.full, "layers": 2, "vision_layers": 1},
    cpu={"H": 4, "C": 512},
    quick={**LLAVA_MODEL.quick, "N": 176},
)
LLAVA_ANSWER = LLAVA_MODEL._replace(
    key="llava-answer",
    full={**LLAVA_MODEL.full, "T": 24},
    cpu={**LLAVA_MODEL.cpu, "layers": 3, "vision_layers": 2},
    quick={**LLAVA_MODEL.quick, "T": 2},
)
LLAVA_LONG_ANSWER = LLAVA_MODEL._replace(
    key="llava-answer-256",
    title="LLaVA-7B, 256 answer tokens",
    full={**LLAVA_MODEL.full, "T": 256},
    cpu={"layers": 2, "vision_layers": 1, "N": 352, "H": 2, "C": 256, "vocabulary": 1000},
    quick={"layers": 1, "N": 176, "T": 40},
)
QWEN_ANSWER = QWEN_MODEL._replace(
    key="qwen-answer",
    full={**QWEN_MODEL.full, "T": 24},
    cpu={**QWEN_MODEL.cpu, "layers": 2, "vision_layers": 1},
    quick={**QWEN_MODEL.quick, "T": 2},
)
