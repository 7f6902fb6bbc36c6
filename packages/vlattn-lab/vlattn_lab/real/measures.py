"""The scores that are explained, and what is measured of their maps: rows of plain numbers, names and lists."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.interpret.relevancy.methods.registry import METHODS, method_of
from vlattn_lab.real.models import SaliencyHead
from vlattn_lab.real.photos import SIDE, pixels, square

TESTS = {  # of the scores
    "class token": ("deletion", "insertion", "pointing", "mass", "sanity"),
    "saliency in a box": ("pointing", "mass"),
}
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the patches, removed or put in
SCALED = 8  # inputs of integrated gradients
BOX = 4  # patches along each side of the box
Row = dict[str, Any]
Methods = Mapping[str, va.methods.Method]


@dataclass(frozen=True)
class SceneScore:
    """The explained score: target(outputs) -> (B,), and the row of tokens that it is read from, as `va.explain` takes both."""

    target: Callable[[Any], Tensor]
    read: str | Tensor


@dataclass(frozen=True)
class Scene:
    """A photo, where the saliency head finds something in it, and its scores by name."""

    name: str
    photo: Any
    inputs: dict[str, Tensor]
    mask: Tensor  # (SIDE, SIDE), where the head's saliency exceeds one half
    box: tuple[int, int]  # the first row and column of patches
    scores: dict[str, SceneScore]


def similarity(reference: Tensor) -> Callable[[Any], Tensor]:
    """The class token along its value (B, D) in the whole photo: 1 where it has this value."""
    return lambda outputs: (outputs.last_hidden_state[:, 0] * reference).sum(-1) / (reference * reference).sum(-1)


def surest(saliency: Tensor, patch: int, box: int = BOX) -> tuple[int, int]:
    """The row and column of the square of box x box patches with the most of the saliency (h, w)."""
    means = nn.functional.avg_pool2d(saliency[None], box * patch, stride=patch)[0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return row, column


def scene(name: str, model: nn.Module, head: SaliencyHead) -> Scene:
    """A photo with its scores: the class token with itself, and the saliency in a box."""
    photo = square(name)
    inputs = {"pixel_values": pixels(photo)}
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
        saliency = head.saliency(states)[0]
    patch = model.config.patch_size
    row, column = surest(saliency, patch)
    rows, columns = (slice(patch * first, patch * (first + BOX)) for first in (row, column))
    grid = torch.zeros(SIDE // patch, SIDE // patch)
    grid[row : row + BOX, column : column + BOX] = 1 / BOX**2
    scores = {
        "class token": SceneScore(similarity(states[:, 0]), "cls"),
        "saliency in a box": SceneScore(
            lambda outputs: head.saliency(outputs.last_hidden_state)[:, rows, columns].mean((1, 2)),
            torch.cat([torch.zeros(1), grid.flatten()]),
        ),
    }
    return Scene(name, photo, inputs, saliency > 0.5, (row, column), scores)


def methods() -> Methods:
    """By their labels, all methods of `va.explain` but those that need the logits of a decoder, and occlusion, which takes a run
    for each patch. One that holds something fixed is there with its default, with less of that, and in its published form."""
    made: list[va.methods.Method] = []
    for kind in METHODS.values():
        if not (kind.takes_logits or kind.reads_score):
            held = kind.default_freeze
            made += [kind(freeze=held[:count]) for count in range(len(held), -1, -1)] if held else [kind()]
    return {method.label: method for method in made}


def explain(model: nn.Module, inputs: Any, method: str | va.methods.Method, position: str | Tensor, **options: Any) -> Any:
    """`va.explain`, with `position` where the method reads a row, and with SCALED steps of integrated gradients."""
    made = copy.copy(method_of(method))
    if made.uses_position:
        options["position"] = position
    if isinstance(made, va.methods.IntegratedGradients):
        made.n_steps = SCALED
    return va.explain(model, inputs, method=made, **options)


def evaluated(model: nn.Module, scene: Scene, score: str, chosen: Methods) -> Iterator[Row]:
    """A row for each method, and for random maps, with the value of each test."""
    asked, tests = scene.scores[score], TESTS[score]

    def calls(method: va.methods.Method) -> Callable[..., Any]:
        return lambda model, inputs, target: explain(model, inputs, method, asked.read, target=target)

    named = {**{label: calls(method) for label, method in chosen.items()}, "random": "random"}
    perturbed = {"steps": FRACTIONS, "batch_size": len(FRACTIONS), "sanity_stages": 1} if "deletion" in tests else {}
    item = (scene.inputs, asked.target, [scene.mask])
    evaluation = va.evaluate(model, [item], methods=named, tests=tests, **perturbed)
    for method in named:
        values = {test: evaluation.value(method, test) for test in tests}
        yield {"task": "evaluation", "score": score, "photo": scene.name, "method": method, **values}


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean state (B, D) of the real tokens."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def cosine(one: Tensor, two: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(one, two, dim=-1)


def word_rows(model: nn.Module, tokenizer: Any, sentence: str, beside: str) -> Iterator[Row]:
    """The cosine of two sentences' embeddings, by the words of the first: their shares of the relevancy by each method, and how
    much the cosine falls without the word ("left out")."""
    inputs, second = (dict(tokenizer(text, return_tensors="pt")) for text in (sentence, beside))

    def embedding(arguments: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return pooled(model(**arguments).last_hidden_state, arguments["attention_mask"])

    fixed, ids = embedding(second), inputs["input_ids"][0]

    def target(outputs: Any) -> Tensor:
        return cosine(pooled(outputs.last_hidden_state, inputs["attention_mask"]), fixed)

    whole = cosine(embedding(inputs), fixed)
    falls = []
    for place in range(1, len(ids) - 1):
        left = {name: torch.cat([value[:, :place], value[:, place + 1 :]], 1) for name, value in inputs.items()}
        falls.append(float(whole - cosine(embedding(left), fixed)))
    facts = {"task": "words", "sentence": sentence, "beside": beside, "cosine": float(whole)}
    words = tokenizer.convert_ids_to_tokens(ids[1:-1].tolist())
    yield {**facts, "method": "left out", "words": words, "values": falls}
    for label, method in methods().items():
        explanation = explain(model, inputs, method, "mean", target=target, processor=tokenizer)
        yield {**facts, "method": label, "words": words, "values": explanation.text[0].tolist()}
