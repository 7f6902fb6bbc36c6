"""The base classes of all methods, and of those that carry a relevancy vector through the layers. Each file of `methods/` holds
one method, and no other file names it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from vlattn_fast._ground.checks import check_choice, check_integer, check_names
from vlattn_fast.attach.frozen import Frozen
from vlattn_fast.interpret.adapters.adapter import Adapter, Tower
from vlattn_fast.interpret.adapters.tokens import decoder_inputs
from vlattn_fast.interpret.relevancy.sink_detection import CHOICES, KEEP
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall

NORMS, ATTENTION = FREEZABLE = ("norms", "attention")
LOGIT, LOG_PROBABILITY, MARGIN = EXPLAINED = ("logit", "log_probability", "margin")
Enter = Callable[[TowerTrace, Tensor, Tensor | None], Tensor]  # see `Method.changes`


@dataclass(frozen=True, eq=False)
class Link:
    """An attention call from the tokens of `tower`, its queries, to those of `source`, often the same."""

    tower: TowerTrace
    source: TowerTrace
    attention: TracedCall
    source_call: int | None  # of cross-attention, the last call of `source` that the keys came through; None without one
    joint: bool = False  # the keys share one softmax with those of `tower`

    @property
    def number(self) -> int:
        """Of the call, among all calls of the run."""
        return self.attention.number


@dataclass(frozen=True, eq=False)
class PredictedTokens:
    """Tokens that a model predicts, of which one is explained."""

    logits: Tensor  # (B, N, vocabulary), at every position
    ids: Sequence[Sequence[int]]  # (B, T), with a zero if an answer is shorter
    positions: Tensor  # int64 (B, T), where each is predicted
    number: int  # of the token that is explained


@dataclass(frozen=True, eq=False)
class BackwardPass:
    """The start of one backward pass of a run."""

    towers: Sequence[TowerTrace]  # with an explained position
    attended: Sequence[TowerTrace]  # that they attend to
    calls: Sequence[Link]  # in the order in which they ran, if towers may attend to one another; else none
    starts: Sequence[Tensor]  # (B, T, N), the weights of the explained positions of `towers`; T is 1 if a score counts
    scores: Tensor | None  # (B,); None for methods without a gradient
    arguments: Mapping[str, Any]  # of the model
    keep: bool  # keep the graph for a further pass
    differentiable: bool = False  # gradients have gradients themselves
    predicted: PredictedTokens | None = None  # for methods that take logits, if a token is explained
    # The part of each tower's relevancy vector (B, 1, N) that comes from attention, without what the residual connections leave
    # at the explained positions. Methods without residual connections note nothing.
    contribution: dict[TowerTrace, Tensor] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)  # caveats of the result; `explain` warns of each once

    def gradients(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of the score at each tensor; None if it does not depend on it."""
        if self.scores is None:
            raise ValueError("scores must be given to a method that takes gradients; got None")
        used = [tensor for tensor in tensors if tensor.requires_grad]
        how = {"retain_graph": self.keep, "create_graph": self.differentiable}
        ones = torch.ones_like(self.scores)
        used_grads = iter(torch.autograd.grad(self.scores, used, ones, allow_unused=True, **how) if used else [])
        grads = [next(used_grads) if tensor.requires_grad else None for tensor in tensors]
        return grads if self.differentiable else [None if grad is None else grad.detach() for grad in grads]  # of a tangent, too

    def reaching_calls(self) -> list[Link]:
        """The calls through which something counts for `towers`: calls of other towers cost time, and add nothing."""
        reached = set(self.towers)
        while more := {call.source for call in self.calls if call.tower in reached} - reached:
            reached |= more
        return [call for call in self.calls if call.tower in reached]

    def real(self, tower: TowerTrace) -> Tensor | None:
        """bool (B, N), False = padding; None = no padding."""
        decodes = bool(self.attended) and tower.entry is None and tower in self.towers
        return tower.tokens_in(decoder_inputs(self.arguments) if decodes else self.arguments).real()


def single_tokens(start: Tensor) -> Tensor:
    """bool (B, T, N), True = an explained token; none for weights that include all tokens."""
    return (start == 1) & (start == 0).any(-1, keepdim=True)


