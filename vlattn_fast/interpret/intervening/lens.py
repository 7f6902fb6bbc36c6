"""`lens`: which tokens the states of each layer already name (logit lens)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_integer, describe
from vlattn_fast._ground.extras import extra, with_progress
from vlattn_fast.attach.session import at_rest, never_compiled, unwrapped
from vlattn_fast.interpret.explaining.answer import encoded
from vlattn_fast.interpret.explaining.request import tokenizer_of
from vlattn_fast.interpret.intervening.editing import EditedCalls
from vlattn_fast.interpret.intervening.edits import Numbers, Residual, check_numbers
from vlattn_fast.interpret.intervening.plans import Plans, keep
from vlattn_fast.interpret.intervening.state_plans import chosen_places, last_of
from vlattn_fast.interpret.intervening.traced_model import TracedTower, trace_model
from vlattn_fast.interpret.result.figures.photos import open_image

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Lens:
    """The result of `va.lens`; `plot` draws where a token is named, layer by layer.

    Args:
        layers: the layers after which states were read.
        top: int64 (L, B, N, k), the most likely tokens at each position.
        probability: (L, B, N, k), theirs.
        tokens: the tokens that were asked for: name -> id.
        probabilities: (L, B, N, T), of these tokens.
        positions: bool (B, N), those of the image; all, if there is none.
    """

    layers: tuple[int, ...]
    top: Tensor
    probability: Tensor
    tokens: Mapping[str, int]
    probabilities: Tensor
    positions: Tensor
    _tower: TracedTower = field(repr=False)
    _names: Any = field(default=None, repr=False)

    def word(self, token: int) -> str:
        """Returns the name of a token: by the processor's tokenizer, else its number."""
        return str(token) if self._names is None else str(self._names.convert_ids_to_tokens([token])[0])

    def maps(self, token: str) -> list[Tensor]:
        """Returns the probabilities of a token of `tokens` over each image, (L, h, w). ValueError for another token, or if the
        model's image tokens are no patches."""
        if token not in self.tokens:
            raise ValueError(f"token must be one of {', '.join(map(repr, self.tokens)) or 'tokens='}; got {token!r}")
        column = list(self.tokens).index(token)
        by_layer = [self._tower.tokens.maps(layer[..., column]) for layer in self.probabilities]
        if any(each is None for each in by_layer):
            raise ValueError(f"inputs must have an image whose tokens are patches; got none in tower '{self._tower.name}'")
        return [torch.stack(list(images)) for images in zip(*(each[0] for each in by_layer if each is not None), strict=True)]

    def __repr__(self) -> str:
        lines = [f"lens of {len(self.layers)} layers, {int(self.positions.sum())} positions; most frequent tokens there:"]
        for layer, top in zip(self.layers, self.top[..., 0], strict=True):
            ids, counts = top[self.positions].unique(return_counts=True)
            most = counts.argsort(descending=True)[:4]
            lines.append(f"  layer {layer:>3}  " + ", ".join(f"{self.word(int(ids[i]))} ({int(counts[i])})" for i in most))
        return "\n".join(lines)

    def plot(self, token: str, image: Any = None, number: int = 0) -> Figure:
        """Draws the maps of a token, a panel for each layer, over `image` (a path or a PIL image) if it is given. `number`: which
        of the images of the inputs. ModuleNotFoundError without matplotlib."""
        maps = self.maps(token)[number]
        with extra("viz"):
            from matplotlib.figure import Figure
        columns = min(len(maps), 6)
        rows = -(-len(maps) // columns)
        figure = Figure(figsize=(1.9 * columns, 2.1 * rows), layout="constrained")
        photo, (height, width) = None if image is None else open_image(image), maps.shape[1:]
        extent, largest = (0, width, height, 0), float(maps.max())
        for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.axis("off")
            if number < len(maps):
                if photo is not None:
                    axes.imshow(photo, extent=extent)
                over = 1.0 if photo is None else 0.6
                axes.imshow(maps[number].tolist(), extent=extent, vmin=0, vmax=largest, alpha=over, cmap="viridis")
                axes.set_title(f"layer {self.layers[number]}", fontsize=9)
        figure.suptitle(f"probability of {token!r}, up to {largest:.2g}", fontsize=10)
        return figure

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with a line for each layer, sample and position of `positions`: the most likely token, its
        probability, and those of `tokens`. ModuleNotFoundError without pandas."""
        with extra("tables"):
            import pandas as pd
        places = self.positions.nonzero().tolist()
        lines = []
        for number, layer in enumerate(self.layers):
            for sample, position in places:
                at = number, sample, position
                asked = {name: float(p) for name, p in zip(self.tokens, self.probabilities[at], strict=True)}
                first = {"token": self.word(int(self.top[at][0])), "probability": float(self.probability[at][0])}
                lines.append({"layer": layer, "sample": sample, "position": position, **first, **asked})
        return pd.DataFrame(lines)


@never_compiled
def lens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    tokens: Sequence[int | str] = (),
    *,
    layers: Numbers = None,
    k: int = 5,
    tower: str | None = None,
    processor: Any = None,
) -> Lens:
    """Reads the states after each layer with the model's own head: which tokens do the patches of an image name already?

    Returns a `Lens`. The states after a layer take the place of those after the last one, so that the last norm and the head read
    them. It takes a forward pass for each layer, and three more.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> seen = va.lens(model, {"input_ids": torch.randint(50, (1, 12))}, tokens=[7])
        >>> seen.top.shape, seen.probabilities.shape
        (torch.Size([3, 1, 12, 5]), torch.Size([3, 1, 12, 1]))

    Args:
        model: a model that predicts tokens, which `explain` supports, and whose states `Residual` finds.
        inputs: the model's keyword arguments, without `logits_to_keep`.
        tokens: those whose probabilities are returned everywhere: ids, or words of one token each with `processor`.
        layers: numbers from 0, or negative from the end; None = all.
        k: how many of the most likely tokens to return at each position.
        tower: the name of the tower; None = the only one.
        processor: a processor or tokenizer, for words.

    Raises:
        TypeError, ValueError: an argument is invalid; a model without logits for each token; and what `intervene` raises.

    Reference: nostalgebraist, "Interpreting GPT: the logit lens", 2020; for image tokens Neo et al., ICLR 2025.
    """
    check_integer("k", k, low=1)
    numbers, names = check_numbers("layers", layers), tokenizer_of(processor)
    asked = _ids_of(tokens, names)
    module = unwrapped(model)
    traced = trace_model(model, inputs, [tower])
    plans = Plans(traced)
    pair = plans.self_pair("lens", tower)[0]
    last = last_of(traced, plans.state_places, pair, "lens")
    chosen = chosen_places(traced, plans.state_places, "residual", "lens", numbers, pair.name)
    states: dict[int, Tensor] = {}
    for place in chosen:
        plans.add_change(place, functools.partial(keep, states, place.layer))
    with torch.inference_mode(False), torch.no_grad(), at_rest(module):
        _run(plans, traced.arguments)
        tops, probabilities, columns = list[Tensor](), list[Tensor](), list[Tensor]()
        for place in with_progress(chosen, "layers"):
            edited = plans.anew()
            edited.add(Residual(last.layer, set=states.pop(place.layer), tower=pair.name))
            logits = traced.adapter.scoring.logits(_run(edited, traced.arguments))
            if not isinstance(logits, Tensor) or logits.ndim != 3 or tuple(logits.shape[:2]) != pair.shape:
                got = "none" if not isinstance(logits, Tensor) else tuple(logits.shape)
                raise ValueError(f"model must give logits for each of the {pair.shape} tokens of '{pair.name}'; got {got}")
            if any(token >= logits.shape[-1] for token in asked.values()):
                raise ValueError(f"tokens must be ids below {logits.shape[-1]}, those of the model; got {list(asked.values())}")
            probability = logits.float().softmax(-1)
            top = probability.topk(min(k, probability.shape[-1]), -1)
            tops.append(top.indices.cpu())
            probabilities.append(top.values.cpu())
            columns.append(probability[..., list(asked.values())].cpu())
    is_image = pair.tokens.image_mask().cpu() if pair.tokens.image else torch.ones(pair.shape, dtype=torch.bool)
    found = torch.stack(tops), torch.stack(probabilities), asked, torch.stack(columns)
    return Lens(tuple(place.layer for place in chosen), *found, is_image, pair, names)


def _run(plans: Plans, arguments: Mapping[str, Any]) -> Any:
    with EditedCalls(plans).observer():
        return plans.traced.model(**arguments)


def _ids_of(tokens: Any, names: Any) -> dict[str, int]:
    """The ids of tokens, by their names."""
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise TypeError(f"tokens must be a list of ids or words; got {describe(tokens)}")
    ids = dict[str, int]()
    for token in tokens:
        if ids.setdefault(str(token), number := _id_of(token, names)) != number:
            raise ValueError(f"tokens must have names that differ; got {token!r}, both an id and a word of another id")
    return ids


def _id_of(token: Any, names: Any) -> int:
    if type(token) is int:
        check_integer("tokens", token, low=0)
        return token
    if not isinstance(token, str):
        raise TypeError(f"tokens must be ids or words; got {describe(token)}")
    if names is None:
        raise ValueError(f"processor must have a tokenizer for tokens that are words; got none for {token!r}")
    ids = encoded("tokens", token, names)
    if len(ids) != 1:
        raise ValueError(f"tokens must be words of one token each; got {token!r}, which has {len(ids)}")
    return ids[0]
