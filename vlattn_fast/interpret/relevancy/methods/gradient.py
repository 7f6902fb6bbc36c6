"""Method "gradient": carried <- carried + carried Abar with Abar = mean_h relu(A * dA), and the paper's ablations.

Chefer, Gur, Wolf (ICCV 2021): equations 5 and 6 for one row, and equations 5 to 11 between towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_bool
from vlattn_fast.interpret.relevancy.method import FREEZABLE, BackwardPass, CarriedMethod, Link
from vlattn_fast.interpret.relevancy.sink_detection import KEEP
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import Recursion
from vlattn_fast.interpret.relevancy.two_modalities import Equations, Relevancies, relevancies, rows_between


class GradientMethod(CarriedMethod):
    """r <- r + r Abar, and the equations between towers, with what a subclass changes in them."""

    default_freeze: ClassVar[tuple[str, ...]] = FREEZABLE
    adds_beside = True
    holds_start = True
    recursion = Recursion("gradient")
    equations: ClassVar[Equations] = Equations()

    def between(self, backward: BackwardPass) -> list[Tensor]:
        calls = backward.reaching_calls()
        grads = backward.gradients([call.attention.output for call in calls])
        return rows_by_equations(backward, calls, grads, self.equations)


class Gradient(GradientMethod):
    """r <- r + r Abar, Abar = mean_h relu(A * dA) (Chefer, Gur, Wolf, ICCV 2021, equations 5 and 6)."""

    name = "gradient"
    by_layer = True

    def __init__(
        self,
        *,
        start_layer: int = 0,
        through_connector: bool = False,
        sinks: str = KEEP,
        freeze: Sequence[str] | None = None,
        of: str | None = None,
    ) -> None:
        """
        Args:
            start_layer: 0 = all layers, -1 = only the last, i = layers i and later. Layers are the model's blocks, numbered by
                their index in its list of blocks; -1 is the last one that mixes tokens.
            through_connector: only supports decoders that see images: carry the relevancy of the image tokens on into the vision
                tower, as `relevancy["vision"]`. Each image token's is divided equally among its patches.
            sinks: tokens that receive attention without content, which `va.find_sinks` names and defines: "keep" = maps as the
                method makes them; "remove" = their columns are left out of each attention map, and `explanation.sinks` names
                them. If Abar is mean_h A, each row keeps its sum. Learned sinks, such as those of gpt-oss, are not tokens and
                stay.
            freeze, of: see `Method`.

        Raises:
            TypeError, ValueError: an option is of no such kind; `through_connector` with another `start_layer` than 0.
        """
        check_bool(through_connector=through_connector)
        if through_connector and start_layer != 0:
            raise ValueError(f"start_layer must be 0 with through_connector=True; got {start_layer!r}")
        self.through_connector = through_connector
        super().__init__(start_layer=start_layer, sinks=sinks, freeze=freeze, of=of)


def rows_by_equations(
    backward: BackwardPass, calls: Sequence[Link], grads: Sequence[Tensor | None], equations: Equations
) -> list[Tensor]:
    """The rows (B, 1, N) of R, which the equations make of the calls and of the gradients at their outputs."""
    matrices, identity = relevancies(calls, grads, equations)

    def read(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
        if (tower, source) not in matrices:  # the score depends on no attention between them
            return start.new_zeros(*start.shape[:2], source.size)
        row = start @ matrices[tower, source]
        if tower is not source:
            return row
        backward.contribution[tower] = row
        return row + start * identity[tower].mT

    return rows_between(backward, read)


# --- ablations, of the published form ---


class _NotNormalized(Equations):
    def normalized(self, call: Link, relevancy: Tensor, identity: Tensor) -> Tensor:
        return relevancy + torch.diag_embed(identity[..., 0])


class _NotAdded(_NotNormalized):
    """As published it goes without the normalization, too: what takes the place of the identity may have no residual."""

    def begin(self, relevancies: Relevancies, calls: Sequence[Link]) -> None:
        """Zeros count where they take the place of something."""
        linked = {(call.tower, call.source) for call in calls if call.tower is not call.source}
        for s, q in linked:
            if (q, s) in linked:
                relevancies[s, q] = relevancies[s, s].new_zeros(s.batch or 0, s.size, q.size)

    def added(self, call: Link, old: Tensor | None, addition: Tensor) -> Tensor:
        return addition


class _CrossAlone(Equations):
    def across(self, of_queries: Tensor, abar: Tensor, of_keys: Tensor) -> Tensor:
        return abar


class WithoutAggregation(GradientMethod):
    """r <- r Abar: a call's addition takes the place of the relevancy. Rows may be zero."""

    name = "gradient:no_aggregation"
    default_freeze = ()
    holds_start = False
    recursion = Recursion("gradient", residual_weight=0.0)
    equations = _NotAdded()


class _BetweenAlone(GradientMethod):
    """An ablation that differs from "gradient" only where towers attend to one another."""

    name = ""
    default_freeze = ()

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        raise ValueError(
            f"method must be 'gradient' for towers that do not attend to one another; got {self.name!r}, which leaves out a part "
            "of the rules for those that do"
        )


class WithoutNormalization(_BetweenAlone):
    """For towers that attend to one another: "gradient" without equations 8 and 9."""

    name = "gradient:no_normalization"
    equations = _NotNormalized()


class WithoutSelfAttention(_BetweenAlone):
    """For towers that attend to one another: "gradient" whose equation 10 adds Abar alone."""

    name = "gradient:no_self_attention"
    equations = _CrossAlone()