class Method:
    """Computes the relevancy of `explain`: the base class of all methods. It has the options; a run's state is with its towers.

    During the forward pass it gets every attention call of the towers (`attend`, `pool`, `cross`), and returns the output of the
    call. Afterwards `carry` or `between` makes the relevancy vectors, once for each score.

    Attributes:
        name: the value of `explain`'s argument `method`; "<method>:<part>" of an ablation. "" = a class for others to build on.
        needs_score: it takes the gradient of a score.
        needs: what it takes from the forward pass: "attention" = every attention call of the towers; "embeddings" = those that
            enter the towers, of a model with any attention or none.
        uses_position: it has an explained position; without, it only uses the score.
        takes_logits: it takes the logits of every position of a decoder.
        rank_filter: the maps of the image are filtered, see `result.numbers.interference`.
        carries_several: a backward pass carries several relevancy vectors of a tower at once, since no score is differentiated.
        default_freeze: the constants of the backward pass, see `freeze`.
        n_runs: the number of changed inputs on which it runs the model; 0 = only the input itself, once.
        unlabelled: options that change no number, which its label leaves out.
        completes: its entries add up to the score's gain over a baseline, as the number of runs grows.
        reads_score: it takes the score itself, of runs without gradients on changed inputs.
        by_layer: it has a map of each layer: relu(A * dA) if it takes gradients, else A.
        adds_parallel: the maps of attention and of a recurrence over the same tokens are added. Other
            methods do not support such layers.
        needs_mixer_rules: what mixes tokens in parallel to a layer's attention counts, and so does further attention over its
            tokens, so that a rule must cover it.
        holds_start: a relevancy vector begins as the weights of the explained positions, and the layers add to it. If it
            equals these weights at the end, the score does not depend on the explained position, and `explain` raises an error.
        weighs_sums: `follow` gets the calls of torch's functions.
        trains: the model runs as it is, in train mode or not, and the calls keep their graph.
        start_layer, sinks, through_connector: options of some methods, with the values for all others.
    """

    name: str = ""
    needs_score: bool = True
    needs: ClassVar[str] = "attention"
    uses_position: ClassVar[bool] = True
    takes_logits: ClassVar[bool] = False
    rank_filter: ClassVar[bool] = False
    carries_several: ClassVar[bool] = False
    unlabelled: ClassVar[tuple[str, ...]] = ()
    completes: ClassVar[bool] = False
    reads_score: ClassVar[bool] = False
    default_freeze: ClassVar[tuple[str, ...]] = ()
    by_layer: ClassVar[bool] = False
    needs_mixer_rules: ClassVar[bool] = True
    weighs_sums: bool = False
    adds_parallel: bool = False
    holds_start: bool = False
    trains: bool = False
    start_layer: int = 0
    sinks: str = KEEP
    through_connector: bool = False
    freeze: tuple[str, ...] = ()
    of: str | None = None

    def __init__(self, *, freeze: Sequence[str] | None = None, of: str | None = None) -> None:
        """
        Args:
            freeze: constants of the backward pass: "norms" = the denominators of LayerNorm, RMSNorm and GroupNorm, including
                those that a module computes itself; "attention" = the attention weights. () = nothing, the form that the papers
                published; None = the method's default: both for "gradient", "weighted" and "input_gradient", norms for "gradcam".
            of: the explained number of a class, a token, or each token of an answer: its "logit", its "log_probability",
                or its "margin", the logit less the log-sum-exp of all others. None = the method's default of an answer, and
                the logit of a target.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        if of is not None:
            check_choice("of", of, EXPLAINED)
        if freeze is not None and not (isinstance(freeze, Sequence) and len(freeze) == 0):
            freeze = check_names("freeze", freeze, FREEZABLE, "a sequence of names, or ()")
        self.freeze = self.default_freeze if freeze is None else tuple(freeze)
        self.of = of

    def constants(self) -> Frozen:
        """What holds the constants of a run's backward pass."""
        return Frozen(NORMS in self.freeze, ATTENTION in self.freeze, self.trains)

    @property
    def n_runs(self) -> int:
        return 0

    @classmethod
    def option_names(cls) -> list[str]:
        """The options that the class takes; those that several classes have come first."""
        return sorted(inspect.signature(cls).parameters, key=lambda name: name not in ("freeze", "of"))

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(type(self)).parameters.items()}
        defaults["freeze"] = self.default_freeze  # None stands for it
        values = {name: getattr(self, name) for name in self.option_names() if name not in self.unlabelled}
        plain = (str, int, float, tuple, type(None))
        return {
            name: value
            for name, value in values.items()
            if not (value is defaults[name] or isinstance(value, plain) and value == defaults[name])
        }

    @property
    def label(self) -> str:
        """The name, with the options that differ from the defaults: "weighted(freeze=norms, of=logit)"."""
        inside = ", ".join(f"{name}={_shown(value)}" for name, value in self.options.items())
        return f"{self.name}({inside})" if inside else self.name

    def __repr__(self) -> str:
        return f"<method {self.label}>"

    # --- what it can explain ---

    def check_adapter(self, adapter: Adapter, model: str) -> None:
        """ValueError if it cannot explain models of this adapter; `model` is the class's name."""

    def check_between(self, entries: Sequence[Tower | None]) -> None:
        """ValueError if it cannot explain towers that attend to one another, or not from its `start_layer`. `entries` are
        those of the towers; None = a tower that is found."""
        if self.start_layer != 0:
            raise ValueError(f"start_layer must be 0 for towers that attend to one another; got {self.start_layer}")

    # --- the forward pass ---

    def changes(self) -> Sequence[Enter]:
        """For each of `n_runs` runs, the new tensor with which the model continues, made of embeddings that enter a tower, and of
        those of the baseline (None = zeros)."""
        return ()

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        """The output (B, H, N, Dv) of self-attention."""
        return self.watched(tower, call.computed())

    def pool(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        """The output of an attention-pooling head, whose queries are learned and are not tokens."""
        return self.watched(tower, call.computed())

    def cross(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        """The output of cross-attention, from the tokens of `tower` to others."""
        return self.watched(tower, call.computed())

    def watched(self, tower: TowerTrace, output: Tensor) -> Tensor:
        """`output`, at which the score has a gradient if the method takes one."""
        if not self.needs_score:
            return self._cut(tower, output)
        output = output if output.requires_grad else output.requires_grad_()
        tower.enters_gradient(output)
        return output

    def _cut(self, tower: TowerTrace, output: Tensor) -> Tensor:
        """`output` without the graph that made it. A gradient at it may name the explained position."""
        return output.detach().requires_grad_(tower.gradients.finds_position)

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], last_tower: Callable[..., tuple[TowerTrace | None, bool]]
    ) -> Any:
        """The result of a call of torch in parallel to attention; NotImplemented = as it is. `last_tower` takes two tensors and
        gives the tower through whose last attention the first one came, and the second did not; and whether the second one
        entered a module before that attention."""
        return NotImplemented

    # --- the backward pass ---

    def ran(self, explained: Sequence[TowerTrace], attended: Sequence[TowerTrace], calls: Sequence[Link]) -> None:
        """Called after the forward pass, with the explained towers, those that they attend to, and `BackwardPass.calls`."""

    def n_vectors_of(self, tower: TowerTrace) -> int:
        """The number of relevancy vectors that a backward pass gives for a tower."""
        return 1

    def edges(self, tower: TowerTrace) -> list[GradientEdge]:
        """Where gradients enter the explained layers; a score must depend on one of them."""
        return tower.edges(self.start_layer)

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        """The relevancy vectors (B, T, N) of towers that do not attend to one another, for their starts (B, T, N)."""
        raise ValueError(f"method={self.name!r} does not support towers that do not attend to one another. Pass another method=")

    def between(self, backward: BackwardPass) -> list[Tensor]:
        """The relevancy vectors (B, 1, N) of towers that attend to others, and of those others; see
        `two_modalities.vectors_between`."""
        raise ValueError(f"method={self.name!r} does not support towers that attend to one another. Pass another method=")

    def carried(self, backward: BackwardPass) -> list[Tensor]:
        """The relevancy vectors (B, 1, N) of `backward.towers` and of `backward.attended`."""
        towers, contribution = [*backward.towers, *backward.attended], backward.contribution
        for tower in towers:
            tower.positions.check()
            if tower.positions.is_flat and backward.attended:
                raise ValueError(
                    "model must keep the order and the number of its tokens if towers attend to one another; got tower "
                    f"'{tower.name}', whose layers change them. Call va.relevancy_step there"
                )
        if backward.attended:
            self.check_between([tower.entry for tower in towers])
            with torch.set_grad_enabled(self.trains):
                return self.between(backward)
        rows = [*self.carry(replace(backward, starts=list(map(_flat, towers, backward.starts))))]
        for number, tower in enumerate(towers):
            if tower.positions.is_flat:
                rows[number] = tower.positions.reported(rows[number])
                if tower in contribution:
                    contribution[tower] = tower.positions.reported(contribution[tower])
        return rows


