"""Which tower a call of a run belongs to, and which its keys come from."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.attach.events import ModuleRun
from vlattn_fast.attach.session import layers_of
from vlattn_fast.interpret.records.record import Tower
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.relevancy.tracking.tensor_marks import TensorMarks


class FindsTowers:
    """The part of a trace that knows the towers of its run."""

    towers: list[TowerTrace]
    _owners: list[TowerTrace | None]  # the tower of each call, by its bit
    _marks: TensorMarks
    _make_tower: Callable[[Tower | None], TowerTrace]

    def _new_tower(self) -> TowerTrace:
        self.towers.append(self._make_tower(None))
        return self.towers[-1]

    def _reached(self, calls: int) -> list[TowerTrace]:
        """The towers among whose calls `calls` are, the latest call's first."""
        owners = (self._owners[i] for i in range(calls.bit_length() - 1, -1, -1) if calls >> i & 1)
        return list(dict.fromkeys(owner for owner in owners if owner is not None))

    def _tower_of(self, run: ModuleRun, calls: int, batch: int, size: int, ids: Tensor | None) -> TowerTrace | None:
        """The tower that a call in `run` continues. `ids`: the numbers (B, N) of its queries' tokens, where they are known."""
        path = run.path or ""
        layers = layers_of(path)
        for tower in sorted(self._reached(calls), key=lambda tower: not tower.places.holds(ids)):
            if tower.goes_on(path, batch, size, ids):
                return tower
        # A tower's first call, a further part of a sequence that is cut into chunks, or one whose past was hidden from the trace.
        for tower in reversed(self.towers):
            again = path == tower.calls.path and tower.calls.run == run.number
            if layers in tower.calls.lists and (again or path not in tower.calls.paths) and tower.fits(path, batch, size):
                return tower
        return None

    def _same_tokens(self, call: TracedCall, calls: int, key_calls: int) -> bool:
        """Whether queries and keys are of one sequence: in cross-attention they came through the calls of different towers, or
        from different inputs."""
        if calls == key_calls or not calls:
            return calls == key_calls and (calls > 0 or self._marks.from_same(call.query, call.key))
        reached = self._reached(key_calls)
        return bool(reached) and reached[0] in self._reached(calls)[:1]

    def _source_of(self, calls: int, call: TracedCall) -> TowerTrace:
        """The tower whose tokens are the keys; where they are no tower's, a made-up one without layers."""
        key, batch, size = call.key, call.key.shape[0], call.tokens
        for tower in (*self._reached(calls), *(tower for tower in self.towers if not tower.calls.paths)):
            if (tower.batch, tower.size) == (batch, size):
                return tower
        tower = next((tower for tower in self.towers if not tower.calls.lists and tower.batch is None), None) or self._new_tower()
        tower.batch, tower.size, tower.dtype, tower.device = batch, size, compute_dtype(key), key.device
        return tower
