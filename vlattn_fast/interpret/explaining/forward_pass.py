"""The third stage of `explain`: one forward pass, in which a carrier goes through the towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.interpret.adapters.connector_maps import Connector
from vlattn_fast.interpret.adapters.image_grids import image_tokens
from vlattn_fast.interpret.adapters.registry import rewrites_forward
from vlattn_fast.interpret.explaining.inputs import with_one_row
from vlattn_fast.interpret.explaining.request import Prompt, Request
from vlattn_fast.interpret.relevancy.embedding_trace import EmbeddingTrace, unchanged
from vlattn_fast.interpret.relevancy.method import Enter
from vlattn_fast.interpret.relevancy.model_trace import Trace
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


@dataclass(frozen=True)
class Run:
    """A forward pass that ran."""

    prompt: Prompt
    outputs: Any  # the model's; of an empty batch, those of one made-up row
    trace: Trace | EmbeddingTrace
    explained: list[TowerTrace]  # with an explained position
    vision: TowerTrace | None  # the vision tower before the connector, whose row comes from that of the decoder; None without
    attended: list[TowerTrace]  # to which those of `explained` attend, and on into which their relevancy goes

    @property
    def request(self) -> Request:
        return self.prompt.request

    @property
    def carrying(self) -> list[TowerTrace]:
        """The towers through which relevancy is carried."""
        return self.explained if self.vision is None else [*self.explained, self.vision]

    @property
    def towers(self) -> list[TowerTrace]:
        """All towers that get a row."""
        return [*self.carrying, *self.attended]


def run_traced(prompt: Prompt, enter: Enter = unchanged) -> Run:
    """The run of a prompt. `enter`: what becomes of embeddings that enter, of a method that needs these."""
    request, arguments = prompt.request, prompt.arguments
    model, adapter, method = request.model, request.adapter, request.method
    vision_tower = None if prompt.empty else request.vision
    if vision_tower is not None:
        _check_images(model.config, arguments)
        adapter = replace(adapter, towers=(*adapter.towers, vision_tower))
    trace: Trace | EmbeddingTrace
    if method.needs == "embeddings":
        trace = EmbeddingTrace(model, adapter, method, prompt.origin, enter)
    else:  # an adapter only knows the position of the model's own score
        of_other_score = callable(request.target) or rewrites_forward(model)
        finds = False if request.position is not None else True if of_other_score else None
        trace = Trace(model, adapter, method, finds, prompt.n_vectors)
    with trace:
        vision = None if vision_tower is None else trace.towers[-1]
        if vision is not None:
            _connect(vision, trace.towers[0], adapter.connector, model.config, arguments)
        outputs = model(**trace.prepare(with_one_row(model, arguments, adapter) if prompt.empty else arguments))
    run = run_of_trace(prompt, trace, outputs, vision)
    if prompt.empty:
        for tower in run.towers:
            tower.batch = 0
    return run


def run_of_trace(prompt: Prompt, trace: Trace | EmbeddingTrace, outputs: Any, vision: TowerTrace | None = None) -> Run:
    """The run of a forward pass that was traced, with the errors of `explain` if a layer is missing."""
    trace.check()
    _check_ids(trace, prompt)
    towers, links = [tower for tower in trace.towers if tower is not vision], trace.links
    explained = _explained_towers(towers, links, prompt)
    attended = [tower for tower in towers if tower not in explained and any((t, tower) in links for t in explained)]
    run, method = Run(prompt, outputs, trace, explained, vision, attended), prompt.request.method
    method.ran(run.carrying, attended, trace.calls)
    for tower in run.carrying:
        tower.check_start(method.start_layer)
    return run


def _check_ids(trace: Trace | EmbeddingTrace, prompt: Prompt) -> None:
    """ValueError if a tower, whose tokens are those of `input_ids`, ran on a sequence of another length."""
    ids = prompt.arguments.get("input_ids")
    for tower in trace.towers:
        if isinstance(ids, Tensor) and tower.entry is not None and tower.entry.rule.predicts and tower.entry.kind.follows_ids:
            if tower.calls.paths and tower.size != ids.shape[-1]:
                raise ValueError(
                    f"model must run tower '{tower.name}' on the tokens of input_ids; got {tower.size} tokens for "
                    f"{ids.shape[-1]} ids. Describe the tokens with an adapter: va.register_adapter"
                )


def _explained_towers(towers: list[TowerTrace], links: set[tuple[TowerTrace, TowerTrace]], prompt: Prompt) -> list[TowerTrace]:
    """The towers with an explained position: those that the caller names, else those that no other one attends to. `links`: a
    tower, and one that it attends to."""
    position, answers = prompt.request.position, prompt.request.adapter.answers
    if isinstance(position, Mapping):
        by_name = {tower.name: tower for tower in towers}
        if unknown := [name for name in position if name not in by_name]:
            raise ValueError(f"position must name towers among {', '.join(x.described for x in towers)}; got {unknown[0]!r}")
        return [by_name[name] for name in position]
    listed = [tower for tower in towers if tower.entry is not None]  # only their adapters name a position
    sources = {source for _, source in links}
    explained = [tower for tower in listed or towers if tower.calls.paths and tower not in sources]
    explained = explained or towers[:1]  # all attend to one another: the first is explained
    if listed:
        return explained
    if answers != "input_ids":  # the decoder runs last; others come before an encoder
        attending = {tower for tower, _ in links}
        explained = [tower for tower in explained if tower in attending][-1:] or explained
    if prompt.answer is not None:
        explained = [tower for tower in explained if tower.shape == prompt.arguments[answers].shape][-1:]
    if not explained:
        shape, found = tuple(prompt.arguments[answers].shape), ", ".join(tower.described for tower in towers)
        raise ValueError(f"model must have a tower over the tokens of '{answers}' {shape}, which hold the answer; got {found}")
    return explained


# --- the connector ---


def _check_images(config: Any, arguments: Mapping[str, Any]) -> None:
    """ValueError for prompts with videos, or without images, and for image tokens that are made of several layers' patches."""
    name = "vision_feature_layer"
    layers = getattr(config, name, None) if arguments.get(name) is None else arguments[name]
    if isinstance(layers, (list, tuple)) and len(layers) > 1:
        raise ValueError(
            f"through_connector=True only supports image tokens made from one layer's patches; got {name} {list(layers)}"
        )
    if arguments.get("pixel_values_videos") is not None:
        raise ValueError("through_connector=True only supports images; got 'pixel_values_videos'")
    if arguments.get("pixel_values") is None:
        raise ValueError("through_connector=True needs 'pixel_values' in inputs; got none")


