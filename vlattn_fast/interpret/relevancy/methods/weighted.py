"""Method "weighted": carried <- carried * a + (carried * b) Abar, with the rows of Abar divided by their sums.

a and b come from the residual sum after each attention (our reading of Huang et al. 2023, see `relevancy_residual`). The
attention operator returns only carried Abar; the residual sum adds carried itself.

The sums are found during the run. A sum y = x + o adds two tensors: o came through the tower's last attention; x did not, and
entered a module before it. So x is the residual stream, while the output of an MLP parallel to the attention is made later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import over_sums
from vlattn_fast.backends.reference.relevancy_residual import WEIGHTINGS, Weighting, residual_weights
from vlattn_fast.interpret.relevancy.method import BackwardPass, Link
from vlattn_fast.interpret.relevancy.methods.gradient import GradientMethod, vectors_by_equations
from vlattn_fast.interpret.relevancy.sink_detection import KEEP
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall
from vlattn_fast.interpret.relevancy.tracking.token_positions import flat_rows
from vlattn_fast.interpret.relevancy.two_modalities import Equations
from vlattn_fast.ops.relevancy_residual import relevancy_residual

_SUMS = ("add", "radd", "iadd")  # names of torch's functions, without underscores


class Weighted(GradientMethod):
    """Weights both terms of each residual sum: r <- r * a + (r * b) Abar, a and b their shares (after Huang et al. 2023).

    It costs one forward and one backward pass. The rows of Abar are divided by their sums. The paper's code is not public:
    `weighting` has this package's reading. A scale of the branch before the sum is part of its term. Between towers an addition
    to R becomes diag(a) R + diag(b) (...).

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.Weighted(weighting="norm", start_layer=2)  # pass it as va.explain(..., method=...)
        <method weighted(weighting=norm, start_layer=2)>
    """

    name = "weighted"
    adds_parallel, weighs_sums = False, True
    recursion = Recursion("gradient", row_normalize=True, residual_weight=0.0)

    def __init__(
        self,
        *,
        weighting: str | Weighting = "contribution",
        start_layer: int = 0,
        sinks: str = KEEP,
        freeze: Sequence[str] | None = None,
        of: str | None = None,
    ) -> None:
        """
        Args:
            weighting: the sizes of which a and b are the shares, with x the residual stream, o the attention's branch and g the
                score's gradient at their sum: "contribution" = |g.x| and |g.o|, "norm" = |x| and |o|, "magnitude" =
                sum_c |g_c x_c| and sum_c |g_c o_c|, "equal" = 1 and 1; or a callable(residual, branch, gradient) -> (a, b),
                (B, N) each.
            start_layer, sinks: see `Gradient`.
            freeze, of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        if not callable(weighting) and not (isinstance(weighting, str) and weighting in WEIGHTINGS):
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)} or a callable; got {weighting!r}")
        self.weighting = weighting
        super().__init__(start_layer=start_layer, sinks=sinks, freeze=freeze, of=of)

    # --- the forward pass ---

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self.begins(tower, call.chunk)
        return super().attend(tower, call)

    def cross(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        self.begins(tower, carries=False)
        return super().cross(tower, call)

    def begins(self, tower: TowerTrace, chunk: bool = False, carries: bool = True) -> None:
        sums = tower.sums
        if sums.waits and not chunk and sums.unsummed is None:
            sums.unsummed = tower.calls.paths[-2]
        sums.waits, sums.carries, sums.branch, sums.partial = True, carries, None, None

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], last_tower: Callable[..., tuple[TowerTrace | None, bool]]
    ) -> Any:
        """The result of a function of torch; the terms of a residual sum get their weights."""
        terms = [arg for arg in args if isinstance(arg, Tensor)]
        if kwargs or len(args) != 2 or len(terms) != 2 or getattr(func, "__name__", "").strip("_") not in _SUMS:
            return NotImplemented
        for added, stream in (terms, terms[::-1]):
            tower, enters_before = last_tower(added, stream)
            if tower is None or not tower.sums.waits or added.shape != stream.shape or added.ndim != 3:
                continue
            sums, moves = tower.sums, tower.positions.reorders and tower.sums.carries and not tower.trains
            branch = sums.branch if sums.branch is not None and added is sums.partial else added
            if not enters_before:  # such as of an MLP parallel to the attention
                sums.branch, sums.partial = branch, func(*args)
                return sums.partial
            if func is Tensor.add_ and added is args[0]:  # the model goes on with this tensor
                return NotImplemented
            positions = tower.positions.locate_states(stream) if moves else None
            with torch._C.DisableTorchFunction():
                if not tower.trains:
                    stream, branch = stream.detach(), branch.detach()
                weighed = self._weigh(tower, stream, branch, added, positions)
            return func(*(weighed if arg is added else arg for arg in args))
        return NotImplemented

    def _weigh(self, tower: TowerTrace, stream: Tensor, branch: Tensor, added: Tensor, positions: Tensor | None) -> Tensor:
        """`added` with the same values, for a residual sum y = stream + added that the model computes itself. `positions` (B, N):
        those of the stream's tokens, if they move.

        The gradient of y is that of `branch`, since the sum has slope one in it. So a second sum, on a graph of its own, takes
        y's gradient and computes a and b from it. The carrier goes through the same node of the graph, so autograd runs the
        attention's backward pass only after the weights are known.
        """
        carriers, sums = tower.carriers, tower.sums
        sums.waits = False
        if sums.carries and not tower.trains:
            after, before = carriers.leaving(), carriers.before
            if positions is not None:  # tokens outside of the sum keep their carrier
                at = tower.positions.call(None)
                parts = [at.pick(flat_rows(carrier), positions) for carrier in (before.to(after), after)]
                total, carrier = relevancy_residual(stream, branch, *parts, weighting=self.weighting)
                carriers.after = [at.scaled(after, 0.0, positions) + at.spread(carrier, positions)]
            elif after.shape[::2] != stream.shape[:2]:
                sums.unsummed = sums.unsummed or tower.calls.path
                return added
            else:
                total, carrier = relevancy_residual(stream, branch, before.to(after), after, weighting=self.weighting)
                carriers.after = [carrier]
            added = added + (total - total.detach()).to(added.dtype)
        if (tower.keeps or tower.trains) and tower.calls.last is not None:
            sums.terms[tower.calls.last] = stream, branch, added
        return added

    # --- the backward pass ---

    def _check(self, towers: Sequence[TowerTrace]) -> None:
        """ValueError if an attention of these towers is not added to their stream."""
        for tower in towers:
            unsummed = tower.sums.unsummed or (tower.calls.path if tower.sums.waits else None)
            if unsummed is not None:
                raise ValueError(
                    f"model must add the output of each attention of tower '{tower.name}' to its residual stream for method "
                    f"{self.name!r}; got no such sum after '{unsummed}'"
                )

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        self._check(backward.towers)
        return super().carry(backward)

    def terms(self, tower: TowerTrace) -> Mapping[int, tuple[Tensor, Tensor, Tensor]]:
        self._check([tower])
        return tower.sums.terms

    def weights(self, call: TracedCall, term: tuple[Tensor, Tensor, Tensor] | None, grad: Tensor | None) -> tuple[Any, Any]:
        assert term is not None
        stream, branch, _ = term
        return residual_weights(stream, branch, torch.zeros_like(branch) if grad is None else grad, self.weighting)

    def between(self, backward: BackwardPass) -> list[Tensor]:
        """An addition to R becomes diag(a) R + diag(b) (what is added), our reading of weighted relevancy between towers."""
        calls = backward.reaching_calls()
        self._check(list(dict.fromkeys(call.tower for call in calls)))
        terms = [call.tower.sums.terms[call.number] for call in calls]
        grads = backward.gradients([*(call.attention.output for call in calls), *(added for *_, added in terms)])
        weights: dict[int, tuple[Tensor, Tensor]] = {}  # none if the score does not depend on the sum
        for call, (stream, branch, _), grad in zip(calls, terms, grads[len(calls) :], strict=True):
            if grad is not None:
                weights[call.number] = residual_weights(stream, branch, grad, self.weighting)
        equations = _WeightedEquations(weights, self.weighting, self.recursion.row_normalize)
        return vectors_by_equations(backward, calls, grads[: len(calls)], equations)


