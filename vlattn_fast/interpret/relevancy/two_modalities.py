"""Relevancy between towers that attend to one another: the rules for two modalities of Chefer, Gur, Wolf (ICCV 2021).

R_st (B, N_s, N_t) holds how much the tokens of tower t count for those of tower s. It begins as the identity for s = t, and as
zero otherwise. R is stored without its part of the identity, which would cost the digits of small relevancies: R_ss =
Rhat_ss + diag(i_s). The attention calls are gone through in the order in which they ran; Abar (N x M) is a call's head mean
relu(A * dA), streamed without a head axis.

Keys may be older than the tokens they are of: both directions of a cross-attention layer take its input, so neither has what
the other adds. So a call takes R of its keys as it was after the last call that they came through.

Where one softmax is over the tokens of its queries' tower and over those of others, all of them are one sequence, and equation 6
holds: each tower's columns of Abar are the contribution of its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import over_sums
from vlattn_fast.interpret.relevancy.method import BackwardPass, Link, single_tokens
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

Relevancies = dict[tuple[TowerTrace, TowerTrace], Tensor]  # without the part of the identity
Identities = dict[TowerTrace, Tensor]  # i_s (B, N, 1), the part of the identity that is left


class Equations:
    """Equations 6 to 11. A method that differs in one of them overrides its part."""

    def begin(self, relevancies: Relevancies, calls: Sequence[Link]) -> None:
        """The entries of `relevancies` between towers before the first call: none, since nothing counts yet."""

    def mean_map(self, call: Link, grad: Tensor, like: Tensor) -> Tensor:
        """Equation 5: Abar (B, N, M) over the keys that are tokens, on the device and in the dtype of `like`: layers may have
        several."""
        return call.attention.at_tokens(self.weighed(call.attention.mean_map(grad).to(like)))

    def weighed(self, abar: Tensor) -> Tensor:
        """Abar over all keys, its rows divided by their sums if a rule says so."""
        return abar

    def normalized(self, call: Link, relevancy: Tensor, identity: Tensor) -> Tensor:
        """Equations 8 and 9: R - I, each row divided by its sum, plus I. Zero rows stay. `relevancy` is R less diag(identity)."""
        rest = relevancy + torch.diag_embed(identity[..., 0] - 1)
        return over_sums(rest) + torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)

    def across(self, query_rows: Tensor, abar: Tensor, key_rows: Tensor) -> Tensor:
        """Equation 10: what cross-attention adds between its two towers, from the relevancies within each."""
        return query_rows.transpose(1, 2) @ abar @ key_rows

    def added(self, call: Link, old: Tensor | None, addition: Tensor) -> Tensor:
        """The relevancy after a call."""
        return addition if old is None else old + addition


def relevancies(calls: Sequence[Link], grads: Sequence[Tensor | None], equations: Equations) -> tuple[Relevancies, Identities]:
    """R_st of all towers of `calls`, whose outputs have the gradients `grads` (None = the score does not depend on it)."""
    state: Relevancies = {}
    identity: Identities = {}
    for call in calls:
        for tower in (call.tower, call.source):
            zeros = torch.zeros(tower.batch or 0, tower.size, 1, dtype=tower.dtype, device=tower.device)
            state.setdefault((tower, tower), zeros.expand(-1, -1, tower.size))
            identity.setdefault(tower, torch.ones_like(zeros))
    equations.begin(state, calls)
    begun = dict(state), dict(identity)
    waited = Counter(call.source_call for call in calls if call.source_call is not None)
    after: dict[int, tuple[Relevancies, Identities]] = {}  # of s after a call of s that keys came through, while calls wait
    for call, grad in zip(calls, grads, strict=True):
        key_state = begun if call.source_call is None else after[call.source_call]
        for pair, addition in [] if grad is None else _additions(state, identity, *key_state, call, grad, equations):
            if call.joint:  # beside the part of the queries' own tower, which has weighed what was there
                state[pair] = state.get(pair, 0.0) + equations.added(call, None, addition)
                continue
            state[pair] = equations.added(call, state.get(pair), addition)
            if pair == (call.tower, call.tower):
                identity[call.tower] = equations.added(call, identity[call.tower], torch.zeros_like(identity[call.tower]))
        if call.source_call is not None:
            waited[call.source_call] -= 1
            if not waited[call.source_call]:
                del after[call.source_call]
        if waited[call.number]:
            kept = {pair: part for pair, part in state.items() if pair[0] is call.tower}
            after[call.number] = kept, {call.tower: identity[call.tower]}
    return state, identity


def _additions(
    state: Relevancies,
    identity: Identities,
    key_state: Relevancies,
    key_identity: Identities,
    call: Link,
    grad: Tensor,
    equations: Equations,
) -> list[tuple[tuple[TowerTrace, TowerTrace], Tensor]]:
    """The additions of a call to the relevancies."""
    s, q = call.tower, call.source
    abar = equations.mean_map(call, grad, state[s, s])

    def within(of: TowerTrace, t: TowerTrace, part: Tensor, left: Identities) -> Tensor:
        """Equations 6, 7 and 11: Abar R of a pair, whose part of the identity scales the columns of Abar."""
        addition = abar @ part.to(abar)
        return addition if of is not t else addition + abar * left[t].mT.to(abar)

    if s is q:
        return [((s, t), within(s, t, part, identity)) for (of, t), part in state.items() if of is s]
    if call.joint:
        return [((s, t), within(q, t, part, key_identity)) for (of, t), part in key_state.items() if of is q]
    source_rows = equations.normalized(call, state[s, s], identity[s])
    query_rows = equations.normalized(call, key_state[q, q].to(abar), key_identity[q].to(abar))
    additions = [((s, q), equations.across(source_rows, abar, query_rows))]
    if (q, s) in key_state:
        additions.append(((s, s), within(q, s, key_state[q, s], identity)))
    return additions


def vectors_between(backward: BackwardPass, vector: Callable[[TowerTrace, TowerTrace, Tensor], Tensor]) -> list[Tensor]:
    """The relevancy vectors (B, 1, N) of the towers, the entries of the explained tokens set to zero, and those of the towers
    that they attend to. `vector` takes a tower, one that it attends to (or itself) and the weights (B, 1, N) of the explained
    positions of the first; it returns how much the tokens of the second count for them, (B, 1, M)."""
    linked = {(call.tower, call.source) for call in backward.calls}
    pairs = list(zip(backward.towers, backward.starts, strict=True))
    carried = [vector(tower, tower, start).masked_fill(single_tokens(start), 0.0) for tower, start in pairs]
    for source in backward.attended:
        parts = [vector(tower, source, start) for tower, start in pairs if (tower, source) in linked]
        carried.append(torch.stack(parts).sum(0))
    return carried


def last_between(calls: Sequence[Link], tower: TowerTrace, source: TowerTrace) -> int:
    """Where in `calls` the last attention from `tower` to `source` is."""
    numbers = [number for number, call in enumerate(calls) if call.tower is tower and call.source is source]
    if not numbers:
        raise ValueError(f"model must attend from tower '{tower.name}' to '{source.name}' for this method; got no such call")
    return numbers[-1]
