"""`score_parts`: which parts of the residual stream make a head attend where it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_choice
from vlattn_fast.attach.events import AttentionEvent
from vlattn_fast.attach.session import at_rest, never_compiled
from vlattn_fast.backends.reference.attention_statistics import LogitStatistics
from vlattn_fast.interpret.intervening.edits import Numbers, check_numbers
from vlattn_fast.interpret.intervening.effects import checked_groups
from vlattn_fast.interpret.intervening.part_table import PartTable, bars
from vlattn_fast.interpret.intervening.plans import Plans, heads_of
from vlattn_fast.interpret.intervening.stream_leaves import PARTS, Leaves, constant_options, run_with_leaves
from vlattn_fast.interpret.intervening.token_sets import TokenGroup, TokenSet, check_group, disjoint, token_set
from vlattn_fast.interpret.intervening.traced_model import trace_model
from vlattn_fast.ops.attention_statistics import attention_statistics
from vlattn_fast.ops.score_attention import score_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class ScoreParts(PartTable):
    """The result of `va.score_parts`; `print` shows the largest numbers, `plot` draws them.

    Args:
        names: the parts: "embedding", "attention 0" or "head 0.3", "mlp 0", ...; the last is "rest": biases of norms and
            projections, and what the model adds to the stream between layers.
        layer: whose scores are split.
        heads: of the layer.
        keys: (B, H, P), the parts of the keys in the score, weighted by attention: the mean over the queries of sum_s A_ts S_ts.
        queries: (B, H, P), the parts of the queries in the same number.
        push: group -> (B, H, P), how much a part of the keys raises the attention to this group: the derivative of its mass. The
            groups of all keys sum to 0, but for what a sink takes.
        query_push: the same for a part of the queries.
        scores: (B, H), sum_s A_ts S_ts: what `keys` and `queries` sum to over the parts.
        entropy_gap: (B, H), log-sum-exp - entropy of the same rows. It equals `scores`, but for what a mask, a bias, a cap of
            the logits or a sink adds.
    """

    layer: int
    heads: tuple[int, ...]
    keys: Tensor
    queries: Tensor
    push: Mapping[str, Tensor]
    query_push: Mapping[str, Tensor]
    scores: Tensor
    entropy_gap: Tensor

    def _kinds(self) -> dict[str, Tensor]:
        kinds = {"keys": self.keys, "queries": self.queries}
        for name, of_keys in self.push.items():
            kinds |= {f"push to {name}": of_keys, f"query push to {name}": self.query_push[name]}
        return kinds

    def __repr__(self) -> str:
        gap = float((self.scores - self.entropy_gap).abs().max())
        head = f"layer {self.layer}, {len(self.heads)} heads, {len(self.names)} parts; sums - (lse - entropy): {gap:.1e} at most"
        kinds = list(self._kinds())
        return "\n".join([head, *(line for kind in kinds[2:] or kinds for line in self._lines(kind, 4))])

    def plot(self, head: int, kind: str | None = None, count: int = 20) -> Figure:
        """Draws the parts of a head with the largest numbers, the mean over the samples. `kind`: "keys", "queries", "push to
        GROUP" or "query push to GROUP", by default "keys". ModuleNotFoundError without matplotlib."""
        name, mean = self._mean(kind)
        if head not in self.heads:
            raise ValueError(f"head must be among {self.heads}; got {head!r}")
        return bars(self.names, mean[self.heads.index(head)], f"layer {self.layer}, head {head}: {name}", count)


@never_compiled
def score_parts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layer: int,
    heads: Numbers = None,
    *,
    parts: str = "layers",
    groups: Mapping[str, TokenGroup] | Sequence[str] | None = None,
    queries: TokenGroup | None = None,
    tower: str | None = None,
) -> ScoreParts:
    """Splits the scores of a layer's heads into the parts of the residual stream: why does a head look there?

    Returns a `ScoreParts`. In a model whose norms divide by constants, query and key are sums over the parts of the residual
    stream before the layer: embedding, outputs of attention or of its heads, outputs of MLPs. So are the scores S = scale q . k,
    and their mean under the head's own attention, sum_s A_ts S_ts. No N x M map is stored: memory is that of one forward pass
    with all parts, (P, B, N, C), and time that of one backward pass through norms and projections for each head and group.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> inputs = {"input_ids": torch.randint(50, (1, 12))}
        >>> table = va.score_parts(model, inputs, 2, heads=[1], groups={"first": (0, 4), "later": (4, 12)})
        >>> table.names
        ('embedding', 'attention 0', 'mlp 0', 'attention 1', 'mlp 1', 'rest')
        >>> table.push["first"].shape  # (B, H, P)
        torch.Size([1, 1, 6])

    A part that adds the same to all keys of a row changes no attention: `keys` has it, `push` leaves it out. `push` is the
    derivative of a group's mass of attention by a factor of the part in the keys, A_ts (S_ts - sum_j A_tj S_tj) summed over the
    group, with the part's S; to first order, what the group loses without the part. `query_push` is that of the queries.

    Args:
        model: a model that `explain` supports, whose layers add to a residual stream (`Residual` and `Mlp` find it).
        inputs: the model's keyword arguments.
        layer: whose scores are split, from 0, or negative from the end.
        heads: numbers from 0, or negative from the end; None = all.
        parts: "layers", or "heads" for each head of the layers before.
        groups: groups of keys, for `push`: names that `Knockout` knows, or {name: tokens}. A token with several names belongs to
            "answer", "last" or "special", in this order; other groups must not overlap.
        queries: the queries over which all numbers are means, as in `Knockout`. None = "last" in a tower of text, else all.
        tower: the name of the tower; None = the only one.

    Constants: the denominators of norms, also those of queries and keys; gates of attention. Rotary positions act on each part.

    Raises:
        TypeError, ValueError: an argument is invalid; an unknown layer, head or tower; a group that is empty; a model whose
            residual stream is not found, or gets something else that is not linear; whose attention has another score than the
            dot product or is written out by hand; or with a norm that cannot be held fixed; and what `intervene` raises.
    """
    named = {} if groups is None else checked_groups(groups)
    check_group("queries", queries)
    chosen = check_numbers("heads", heads)
    check_choice("parts", parts, PARTS)
    traced = trace_model(model, inputs, [tower])
    plans = Plans(traced)
    pair = plans.self_pair("score_parts", tower)
    (plan, *more) = plans.layers([pair], check_numbers("layer", layer), "layer")
    if more or type(layer) is not int:
        raise ValueError(f"layer must be a number of a layer that attends once; got {layer!r}")
    if plan.call.problem:
        raise ValueError(f"model must attend over whole inputs if scores are split; got {plan.call.problem}")
    numbers = heads_of(plan.call, chosen)
    tower_of = pair[0]
    weights = _query_weights(queries, tower_of)
    sets = {name: _set_of(f"groups[{name!r}]", group, tower_of) for name, group in disjoint(named, [tower_of]).items()}
    with at_rest(traced.model):
        leaves = run_with_leaves(plans, tower_of, "score_parts", plan.call)
        return _split(leaves, leaves.events[plan.call], parts, plan.call.layer, numbers.tolist(), weights, sets)


