"""Method "weighted": carried <- carried * a + (carried * b) Abar, with the rows of Abar divided by their sums.

a and b come from the residual sum behind each attention (our reading of Huang et al. 2023, see `relevancy_residual`). The
attention operator returns carried Abar alone; the residual sum adds carried itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.backends.reference.relevancy_residual import Weighting, residual_weights
from vlattn_fast.interpret.records.record import Tower
from vlattn_fast.interpret.relevancy.method import BackwardPass, Hook, LinkedCall
from vlattn_fast.interpret.relevancy.methods.gradient import Gradient, rows_by_equations
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace, matching, submodule
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall
from vlattn_fast.interpret.relevancy.two_modalities import Equations, divided_by_sums
from vlattn_fast.ops.relevancy_residual import relevancy_residual

# Names of torch's functions, without underscores: those that add, and those that leave the numbers as they are.
_SUMS, _UNCHANGED = ("add", "radd", "iadd"), ("dropout", "to", "float", "type_as", "contiguous")


@dataclass
class _Sums:
    """The residual sums of one tower."""

    stream: Tensor | None = None  # x in front of the attention that runs
    carrier: Tensor | None = None  # behind that attention, in front of its sum
    unadded: Tensor | None = None  # the branch that the model has yet to add to its residual stream
    terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # x and o behind each attention, where every call is kept


class Weighted(Gradient):
    name = "weighted"
    takes_weighting = True
    recursion = Recursion("gradient", row_normalize=True, residual_weight=0.0)

    kept: dict[TowerTrace, _Sums]

    # --- what it can explain ---

    def check_between(self, start_layer: int, records: Sequence[Tower | None]) -> None:
        if not all(record is not None and record.branch and (record.sums or not record.further) for record in records):
            problem = f"method={self.name!r} needs a record of the residual sums of towers that attend to one another"
            raise ValueError(f"{problem}. Pass another method=")
        super().check_between(start_layer, records)

    def check_unrecorded(self, path: str) -> None:
        raise ValueError(
            f"method must be one that needs no residual branch where towers have no record; got 'weighted' and '{path}'"
        )

    # --- the forward pass ---

    def hooks(self, model: nn.Module, towers: Sequence[TowerTrace], of_this_run: Callable[[Hook], Hook]) -> Iterator[Any]:
        """Those at the residual sums."""
        for tower in towers:
            record = tower.record
            if record is None or record.branch is None:
                missing = f"which tower '{tower.name}' has no record of"
                raise ValueError(f"method must be one that needs no residual branch, {missing}; got 'weighted'")
            self.kept[tower] = _Sums()
            root = submodule(tower.model, record.path, record)
            keep_stream, at_branch = (
                of_this_run(functools.partial(hook, tower)) for hook in (self._keep_stream, self._at_branch)
            )
            for layer in (layer for layers in matching(root, record) for layer in root.get_submodule(layers).children()):
                yield submodule(layer, record.stream, record).register_forward_pre_hook(keep_stream, with_kwargs=True)
                yield submodule(layer, record.branch, record).register_forward_hook(at_branch)
            for layer in (layer for layers in record.further for layer in tower.model.get_submodule(layers).children()):
                for path in record.sums:
                    hook = of_this_run(lambda _, terms, tower=tower: self._add_sum(tower, *terms))
                    yield submodule(layer, path, record).register_forward_pre_hook(hook)

    def _keep_stream(self, tower: TowerTrace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        self.kept[tower].stream = stream if stream is None or self.trains else stream.detach()

    def _at_branch(self, tower: TowerTrace, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        branch = output[0] if isinstance(output, tuple) else output
        if tower.keeps or self.trains:
            self._add_sum(tower, self.kept[tower].stream, branch)
            self.kept[tower].unadded = None if tower.keeps else branch
            return output
        branch = self._weigh(tower, branch)
        return (branch, *output[1:]) if isinstance(output, tuple) else branch

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        output = super().attend(tower, call)
        if not tower.keeps:
            self.kept[tower].carrier = tower.carriers.behind[-1]
        return output

    def _add_sum(self, tower: TowerTrace, stream: Tensor | None, branch: Tensor) -> None:
        terms = self.kept[tower].terms
        if stream is None or stream.shape != branch.shape or len(terms) + 1 != len(tower.paths):
            raise ValueError(
                f"model must add the output of each attention of tower '{tower.name}' to its residual stream; got "
                f"{'no stream' if stream is None else tuple(stream.shape)} and a branch of {tuple(branch.shape)} behind "
                f"'{tower.path}'"
            )
        terms.append((stream if self.trains else stream.detach(), branch))

    def _weigh(self, tower: TowerTrace, branch: Tensor) -> Tensor:
        sums, carriers, path = self.kept[tower], tower.carriers, "" if tower.record is None else tower.record.branch
        if sums.carrier is None or sums.stream is None or sums.stream.shape != branch.shape:
            raise ValueError(
                f"model must add the output of '{path}' to its residual stream behind attention '{tower.path}'; got "
                f"{'no stream' if sums.stream is None else tuple(sums.stream.shape)} and a branch of {tuple(branch.shape)}"
            )
        around = carriers.before.to(branch.device)
        branch, carriers.behind[-1] = weigh(sums.stream, branch, around, sums.carrier, self.weighting)
        sums.carrier = sums.stream = None
        sums.unadded = branch
        return branch

    def follow(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """ValueError for a branch that `func` changes before it is added: the weights would be those of another sum."""
        for tower, sums in self.kept.items():
            if sums.unadded is None or not isinstance(result, Tensor) or not any(arg is sums.unadded for arg in args):
                continue
            name = getattr(func, "__name__", "").strip("_")
            if name not in (*_SUMS, *_UNCHANGED):
                where = "" if tower.record is None else tower.record.branch
                raise ValueError(
                    f"model must add the output of '{where}' to its residual stream as it is where method is 'weighted'; got "
                    f"'{name}' of it behind attention '{tower.path}'"
                )
            sums.unadded = result if name in _UNCHANGED else None

    def check_tower(self, tower: TowerTrace) -> None:
        sums = self.kept.get(tower, _Sums())
        if (tower.keeps or (self.trains and tower.record is not None)) and len(sums.terms) != len(tower.paths):
            raise ValueError(
                f"model must add each attention of tower '{tower.name}' to its stream; got none behind '{tower.path}'"
            )
        if sums.carrier is not None and tower.record is not None:
            raise ValueError(f"model must call '{tower.record.branch}' in every layer of tower '{tower.name}'; got no last call")

    # --- the backward pass ---

    def terms(self, tower: TowerTrace) -> Sequence[tuple[Tensor, Tensor]]:
        return self.kept[tower].terms

    def weights(self, call: TracedCall, term: tuple[Tensor, Tensor] | None, grad: Tensor | None) -> tuple[Any, Any]:
        assert term is not None
        return residual_weights(*term, torch.zeros_like(term[1]) if grad is None else grad, self.weighting)

    def between(self, backward: BackwardPass) -> list[Tensor]:
        """Where the record says where the sums are, an addition to R becomes diag(a) R + diag(b) (what is added), our reading of
        weighted relevancy between towers."""
        calls = backward.reaching_calls()
        terms = {tower: iter(sums.terms) for tower, sums in self.kept.items()}
        of_calls = [next(terms[call.tower]) for call in calls]
        outputs = [*(call.attention.output for call in calls), *(branch for _, branch in of_calls)]
        grads = backward.gradients(outputs)
        weights: dict[int, tuple[Tensor, Tensor]] = {}  # none where the score does not depend on the sum
        for call, (stream, branch), grad in zip(calls, of_calls, grads[len(calls) :], strict=True):
            if grad is not None:
                weights[call.number] = residual_weights(stream, branch, grad, self.weighting)
        equations = _WeightedEquations(weights, self.weighting, self.recursion.row_normalize)
        return rows_by_equations(backward, calls, grads[: len(calls)], equations)


class WithoutNormalization(Weighted):
    """The rows of Abar as they are."""

    name = "weighted:no_normalization"
    recursion = Recursion("gradient", residual_weight=0.0)


class _WeightedEquations(Equations):
    """With `weights`, a and b (B, N) of each call that has them, by its number."""

    def __init__(self, weights: Mapping[int, tuple[Tensor, Tensor]], weighting: str | Weighting, row_normalize: bool) -> None:
        self.weights, self.weighting, self.row_normalize = weights, weighting, row_normalize

    def mean_map(self, call: LinkedCall, grad: Tensor, like: Tensor) -> Tensor:
        abar = super().mean_map(call, grad, like)
        return divided_by_sums(abar) if self.row_normalize else abar

    def normalized(self, call: LinkedCall, relevancy: Tensor) -> Tensor:
        """Where a + b = 1, and the rows of Abar are divided by their sums, rows sum to one anyway: R itself stands in equation 10
        but with equal weights."""
        return super().normalized(call, relevancy) if self.weighting == "equal" else relevancy

    def added(self, call: LinkedCall, old: Tensor | None, addition: Tensor) -> Tensor:
        if call.number not in self.weights:
            return super().added(call, old, addition)
        a, b = (part[..., None].to(addition) for part in self.weights[call.number])
        return super().added(call, None if old is None else a * old, b * addition)


def weigh(
    stream: Tensor, branch: Tensor, carrier: Tensor, branch_carrier: Tensor, weighting: str | Weighting
) -> tuple[Tensor, Tensor]:
    """`relevancy_residual` for a residual sum y = stream + branch that the model computes itself.

    A hook sees the branch, but not the sum. The gradients at both are equal, since the sum has slope one in the branch. So
    this function computes the sum on its own graph and returns branch + (sum - sum): the value of the branch, with a
    backward pass that goes through `relevancy_residual`. The carrier takes the same node of the graph, so autograd runs the
    attention's backward pass only after the weights a and b are known.

    `carrier` and `branch_carrier` (B, T, N) go around the attention and through it. Returns the branch (B, N, C) with unchanged
    values, and the carrier behind the sum.
    """
    total, carrier = relevancy_residual(stream, branch, carrier, branch_carrier, weighting=weighting)
    return branch.detach() + (total - total.detach()).to(branch.dtype), carrier
