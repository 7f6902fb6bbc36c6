"""What `va.explain` costs on whole models: `python -m vlattn_fast.benchmarks._whole_models` writes results/models-cpu.json.

Models have the sizes of published ones, at a reduced depth where the row says so, and random weights. Each variant runs in a
process of its own, so that peaks of memory are its own. *plain* is the model's pass with SDPA and the gradient at its embeddings.
*maps stored* takes the gradients of all maps in one backward pass through eager attention, *published* those of one layer at a
time (Chefer et al.), both with the whole N x N product. The published rules of LXMERT are not measured here.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vlattn_fast.benchmarks._rows import provenance

import vlattn_fast as va

RESULTS = Path(__file__).parent / "results" / "models-cpu.json"
VARIANTS = ("plain", "va.explain", "maps stored", "published")
ANSWER = 24  # tokens of the answers that each=True explains


def clip() -> tuple[Any, dict[str, Tensor]]:
    """CLIP ViT-L/14@336, 24 layers, 577 tokens."""
    import transformers as t

    config = t.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    return t.CLIPVisionModel(config), {"pixel_values": torch.randn(1, 3, 336, 336)}


def llava() -> tuple[Any, dict[str, Tensor]]:
    """LLaVA-7B, 4 of 32 layers, 704 tokens."""
    import transformers as t

    vision = t.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16, image_size=336, patch_size=14
    )
    text = t.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32, vocab_size=1000, pad_token_id=0
    )
    model = t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=999, image_token_index=999)
    )
    ids = torch.randint(3, 900, (1, 704))
    ids[:, 5:581] = 999
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}


def qwen() -> tuple[Any, dict[str, Tensor]]:
    """Qwen2.5-VL-3B, 6 of 36 layers, 640 tokens."""
    import transformers as t

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=1000,
        rope_parameters=rope,
    )
    vision = dict(
        depth=4, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, fullatt_block_indexes=[3]
    )
    special = dict(image_token_id=995, video_token_id=996, vision_start_token_id=993, vision_end_token_id=994)
    model = t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))
    ids = torch.randint(3, 900, (1, 576 + 64))
    ids[0, 4], ids[0, 5:581], ids[0, 581] = 993, 995, 994
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 995).int()}
    inputs |= {"pixel_values": torch.randn(48 * 48, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 48, 48]])}
    return model, inputs


def lxmert() -> tuple[Any, dict[str, Tensor]]:
    """LXMERT, 8 questions of 20 tokens, 36 boxes."""
    import transformers as t

    inputs = {"input_ids": torch.randint(3, 900, (8, 20)), "visual_feats": torch.randn(8, 36, 2048)}
    inputs["visual_pos"] = torch.rand(8, 36, 4)
    return t.LxmertForQuestionAnswering(t.LxmertConfig(vocab_size=1000)), inputs


MODELS = {"clip": clip, "llava": llava, "qwen": qwen, "lxmert": lxmert}


def _score(outputs: Any) -> Tensor:
    if hasattr(outputs, "question_answering_score"):
        return outputs.question_answering_score[:, 7]
    return outputs.logits[:, -1, 7] if hasattr(outputs, "logits") else outputs.pooler_output[:, 7]


def _runs(name: str, variant: str) -> Callable[[], object]:
    """One call of a variant; the model is made before."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval().requires_grad_(False)
    options = {"use_cache": False} if name in ("llava", "qwen") else {}
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        kept.append(output.requires_grad_())

    def plain() -> object:
        kept.clear()
        return torch.autograd.grad(_score(model(**inputs, **options)).sum(), kept)

    def stored(one_backward: bool) -> object:
        outputs = model(**inputs, **options, output_attentions=True)
        score, maps = _score(outputs).sum(), outputs.attentions
        grads = torch.autograd.grad(score, maps) if one_backward else None
        product = torch.eye(maps[0].shape[-1]).expand(len(maps[0]), -1, -1)
        for number, attention in enumerate(maps):
            grad = grads[number] if grads else torch.autograd.grad(score, attention, retain_graph=True)[0]
            product = product + (attention.detach() * grad).clamp(min=0).mean(1) @ product
        return product

    if variant == "va.explain":
        return lambda: va.explain(model, inputs, target=_score)
    if variant == "answer":
        return lambda: va.explain(model, inputs, answer=list(range(10, 10 + ANSWER)))
    embeddings = model.embeddings if name == "clip" else model.get_input_embeddings()
    embeddings.register_forward_hook(keep)
    if variant == "plain":
        return plain
    model.set_attn_implementation("eager")
    return lambda: stored(variant == "maps stored")


def _measure(name: str, variant: str, rounds: int) -> dict[str, float]:
    run = _runs(name, variant)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        run()
        if number:  # the first warms up
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds), "peak_mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "VARIANT"), help="one variant in this process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measure(*options.one, options.rounds)))
        return
    rows, origin = [], provenance(f"python -m {__spec__.name} --rounds {options.rounds}")
    for name, make in MODELS.items():
        variants = {"lxmert": ("plain", "va.explain"), "llava": (*VARIANTS, "answer")}.get(name, VARIANTS)
        title = str(make.__doc__).rstrip(".")
        for variant in variants:
            command = [sys.executable, "-m", __spec__.name, "--one", name, variant, "--rounds", str(options.rounds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"model": title, "variant": variant, **json.loads(done.stdout.splitlines()[-1]), **origin})
            print(f"{name}, {variant}: {rows[-1]['seconds']:.3f} s, {rows[-1]['peak_mib']:.0f} MiB", flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
