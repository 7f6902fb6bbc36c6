"""Method "gradient": carried <- carried + carried Abar with Abar = mean_h relu(A * dA), and the paper's ablations.

Chefer, Gur, Wolf (ICCV 2021): equations 5 and 6 for one relevancy vector, and equations 5 to 11 between towers.
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
from vlattn_fast.interpret.relevancy.two_modalities import Equations, Relevancies, relevancies, vectors_between


class GradientMethod(CarriedMethod):
    """r <- r + r Abar, and the equations between towers, with what a subclass changes in them."""

    default_freeze: ClassVar[tuple[str, ...]] = FREEZABLE
    adds_parallel = True
    holds_start = True
    recursion = Recursion("gradient")
    equations: ClassVar[Equations] = Equations()

    def between(self, backward: BackwardPass) -> list[Tensor]:
        calls = backward.reaching_calls()
        grads = backward.gradients([call.attention.output for call in calls])
        return vectors_by_equations(backward, calls, grads, self.equations)


class Gradient(GradientMethod):
    """Adds gradient-weighted maps: r <- r + r Abar, Abar = mean_h relu(A * dA) (Chefer, Gur, Wolf, ICCV 2021, eq. 5 and 6).

    It costs one forward and one backward pass. The operators compute r Abar without storing a map.

    Examples:
        >>> import vlattn_fast as va
        >>> method = va.methods.Gradient(freeze=(), sinks="remove")  # pass it as va.explain(..., method=method)
        >>> method
        <method gradient(freeze=(), sinks=remove)>
    """

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
            start_layer: i = layers i and later, negative from the end: 0 = all layers, -1 = only the last. Layers are the model's
                blocks, numbered by their index in its list of blocks; -1 is the last one that mixes tokens.
            through_connector: True = carry the relevancy of the image tokens on into the vision tower, as
                `relevancy["vision"]`; each image token's is divided equally among its patches. It only supports decoders that
                take images.
            sinks: tokens that receive attention without content, which `va.find_sinks` names and defines: "keep" = maps as the
                method makes them; "remove" = their columns are left out of each attention map, and `explanation.sinks` names
                them. If Abar is mean_h A, each row keeps its sum. Learned sinks, such as those of gpt-oss, are not tokens and
                stay.
            freeze, of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value; `through_connector` with a `start_layer` other than 0.
        """
        check_bool(through_connector=through_connector)
        if through_connector and start_layer != 0:
            raise ValueError(f"start_layer must be 0 with through_connector=True; got {start_layer!r}")
        self.through_connector = through_connector
        super().__init__(start_layer=start_layer, sinks=sinks, freeze=freeze, of=of)


def vectors_by_equations(
    backward: BackwardPass, calls: Sequence[Link], grads: Sequence[Tensor | None], equations: Equations
) -> list[Tensor]:
    """The relevancy vectors (B, 1, N), rows of R, from the calls and the gradients at their outputs."""
    matrices, identity = relevancies(calls, grads, equations)

    def vector(tower: TowerTrace, source: TowerTrace, start: Tensor) -> Tensor:
        if (tower, source) not in matrices:  # the score depends on no attention between them
            return start.new_zeros(*start.shape[:2], source.size)
        row = start @ matrices[tower, source]
        if tower is not source:
            return row
        backward.contribution[tower] = row
        return row + start * identity[tower].mT

    return vectors_between(backward, vector)


# --- ablations, of the published form ---


class _NotNormalized(Equations):
    def normalized(self, call: Link, relevancy: Tensor, identity: Tensor) -> Tensor:
        return relevancy + torch.diag_embed(identity[..., 0])


class _NotAdded(_NotNormalized):
    """As published, it leaves out the normalization, too: what replaces the identity may have no residual."""

    def begin(self, relevancies: Relevancies, calls: Sequence[Link]) -> None:
        """Pairs of towers that attend to each other start with zeros, which an addition replaces."""
        linked = {(call.tower, call.source) for call in calls if call.tower is not call.source}
        for s, q in linked:
            if (q, s) in linked:
                relevancies[s, q] = relevancies[s, s].new_zeros(s.batch or 0, s.size, q.size)

    def added(self, call: Link, old: Tensor | None, addition: Tensor) -> Tensor:
        return addition


class _OnlyAcross(Equations):
    def across(self, query_rows: Tensor, abar: Tensor, key_rows: Tensor) -> Tensor:
        return abar


class WithoutAggregation(GradientMethod):
    """Replaces the relevancy by each call's addition: r <- r Abar. Relevancy may be zero."""

    name = "gradient:no_aggregation"
    default_freeze = ()
    holds_start = False
    recursion = Recursion("gradient", residual_weight=0.0)
    equations = _NotAdded()


class _OnlyBetween(GradientMethod):
    """An ablation that differs from "gradient" only for towers that attend to one another."""

    name = ""
    default_freeze = ()

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        raise ValueError(
            f"method must be 'gradient' for towers that do not attend to one another; got {self.name!r}, which leaves out a part "
            "of the rules for those that do"
        )


class WithoutNormalization(_OnlyBetween):
    """Leaves out equations 8 and 9 of "gradient", for towers that attend to one another."""

    name = "gradient:no_normalization"
    equations = _NotNormalized()


class WithoutSelfAttention(_OnlyBetween):
    """Adds only Abar in equation 10 of "gradient", for towers that attend to one another."""

    name = "gradient:no_self_attention"
    equations = _OnlyAcross()
