"""The sizes of benchmarks of whole tasks: C width, T tokens of an answer.

`every` = 3: the loss on every third sample, as IAIS takes the matched pairs among hard negatives.
"""

from __future__ import annotations

from vlattn_fast.benchmarks._workloads import SCAN, workload

# One layer of a decoder over a long input, see task_long.py
_OF_QWEN = "B 1, H 28, Hkv 4, N {}, D 128, causal 1"
LONG = [
    workload(f"long-{n}", f"Qwen2.5-VL-7B, {what}", _OF_QWEN.format(n), f"H {heads}, Hkv 1", "H 2, N 512")
    for n, what, heads in (
        *((n, f"{n:,} tokens", 7) for n in (8192, 16384, 32768)),
        (43152, "16 video frames", 7),
        (131072, "131,072 tokens", 1),
    )
]
CLIP_TOWER = workload("clip-tower", "CLIP ViT-L/14@336's tower", "layers 24, B 64, H 16, N 577, D 64, C 1024", "B 1", "layers 1")
UNITER_ENCODER = workload(
    "uniter-encoder", "UNITER-base", "layers 12, B 256, H 12, L 60, V 100, D 64, C 768, every 3", "layers 3, B 6", "layers 1, B 3"
)
# Training steps of ViT-B/16 on pictures of 224, 384, 512 and 1,024 pixels a side, with as many tokens a batch on a GPU
VIT_STEPS = [
    workload(
        f"vit-{n}",
        f"ViT-B/16, {n} tokens",
        f"layers 12, B {-(-32 * 197 // n)}, H 12, N {n}, D 64, C 768",
        cpu,
        "layers 1, B 1, N 65, H 3, C 192",
    )
    for n, cpu in ((197, "B 2"), (577, "B 1"), (1025, "B 1, layers 6"), (4097, "B 1, layers 2"))
]
SCAN_BATCH = SCAN._replace(key="scan-batch", title="SCAN, a training batch", cpu={}, quick={"images": 24, "captions": 24})

# Whole models of transformers: on a CPU a reduced depth and width of decoders. CLIP's text tower has half the depth and three
# quarters of the heads, LXMERT's boxes and cross-attention half the layers, and T tokens are those of an answer.
CLIP_MODEL = workload(
    "clip-model",
    "CLIP ViT-L/14@336, both towers",
    "layers 24, B 8, H 16, N 577, L 77, D 64, C 1024, vocabulary 49408",
    "B 1",
    "layers 2, H 4, C 256, vocabulary 1000",
)
LXMERT_MODEL = workload(
    "lxmert-model",
    "LXMERT",
    "layers 9, B 64, H 12, L 20, V 36, D 64, C 768, vocabulary 30522",
    "B 8",
    "layers 1, B 2, vocabulary 1000",
)
LLAVA_MODEL = workload(
    "llava-model",
    "LLaVA-7B, whole",
    "layers 32, vision_layers 24, B 1, H 32, N 704, D 128, C 4096, vocabulary 32000",
    "layers 12, vision_layers 4, H 8, C 1024",
    "layers 1, vision_layers 1, H 2, C 256, vocabulary 1000",
)
QWEN_MODEL = workload(
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