def _shown(value: Any) -> str:
    """The value of an option in a label."""
    if isinstance(value, tuple):
        return "+".join(value) or "()"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (Tensor, Mapping)):
        return "tensor" if isinstance(value, Tensor) else "dict"
    return "callable" if callable(value) else str(value)


def check_sinks(sinks: Any) -> str:
    """The option of this name; ValueError unless it is "keep" or "remove"."""
    if sinks == "report":
        raise ValueError("sinks must be 'keep' or 'remove'; got 'report'. va.find_sinks(model, inputs) names these tokens")
    check_choice("sinks", sinks, CHOICES)
    return str(sinks)


def _flat(tower: TowerTrace, start: Tensor) -> Tensor:
    """The weights of the explained positions, as methods take them: flat if a tower's tokens move."""
    positions = tower.positions
    if tower.pooled or not positions.is_flat:
        return start
    flat = positions.flattened(start)
    return flat if positions.reorders else flat[0].unflatten(1, positions.shape).transpose(0, 1)


class CarriedMethod(Method):
    """A method that carries one relevancy vector through all layers (Chefer, Gur, Wolf, ICCV 2021, equations 5 and 6)."""

    recursion: ClassVar[Recursion]  # what an attention call does to the relevancy vector

    def __init__(
        self, *, start_layer: int = 0, sinks: str = KEEP, freeze: Sequence[str] | None = None, of: str | None = None
    ) -> None:
        """
        Args:
            start_layer, sinks: see `Gradient`.
            freeze, of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        check_integer("start_layer", start_layer)
        self.start_layer, self.sinks = start_layer, check_sinks(sinks)
        super().__init__(freeze=freeze, of=of)

    def attend(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        return self._of_carrier(tower, tower.carriers.through(call, self.recursion))

    def pool(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        output = self._of_carrier(tower, call.computed())
        output = tower.carriers.into_probes(call, output, self.recursion)
        return output if self.needs_score else output.detach()

    def _of_carrier(self, tower: TowerTrace, output: Tensor) -> Tensor:
        if not self.needs_score:
            return self._cut(tower, output)  # between the layers only the carrier needs a graph
        tower.enters_gradient(output)
        return output

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        """One backward pass starts at the score and at the carrier that leaves each tower."""
        carriers = [tower.carriers for tower in backward.towers]
        outputs = [one.leaving() for one in carriers]
        counts = [start.shape[1] for start in backward.starts]
        starts = zip(backward.starts, counts, carriers, outputs, strict=True)
        carried = [nn.functional.pad(x, (0, 0, 0, 2 * of.n_vectors - n)).to(output.device) for x, n, of, output in starts]
        if backward.scores is not None:
            score = backward.scores.sum()
            outputs, carried = [score, *outputs], [torch.ones_like(score), *carried]
        entering = [tower.carriers.entering_from(tower.first_layer(self.start_layer)) for tower in backward.towers]
        parts = [part for tower_parts in entering for part in tower_parts]
        grads = iter(torch.autograd.grad(outputs, parts, carried, retain_graph=backward.keep))
        rows = [torch.cat([next(grads) for _ in tower_parts], 2) for tower_parts in entering]
        halves = [row.chunk(2, 1) for row in rows]
        backward.contribution.update(
            (tower, half[1][:, :n]) for tower, half, n in zip(backward.towers, halves, counts, strict=True)
        )
        return [half[0][:, :n] for half, n in zip(halves, counts, strict=True)]

    # --- for relevancy with gradients, see `live_calls` ---

    def begins(self, tower: TowerTrace, chunk: bool = False, carries: bool = True) -> None:
        """A call begins, whose residual sum comes later. `carries`: it is self-attention."""

    def terms(self, tower: TowerTrace) -> Mapping[int, tuple[Tensor, Tensor, Tensor]]:
        """By the number of each call that is added to the residual stream, if weights depend on it: the stream and the branch
        (B, N, C), and the tensor that the model adds. Else nothing."""
        return {}

    def weights(self, call: TracedCall, term: tuple[Tensor, Tensor, Tensor] | None, grad: Tensor | None) -> tuple[Any, Any]:
        """a and b of the recursion, numbers or (B, N). `grad`: at the last tensor of `term`."""
        return call.weights(self.recursion)
