"""The positions of the tokens of a tower: as they entered, at each of its attention calls, and at its end.

A tower counts its tokens in the order of its first call: these are its positions. While every call has them in this order, a
carrier is (B, 1, N). From the first call on that has them otherwise, it is flat, (1, 1, number of positions), and a call takes
its own part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.interpret.relevancy.tracking.token_moves import TokenMoves
from vlattn_fast.interpret.relevancy.tracking.token_numbers import MERGED, Numbers


@dataclass(frozen=True, eq=False)
class Moved:
    """The positions of a call's queries (B', N) and keys (B', M), -1 = a key that is not a token of the tower."""

    queries: Tensor
    keys: Tensor
    count: int  # of the tower's positions so far

    def pick(self, flat: Tensor, positions: Tensor) -> Tensor:
        """(B', T, N) of flat vectors (1, T, positions); zeros for what is not a token."""
        return functional.pad(flat, (0, self.count + 1 - flat.shape[2]))[0][:, positions.to(flat.device)].transpose(0, 1)

    def spread(self, part: Tensor, positions: Tensor) -> Tensor:
        """The flat vectors (1, T, positions) of parts (B', T, N), summed if several have one position."""
        index = positions.where(positions >= 0, self.count).flatten().to(part.device)
        rows = part.new_zeros(1, part.shape[1], self.count + 1)
        return rows.index_add(2, index, part.transpose(0, 1).reshape(1, part.shape[1], -1))[..., : self.count]

    def real(self, queries: Tensor | None, keys: Tensor | None, entered: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which queries and keys are real, from masks (B, N) of the tokens as they entered, at the positions `entered`."""
        real = []
        for mask, positions in ((queries, self.queries), (keys, self.keys)):
            flat = torch.zeros(1, 1, self.count) if mask is None else self.spread(mask[:, None].float().cpu(), entered)
            real.append(None if mask is None else self.pick(flat, positions)[:, 0] > 0)
        return real[0], real[1]

    def scaled(self, flat: Tensor, weight: Any, positions: Tensor | None = None) -> Tensor:
        """Flat rows times a weight, a number or (B', N), at the positions of the queries."""
        flat = functional.pad(flat, (0, self.count - flat.shape[2]))
        positions = (self.queries if positions is None else positions).flatten().to(flat.device)
        factor = torch.ones_like(flat[0, 0])
        value = weight.to(factor).flatten() if isinstance(weight, Tensor) else factor.new_full(positions.shape, weight)
        return flat * factor.index_copy(0, positions, value)


class _Numbered:
    """The positions of tokens by their numbers."""

    def __init__(self) -> None:
        self.ids, self.positions = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)  # sorted by the numbers

    def learn(self, ids: Tensor, positions: Tensor) -> None:
        ids, positions = torch.cat([self.ids, ids.flatten()]), torch.cat([self.positions, positions.flatten()])
        order = ids.argsort(stable=True)
        self.ids, self.positions = ids[order], positions[order]

    def locate(self, ids: Tensor) -> Tensor:
        """The position of each token; -1 for what has none."""
        if not len(self.ids):
            return torch.full_like(ids, -1)
        at = torch.searchsorted(self.ids, ids.contiguous()).clamp(max=len(self.ids) - 1)
        return self.positions[at].where(self.ids[at] == ids, -1)


class TokenPositions:
    """The positions of one tower."""

    def __init__(self, moves: TokenMoves) -> None:
        self.moves = moves
        self.shape = (0, 0)  # of the first call, with its further parts: B, N
        self.count = 0
        self._size = 0  # of the first call's positions
        self.error = ""  # why the tokens cannot be followed
        self.reorders = False  # some call has the tokens otherwise
        self.end: Numbers | None = None  # of the tokens after the last call
        self.last: Tensor | None = None  # the positions of the last call's queries; None = all, in order
        self.latest: Numbers | None = None  # of the queries of the last call
        self._layout: Numbers | None = None  # of the queries of the first call
        self._numbered = _Numbered()
        self._in_order: dict[int, Numbers] = {}  # known to be of all tokens, in the order of the first call
        self._report: Tensor | None = None  # the positions (B, N) of the tokens in the order in which they entered

    @property
    def _in_rows(self) -> Tensor:
        """The positions (B, N) in the order of the first call."""
        return torch.arange(self.shape[0] * self.shape[1]).view(self.shape)

    # --- numbers ---

    def numbers(self, tensor: Tensor) -> Numbers | None:
        return self.moves.of(tensor)

    def locate(self, ids: Tensor) -> Tensor:
        """The position of each token; -1 for what is not a token of the tower."""
        return self._numbered.locate(ids)

    def holds(self, ids: Tensor | None, all_of: bool = False) -> bool:
        """Whether tokens are the tower's, but for new ones; `all_of`: without those."""
        if ids is None:
            return False
        positions = self.locate(ids)
        return bool((positions >= 0).any()) and bool(((positions >= 0) | (ids < 0 if not all_of else False)).all())

    # --- calls ---

    def enter(self, query: Tensor, key: Tensor, columns: Tensor | None, path: str, chunk: bool, size: int) -> Moved | None:
        """Takes a call of the tower to itself in, whose tokens have these `columns` among the keys (None = all); returns None
        if its tokens are all of the tower's, in order. Gives the numbers of its queries to `query`, so that its output has
        them."""
        moves = self.moves
        numbers = moves.of(query)
        if not self.reorders and not chunk and id(numbers) in self._in_order and moves.of(key) is numbers:
            self.last, self.latest = None, numbers
            return None
        for each in (numbers, moves.of(key)):
            if each is not None and each.why and bool((each.ids == MERGED).any()):
                self.fail(
                    f"model must not merge tokens; got attention '{path}' over tokens that {each.why} merges, and no published "
                    "rule divides the relevancy among them"
                )
        ids, key_ids = ids_of(numbers, query), _of_columns(ids_of(moves.of(key), key), columns)
        if self._layout is None or (chunk and size > self.shape[1]):
            return self._begin(query, ids, key_ids, chunk, size)
        queries = self._queries(query, ids, path)
        self.latest = moves.of(query)
        keys = queries
        if key_ids is not None and moves.of(key) is not numbers and not (ids is not None and torch.equal(ids, key_ids)):
            located = self.locate(key_ids)
            keys = located if bool((located >= 0).any()) else queries
        if keys.shape[1] != (key.shape[2] if columns is None else len(columns)):
            self.fail(f"model must move its tokens only with supported functions; got lost keys in attention '{path}'")
        if queries.unique().numel() < queries.numel():
            self.fail(
                f"model must attend from each token once in a call; got a token at several positions in attention '{path}', such "
                "as from a repetition of tokens"
            )
        whole = queries.shape == self.shape and torch.equal(queries.flatten(), torch.arange(queries.numel()))
        same = keys is queries or torch.equal(keys, queries)
        self.last = None if whole else queries
        if whole and same and not self.reorders:
            if (numbers := moves.of(query)) is not None:
                self._in_order[id(numbers)] = numbers
            return None
        self.reorders = True
        return Moved(queries, keys, self.count)

    def _begin(self, query: Tensor, ids: Tensor | None, key_ids: Tensor | None, chunk: bool, size: int) -> Moved | None:
        """The first call, or a further part of the sequence in it."""
        moves, (batch, _, count, _) = self.moves, query.shape
        if ids is None or bool((ids < 0).any()) or ids.unique().numel() < ids.numel() or bool((self.locate(ids) >= 0).any()):
            moves.rename(query, moves.new((batch, 1, count, 1)), ids)
        numbers = self.latest = moves.of(query)
        assert numbers is not None
        taken = torch.arange(batch)[:, None] * size + torch.arange(size - count, size)
        if chunk:  # the positions of the parts before go with the whole size
            old = self._numbered.positions
            self._numbered.positions = old // self.shape[1] * size + old % self.shape[1]
        self._numbered.learn(numbers.over((batch, 1, count, 1)), taken)
        self.shape, self.count, self._layout = (batch, size), batch * size, numbers
        self._size = self.count
        self.last = None
        if chunk or key_ids is None or ids is None or key_ids.shape[0] != batch:
            return None
        keys = self.locate(key_ids)
        if torch.equal(keys, taken) or not bool((keys >= 0).all()):
            return None
        self.reorders = True
        return Moved(taken, keys, self.count)

    def pool(self, key: Tensor, columns: Tensor | None) -> Moved | None:
        """The positions of the keys of a pooling head; None if they are all of the tower's tokens, in order."""
        ids = _of_columns(ids_of(self.moves.of(key), key), columns)
        whole = self._in_rows
        keys = whole if ids is None or not self.holds(ids) else self.locate(ids)
        if torch.equal(keys, whole) and not self.reorders:
            return None
        self.reorders = True
        return Moved(keys, keys, self.count)

    def _queries(self, query: Tensor, ids: Tensor | None, path: str) -> Tensor:
        """The positions (B', N) of the queries of a later call; new tokens get new positions."""
        moves, (batch, _, count, _) = self.moves, query.shape
        positions = None if ids is None else self.locate(ids)
        if ids is None or positions is None or not bool((positions >= 0).any()):  # not known: as the first call has them
            if (batch, count) != self.shape:
                self.fail(f"model must move its tokens only with supported functions; got lost tokens in attention '{path}'")
                return torch.arange(batch * count).view(batch, count) % self.count
            positions = self._in_rows
            if self.latest is not None and self.latest.shape == (batch, 1, count, 1):
                moves.rename(query, self.latest, ids)  # as the last call had them
                return self.locate(self.latest.ids)[:, 0, :, 0]
            numbers = moves.new((batch, 1, count, 1))
            moves.rename(query, numbers, ids)
            self._numbered.learn(numbers.ids, positions)
            return positions
        added = positions < 0
        if bool(added.any()):
            numbers = moves.new((int(added.sum()),))
            moves.rename(query, numbers, ids[added])
            added_ids = numbers.ids
            new = torch.arange(self.count, self.count + len(added_ids))
            self._numbered.learn(added_ids, new)
            self.count += len(added_ids)
            positions = positions.masked_scatter(added, new)
            ids = ids.masked_scatter(added, added_ids)
            moves.give(query, Numbers((batch, 1, count, 1), _ids=ids.view(batch, 1, count, 1)))
        return positions

    def check(self) -> None:
        """ValueError for tokens that cannot be followed."""
        if self.error:
            raise ValueError(self.error)

    def fail(self, why: str) -> None:
        """Notes why the tower cannot be explained; others may be."""
        self.error = self.error or f"{why}. {_WAYS}"

    def locate_states(self, states: Tensor) -> Tensor:
        """The positions (B', N) of states (B', N, C); ValueError if they are lost."""
        numbers = self.moves.of(states)
        positions = None if numbers is None else self.locate(numbers.ids.expand(*states.shape[:-1], -1)[..., 0])
        if positions is None or bool((positions < 0).any()):
            raise ValueError(
                f"model must move its tokens only with supported functions; got lost tokens in a residual sum. {_WAYS}"
            )
        return positions

    # --- afterwards ---

    def goes_through(self, states: Tensor) -> None:
        """Notes where the tokens are after the last call: the latest states that hold all of those that any hold."""
        numbers = self.moves.of(states)
        if numbers is None or numbers is self.end:
            return
        if self.end is None or math.prod(numbers.shape) >= self.end.ids.numel():
            self.end = numbers

    def finish(self, listed: bool) -> tuple[int, int] | None:
        """Finds the order in which the tokens entered, if it is not that of the first call, such as in windows; returns its sizes
        B and N. An adapter knows its tokens in the order of the first call, unless they leave as they entered."""
        in_first = self._numbered.positions < self._size
        ids, positions = self._numbered.ids[in_first], self._numbered.positions[in_first]
        if not len(ids) or self._size == 0:
            return None
        begin, shape, _ = self.moves.beginning(int(ids[0]))
        sizes = [size for size in shape if size > 1]
        first = (ids >= begin) & (ids < begin + math.prod(shape))
        ids, positions = ids[first], positions[first]  # sorted
        if len(positions.unique()) < self._size or len(positions) > self._size:
            return None
        batch = shape[0] if len(shape) > 2 else self.shape[0]
        if len(positions) % batch:
            return None
        if not torch.equal(
            (ids - begin) // (math.prod(sizes) // batch), torch.arange(batch).repeat_interleave(len(ids) // batch)
        ):
            return None
        grid = positions.view(batch, -1)
        whole = torch.arange(len(positions))
        if torch.equal(grid.T.flatten(), whole) or (grid.shape == self.shape and torch.equal(positions, whole)):
            return None
        if listed and not (self.end is not None and torch.equal(self.locate(self.end.ids).flatten(), positions)):
            return None
        self._report = grid
        return grid.shape[0], grid.shape[1]

    @property
    def is_flat(self) -> bool:
        return self.reorders or self._report is not None

    def call(self, at: Moved | None) -> Moved:
        """The positions of a call, also of one that has them in order."""
        if at is not None:
            return Moved(at.queries, at.keys, self.count)
        return Moved(self._in_rows, self._in_rows, self.count)

    @property
    def entered(self) -> Tensor:
        """The positions (B, N) of the tokens as they entered."""
        return self._in_rows if self._report is None else self._report

    def flattened(self, row: Tensor) -> Tensor:
        """The flat vector (1, 1, positions) of a row (B, 1, N) over the tokens as they entered."""
        return Moved(self.entered, self.entered, self.count).spread(row, self.entered)

    def reported(self, row: Tensor) -> Tensor:
        """The relevancy vectors (B, T, N) over the tokens as they entered, of flat vectors (1, T, positions), or of (B, T, N) in
        the order of the first call."""
        return flat_rows(row)[0][:, self.entered.to(row.device)].transpose(0, 1)

    def as_entered(self, values: Tensor, numbers: Numbers | None) -> Tensor | None:
        """Values (B', K, C) or (B', H, K, D) of tokens with these numbers, over the tokens as they entered, zeros for those that
        are missing; None if it is not known which they are."""
        ids = None if numbers is None else self.locate(numbers.ids).squeeze(-1)
        ids = ids[:, 0] if ids is not None and values.ndim > 3 else ids
        if ids is None or bool((ids < 0).any()) or tuple(ids.shape) != (len(values), values.shape[-2]):
            return None
        flat = values.transpose(-2, -3).reshape(ids.numel(), -1) if values.ndim > 3 else values.reshape(ids.numel(), -1)
        every = flat.new_zeros(self.count, flat.shape[1]).index_add(0, ids.flatten().to(flat.device), flat)
        entered = every[self.entered.to(flat.device)]
        return entered.unflatten(-1, (values.shape[1], -1)).transpose(1, 2) if values.ndim > 3 else entered

    def ends(self) -> Tensor | None:
        """Which token, as they entered, each position (B, K) after the last call holds, counted over the batch, -1 = a new token;
        None if all are there, as they entered."""
        entered = self.entered
        if self.end is None:
            return None
        positions = self.locate(self.end.ids)
        if bool((positions < 0).all()):
            return None
        order = torch.full((self.count + 1,), -1)
        order[entered.flatten()] = torch.arange(entered.numel())
        rows = order[positions]
        rows = rows.reshape(rows.shape[0], -1) if rows.ndim > 2 else rows.reshape(entered.shape[0], -1)
        if rows.shape[0] != entered.shape[0] and rows.shape[1] == entered.shape[0]:
            rows = rows.T
        is_whole = rows.numel() == entered.numel() and torch.equal(rows.flatten(), torch.arange(rows.numel()))
        return None if is_whole or torch.equal(rows.T.flatten(), torch.arange(entered.numel())) else rows


_WAYS = (
    "Call va.relevancy_step and move the relevancy vectors yourself (examples/relevancy_behind_sdpa.py), or explain only the "
    "layers after it"
)


def flat_rows(rows: Tensor) -> Tensor:
    """(1, T, positions) of relevancy vectors (B, T, N) in the order of the first call; flat vectors stay."""
    return rows.transpose(0, 1).reshape(1, rows.shape[1], -1)


def _of_columns(ids: Tensor | None, columns: Tensor | None) -> Tensor | None:
    return ids if ids is None or columns is None else ids[:, columns.cpu()]


def ids_of(numbers: Numbers | None, tensor: Tensor) -> Tensor | None:
    """The numbers (B, N) of the tokens of queries or keys (B, H, N, D); None if they are not known."""
    if numbers is None or len(numbers.shape) != 4 or numbers.shape[3] != 1:
        return None
    batch, _, count, _ = tensor.shape
    if numbers.shape[0] not in (1, batch) or numbers.shape[2] not in (1, count) or numbers.shape[1] != 1:
        return None
    return numbers.over((batch, 1, count, 1))[:, 0, :, 0]