def _set_of(name: str, group: Any, tower: Any) -> Tensor:
    chosen = token_set(name, group, tower)
    if not isinstance(chosen, TokenSet):
        raise ValueError(chosen)
    return chosen.mask


def _query_weights(queries: Any, tower: Any) -> Tensor:
    """(B, N), which sum to 1 over the queries of each sample."""
    if queries is None and bool(tower.last.any()):
        queries = "last"
    mask = _set_of("queries", queries, tower)
    real = tower.tokens.real()
    mask = mask if real is None else mask & real.bool().cpu()
    if not bool(mask.any(1).all()):
        raise ValueError(f"queries must have a token in each sample; got none in sample {int((~mask.any(1)).nonzero()[0])}")
    return mask.double() / mask.sum(1, keepdim=True)


def _split(
    leaves: Leaves,
    event: AttentionEvent,
    parts: str,
    layer: int,
    heads: Sequence[int],
    weights: Tensor,
    sets: Mapping[str, Tensor],
) -> ScoreParts:
    options, query, key = constant_options(event), event.query, event.key
    scale = query.shape[-1] ** -0.5 if options.get("scale") is None else float(options["scale"])
    options |= {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    # Each on its own: the weights of attention are constants in the scores' mean, and not in the push.
    q, k, values = (x.detach().requires_grad_() for x in (query, key, key))
    mixed = score_attention(q.detach(), k.detach(), values, **options)  # (B, H, N, D)
    columns = [mask.to(q.device, q.dtype) for mask in sets.values()]
    masses = None
    if columns:
        of_groups = torch.stack(columns, -1)[:, None].expand(-1, key.shape[1], -1, -1)
        masses = score_attention(q, k, of_groups, **options)  # (B, H, N, G)
    weights = weights.to(q.device, q.dtype)[:, None, :, None]
    pushes = [(side, name) for side in ("keys", "queries") for name in sets]
    kinds: dict[Any, list[Tensor]] = {name: [] for name in ("keys", "queries", *pushes)}
    for head in heads:
        of_head = torch.zeros(query.shape[1], 1, 1, dtype=q.dtype, device=q.device).index_fill(0, torch.tensor(head), 1.0)
        cotangent = of_head * weights  # (B, H, N, 1)
        (by_key,) = torch.autograd.grad(mixed, values, scale * cotangent * q.detach(), retain_graph=True)
        kinds["keys"].append(_shares(leaves, key, by_key, parts))
        kinds["queries"].append(_shares(leaves, query, scale * cotangent * mixed.detach(), parts))
        for number, name in enumerate(sets):
            assert masses is not None
            by_key, by_query = torch.autograd.grad(masses[..., number : number + 1], (k, q), cotangent, retain_graph=True)
            kinds["keys", name].append(_shares(leaves, key, by_key, parts))
            kinds["queries", name].append(_shares(leaves, query, by_query, parts))
    tables = {name: torch.stack(each, 1) for name, each in kinds.items()}  # (B, H, P)
    push, query_push = ({name: tables[side, name] for name in sets} for side in ("keys", "queries"))
    statistics = attention_statistics(q.detach(), k.detach(), statistics=("entropy", "lse"), **options)
    assert isinstance(statistics, LogitStatistics)
    weight = weights[..., 0].double()
    gap = torch.where(weight > 0, weight * (statistics.lse - statistics.entropy).double(), 0.0).sum(-1)[:, list(heads)]
    names = (*leaves.part_names(parts), "rest")
    keys = tables["keys"]
    return ScoreParts(names, layer, tuple(heads), keys, tables["queries"], push, query_push, keys.sum(-1), gap)


def _shares(leaves: Leaves, output: Tensor, cotangent: Tensor, parts: str) -> Tensor:
    """(B, P), the shares of the parts in sum(output * cotangent)."""
    whole = (output.detach().double() * cotangent.double()).flatten(1).sum(1)
    return leaves.shares(leaves.gradients(output, cotangent), whole, parts)
