"""`attribute_edges` and `intervene_each`: the first-order and the true effects of edges of attention on a score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_integer, check_items, describe
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.session import never_compiled
from vlattn_fast.interpret.intervening.asking import Asked, check_scores, repeated_set
from vlattn_fast.interpret.intervening.edges import Edge, EdgeTable, as_edge
from vlattn_fast.interpret.intervening.edits import check_tower
from vlattn_fast.interpret.intervening.first_order import KeepsCalls
from vlattn_fast.interpret.intervening.plans import CallPlan, Pair, Plans, Term, check_edges, heads_of
from vlattn_fast.interpret.intervening.token_sets import TokenGroup, TokenSet, check_group

Sets = dict[str, TokenSet]


@never_compiled
def attribute_edges(
    model: nn.Module,
    inputs: Mapping[str, Any],
    groups: Mapping[str, TokenGroup] | Sequence[str] | None = None,
    *,
    target: Any = None,
    answer: Any = None,
    of: str | None = None,
    tower: str | tuple[str, str] | None = None,
    processor: Any = None,
    n_steps: int | None = None,
) -> EdgeTable:
    """Computes the first-order effect of every edge of attention on a score: for each layer, head and pair of token groups.

    Returns an `EdgeTable` with layers x heads x groups x groups edges, each with the mean over the samples. It takes one forward
    pass and one backward pass, and stores no map. `intervene_each` gives the true effects; they differ if a softmax is saturated.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model = ViTForImageClassification(ViTConfig(**sizes))
        >>> table = va.attribute_edges(model, {"pixel_values": torch.rand(2, 3, 16, 16)}, ["special", "image"])
        >>> table.matrix("image", "special").shape  # (layers, heads)
        torch.Size([2, 4])

    An edge has the weight w = e^b, with b added to the logits of its queries and keys; w = 1 is the unedited model, and w = 0 a
    cut. Its effect is the gradient of the score with respect to b at 0, the sum of A (dA - sum_j A dA) over the pairs of its
    tokens: to first order, the drop of the score if the edge is cut. This is attribution patching (Nanda, 2023; Syed et al.,
    2023) for edges of attention.

    With `n_steps`, the edges between two groups are cut gradually in all layers and heads: each head's output is s times the
    unedited one plus 1 - s times the one with a cut. The effect of an edge is the mean of the derivatives by its s at the
    `n_steps` midpoints between 0 and 1, as in integrated gradients (Sundararajan et al., ICML 2017). For each two groups, these
    effects sum to what all cuts together take from the score, up to the table's `gaps`. So they say more about edges that are
    cut together, and less about one edge, which others may replace. It takes `n_steps` + 1 passes for each two groups.

    Args:
        model: a model that `explain` supports.
        inputs: the model's keyword arguments.
        groups: names that `Knockout` knows, such as ["image", "question", "last"]; or {name: tokens}, with tokens as for
            `Knockout`. The table has each token once: a token with several names belongs to "answer", "last" or "special", in
            this order; other groups must not overlap. None = each of "image", "question", "answer", "last" and "special" that
            has tokens, in the tower with the most of these.
        target: as in `explain`: the score is a logit, or the result of a callable.
        answer: as in `explain`, instead of a target: the score is the sum of `of` over its tokens.
        processor: as in `explain`.
        of: the score of a token or a class, "logit", "log_probability" or "margin", see `va.methods.Method`. None = the
            log-probability of an answer, the logit of a target.
        tower: the tower of the edges: a name, or (queries', keys') for cross-attention, each with the groups that it has. None =
            the only one that has all groups.
        n_steps: of integrated effects; None = first-order effects.

    Layers without a softmax, such as recurrences, have no edges: the table's `without_edges` names them.

    Raises:
        TypeError, ValueError: an argument is invalid; a group that is empty, or that several towers have; groups that overlap; a
            score that does not depend on the attention, or is NaN; and what `explain` and `intervene` raise.
    """
    named = None if groups is None else checked_groups(groups)
    check_tower(tower)
    if n_steps is not None:
        check_integer("n_steps", n_steps, low=1)
    question = {"target": target, "answer": answer, "of": of, "tower": tower, "processor": processor}
    with torch.inference_mode(False), torch.enable_grad():
        notes = KeepsCalls() if n_steps is None else None
        asked = Asked.check(model, inputs, **question, notes=notes)
        plans = Plans(asked.traced)
        pair, named, queries, keys = plans.with_groups(plans.named_groups(tower) if named is None else named, tower)
        chosen = plans.layers([pair], None)
        for plan in chosen:
            check_edges(plan)
        by_pair: dict[tuple[str, str], Tensor] = {}
        if notes is None:
            assert n_steps is not None
            scores, call_effects, by_pair = _integrated(asked, chosen, queries, keys, n_steps)
        elif notes.takes_all:
            scores, _ = asked.scores(asked.outputs)
            calls = notes.for_plans(plans, chosen, queries, keys)
            _gradients(scores, [call.leaf for call in calls])
            call_effects = [plan.call.share.whole(call.by_sets(), 1) for plan, call in zip(chosen, calls, strict=True)]
        else:
            scores, call_effects = _by_edits(asked, plans, chosen, queries, keys)
    layer_effects: dict[int, Tensor] = {}  # (B, H, F, T)
    for plan, effect in zip(chosen, call_effects, strict=True):
        layer = plan.call.layer
        layer_effects[layer] = layer_effects[layer] + effect if layer in layer_effects else effect
    edges, effects = [], []
    for layer, effect in layer_effects.items():
        rows = effect.detach().flatten(1).T  # (H * F * T, B)
        effects.append(rows)
        names = [(head, f, t) for head in range(effect.shape[1]) for f in keys for t in queries]
        means = rows.double().mean(1).tolist()
        edges += [Edge(layer, *name, mean) for name, mean in zip(names, means, strict=True)]
    none = torch.tensor(torch.nan, dtype=torch.float64, device=scores.device)
    gaps = torch.stack([torch.stack([by_pair.get((f, t), none) for t in named]) for f in named]) if by_pair else None
    table = EdgeTable(tuple(edges), torch.cat(effects), scores.detach(), named, question, gaps=gaps)
    return replace(table, without_edges=tuple(plans.without_edges([pair])))


def _by_edits(asked: Asked, plans: Plans, chosen: Sequence[CallPlan], queries: Sets, keys: Sets) -> tuple[Tensor, list[Tensor]]:
    """The scores, and their gradients (B, H, F, T) by the biases of each call, of a second run that has these: the first one
    cannot have them if a module calls `score_attention` itself, or learns a mask."""
    weight = next(asked.request.model.parameters(), torch.zeros(()))
    made: Any = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device, "requires_grad": True}
    leaves = [torch.zeros(plan.call.tower.shape[0], plan.call.heads, len(keys), len(queries), **made) for plan in chosen]
    for plan, leaf in zip(chosen, leaves, strict=True):
        for column, key_set in enumerate(keys.values()):
            for row, query_set in enumerate(queries.values()):
                plans.add_term(plan, Term(query_set, key_set, leaf[:, :, column, row]))
    scores, _ = asked.scores(asked.run(plans))
    gradients = zip(leaves, _gradients(scores, leaves), strict=True)
    return scores, [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in gradients]


def _integrated(
    asked: Asked, chosen: Sequence[CallPlan], queries: Sets, keys: Sets, n_steps: int
) -> tuple[Tensor, list[Tensor], dict[tuple[str, str], Tensor]]:
    """The scores; the mean gradients (B, H, F, T) of each call by how much of its edges is kept; by the names of two groups, how
    much these sum to beyond the effect of all cuts together, the mean over the samples."""
    with torch.no_grad():
        scores, target = asked.scores(asked.run(Plans(asked.traced)))
    asked, device, dtype = asked.repeated(1, target), scores.device, torch.promote_types(scores.dtype, torch.float32)
    called = {call: number for number, call in enumerate(asked.traced.calls)}

    def cut(queries: TokenSet, keys: TokenSet, share: float) -> tuple[Tensor, list[Tensor]]:
        plans, leaves = Plans(asked.traced), list[Tensor]()
        for call in (plan.call for plan in chosen):
            plan = plans.calls[called[call]]
            plans.add_term(plan, Term(queries, keys, torch.full((call.heads,), -torch.inf)))
            plan.kept = torch.full((call.tower.shape[0], call.heads), share, dtype=dtype, device=device, requires_grad=True)
            leaves.append(plan.kept)
        return asked.scores(asked.run(plans))[0], leaves

    sizes = [(plan.call.tower.shape[0], plan.call.heads, len(keys), len(queries)) for plan in chosen]
    effects = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
    gaps = {}
    for (f, from_), (t, to) in product(enumerate(keys), enumerate(queries)):
        sets = queries[to], keys[from_]
        for step in range(n_steps):
            for effect, gradient in zip(effects, _gradients(*cut(*sets, (step + 0.5) / n_steps)), strict=True):
                if gradient is not None:
                    effect[:, :, f, t] += gradient / n_steps
        with torch.no_grad():
            drop = scores - cut(*sets, 0.0)[0]
        gaps[from_, to] = (sum(effect[:, :, f, t].sum().double() for effect in effects) - drop.sum().double()) / len(drop)
    return scores, effects, gaps


def _gradients(scores: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of the scores' sum at each leaf. ValueError for scores that are NaN, or depend on no leaf."""
    check_scores(scores)
    gradients = torch.autograd.grad(scores.sum(), leaves, allow_unused=True) if scores.requires_grad else (None,) * len(leaves)
    if all(gradient is None for gradient in gradients):
        raise ValueError("target must give scores that depend on the attention; got scores without a gradient there")
    return gradients


