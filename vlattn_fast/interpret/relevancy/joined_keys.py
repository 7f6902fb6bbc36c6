"""Whose tokens the keys of an attention call are, if it joins several: those of another tower, a learned key, zeros, a prefix.

That follows from the keys' numbers. Keys that are joined before the first attention have new ones, so the numbers of their parts
count, too. A key that came from outside of the run, and is not one of the model's tensors, may be that of a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.relevancy.tracking.tensor_records import ELSEWHERE, TOKENS
from vlattn_fast.interpret.relevancy.tracking.token_moves import TokenMoves


def with_columns(moves: TokenMoves, call: TracedCall, sizes: Sequence[int], strict: bool) -> TracedCall:
    """The call with the columns of its tokens, one of `sizes` many, if it has further keys that differ from them. `strict`: an
    error for keys from elsewhere, which may be tokens that ran earlier."""
    for _, origins in _levels(moves, call) if call.tokens not in sizes else ():
        columns = (origins == TOKENS).nonzero()[:, 0]
        if len(columns) not in sizes:
            continue
        if not bool((origins == ELSEWHERE).any()):
            return replace(call, columns=columns.to(call.key.device))
        if strict:
            raise ValueError(
                f"inputs must give the whole sequence in one forward pass; got {call.tokens - len(columns)} keys in attention "
                f"'{call.path}' from outside of it, such as from a cache. A learned prefix must be a parameter of the model"
            )
        break
    return call


def _levels(moves: TokenMoves, call: TracedCall) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of the keys and where they are from, then the same of what they were joined of, and so on, while the values are
    from there, too."""
    for keys, values in zip(moves.levels(call.key), moves.levels(call.value), strict=False):
        origins = moves.origins(keys)
        if not torch.equal(origins, moves.origins(values)):
            return
        yield keys, origins


class Joint(NamedTuple):
    """Keys of one call that are tokens of a tower."""

    tower: TowerTrace | None  # None = that of the queries
    columns: Tensor


def joint_keys(moves: TokenMoves, call: TracedCall, owner: TowerTrace | None, towers: Sequence[TowerTrace]) -> list[Joint]:
    """The keys of a call that attends to the tokens of its queries and of other towers at once, those of the queries first; none
    if its keys are not joined from such parts. `owner`: the tower that the queries continue; None = they begin one."""
    for keys, origins in _levels(moves, call):
        if bool((origins != TOKENS).any()):
            continue
        held = torch.full_like(keys, -1)  # the tower of each key; -1 = that of the queries
        for place, tower in enumerate(towers):
            if tower is not owner:
                held = torch.where((held < 0) & (keys >= 0) & (tower.positions.locate(keys) >= 0), place, held)
        joint = [
            Joint(towers[place] if place >= 0 else None, (held == place).nonzero()[:, 0].to(call.key.device))
            for place in held.unique().tolist()
        ]
        sizes = [call.query.shape[2] if part.tower is None else part.tower.size for part in joint]
        if joint[0].tower is None and len(joint) > 1 and sizes == [len(part.columns) for part in joint]:
            return joint
    return []


def check_cross(call: TracedCall, owner: TowerTrace | None, reached: Sequence[TowerTrace], knows: bool) -> None:
    """ValueError for cross-attention to keys that are not another tower's.

    Args:
        owner: the tower that the queries continue; None = they begin one.
        reached: those that the keys came through, the last first.
        knows: there are such calls, or states that both came through.
    """
    as_one = call.calls == call.key_calls  # the keys came through the same calls as the queries
    path, queries, keys = call.path, call.query.shape[2], call.tokens
    if owner is None and as_one and reached and keys == reached[0].size:
        raise ValueError(f"model must not pool tokens before attention; got {queries} queries for {keys} tokens in '{path}'")
    if knows and (as_one or reached[:1] == [owner]):
        raise ValueError(
            f"model must have one key for each token of a tower; got {queries} queries and {keys} keys in '{path}', made from "
            "the same tokens, such as with a strided convolution. Keys that are not tokens are supported if torch.cat or pad "
            "joins them to those of the tokens"
        )
    if any(keys == queries + source.size for source in reached if source is not owner):
        kinds = f"{queries} tokens of its own and {keys - queries} of another tower"
        raise ValueError(f"model must attend to one tower in a call; got '{path}', whose {keys} keys are {kinds}")
