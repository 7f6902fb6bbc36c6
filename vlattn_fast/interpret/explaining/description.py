"""Lines that say what `explain` knows of a model before a run: its adapter, listed or derived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from vlattn_fast.interpret.adapters import derived_grids
from vlattn_fast.interpret.adapters.adapter import Adapter, Tower
from vlattn_fast.interpret.adapters.derived import generates, why_underived
from vlattn_fast.interpret.adapters.registry import find_adapter, listed_adapter
from vlattn_fast.interpret.explaining.answer import encoder_decoder
from vlattn_fast.interpret.relevancy.recurrent_calls import RECURRENT, check_rules
from vlattn_fast.interpret.relevancy.tower_trace import matching, submodule

SCORES = {
    "pair": "similarity of image i and text i",
    "class": "largest logit",
    "token": "next token, or answer=",
    "query": "surest object query",
}


def described(model: nn.Module) -> Iterator[str]:
    """Lines about a model: where its adapter is from, its towers, explained positions, kinds of tokens, grid, and what is not
    supported."""
    name, adapter = type(model).__name__, find_adapter(model)
    if adapter is None:
        yield f"{'adapter':12}none"
        if encoder_decoder(model) is not None and generates(model):
            yield f"{'score':12}next token of {name}, an encoder-decoder whose towers are found in a forward pass, or answer="
            yield f"{'position':12}the decoder's position that predicts the token, and what it attends to"
        else:
            yield f"{'unsupported':12}va.explain(model, inputs) without position=: {why_underived(model)}"
        return
    yield f"{'adapter':12}{'derived from the model and its config' if listed_adapter(model) is None else 'listed by its class'}"
    for tower in adapter.towers:
        yield from _of_tower(model, adapter, tower)
    if adapter.vision is not None:
        yield from _of_tower(model, adapter, adapter.vision, "through_connector=True: ")
    yield f"{'score':12}{SCORES[adapter.score]}"
    try:
        check_rules(model, [tower.path for tower in adapter.towers])
    except ValueError as error:
        yield f"{'unsupported':12}{error}"
    if adapter.vision is None and any(tower.kind.image_ids for tower in adapter.towers):
        yield f"{'unsupported':12}through_connector=True, which needs a listed adapter with a connector"
    yield f"{'note':12}a forward pass may find further modules that are not supported; the error names them"


def _of_tower(model: nn.Module, adapter: Adapter, tower: Tower, when: str = "") -> Iterator[str]:
    root = submodule(model, tower.path, tower)
    lists = [f"{tower.path}.{each}".strip(".") for each in matching(root, tower)] if tower.layers else []
    lists += tower.further
    count = sum(len(model.get_submodule(each)._modules) for each in lists)
    shown = f"{', '.join(lists)}, {count} layers" if lists else f"{tower.path}, attended to"
    yield f"{'tower':12}{when}{tower.name} ({shown})"
    kinds = Counter(type(part).__name__ for part in root.modules() if type(part).__name__.endswith(RECURRENT))
    if kinds:
        yield f"{'  mixers':12}{', '.join(f'{number} {kind}' for kind, number in kinds.items())}: as maps over their values"
    explained = not adapter.bimodal or tower is adapter.towers[0]
    yield f"{'  position':12}{tower.rule.label if explained else 'explained through the first tower'}"
    yield f"{'  tokens':12}{tower.tokens}{_image_ids(model, tower)}"
    if tower.kind.image_ids:
        if tower.grid is derived_grids.derived:
            yield f"{'  grid':12}of each input: by image_grid_thw, image_sizes or patches that the tokens add up to; else no map"
        else:
            yield f"{'  grid':12}{'none: the tokens are not patches' if tower.grid is None else tower.grid.__name__}"


def _image_ids(model: nn.Module, tower: Tower) -> str:
    """The ids of tokens that stand for images, videos and sounds."""
    config = getattr(model, "config", None)
    names = ("image_token_id", "video_token_id", "audio_token_id") if tower.kind.image_ids else ()
    ids = ((name, getattr(config, name, None)) for name in names)
    named = ", ".join(f"{name} {value}" for name, value in ids if value is not None)
    return f" ({named})" if named else ""
