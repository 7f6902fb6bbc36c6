"""The saliency of DINOv2 where attention to some patches, or a head, is taken away: rows of plain numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_lab.real.measures import Row, Scene, similarity
from vlattn_lab.real.models import SaliencyHead

HEAD = (8, 3)  # layer and number of the attention head without which the saliency changes most, by the stored rows
PATCHES, DRAWS = 4, 5  # patches of a photo that are cut at once, and random choices of them
CHANGES = ("change", "overlap", "fall")
CUTS = ("most read", "largest state", "random", "class token", "most read in layer 0")


def together(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The photos as one batch."""
    return {"pixel_values": torch.cat([scene.inputs["pixel_values"] for scene in scenes])}


@torch.no_grad()
def read_most(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(L, B, N), how much the patches attend to each token, the mean over heads and patches, times the number of tokens: 1 where
    attention is even."""
    layers = range(model.config.num_hidden_layers)
    with va.nn.capture_attention(model, layers=layers) as seen:
        size = model(**inputs).last_hidden_state.shape[1]
    rows = torch.full((size,), size / (size - 1)).index_fill(0, torch.tensor([0]), 0.0)  # without that of the class token
    received = []
    for layer in layers:
        assert seen[layer].image is not None
        query, key = seen[layer].image
        received.append(va.attention_statistics(query, key, row_weight=rows, statistics=("received",)).received.mean(1))
    return torch.stack(received)


@torch.no_grad()
def state_sizes(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, N), the norms of the tokens' states in front of the last layer, where those of large models have outliers."""
    sizes: Tensor = model(**inputs, output_hidden_states=True).hidden_states[-2].norm(dim=-1)
    return sizes


def chosen(read: Tensor, sizes: Tensor) -> dict[str, list[tuple[Tensor, int | None]]]:
    """By the name of CUTS: masks (B, N) of tokens, one for each draw, and the layer in which they are cut, None = all."""
    generator = torch.Generator().manual_seed(0)

    def largest(values: Tensor, count: int = PATCHES) -> Tensor:
        patches = values.index_fill(1, torch.tensor([0]), -torch.inf)  # the class token is none
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, patches.topk(count).indices, True)

    class_token = torch.zeros_like(sizes, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    draws = [largest(torch.rand(sizes.shape, generator=generator)) for _ in range(DRAWS)]
    masks = [[largest(read.mean(0))], [largest(sizes)], draws, [class_token], [largest(read[0], 1)]]
    return {
        name: [(mask, 0 if "layer 0" in name else None) for mask in its_masks]
        for name, its_masks in zip(CUTS, masks, strict=True)
    }


@dataclass(frozen=True)
class Run:
    """The saliency (B, SIDE, SIDE) and the class token (B, D) of a run."""

    saliency: Tensor
    token: Tensor

    def changes(self, edited: Run) -> Tensor:
        """(CHANGES, B), between this run and an edited one: the mean difference of the saliency; the overlap, intersection over
        union, of the pixels above one half; the fall of the class token along its own value."""
        first, second = self.saliency > 0.5, edited.saliency > 0.5
        overlap = (first & second).sum((1, 2)) / (first | second).sum((1, 2))
        fall = 1 - (edited.token * self.token).sum(-1) / self.token.square().sum(-1)
        return torch.stack([(edited.saliency - self.saliency).abs().mean((1, 2)), overlap, fall])


@torch.no_grad()
def run_of(model: nn.Module, head: SaliencyHead, inputs: dict[str, Tensor]) -> Run:
    states = model(**inputs).last_hidden_state
    return Run(head.saliency(states), states[:, 0])


def outlier_rows(model: nn.Module, head: SaliencyHead, scenes: Sequence[Scene]) -> Iterator[Row]:
    """For each photo: how large the largest state and the most read patch of each layer are, beside the others; and what becomes
    of the saliency where no token reads some tokens."""
    inputs = together(scenes)
    read, sizes = read_most(model, inputs), state_sizes(model, inputs)
    patches = sizes[:, 1:]
    for number, scene in enumerate(scenes):
        largest = float(patches[number].max() / patches[number].median())
        largest_read = [round(float(x), 2) for x in read[:, number, 1:].amax(-1)]
        yield {"task": "outliers", "photo": scene.name, "size": round(largest, 3), "read": largest_read}
    whole = run_of(model, head, inputs)
    for name, draws in chosen(read, sizes).items():
        changes = []
        for mask, layer in draws:
            with va.intervene(model, inputs, va.Knockout(keys=mask, layers=layer)):
                changes.append(whole.changes(run_of(model, head, inputs)))
        means = torch.stack(changes).mean(0)
        share = torch.stack([(read.mean(0) * mask).sum(1) / mask.shape[1] for mask, _ in draws]).mean(0)
        for number, scene in enumerate(scenes):
            values = dict(zip(CHANGES, means[:, number].tolist(), strict=True))
            yield {"task": "cut", "photo": scene.name, "tokens": name, "share": float(share[number]), **values}


def head_rows(model: nn.Module, head: SaliencyHead, scenes: Sequence[Scene]) -> Iterator[Row]:
    """For each photo: the relevancy of each attention head to the class token with itself, and what changes without the head.

    An attention head's relevancy is the sum over the patches of its row of relu(A * dA).
    """
    inputs = together(scenes)
    whole = run_of(model, head, inputs)
    options: Row = {"target": similarity(whole.token), "method": va.methods.Gradient(freeze=())}
    relevancy = va.explain_layers(model, inputs, per="head", **options).image.sum((-2, -1))  # (layers, heads, B)
    layers, heads, batch = relevancy.shape
    changes = torch.zeros(len(CHANGES), layers, heads, batch)
    for layer, number in itertools.product(range(layers), range(heads)):
        with va.intervene(model, scenes[0].inputs, va.ScaleHeads({layer: [number]}, 0.0)):  # a photo shows it the layers
            changes[:, layer, number] = whole.changes(run_of(model, head, inputs))
    for photo, scene in enumerate(scenes):
        numbers = {name: values[..., photo].tolist() for name, values in zip(CHANGES, changes, strict=True)}
        yield {"task": "heads", "photo": scene.name, "relevancy": relevancy[..., photo].tolist(), **numbers}