@never_compiled
def intervene_each(
    model: nn.Module,
    inputs: Mapping[str, Any],
    edges: EdgeTable | Iterable[Edge | tuple[int, int | None, str, str]],
    *,
    groups: Mapping[str, TokenGroup] | Sequence[str] | None = None,
    target: Any = None,
    answer: Any = None,
    tower: str | tuple[str, str] | None = None,
    processor: Any = None,
    batch_size: int = 8,
) -> EdgeTable:
    """Measures the true effect of each edge: the score of the unedited model minus its score with only this edge cut.

    Returns an `EdgeTable` of the edges in their order. It takes a forward pass per edge, `batch_size` of them at once,
    and two of the unedited model.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model, inputs = ViTForImageClassification(ViTConfig(**sizes)), {"pixel_values": torch.rand(2, 3, 16, 16)}
        >>> table = va.attribute_edges(model, inputs, ["special", "image"])
        >>> len(va.intervene_each(model, inputs, table.top(3)))
        3

    Args:
        model, inputs: as in `attribute_edges`.
        edges: a table of `attribute_edges`, or a part of it, such as `table.top(20)`, which has its groups and its score. Or
            `Edge`s, or tuples (layer, head, from, to); head None = all heads, and negative numbers count from the end.
        groups, target, answer, tower, processor: as in `attribute_edges`, for edges that are not in a table. Target None = the
            one that the unedited model chooses.
        batch_size: the number of copies of the inputs, each with one edge cut, in a forward pass; 1 with a callable target.

    Raises:
        TypeError, ValueError: no edge; an unknown layer, head or group; groups with a table, or none without; and what
            `attribute_edges` raises.
    """
    check_integer("batch_size", batch_size, low=1)
    question = {"target": target, "answer": answer, "processor": processor, "tower": tower}
    if isinstance(edges, EdgeTable):
        if groups is not None or any(value is not None for value in question.values()):
            raise ValueError(
                "edges must be given without groups, target, answer and tower if they are a table; got some of these"
            )
        groups, question = edges.groups, dict(edges.asked)
    if groups is None:
        raise ValueError("groups must be given for edges that are not in a table; got None")
    check_items("edges", edges, "a table of va.attribute_edges, or edges (layer, head, from, to)")
    named = checked_groups(groups)
    listed = [as_edge(edge, named) for edge in edges]
    if not listed:
        raise ValueError("edges must have at least one; got none")
    check_tower(question["tower"])
    asked = Asked.check(model, inputs, **question)
    plans = Plans(asked.traced)
    pair, named, queries, keys = plans.with_groups(named, question["tower"])
    listed = [_from_start(plans, pair, edge) for edge in listed]
    with torch.no_grad():
        scores, chosen = asked.scores(asked.run(Plans(asked.traced)))
        check_scores(scores)
        effects = []
        copies = asked.at_once(batch_size)
        for first in with_progress(range(0, len(listed), copies), "cutting edges"):
            some = listed[first : first + copies]
            copied = asked.repeated(len(some), chosen)
            cut, _ = copied.scores(copied.run(_cuts(asked, pair, some, queries, keys)))
            effects.append(scores - cut.view(len(some), -1))
    joined = torch.cat(effects)
    means = joined.double().mean(1).tolist()
    measured = tuple(Edge(e.layer, e.head, e.from_, e.to, mean) for e, mean in zip(listed, means, strict=True))
    return EdgeTable(measured, joined, scores, named, question, first_order=False)