def _connect(vision: TowerTrace, language: TowerTrace, connector: Connector, config: Any, arguments: Mapping[str, Any]) -> None:
    """Let the relevancy of `language`'s image tokens go on into `vision`, which runs before it.

    A connector makes an image token of one patch, or of a square of neighbouring ones. The relevancy of an image token is divided
    equally among the patches it was made of, so that its sum stays. The backward pass then goes on through the vision tower.
    """

    def below(like: Tensor) -> Tensor:
        leaving = vision.carriers.leaving()
        fed = connector(config, arguments, vision.shape, int(image_tokens(config, arguments).sum())).tokens
        real, positions = fed >= 0, image_tokens(config, arguments).flatten().nonzero()[:, 0]
        tokens = fed[real].to(leaving.device)
        shares = 1 / tokens.bincount(minlength=len(positions)).clamp(min=1).to(leaving)
        lines = leaving.transpose(0, 1).flatten(1)[:, real.to(leaving.device)]  # (2, patches), as they lie in the batch
        contribution = (leaving.new_zeros(2, len(positions)).index_add(1, tokens, lines) * shares).to(like)
        flat = torch.zeros_like(like).transpose(0, 1).flatten(1).index_copy(1, positions.to(like.device), contribution)
        return flat.view(2, *like.shape[::2]).transpose(0, 1)

    language.carriers.below = below
