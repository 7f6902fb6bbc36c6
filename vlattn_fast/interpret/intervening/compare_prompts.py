"""`compare_prompts`: which states, heads and MLPs carry the difference between two runs of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_choice, check_integer, describe
from vlattn_fast._ground.extras import extra, with_progress
from vlattn_fast.attach.session import never_compiled
from vlattn_fast.interpret.intervening.asking import Asked, check_scores
from vlattn_fast.interpret.intervening.edits import Edit, Mlp, Patch, Residual
from vlattn_fast.interpret.intervening.plans import Plans, keep
from vlattn_fast.interpret.intervening.records import HeadRecord
from vlattn_fast.interpret.intervening.state_places import KINDS
from vlattn_fast.interpret.intervening.state_plans import chosen_places
from vlattn_fast.interpret.intervening.traced_model import TracedTower
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DIRECTIONS = ("denoise", "noise")
Span = tuple[int, int]
Head = tuple[int, int]  # layer and head


class PatchEffect(NamedTuple):
    """What a patch from the other run does: 0 = the score of the corrupt run, 1 = that of the clean run.

    kind: "residual", of one position; "head" or "mlp", at all aligned positions. number: the position, in the run that is
    patched, or the head; None for an MLP. true: NaN if it was not measured.
    """

    kind: str
    layer: int
    number: int | None
    first_order: float
    true: float = float("nan")


@dataclass(frozen=True, eq=False)
class PromptComparison:
    """The result of `va.compare_prompts`: effects of patches, by layer, from 0 = the corrupt run to 1 = the clean run.

    Args:
        clean, corrupt: (B,), the scores of the two runs.
        direction: "denoise": the corrupt run is patched from the clean one; "noise": the clean run is patched.
        positions: of each aligned token in the run that is patched.
        residual: (L, T), first-order effects of the residual stream after each layer, at each aligned token.
        heads: (L, H), of the outputs of heads at all aligned tokens.
        mlps: (L), of the outputs of MLPs.
        measured: the patches with the largest first-order change, with their true effects.
    """

    clean: Tensor
    corrupt: Tensor
    direction: str
    positions: tuple[int, ...]
    residual: Tensor
    heads: Tensor
    mlps: Tensor
    measured: tuple[PatchEffect, ...] = ()
    _runs: Any = field(default=None, repr=False)

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's correlation of the first-order with the true effects of `measured`; None for fewer than three."""
        if len(self.measured) < 3:
            return None
        pairs = [(each.first_order, each.true) for each in self.measured]
        return rank_correlation(*torch.tensor(pairs, dtype=torch.float64).T)

    def __repr__(self) -> str:
        lines = [
            f"{self.direction}: score {float(self.corrupt.mean()):.4g} corrupt (0), {float(self.clean.mean()):.4g} clean (1)"
        ]
        for each in self.measured[:10]:
            where = "" if each.number is None else f"{'position' if each.kind == 'residual' else 'head'} {each.number}"
            first, true = f"{each.first_order:+.3f}", f"{each.true:+.3f}"
            lines.append(f"  {each.kind:<8} layer {each.layer:>3}  {where:<13} first order {first}, true {true}")
        if (rank := self.rank_correlation) is not None:
            lines.append(f"rank correlation of first-order and true effects: {rank:.2f} over {len(self.measured)} patches")
        return "\n".join(lines)

    def patch_path(self, sender: Head, receiver: Head) -> float:
        """Returns the effect of the path from one head straight to another, later one (path patching, Wang et al., ICLR 2023).

        The sender has its output of the other run; all other heads and MLPs keep theirs, and so the receiver changes by this path
        alone; its new output then goes into the run that is patched. Takes two forward passes. 0 and 1 as in the table.

        Raises:
            ValueError: an unknown layer or head; a receiver that is not in a later layer.
        """
        effect: float = self._runs.path(sender, receiver)
        return effect

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with a line for each patch: kind, layer, number (position or head) and first_order; true where it
        was measured. ModuleNotFoundError without pandas."""
        with extra("tables"):
            import pandas as pd
        true = {(each.kind, each.layer, each.number): each.true for each in self.measured}
        lines = [each._replace(true=true.get((each.kind, each.layer, each.number), each.true)) for each in self.effects()]
        return pd.DataFrame(lines).astype({"number": "Int64"})

    def effects(self) -> list[PatchEffect]:
        """Returns all first-order effects."""
        effects = list[PatchEffect]()
        for layer in range(len(self.mlps)):
            rows = (("residual", self.positions, self.residual[layer]), ("head", range(self.heads.shape[1]), self.heads[layer]))
            for kind, numbers, values in (*rows, ("mlp", (None,), self.mlps[layer : layer + 1])):
                effects += [PatchEffect(kind, layer, *each) for each in zip(numbers, values.tolist(), strict=True)]
        return effects

    def plot(self) -> Figure:
        """Draws the first-order effects: of the residual stream by layer and position, of heads and MLPs by layer.
        ModuleNotFoundError without matplotlib."""
        with extra("viz"):
            from matplotlib.figure import Figure
        neutral = 0.0 if self.direction == "denoise" else 1.0
        panels = {"residual stream": self.residual, "heads": self.heads, "MLPs": self.mlps[:, None]}
        figure = Figure(figsize=(9, 1.5 + 0.25 * len(self.mlps)), layout="constrained")
        widths = [max(3, x.shape[1]) for x in panels.values()]
        for axes, (title, values) in zip(figure.subplots(1, 3, width_ratios=widths), panels.items(), strict=True):
            largest = max(1.0, float((values - neutral).abs().nan_to_num().max()))
            colours = {"cmap": "RdBu_r", "vmin": neutral - largest, "vmax": neutral + largest}
            image = axes.imshow(values.tolist(), aspect="auto", **colours)
            axes.set(title=title, xlabel={"residual stream": "aligned token", "heads": "head"}.get(title, ""), ylabel="layer")
            figure.colorbar(image, ax=axes)
        return figure


@never_compiled
def compare_prompts(
    model: nn.Module,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any],
    score: Any,
    *,
    direction: str = "denoise",
    align: Sequence[tuple[Span, Span]] | None = None,
    k: int = 10,
    tower: str | None = None,
    processor: Any = None,
) -> PromptComparison:
    """Finds where the difference between two runs of a model is: patches every state, head and MLP from one run into the other.

    Returns a `PromptComparison`: the first-order effect of every patch, from two forward passes and one backward pass, and the
    true effects of the `k` patches that change most, one forward pass each.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> clean = {"input_ids": torch.tensor([[1, 5, 9, 7, 4]])}
        >>> corrupt = {"input_ids": torch.tensor([[1, 5, 8, 7, 4]])}
        >>> table = va.compare_prompts(model, clean, corrupt, score=(3, 6), k=4)
        >>> table.residual.shape, table.heads.shape, len(table.measured)  # (layers, tokens), (layers, heads)
        (torch.Size([3, 5]), torch.Size([3, 4]), 4)

    "denoise" runs on `corrupt` and takes states from `clean`: an effect of 1 restores the score of the clean run. "noise" runs on
    `clean` and takes states from `corrupt`: 1 changes nothing, 0 destroys it. The inputs may differ in the image, in the text, or
    in both.

    Args:
        model: a model that `explain` supports, whose states `Residual` and `Mlp` find.
        clean, corrupt: the model's keyword arguments, of as many samples.
        score: as `target` of `explain`, but not None, since all runs have the same; or a pair of targets, whose scores are
            subtracted, such as the token of the clean answer and that of the corrupt one.
        direction: "denoise" or "noise".
        align: pairs of spans (start, stop) of as many tokens in `clean` and in `corrupt`, which correspond. None = all tokens,
            if both have as many.
        k: how many true effects to measure; 0 = none.
        tower: the name of the tower that is patched; None = the only one.
        processor: as in `explain`.

    Raises:
        TypeError, ValueError: an argument is invalid; other numbers of samples; other numbers of tokens without `align`; spans of
            other lengths, or outside of the inputs; equal scores; and what `explain` and `intervene` raise.

    References: Meng et al., NeurIPS 2022; Nanda, "Attribution patching", 2023; Zhang and Nanda, ICLR 2024.
    """
    check_choice("direction", direction, DIRECTIONS)
    check_integer("k", k, low=0)
    with torch.inference_mode(False):
        sides = {
            name: _Side.of(name, model, inputs, score, tower, processor)
            for name, inputs in (("clean", clean), ("corrupt", corrupt))
        }
        runs = _Runs(sides["clean"], sides["corrupt"], direction, align)
        table = runs.first_order()
        order = sorted(table.effects(), key=lambda each: -abs(each.first_order - runs.neutral))
        measured = tuple(each._replace(true=runs.true(each)) for each in with_progress(order[:k], "patching"))
    return replace(table, measured=measured)


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two inputs, and how its outputs are scored."""

    asked: tuple[Asked, ...]  # one, or two whose scores are subtracted
    tower: TracedTower
    plans: Plans  # without edits

    @classmethod
    def of(cls, name: str, model: Any, inputs: Any, score: Any, tower: str | None, processor: Any) -> _Side:
        pair = score if isinstance(score, tuple) else (score,)
        if len(pair) not in (1, 2) or any(each is None for each in pair):  # each run has another largest logit
            raise ValueError(f"score must be a target, or a pair of targets; got {describe(score)}")
        question = {"answer": None, "tower": tower, "processor": processor}
        asked = tuple(
            Asked.check(model, inputs, target=each, of=None if callable(each) else "logit", **question) for each in pair
        )
        plans = Plans(asked[0].traced)
        return cls(asked, plans.self_pair("compare_prompts", tower)[0], plans)

    def scores(self, outputs: Any) -> Tensor:
        first, *second = (asked.scores(outputs)[0] for asked in self.asked)
        scores = first - second[0] if second else first
        check_scores(scores)
        return scores

    def run(self, plans: Plans) -> Tensor:
        return self.scores(self.asked[0].run(plans))

    def plans_that(self, take: Callable[..., Tensor], kept: dict[Any, Tensor]) -> Plans:
        """Plans that hand each state and the outputs of each layer's heads to take(kept, (kind, layer), tensor)."""
        plans = self.plans.anew()
        for kind in KINDS:
            for place in chosen_places(plans.traced, plans.state_places, kind, "compare_prompts", None, self.tower.name):
                plans.add_change(place, functools.partial(take, kept, (kind, place.layer)))
        for plan in plans.layers([plans.self_pair("compare_prompts", self.tower.name)], None):
            plan.through = functools.partial(take, kept, ("head", plan.call.layer))
        return plans


