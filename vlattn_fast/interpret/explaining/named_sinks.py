"""The tokens that receive attention without content, by sample and with their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.interpret.explaining.fields import parts, tokens_of
from vlattn_fast.interpret.explaining.forward_pass import Run
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.sink_detection import REMOVE, REPORT, Findings
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.result.numbers.sink_tokens import Sink, Sinks

Place = tuple[int, int, int]


class FindsSinks(Method):
    """Gets every attention call to find sinks, and makes no relevancy."""

    needs_score = False
    uses_position = False
    needs_mixer_rules = False
    sinks = REPORT

    def __init__(self) -> None:
        super().__init__()


def named_sinks(run: Run, image_samples: Sequence[int] | None = None) -> Sinks:
    """The sinks of each sample. `image_samples`: the sample of each map of an explanation."""
    method, count = run.request.method, run.towers[0].batch or 0
    samples: list[list[Sink]] = [[] for _ in range(count)]
    by_towers: dict[tuple[TowerTrace, TowerTrace], list[Findings]] = {}
    for reader, source, found in run.trace.findings:
        if source in run.towers:
            by_towers.setdefault((reader, source), []).append(found)
    names = _Names(run)
    image_samples = names.image_samples if image_samples is None else image_samples
    for (reader, source), calls in by_towers.items():
        shares, norms, sinks = (
            [_as_entered(source, getattr(found, name), found) for found in calls] for name in ("shares", "norms", "sinks")
        )
        layers = [found.layer for found in calls]
        rows = image_samples if len(image_samples) == source.batch else None
        for row, index in torch.stack(sinks).any(0).nonzero().tolist():
            if row >= (source.batch or 0):  # of the made-up sample for an empty batch
                continue
            sample = row if source.batch == count else rows[row] if rows is not None else row * count // (source.batch or 1)
            layer_shares, layer_norms = (
                dict(zip(layers, (float(one[row, index]) for one in each), strict=True)) for each in (shares, norms)
            )
            where = tuple(layer for layer, one in zip(layers, sinks, strict=True) if bool(one[row, index]))
            place, word = names.of(source, row, index)
            fields = source.name, index, reader.name, where, layer_shares, layer_norms, place, word
            samples[sample].append(Sink(*fields, removed=method.sinks == REMOVE))
    return Sinks(samples)


def _as_entered(tower: TowerTrace, values: Tensor, found: Findings) -> Tensor:
    """(B, N) over the tower's tokens, of values over the keys of a call."""
    positions = tower.positions
    if not positions.is_flat:
        return values.cpu()
    at = positions.call(found.token_positions)
    flat = at.spread(values[:, None].cpu().to(torch.float64), at.keys)
    return positions.reported(flat)[:, 0].to(values.dtype)


class _Names:
    """The positions of tokens in the image, and the names of their ids."""

    def __init__(self, run: Run) -> None:
        request, arguments, towers = run.request, run.prompt.arguments, [*run.explained, *run.attended]
        self._convert = getattr(request.tokenizer, "convert_ids_to_tokens", None)
        # With the tokens' numbers instead of their relevancy, the maps have the token of each patch.
        numbers = {tower.name: torch.arange(tower.size, dtype=torch.float64).expand(tower.shape) for tower in towers}
        fields, owners = parts(towers, arguments, numbers, None, request.patches, request.special)
        self.image_samples: Sequence[int] = fields.get("image_samples", ())  # the sample of each map
        self._owner, self._places = owners.get("image"), _places(fields)
        self._ids: dict[str, Tensor] = {}
        for tower, tokens in tokens_of(towers, arguments, request.special).items():
            if tokens.ids is not None:
                self._ids[tower.name] = functional.pad(tokens.ids, (tokens.before, 0), value=-1).cpu()

    def of(self, tower: TowerTrace, row: int, index: int) -> tuple[Place | None, str | None]:
        place = self._places.get((row, index)) if tower.name == self._owner and tower.grid is None else None
        ids = self._ids.get(tower.name)
        if place is not None or ids is None or row >= len(ids) or index >= ids.shape[1] or ids[row, index] < 0:
            return place, None
        number = int(ids[row, index])
        return None, str(number) if self._convert is None else str(self._convert([number])[0])


def _places(fields: Mapping[str, Any]) -> dict[tuple[int, int], Place]:
    """(row, token) -> (image, y, x), the image counted within its row."""
    places: dict[tuple[int, int], Place] = {}
    counts: dict[int, int] = {}
    for row, numbers in zip(fields.get("image_samples", ()), fields.get("image", ()), strict=True):
        image = counts[row] = counts.get(row, -1) + 1
        for y, line in enumerate(numbers.tolist()):
            places |= {(row, int(token)): (image, y, x) for x, token in enumerate(line)}
    return places
