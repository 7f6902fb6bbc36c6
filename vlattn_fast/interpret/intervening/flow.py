"""`information_flow`: the layers through which an answer needs attention between two groups of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_integer, check_items, describe
from vlattn_fast._ground.extras import extra, with_progress
from vlattn_fast.attach.session import never_compiled
from vlattn_fast.interpret.intervening.asking import Asked, check_scores, repeated_set
from vlattn_fast.interpret.intervening.edits import Knockout, Numbers
from vlattn_fast.interpret.intervening.plans import Pair, Plans, Term, heads_of
from vlattn_fast.interpret.intervening.token_sets import TokenGroup, TokenSet, disjoint, token_set

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class FlowCurve:
    """The result of `information_flow`: the answer's probability with an edge cut in a window of layers, by its middle layer.

    Args:
        base: (S,), the probability of each sample's answer in the unedited model.
        probability: (S, L), with the window around layer l cut.
        layers: (L), the numbers of the layers with this attention.
        window: the number of layers that are cut together, fewer at the ends.
        label: the edge in words, keys -> queries.
    """

    base: Tensor
    probability: Tensor
    layers: tuple[int, ...]
    window: int
    label: str

    @property
    def change(self) -> Tensor:
        """(S, L), (probability - base) / base: -1 if the probability is 0."""
        return self.probability / self.base[:, None] - 1

    @property
    def curve(self) -> Tensor:
        """(L,), the mean drop of the probability over the samples, -change: 0 = the layer's window is not needed."""
        return -self.change.mean(0)

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with a line per sample and layer: sample, layer, probability, base and change."""
        with extra("tables"):
            import pandas as pd
        pairs = torch.cartesian_prod(torch.arange(len(self.base)), torch.tensor(self.layers))
        base = self.base[:, None].expand_as(self.probability)
        values = {"probability": self.probability, "base": base, "change": self.change}
        columns = {"sample": pairs[:, 0], "layer": pairs[:, 1], **{name: x.flatten() for name, x in values.items()}}
        return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})

    def plot(self) -> Figure:
        """Draws the curve. ModuleNotFoundError without matplotlib."""
        with extra("viz"):
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.layers, (100 * self.change.mean(0)).tolist(), marker="o", markersize=3, label=self.label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set(xlabel=f"layer (window of {self.window})", ylabel="change of the probability, %")
        axes.legend(frameon=False)
        return figure


@never_compiled
def information_flow(
    model: nn.Module,
    dataset: Iterable[tuple[Mapping[str, Any], Any]],
    *,
    window: int | None = None,
    queries: TokenGroup | None = "last",
    keys: TokenGroup | None = "image",
    heads: Numbers = None,
    target: Any = None,
    tower: str | tuple[str, str] | None = None,
    processor: Any = None,
    batch_size: int = 8,
) -> FlowCurve:
    """Measures the drop of the answer's probability if the attention between two groups of tokens is cut, layer by layer.

    Returns a `FlowCurve`. It takes a forward pass per sample and layer, `batch_size` of them at once, and two per sample of
    the unedited model. This is attention knockout
    (Geva et al., EMNLP 2023), with the curve of "Cross-modal Information Flow in MLLMs" (CVPR 2025).

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model, inputs = ViTForImageClassification(ViTConfig(**sizes)), {"pixel_values": torch.rand(2, 3, 16, 16)}
        >>> va.information_flow(model, [(inputs, None)], window=1, queries="special", keys="image").curve.shape
        torch.Size([2])

    Args:
        model: a decoder or a classifier that `explain` supports.
        dataset: (inputs, answer) for each sample or batch. answer: as in `explain`; None = `target`.
        queries, keys, heads, tower: as in `Knockout`; the edge is keys -> queries. Tokens of both groups belong to one of them,
            as in `attribute_edges`.
        window: the number of layers that are cut together: for layer l those from l - (window - 1) // 2 to l + window // 2, if
            they exist. None = a quarter of the layers with this attention: one layer hands on what another one does not.
        target: for samples without an answer, as in `explain`: None = the token or class that the unedited model chooses. A
            callable returns (B,) numbers that replace the probability.
        processor: as in `explain`.
        batch_size: the number of copies of the inputs, each with one window cut, in a forward pass; 1 with a callable target.

    Raises:
        TypeError, ValueError: an argument is invalid; an item that is not a pair; no sample; samples that go through different
            layers; a dual encoder, whose similarities are not probabilities; and what `intervene` and `explain` raise.
    """
    for name, value in (("window", 1 if window is None else window), ("batch_size", batch_size)):
        check_integer(name, value, low=1)
    cut = Knockout(queries=queries, keys=keys, heads=heads, tower=tower)
    check_items("dataset", dataset, "(inputs, answer) for each sample or batch")
    bases, curves, layers = list[Tensor](), list[Tensor](), set[tuple[int, ...]]()
    for item in with_progress(dataset, "samples"):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(f"dataset must yield (inputs, answer) for each sample or batch; got {describe(item)}")
        question = {"target": None if item[1] is not None else target, "answer": item[1]}
        asked = Asked.check(model, item[0], **question, processor=processor, tower=tower)
        base, curve, numbers = _of_one(asked, cut, window, asked.at_once(batch_size))
        bases.append(base)
        curves.append(curve)
        layers.add(numbers)
    if not bases:
        raise ValueError("dataset must have at least one item; got none")
    if len(layers) > 1:
        raise ValueError(f"dataset must have samples that go through the same layers; got {sorted(layers)}")
    label = f"{_in_words(keys)} -> {_in_words(queries)}"
    numbers = layers.pop()
    return FlowCurve(torch.cat(bases), torch.cat(curves), numbers, _size(window, numbers), label)


def _size(window: int | None, layers: Sequence[int]) -> int:
    return max(1, round(len(layers) / 4)) if window is None else window


def _in_words(group: Any) -> str:
    return group if isinstance(group, str) else "all" if group is None else "some tokens"


def _apart(plans: Plans, cut: Knockout) -> dict[Pair, tuple[TokenSet, TokenSet]]:
    """The sets of queries and keys by their towers. Two groups of a tower hold each token once; one group may flow to itself."""
    by_pair = plans.with_tokens("information_flow", cut.queries, cut.keys, cut.tower)
    (tower,) = {pair[0] for pair in by_pair}
    itself = tower, tower
    if itself not in by_pair or cut.queries is None or cut.keys is None:
        return by_pair
    names = [group for group in (cut.queries, cut.keys) if isinstance(group, str)]
    if names[0] == names[1] if len(names) == 2 else torch.equal(*(each.mask for each in by_pair[itself])):
        return by_pair
    apart = disjoint({"queries": cut.queries, "keys": cut.keys}, [tower])
    queries, keys = (token_set(name, group, tower) for name, group in apart.items())
    if isinstance(queries, str) or isinstance(keys, str):
        raise ValueError(queries if isinstance(queries, str) else keys)
    return {**by_pair, itself: (queries, keys)}


@torch.no_grad()
def _of_one(asked: Asked, cut: Knockout, window: int | None, batch_size: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The probabilities (B,) and (B, L) of one batch, and the numbers of the layers."""
    outputs = asked.run(Plans(asked.traced))
    scores, chosen = asked.scores(outputs)
    check_scores(scores)
    base = asked.probabilities(outputs)
    plans = Plans(asked.traced)
    by_pair = _apart(plans, cut)
    layers = sorted({plan.call.layer for plan in plans.layers(by_pair, None)})
    size, parts = _size(window, layers), []
    for first in with_progress(range(0, len(layers), batch_size), "cutting windows", leave=False):
        middles = torch.tensor(layers[first : first + batch_size])
        plans, copies = Plans(asked.traced), len(middles)
        sets = {pair: (repeated_set(q, copies), repeated_set(k, copies)) for pair, (q, k) in by_pair.items()}
        for plan in plans.layers(by_pair, None):
            is_cut = (middles - (size - 1) // 2 <= plan.call.layer) & (plan.call.layer <= middles + size // 2)
            bias = torch.zeros(copies, plan.call.tower.shape[0], plan.call.heads)
            for copy in is_cut.nonzero()[:, 0].tolist():
                bias[copy, :, heads_of(plan.call, cut.heads)] = -torch.inf  # type: ignore[arg-type]
            if bool(is_cut.any()):
                plans.add_term(plan, Term(*sets[plan.pair], bias.flatten(0, 1)))
        copied = asked.repeated(copies, chosen)
        parts.append(copied.probabilities(copied.run(plans)).view(copies, -1))
    return base, torch.cat(parts).T, tuple(layers)