class _Runs:
    """Both sides: `base` is patched with what `source` has."""

    def __init__(self, clean: _Side, corrupt: _Side, direction: str, align: Any) -> None:
        self.direction = direction
        self.base, self.source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        self.neutral = 0.0 if direction == "denoise" else 1.0
        batches = clean.tower.shape[0], corrupt.tower.shape[0]
        if batches[0] != batches[1]:
            raise ValueError(f"clean and corrupt must have as many samples; got {batches[0]} and {batches[1]}")
        of_clean, of_corrupt = _aligned(align, clean.tower.shape[1], corrupt.tower.shape[1])
        self.to, self.from_ = (of_corrupt, of_clean) if direction == "denoise" else (of_clean, of_corrupt)
        plans = self.base.plans
        self.pair = plans.self_pair("compare_prompts", self.base.tower.name)
        once = plans.once_in_layers(self.pair, None, "runs are compared")
        self.calls = {plan.call.layer: plan.call for plan in once}
        self.base_outputs, self.base_scores = self._recorded(self.base)
        self.source_outputs, source_scores = self._recorded(self.source)
        pair = self.base_scores, source_scores
        self.corrupt_scores, self.clean_scores = pair if direction == "denoise" else pair[::-1]
        self.difference = self.clean_scores - self.corrupt_scores
        if not bool((self.difference != 0).all()):
            raise ValueError("clean and corrupt must have different scores; got equal ones, so that effects have no scale")

    def _recorded(self, side: _Side) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
        """The states and the outputs of heads by kind and layer, and the scores of a run."""
        kept = dict[tuple[str, int], Tensor]()
        with torch.no_grad():
            scores = side.run(side.plans_that(keep, kept))
        return kept, scores

    def first_order(self) -> PromptComparison:
        """The effects of all patches, from the gradients of the base run."""
        leaves = dict[tuple[str, int], Tensor]()
        plans = self.base.plans_that(_with_leaf, leaves)
        with torch.enable_grad():
            scores = self.base.run(plans).double()
            effect = (scores / self.difference.double()).mean()  # a tower may pack the tokens of all samples
            gradients = dict(zip(leaves, torch.autograd.grad(effect, [*leaves.values()], allow_unused=True), strict=True))
        layers = 1 + max(layer for _, layer in leaves)
        heads = max(call.heads for call in self.calls.values())
        tables = {"residual": torch.full((layers, len(self.to)), torch.nan), "head": torch.full((layers, heads), torch.nan)}
        tables["mlp"] = torch.full((layers, 1), torch.nan)
        for (kind, layer), gradient in gradients.items():
            base, source = self.base_outputs[kind, layer], self.source_outputs[kind, layer]
            if kind != "head":
                base, source = base[:, None], source[:, None]
            change = source[:, :, self.from_].double() - base[:, :, self.to].double()  # (B, H or 1, T, C)
            if gradient is None:
                products = torch.zeros(change.shape[:3], dtype=torch.float64)
            else:
                grad = gradient if kind == "head" else gradient[:, None]
                products = (grad[:, :, self.to].double() * change).sum(-1).cpu()
            effects = products[:, 0] if kind == "residual" else products.sum(2)
            tables[kind][layer, : effects.shape[1]] = self.neutral + effects.sum(0)
        shown = self.clean_scores, self.corrupt_scores, self.direction, tuple(self.to)
        return PromptComparison(*shown, tables["residual"], tables["head"], tables["mlp"][:, 0], _runs=self)

    def true(self, effect: PatchEffect) -> float:
        """The effect of one patch, measured."""
        edit: Edit
        if effect.kind == "head":
            moved = self._moved("head", effect.layer)
            edit = Patch(self._record({effect.layer: moved}), {effect.layer: effect.number}, self._mask(self.to))
        else:
            kind: Any = Residual if effect.kind == "residual" else Mlp
            values = self._moved(effect.kind, effect.layer)
            positions = self._mask(self.to if effect.number is None else [effect.number])
            edit = kind(effect.layer, positions, set=values, tower=self.base.tower.name)
        return self._effect_of(edit)

    def _effect_of(self, edit: Edit) -> float:
        plans = self.base.plans.anew()
        plans.add(edit)
        with torch.no_grad():
            change = (self.base.run(plans) - self.base_scores).double() / self.difference.double()
        return self.neutral + float(change.mean())

    def path(self, sender: Head, receiver: Head) -> float:
        (one, one_head), (two, two_head) = (
            self._numbered(name, each) for name, each in (("sender", sender), ("receiver", receiver))
        )
        if two <= one:
            raise ValueError(f"receiver must be in a layer after that of the sender, {one}; got {two}")
        plans, received = self.base.plans.anew(), dict[int, Tensor]()
        of_base = self._record({layer: x for (kind, layer), x in self.base_outputs.items() if kind == "head"})
        of_source = self._record({one: self._moved("head", one)})
        everywhere = self._mask(range(self.base.tower.shape[1]))
        for layer, call in self.calls.items():
            kept = [head for head in range(call.heads) if (layer, head) != (one, one_head)]
            if layer < two and kept:
                plans.add(Patch(of_base, {layer: kept}, everywhere))
        plans.add(Patch(of_source, {one: one_head}, self._mask(self.to)))
        for (kind, layer), state in self.base_outputs.items():
            if kind == "mlp" and layer < two:
                plans.add(Mlp(layer, set=state, tower=self.base.tower.name))
        (plan,) = plans.layers([self.pair], [two])
        plan.through = functools.partial(keep, received, two)
        with torch.no_grad():
            self.base.run(plans)
        return self._effect_of(Patch(self._record(received), {two: two_head}, everywhere))

    def _numbered(self, name: str, head: Any) -> Head:
        if not (isinstance(head, tuple) and len(head) == 2 and all(type(number) is int for number in head)):
            raise TypeError(f"{name} must be (layer, head); got {describe(head)}")
        if head[0] not in self.calls or not 0 <= head[1] < self.calls[head[0]].heads:
            raise ValueError(f"{name} must be a head of layers {', '.join(map(str, self.calls))}; got {head}")
        return head

    def _record(self, outputs: Mapping[int, Tensor]) -> HeadRecord:
        """Outputs of heads by layer, for `Patch`."""
        return HeadRecord((self.base.tower.name, self.base.tower.name), {}, outputs, 0)

    def _moved(self, kind: str, layer: int) -> Tensor:
        """What the base run has there, (B, ..., N, C), with the aligned tokens of the source."""
        base, source = self.base_outputs[kind, layer], self.source_outputs[kind, layer]
        return base.index_copy(-2, torch.tensor(self.to, device=base.device), source[..., self.from_, :].to(base))

    def _mask(self, positions: Sequence[int]) -> Tensor:
        return torch.zeros(self.base.tower.shape, dtype=torch.bool).index_fill(1, torch.tensor(list(positions)), True)


