"""What one relevancy map costs: the published procedure, its one-backward variant, ours, and the model's own passes.

The model has the size of CLIP ViT-L/14@336 and random weights. Every variant runs in a process of its own, so that its peak
memory is its own; the parent starts the runs in turns, so that a busy moment of the machine hits all of them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def vision_model(sizes: dict[str, int]) -> Any:
    """A CLIP vision tower with frozen random weights: normal, by fan-in, so that attention is uneven as in a trained model."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.initialization import no_init_weights

    config: dict[str, Any] = {**sizes}
    with no_init_weights():
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.eval().requires_grad_(False)


def picture(sizes: dict[str, int]) -> Tensor:
    size = sizes["image_size"]
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def similarity(outputs: Any) -> Tensor:
    """(B) scores: cosine of the image with a fixed random text."""
    embeds = outputs.image_embeds
    text = torch.randn(embeds.shape[-1], generator=torch.Generator().manual_seed(2), dtype=embeds.dtype)
    return torch.nn.functional.cosine_similarity(embeds, text[None])


def plain(model: Any, pixels: Tensor) -> None:
    """Forward and backward with SDPA, down to the picture: the least any gradient explanation does."""
    model.set_attn_implementation("sdpa")
    pixels = pixels.clone().requires_grad_()
    torch.autograd.grad(similarity(model(pixel_values=pixels)).sum(), pixels)


def ours(model: Any, pixels: Tensor) -> Tensor:
    from vlattn_fast.interpret import explain

    model.set_attn_implementation("sdpa")
    return explain(model, {"pixel_values": pixels}, target=similarity).relevancy["vision"]


def published(model: Any, pixels: Tensor) -> Tensor:
    """As in CLIP_explainability.ipynb of Chefer et al.: maps stored, a gradient per layer, the full N x N product."""
    score, maps = _stored(model, pixels)
    return _product(maps, (torch.autograd.grad(score, [prob], retain_graph=True)[0] for prob in maps))


def one_backward(model: Any, pixels: Tensor) -> Tensor:
    """The same with the gradients of all stored maps taken in one backward pass."""
    score, maps = _stored(model, pixels)
    return _product(maps, torch.autograd.grad(score, maps))


def _stored(model: Any, pixels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    model.set_attn_implementation("eager")
    outputs = model(pixel_values=pixels.clone().requires_grad_(), output_attentions=True)
    return similarity(outputs).sum(), outputs.attentions


def _product(maps: Sequence[Tensor], grads: Any) -> Tensor:
    size = maps[0].shape[-1]
    relevancy = torch.eye(size).expand(maps[0].shape[0], size, size)
    for prob, grad in zip(maps, grads, strict=True):
        abar = (grad.detach() * prob.detach()).clamp(min=0).mean(dim=1)
        relevancy = relevancy + torch.bmm(abar, relevancy)
    return relevancy[:, 0]


VARIANTS: dict[str, Callable[[Any, Tensor], Tensor | None]] = {
    "plain forward+backward": plain,
    "vlattn_fast": ours,
    "maps stored, one backward": one_backward,
    "published, one per layer": published,
}


@dataclass(frozen=True)
class Cost:
    """seconds: the fastest run; memory: MiB at the peak of the first run above what the idle model holds; difference: of
    the map from the published one, largest over the largest entry besides the row's own; None where there is no map."""

    seconds: float
    runs: int
    memory: float
    difference: float | None


class _Worker:
    """A fresh process that holds the model and runs one variant each time it is asked."""

    def __init__(self, variant: str, sizes: dict[str, int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlattn_fast._cost", variant, json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"OMP_WAIT_POLICY": "passive", **os.environ},  # threads that wait must not take a core from who is measured
        )

    def ready(self) -> None:
        self._answer()

    def run(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line the process prints: the first says that it is ready, the others answer a run."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended early with status {self.process.wait()}; was there memory enough?")
        return dict(json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def compare(sizes: dict[str, int] | None = None, *, rounds: int = 3) -> dict[str, Cost]:
    """The cost of each of VARIANTS; all run `rounds` times in turns, the published procedure once, in the middle."""
    sizes = VIT_L_14_336 if sizes is None else sizes
    workers: dict[str, _Worker] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    try:
        for name in VARIANTS:
            workers[name] = _Worker(name, sizes)
        for worker in workers.values():
            worker.ready()
        for number in range(rounds):
            for name, worker in workers.items():
                if VARIANTS[name] is not published or number == 0:
                    answers[name].append(worker.run())
    finally:
        for worker in workers.values():
            worker.close()
    truth = torch.tensor(next(found[0]["map"] for name, found in answers.items() if VARIANTS[name] is published))
    return {
        name: Cost(min(a["seconds"] for a in found), len(found), found[0]["memory"], _difference(found[0]["map"], truth))
        for name, found in answers.items()
    }


def _difference(found: list[list[float]] | None, truth: Tensor) -> float | None:
    """The read-out row is token 0's: its own entry holds the identity that the recursion starts from."""
    if found is None:
        return None
    return float((torch.tensor(found) - truth)[:, 1:].abs().max() / truth[:, 1:].abs().max())


def _peak() -> float:
    """MiB this process has held at most."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(variant: str, sizes: str) -> None:
    """The worker: ready, then one line of JSON for each line on standard input."""
    arguments = json.loads(sizes)
    model, pixels = vision_model(arguments), picture(arguments)
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        held = _peak()
        start = time.perf_counter()
        found = VARIANTS[variant](model, pixels)
        answer = {"seconds": time.perf_counter() - start, "memory": _peak() - held}
        print(json.dumps({**answer, "map": None if found is None else found.tolist()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
