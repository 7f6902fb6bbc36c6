"""How many image tokens does a captioner need, and which rule finds them? 50, 25 and 12 % of DigitScenes' patches.

The model reads a prompt and the whole image once. A rule scores the patches; the captioner then answers from those with the
largest scores and CLS alone. The seeds are sets of test prompts; the package ships the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast import explain, text_raters, token_scores
from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, spread
from vlattn_fast.models import CLIPMapper
from vlattn_lab.experiments.experiment import Cell, Effect, Experiment, Record, Settings, Stage, band, effects_of, less
from vlattn_lab.mapper import LONGEST, load_captioner
from vlattn_lab.questions import PROMPTS, Questions, are_true, digit_prompts
from vlattn_lab.texts import END, SceneProcessor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.5, 0.25, 0.12)
LAYER = 1  # of the mapper; FastV prunes behind its second layer
Inputs = dict[str, Tensor]


def visionzip(model: CLIPMapper, inputs: Inputs, seed: int) -> Tensor:
    with torch.no_grad(), va.nn.capture_attention(model.vision, layers=-2) as seen:
        model.encode_image(inputs["pixel_values"])
    return seen.image.token_scores("visionzip")


def from_words(rule: str, **options: Any) -> Callable[..., Tensor]:
    """A rule of decoders, over the words' attention to the image in one layer of the mapper."""

    def scores(model: CLIPMapper, inputs: Inputs, seed: int) -> Tensor:
        query, key, words, image = _attention(model, inputs)
        real = inputs["attention_mask"].bool()
        chosen = real
        if rule == "fastv":  # the last word
            chosen = real & (real.flip(1).cumsum(1).flip(1) == 1)
        elif rule == "sparsevlm":
            is_image = torch.arange(image.shape[1] + words.shape[1]) < image.shape[1]
            is_text = torch.cat([torch.zeros(image.shape[:2], dtype=torch.bool), real], 1)
            raters = text_raters(torch.cat([image, words], 1), is_image.expand_as(is_text), is_text)
            chosen = raters[:, image.shape[1] :]
        return token_scores(query, key, rule, queries=chosen, is_causal=False, per_head=False, **options)

    return scores


@torch.no_grad()
def _attention(model: CLIPMapper, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query and key of the words' attention to the image, and the states of both that it reads."""
    layer: Any = model.layers[LAYER].cross_attention
    states: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: states.extend(args[:2]))
    try:
        model(**inputs)
    finally:
        handle.remove()
    heads = (layer.num_heads, layer.head_dim)
    query, key = (
        linear(x).unflatten(-1, heads).transpose(1, 2) for linear, x in zip((layer.query, layer.key), states, strict=True)
    )
    return query, key, states[0], states[1]


def gradient(model: CLIPMapper, inputs: Inputs, seed: int) -> Tensor:
    return explain(model, inputs, method=published("gradient")).relevancy["vision"]


def chance(model: CLIPMapper, inputs: Inputs, seed: int) -> Tensor:
    tokens = int(model.vision.config.image_size // model.vision.config.patch_size) ** 2 + 1  # type: ignore[union-attr, operator]
    return torch.rand(len(inputs["input_ids"]), tokens, generator=torch.Generator().manual_seed(seed))


RULES: dict[str, Callable[[CLIPMapper, Inputs, int], Tensor]] = {
    "visionzip": visionzip,
    "fastv": from_words("fastv"),
    "h2o": from_words("h2o"),
    "snapkv": from_words("snapkv", recent=0),
    "sparsevlm": from_words("sparsevlm"),
    "gradient relevancy": gradient,
    "chance": chance,
}


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"seed": seed, "kind": kind} for seed in range(settings.seeds) for kind in PROMPTS]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    asked = digit_prompts(12 if settings.smoke else 120, seed=cell["seed"], kind=cell["kind"])
    model, _ = load_captioner()
    inputs: Inputs = dict(SceneProcessor(end=False)(asked.images, asked.questions))
    with torch.no_grad():
        image = model.encode_image(inputs["pixel_values"])
    accuracy: dict[str, dict[str, float]] = {"all patches": {"1": _accuracy(model, inputs, asked, image)}}
    for name, rule in RULES.items():
        patches = rule(model, inputs, cell["seed"])[:, 1:].detach()  # behind CLS
        accuracy[name] = {}
        for share in SHARES:
            best = patches.topk(max(1, round(share * patches.shape[1])), 1).indices.sort().values + 1
            index = torch.cat([torch.zeros_like(best[:, :1]), best], 1)
            chosen = image.take_along_dim(index[..., None], 1)
            accuracy[name][str(share)] = _accuracy(model, inputs, asked, chosen)
    return {"accuracy": accuracy}


def _accuracy(model: CLIPMapper, inputs: Inputs, asked: Questions, image_states: Tensor) -> float:
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    said = SceneProcessor().decode(model.generate(**words, image_states=image_states, max_new_tokens=LONGEST, stop_token=END))
    right = are_true(asked, said)
    return round(sum(right) / len(right), 4)


def _of_sets(records: Sequence[Record], rule: str, share: str) -> list[float]:
    """The accuracy of each set, the mean over the kinds of prompts."""
    seeds = sorted({record["seed"] for record in records})
    each = [[record["accuracy"][rule][share] for record in having(records, seed=seed)] for seed in seeds]
    return [sum(values) / len(values) for values in each]


def tables(records: Sequence[Record]) -> Iterator[str]:
    lines = [["all patches", *[spread(_of_sets(records, "all patches", "1"))] * len(SHARES)]]
    lines += [[rule, *(spread(_of_sets(records, rule, str(share))) for share in SHARES)] for rule in RULES]
    yield markdown(["patches chosen by", *(f"{share:.0%}" for share in SHARES)], lines)


def effects(records: Sequence[Record]) -> list[Effect]:
    """Each rule less chance, over the sets of prompts."""
    chance = {share: _of_sets(records, "chance", str(share)) for share in SHARES}
    return effects_of(
        [
            (f"{rule} less chance", f"true answers, {share:.0%} of the patches".replace("%", " %"), less(found, chance[share]))
            for rule in RULES
            if rule != "chance"
            for share in SHARES
            for found in [_of_sets(records, rule, str(share))]
        ]
    )


def figure(records: Sequence[Record]) -> Figure:
    """True answers over the share of patches, the mean over the kinds of prompts."""
    drawn, ((axis,),) = panels(1, 1, (6.8, 3.8))
    colours = ("#c2410c", "#0f766e", "#7ec8be", "#4456b5", "#9d5ca8", "#e8a33d", "#111111")
    for rule, colour in zip(RULES, colours, strict=True):
        style = "--" if rule == "chance" else "-"
        sets = [_of_sets(records, rule, str(share)) for share in SHARES]
        band(axis, [100 * share for share in SHARES], sets, color=colour, label=rule, marker="o", markersize=4, linestyle=style)
    everything = _of_sets(records, "all patches", "1")
    axis.axhline(sum(everything) / len(everything), color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlabel="patches kept (%)", ylabel="true answers", ylim=(0.4, 1.0), xticks=[12, 25, 50])
    drawn.legend(loc="outside right center", frameon=False)
    return drawn


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"pruning": figure}, effects)
