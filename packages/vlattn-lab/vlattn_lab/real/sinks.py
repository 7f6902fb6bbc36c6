"""DINOv2's tokens that are read most, and maps without those that `va.explain` finds: rows of plain numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_lab.real.cuts import read_most
from vlattn_lab.real.measures import FRACTIONS, Methods, Row, Scene, cosine, pooled

MODES = ("keep", "remove")
_PUBLISHED = (
    functools.partial(va.methods.Gradient, freeze=()),
    va.methods.Rollout,
    va.methods.Attention,
    functools.partial(va.methods.Weighted, freeze=()),
)
METHODS: dict[str, Methods] = {kind().label: {mode: kind(sinks=mode) for mode in MODES} for kind in _PUBLISHED}
TESTS = {"class token": ("deletion", "insertion", "pointing", "mass"), "saliency in a box": ("pointing", "mass")}
SIZES = ("read", "values", "states", "largest")


@torch.no_grad()
def token_sizes(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the name of SIZES, (L, N), of one photo in front of each layer's attention: how much patches read each token, times the
    number of tokens; the norms of the values and of the states, over their medians; the largest coordinate of the state over its
    root mean square."""
    values: list[Tensor] = []
    layers: Any = model.encoder.layer  # type: ignore[union-attr]
    handles = [layer.attention.v_proj.register_forward_hook(lambda module, args, out: values.append(out[0])) for layer in layers]
    try:
        states = model(**inputs, output_hidden_states=True).hidden_states[:-1]
    finally:
        for handle in handles:
            handle.remove()
    norms = [torch.stack([x.norm(dim=-1) for x in of]) for of in (values, [state[0] for state in states])]
    largest = torch.stack([state[0].abs().amax(-1) / state[0].square().mean(-1).sqrt() for state in states])
    relative = (norm / norm.median(-1, keepdim=True).values for norm in norms)
    return dict(zip(SIZES, (read_most(model, inputs)[:, 0], *relative, largest), strict=True))


def token_rows(model: nn.Module, scenes: Sequence[Scene]) -> Iterator[Row]:
    """By photo, the class token and the patch that is read most in each layer, and in which layers `va.explain` names them."""
    for scene in scenes:
        sizes = token_sizes(model, scene.inputs)
        patches = sizes["read"][:, 1:].argmax(1) + 1
        named = {(layer, sink.index) for sink in va.find_sinks(model, scene.inputs)[0] for layer in sink.layers}
        for token, places in (("class token", torch.zeros_like(patches)), ("most read patch", patches)):
            numbered = enumerate(places.tolist())
            yield {
                **{"task": "sink sizes", "photo": scene.name, "token": token},
                **{name: [round(float(x), 4) for x in values.gather(1, places[:, None])] for name, values in sizes.items()},
                "named": [(layer, place) in named for layer, place in numbered],
            }
        yield {"task": "sinks named", "photo": scene.name, "count": len(named), "patches": sum(index > 0 for _, index in named)}


def word_rows(model: nn.Module, tokenizer: Any, sentence: str, beside: str) -> Iterator[Row]:
    """The words of a sentence by method, with all tokens and without sinks, as `measures.word_rows` has them; and its sinks."""
    inputs, second = (dict(tokenizer(text, return_tensors="pt")) for text in (sentence, beside))
    with torch.no_grad():
        fixed = pooled(model(**second).last_hidden_state, second["attention_mask"])

    def target(outputs: Any) -> Tensor:
        return cosine(pooled(outputs.last_hidden_state, inputs["attention_mask"]), fixed)

    for sink in va.find_sinks(model, inputs, processor=tokenizer)[0]:
        facts = {"token": sink.word, "layers": list(sink.layers)}
        by_layer = {
            name: [round(values[layer], 4) for layer in sorted(values)]
            for name, values in (("shares", sink.shares), ("norms", sink.norms))
        }
        yield {"task": "sentence sinks", "sentence": sentence, **facts, **by_layer}
    for label, by_mode in METHODS.items():
        for mode, method in by_mode.items():
            found = va.explain(model, inputs, target=target, method=method, position="mean", processor=tokenizer)
            yield {"task": "sink words", "sentence": sentence, "method": label, "sinks": mode, "values": found.text[0].tolist()}


def map_rows(model: nn.Module, scene: Scene, score: str) -> Iterator[Row]:
    """By method, the tests of maps with all tokens and without sinks."""
    asked = scene.scores[score]

    def calls(method: va.methods.Method) -> Callable[..., Any]:
        return lambda model, inputs, target: va.explain(model, inputs, method=method, position=asked.read, target=target)

    named = {f"{label} {mode}": calls(method) for label, by_mode in METHODS.items() for mode, method in by_mode.items()}
    perturbed = {"steps": FRACTIONS, "batch_size": len(FRACTIONS)} if "deletion" in TESTS[score] else {}
    item = (scene.inputs, asked.target, [scene.mask])
    evaluation = va.evaluate(model, [item], methods=named, tests=TESTS[score], **perturbed)
    for name in named:
        method, _, mode = name.rpartition(" ")
        values = {test: evaluation.value(name, test) for test in TESTS[score]}
        yield {"task": "sinks", "score": score, "photo": scene.name, "method": method, "sinks": mode, **values}