def _with_leaf(leaves: dict[Any, Tensor], key: Any, value: Tensor, *place: int) -> Tensor:
    leaves[key] = torch.zeros_like(value, requires_grad=True)
    return value + leaves[key]


def _aligned(align: Any, clean: int, corrupt: int) -> tuple[list[int], list[int]]:
    """The places of corresponding tokens in inputs of so many tokens."""
    if align is None:
        if clean != corrupt:
            raise ValueError(
                f"clean and corrupt must have as many tokens, or align= must name corresponding spans; got {clean} and {corrupt}"
            )
        return list(range(clean)), list(range(corrupt))
    places: tuple[list[int], list[int]] = [], []
    form = "align must be pairs of spans ((start, stop), (start, stop)) of as many tokens, within the inputs and apart"
    if not isinstance(align, Sequence) or not align:
        raise TypeError(f"{form}; got {describe(align)}")
    for pair in align:
        try:
            spans = [range(*span) for span in pair]
        except TypeError:
            raise ValueError(f"{form}; got {pair!r:.80}") from None
        fits = len(spans) == 2 and len(spans[0]) == len(spans[1]) > 0 and min(spans[0].start, spans[1].start) >= 0
        if not fits or spans[0].stop > clean or spans[1].stop > corrupt:
            raise ValueError(f"{form}, of {clean} and {corrupt} tokens; got {pair!r:.80}")
        for chosen, span in zip(places, spans, strict=True):
            chosen += span
    if any(len(set(chosen)) < len(chosen) for chosen in places):
        raise ValueError(f"{form}; got spans that overlap")
    return places