class WithoutNormalization(Weighted):
    """Leaves the rows of Abar in "weighted" undivided."""

    name = "weighted:no_normalization"
    default_freeze = ()
    recursion = Recursion("gradient", residual_weight=0.0)


class _WeightedEquations(Equations):
    """With `weights`, a and b (B, N) of each call that has them, by its number."""

    def __init__(self, weights: Mapping[int, tuple[Tensor, Tensor]], weighting: str | Weighting, row_normalize: bool) -> None:
        self.weights, self.weighting, self.row_normalize = weights, weighting, row_normalize

    def weighed(self, abar: Tensor) -> Tensor:
        return over_sums(abar) if self.row_normalize else abar

    def normalized(self, call: Link, relevancy: Tensor, identity: Tensor) -> Tensor:
        """If a + b = 1 and the rows of Abar are divided by their sums, rows of R sum to one anyway: equation 10 takes R itself,
        except for equal weights."""
        if self.weighting == "equal":
            return super().normalized(call, relevancy, identity)
        return relevancy + torch.diag_embed(identity[..., 0])

    def added(self, call: Link, old: Tensor | None, addition: Tensor) -> Tensor:
        if call.number not in self.weights:
            return super().added(call, old, addition)
        a, b = (part[..., None].to(addition) for part in self.weights[call.number])
        return super().added(call, None if old is None else a * old, b * addition)
