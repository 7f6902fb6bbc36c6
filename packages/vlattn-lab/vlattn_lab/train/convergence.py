"""Three small models of DigitScenes trained with torch's attention and with this package's, from the same seeds.

    python -m vlattn_lab.train.convergence                # 200 steps; writes the rows
    python -m vlattn_lab.train.convergence --steps 30     # prints the differences

Each step's loss is compared. Rounding alone makes two trainings part slowly; a wrong gradient shows at once. So a third training
has torch's attention written out as matmul, softmax and matmul, which rounds otherwise than torch's kernel does: it tells what is
to be expected.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import vlattn_fast as va
from vlattn_fast.models import UNITER
from vlattn_lab.checkout import ROOT
from vlattn_lab.clip import CONFIG as CLIP
from vlattn_lab.clip import build_clip, caption_ids, words_of
from vlattn_lab.scenes import sample_scenes
from vlattn_lab.train import clip as clip_training
from vlattn_lab.train.fit import seeded
from vlattn_lab.uniter import CONFIG as UNITER_CONFIG

ROWS = ROOT / "benchmarks" / "results" / "convergence.json"
STEPS, BATCH, SEED = 200, 16, 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = ("torch", "vlattn_fast", "torch, written out")
# the largest difference of a step's loss from that of torch's attention, over the loss
BOUND = {"float32": 0.001, "bfloat16": 0.05}


class Training(NamedTuple):
    """`loss()` draws a batch and returns its loss."""

    parameters: list[nn.Parameter]
    loss: Callable[[], Tensor]


class Attending(TorchFunctionMode):
    """A mode of torch in which models that call its attention have another one, of ATTENTION."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._attend = {"torch": F.scaled_dot_product_attention, "vlattn_fast": ours}.get(kind, written_out)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (self._attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def ours(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *rest: Any, **named: Any
) -> Tensor:
    options = dict(zip(("is_causal", "scale", "enable_gqa"), rest, strict=False)) | named
    return va.score_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **options)


def written_out(*args: Any, **named: Any) -> Tensor:
    """torch's attention as matmul, softmax, matmul."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **named)


def clip(kind: str, generator: torch.Generator) -> Training:
    """CLIP on scenes and captions, with all losses of its training."""
    sizes = CLIP["vision_config"]["hidden_size"], CLIP["text_config"]["hidden_size"]
    model, heads = seeded(SEED, lambda: (build_clip(CLIP), clip_training.TrainingHeads(*sizes)))
    model.set_attn_implementation("sdpa")
    kinds = torch.zeros(BATCH, dtype=torch.int64)

    def loss() -> Tensor:
        parts = clip_training.losses(model, heads, sample_scenes(kinds, "train", None, generator), generator)
        return torch.stack([clip_training.WEIGHTS[name] * part for name, part in parts.items()]).sum()

    return Training([*model.parameters(), *heads.parameters()], loss)


def decoder(kind: str, generator: torch.Generator) -> Training:
    """A decoder with grouped heads learns to write captions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = seeded(SEED, lambda: LlamaForCausalLM(LlamaConfig(**sizes, **heads)))
    kinds = torch.zeros(2 * BATCH, dtype=torch.int64)

    def loss() -> Tensor:
        tokens = caption_ids(words_of(sample_scenes(kinds, "train", None, generator)))
        return model(input_ids=tokens, labels=tokens).loss

    return Training(list(model.parameters()), loss)


def uniter(kind: str, generator: torch.Generator) -> Training:
    """UNITER tells true captions from false ones, with CACR on its last layer."""
    model = seeded(SEED, lambda: UNITER(UNITER_CONFIG))
    congruence = va.nn.CongruenceLoss("cacr", backend="auto" if kind == "vlattn_fast" else "reference")
    kinds = torch.arange(2 * BATCH) % 2

    def loss() -> Tensor:
        scenes = sample_scenes(kinds, "train", None, generator)
        with va.nn.capture_attention(model) as captured:
            outputs = model(**scenes.inputs())
        text, image, cross = captured.split(scenes.input_ids.shape[1])
        return F.cross_entropy(outputs.logits, scenes.label) + congruence(text, image, cross)

    return Training(list(model.parameters()), loss)


TRAININGS: dict[str, Callable[[str, torch.Generator], Training]] = {"CLIP": clip, "decoder": decoder, "UNITER with CACR": uniter}


def losses(name: str, kind: str, dtype: torch.dtype, steps: int) -> list[float]:
    """The loss of each step. bfloat16 is autocast's: parameters and sums stay float32."""
    generator = torch.Generator().manual_seed(SEED)
    training = TRAININGS[name](kind, generator)
    optimizer = torch.optim.AdamW(training.parameters, lr=1e-3)
    values = []
    for _ in range(steps):
        with Attending(kind), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = training.loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters, 1.0)
        optimizer.step()
        values.append(float(loss.detach()))
    return values


def difference(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest of a step, over the loss."""
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def rows(steps: int) -> Iterator[dict[str, Any]]:
    for name in TRAININGS:
        for dtype in DTYPES:
            by_kind = {kind: losses(name, kind, DTYPES[dtype], steps) for kind in ATTENTION}
            theirs, ours, expected = (by_kind[kind] for kind in ATTENTION)
            every = [round(x, 5) for x in ours[:: max(1, steps // 10)]]
            yield {
                "model": name,
                "dtype": dtype,
                "steps": steps,
                "first": theirs[0],
                "last": theirs[-1],
                "difference": difference(theirs, ours),
                "written out": difference(theirs, expected),
                "losses": every,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    stored = []
    for row in rows(steps):
        stored.append(row)
        print({name: x for name, x in row.items() if name != "losses"}, flush=True)
    if steps == STEPS:
        ROWS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