def _from_start(plans: Plans, pair: Pair, edge: Edge) -> Edge:
    """The edge, with numbers from 0."""
    call = plans.layers([pair], [edge.layer])[0].call
    return replace(edge, layer=call.layer, head=None if edge.head is None else int(heads_of(call, [edge.head])))


def _cuts(asked: Asked, pair: Pair, edges: Sequence[Edge], queries: Sets, keys: Sets) -> Plans:
    """Plans for copies of the inputs, each with one edge cut."""
    plans, copies = Plans(asked.traced), len(edges)
    for side, sets in (("to", queries), ("from_", keys)):
        for name in (getattr(edge, side) for edge in edges):
            if name not in sets:
                raise ValueError(
                    f"edges must go between tokens of the towers; got {name!r} as '{side.strip('_')}', which has none"
                )
    query_sets = {edge.to: repeated_set(queries[edge.to], copies) for edge in edges}
    key_sets = {edge.from_: repeated_set(keys[edge.from_], copies) for edge in edges}
    biases: dict[tuple[int, str, str], Tensor] = {}
    layer_plans: dict[int, list[CallPlan]] = {}
    for copy, edge in enumerate(edges):
        layer_plans[edge.layer] = plans.layers([pair], [edge.layer])
        call = layer_plans[edge.layer][0].call
        chosen = heads_of(call, None if edge.head is None else [edge.head])
        key = edge.layer, edge.to, edge.from_
        bias = biases.setdefault(key, torch.zeros(copies, call.tower.shape[0], call.heads))
        bias[copy, :, chosen] = -torch.inf
    for (layer, to, from_), bias in biases.items():
        for plan in layer_plans[layer]:
            plans.add_term(plan, Term(query_sets[to], key_sets[from_], bias.flatten(0, 1)))
    return plans


def checked_groups(groups: Any) -> dict[str, Any]:
    """The groups by their names."""
    if isinstance(groups, Sequence) and not isinstance(groups, str) and all(isinstance(name, str) for name in groups):
        groups = {name: name for name in groups}
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups must be a dict {{name: tokens}}, or names; got {describe(groups)}")
    if not groups:
        raise ValueError("groups must have at least one; got none")
    for name, group in groups.items():
        if not isinstance(name, str):
            raise TypeError(f"groups must have names; got {describe(name)}")
        check_group(f"groups[{name!r}]", group)
    return dict(groups)
