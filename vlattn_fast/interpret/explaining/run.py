"""The third stage of `explain`: one forward pass, in which a carrier goes through the towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlattn_fast.interpret.explaining.inputs import with_one_row
from vlattn_fast.interpret.explaining.prompt import Prompt
from vlattn_fast.interpret.explaining.request import Request
from vlattn_fast.interpret.relevancy.model_trace import Trace
from vlattn_fast.interpret.relevancy.through_connector import check_pictures, connect
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced import traced


@dataclass(frozen=True)
class Run:
    """A forward pass that ran.

    Args:
        outputs: the model's; of an empty batch, those of one made-up row.
        read: the towers whose own rows are read.
        vision: the tower behind the connector, whose row comes from that of the decoder; None without.
        attended: the towers that those of `read` attend to, whose part of these rows is read as well.
    """

    outputs: Any
    trace: Trace
    read: list[TowerTrace]
    vision: TowerTrace | None
    attended: list[TowerTrace]

    @property
    def carrying(self) -> list[TowerTrace]:
        """The towers through which relevancy is carried."""
        return self.read if self.vision is None else [*self.read, self.vision]

    @property
    def towers(self) -> list[TowerTrace]:
        """All towers that get a row."""
        return [*self.carrying, *self.attended]


def run_traced(request: Request, prompt: Prompt) -> Run:
    model, record, arguments = request.model, request.record, prompt.arguments
    connects = request.vision is not None and not prompt.empty
    if request.vision is not None and connects:
        check_pictures(model.config, arguments)
        record = replace(record, towers=(*record.towers, request.vision))
    with traced(model, record, request.method) as trace:
        if connects:
            connect(trace.towers[-1], trace.towers[0], record.connector, model.config, arguments)
        outputs = model(**(with_one_row(model, arguments, record) if prompt.empty else arguments))
    trace.check()
    vision = trace.towers[-1] if connects else None
    read, attended = _towers_of(trace, request, prompt, vision)
    run = Run(outputs, trace, read, vision, attended)
    for tower in run.carrying:
        tower.check_start(request.start_layer)
    if prompt.empty:
        for tower in run.towers:
            tower.batch = 0
    return run


def _towers_of(
    trace: Trace, request: Request, prompt: Prompt, vision: TowerTrace | None
) -> tuple[list[TowerTrace], list[TowerTrace]]:
    """The towers whose own rows are read, and those that they attend to; `vision` is neither."""
    towers = [tower for tower in trace.towers if tower is not vision]
    links = {(call.tower, call.source) for call in trace.calls if call.tower is not call.source}
    by_name = {tower.name: tower for tower in towers}
    if isinstance(request.read, Mapping):
        for name in request.read:
            if name not in by_name:
                raise ValueError(f"read must name towers among {', '.join(by_name)}; got {name!r}")
        read = [by_name[name] for name in request.read]
    else:
        recorded = [tower for tower in towers if tower.record is not None]  # towers without a record have no read-out row
        read = [t for t in recorded or towers if t.paths and not any(source is t for _, source in links)]
        read = read or towers[:1]  # all attend to one another: the first is read
        if prompt.answer is not None and not recorded:  # the decoder is the last tower of the answer's size
            answered = tuple(prompt.arguments[request.record.answers].shape)
            read = [tower for tower in read if tower.shape == answered][-1:]
    return read, [tower for tower in towers if tower not in read and any((t, tower) in links for t in read)]
