"""The base of all methods. Each file of `methods/` holds one, and nothing else names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from vlattn_fast.backends.reference.relevancy_residual import WEIGHTINGS, Weighting
from vlattn_fast.interpret.records.record import Tower
from vlattn_fast.interpret.relevancy.attention_call import AttentionCall
from vlattn_fast.interpret.relevancy.backward import BackwardPass
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

Hook = Callable[..., Any]


class Method:
    """A method of `explain`; an instance serves one call of it.

    During the forward pass it sees every attention call of the towers (`attend`, `pool`, `cross`), and returns what the call
    gives the model. Afterwards `carry` or `between` makes the relevancy rows, once for each score.

    Attributes:
        name: the value of `explain`'s argument `method`; "<method>:<part>" of an ablation. "" = a class for others to build on.
        needs_score: it takes the gradient of a score.
        takes_weighting: it takes `explain`'s argument `weighting`.
        holds_start: its rows hold the row that is read, unless nothing else counts for it. So a row that holds nothing
            else tells that the score does not depend on it.
        kept: of each tower, what the method keeps for the backward pass.
    """

    name: ClassVar[str] = ""
    needs_score: ClassVar[bool] = True
    takes_weighting: ClassVar[bool] = False
    holds_start: ClassVar[bool] = False

    def __init__(self, weighting: str | Weighting = "contribution") -> None:
        check_weighting(weighting)
        if weighting != "contribution" and not self.takes_weighting:
            raise ValueError(f"weighting must be left out for a method without weights; got {weighting!r} for {self.name!r}")
        self.weighting = weighting
        self.kept: dict[TowerTrace, Any] = {}

    # --- what it can explain ---

    def check_between(self, start_layer: int, records: Sequence[Tower | None]) -> None:
        """ValueError where it cannot explain towers that attend to one another, or not from this layer.

        Args:
            records: of the towers; None = a tower that is found.
        """
        if start_layer != 0:
            raise ValueError(f"start_layer must be 0 for towers that attend to one another; got {start_layer}")

    def check_unrecorded(self, path: str) -> None:
        """ValueError where it needs a record of each tower; the module at `path` belongs to a tower without."""

    # --- the forward pass ---

    def hooks(self, model: nn.Module, towers: Sequence[TowerTrace], of_this_run: Callable[[Hook], Hook]) -> Iterator[Any]:
        """Registers the hooks that it needs beside the attention calls; yields their handles.

        Args:
            towers: those with a record; others are found while the model runs.
            of_this_run: makes a hook that is silent in other runs of the same model.
        """
        yield from ()

    def attend(self, tower: TowerTrace, call: AttentionCall) -> Tensor:
        """The output (B, H, N, Dv) of self-attention."""
        return self.watched(tower, call.output())

    def pool(self, tower: TowerTrace, call: AttentionCall) -> Tensor:
        """The output of an attention-pooling head, whose queries are learnt and no tokens."""
        return self.watched(tower, call.output())

    def cross(self, tower: TowerTrace, call: AttentionCall) -> Tensor:
        """The output of cross-attention, from the tokens of `tower` to others."""
        return self.watched(tower, call.output())

    def watched(self, tower: TowerTrace, output: Tensor) -> Tensor:
        """`output`, at which the score has a gradient, where the method takes one."""
        if not self.needs_score:
            return output.detach()
        output = output if output.requires_grad else output.requires_grad_()
        tower.enters_gradient(output)
        return output

    def follow(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """Sees each call of torch beside attention."""

    def check_tower(self, tower: TowerTrace) -> None:
        """ValueError where the forward pass has not shown what the method needs."""

    # --- the backward pass ---

    def edges(self, tower: TowerTrace, start_layer: int) -> list[GradientEdge]:
        """Where gradients enter the explained layers: a score must depend on one of them."""
        return tower.edges(start_layer)

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        """The rows (B, 1, N) of towers that do not attend to one another."""
        raise ValueError(f"method must be another one for towers that do not attend to one another; got {self.name!r}")

    def between(self, backward: BackwardPass) -> list[Tensor]:
        """The rows (B, 1, N) of towers that attend to others, and of those others; see `two_modalities.rows_between`."""
        raise ValueError(f"method must be another one for towers that attend to one another; got {self.name!r}")


def rows_of(method: Method, backward: BackwardPass) -> list[Tensor]:
    """The rows (B, 1, N) of `backward.towers` and of `backward.attended`."""
    if not backward.attended:
        return method.carry(backward)
    method.check_between(backward.start_layer, [tower.record for tower in [*backward.towers, *backward.attended]])
    return method.between(backward)


def check_weighting(weighting: str | Weighting) -> None:
    """ValueError unless `weighting` is a known name or a callable."""
    if not callable(weighting) and not (isinstance(weighting, str) and weighting in WEIGHTINGS):
        raise ValueError(f"weighting must be 'contribution', 'norm', 'equal' or a callable; got {weighting!r}")
