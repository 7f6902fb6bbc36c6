"""Methods that are one recursion from the last layer to the first, with a carrier through the attention calls."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vlattn_fast.interpret.relevancy.attention_call import AttentionCall
from vlattn_fast.interpret.relevancy.backward import BackwardPass
from vlattn_fast.interpret.relevancy.carriers import Recursion
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


class CarriedMethod(Method):
    """A method that carries one row through all layers (Chefer, Gur, Wolf, ICCV 2021, equations 5 and 6 for one row).

    Attributes:
        recursion: what an attention call does to the row that is carried back.
    """

    recursion: ClassVar[Recursion]

    def attend(self, tower: TowerTrace, call: AttentionCall) -> Tensor:
        return self._of_carrier(tower, tower.carriers.through(call, self.recursion))

    def pool(self, tower: TowerTrace, call: AttentionCall) -> Tensor:
        output = self._of_carrier(tower, call.output())
        output = tower.carriers.into_probes(call, output, self.recursion)
        return output if self.needs_score else output.detach()

    def _of_carrier(self, tower: TowerTrace, output: Tensor) -> Tensor:
        if not self.needs_score:
            return output.detach()  # only the carrier needs a graph between the layers
        tower.enters_gradient(output)
        return output

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        """One backward pass starts at the score and at the carrier that leaves each tower."""
        carriers = [tower.carriers for tower in backward.towers]
        outputs = [one.leaving() for one in carriers]
        carried = [start.to(output.device) for start, output in zip(backward.starts, outputs, strict=True)]
        if backward.scores is not None:
            score = backward.scores.sum()
            outputs, carried = [score, *outputs], [torch.ones_like(score), *carried]
        entering = [one.entering[backward.start_layer] for one in carriers]
        parts = [part for of_tower in entering for part in of_tower]
        grads = iter(torch.autograd.grad(outputs, parts, carried, retain_graph=backward.keep))
        return [torch.cat([next(grads) for _ in of_tower], 2) for of_tower in entering]
