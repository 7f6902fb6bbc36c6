"""Constants of the backward pass: denominators of norms, attention weights. The forward pass stays unchanged.

A norm is y = (x - mean(x)) / d(x) * weight + bias, or the same without the mean; d(x) is the norm of the numerator. A
gradient that comes back through it is orthogonal to x, so the contributions of tokens to x cancel. With a constant d, y is linear
in x (Ali et al., ICML 2022; studies of circuits linearise models so).

torch's own functions are replaced by one with this gradient. A norm that a model writes out is found in the graph of its run: a
root of sums of squares of x that divides x, or a reciprocal root that multiplies it. Nothing goes back through that root. Vectors
of unit length, whose squares are summed, may also be those of a similarity, as CLIP's embeddings are: they are a norm's if a
module around them gives a tensor of its input's shape, as layers and norms do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast.attach.events import SCORE_ATTENTION, SOFTMAX, ModuleRun, Subscriber, is_map
from vlattn_fast.attach.session import named
from vlattn_fast.backends.inputs import ScoreAttentionInputs, schema_of
from vlattn_fast.ops._sinks import with_sink

_HELD = "vlattn_held"  # a key in the metadata of a node of the graph through which no gradient goes back, or may not


class Frozen(Subscriber):
    """The constants of the backward pass of an observed run of `model`. Add it to the run's subscribers, or enter
    `Observer(model, [Frozen()])` around runs that have observers of their own.

    Args:
        norms: the denominators of norms are constants.
        attention: so are attention weights. A run that computes attention itself calls `constant` for queries and keys.
        switches: the model trains on the same graph: values are constants only while `holds` is set.
        similarities: the denominators of vectors of unit length are constants wherever they are.

    Attributes:
        differentiable: the gradients with these constants are differentiated themselves, if the model trains.
        missed: the modules that ran, named, that are a norm of another kind, which keeps its derivative.
    """

    sees_all = True

    def __init__(self, norms: bool = True, attention: bool = False, switches: bool = False, similarities: bool = False) -> None:
        self.norms, self.attention, self._switches, self.holds = norms, attention, switches, not switches
        self.differentiable, self._similarities = False, similarities
        self.missed = list[str]()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """A context whose backward passes treat them as constants, for a model that trains."""
        before, self.holds = self.holds, True
        try:
            yield
        finally:
            self.holds = before

    def constant(self, tensor: Tensor) -> Tensor:
        """The tensor, as a constant of the backward pass."""
        return self._switched(tensor, None, None) if self._switches else tensor.detach()

    def _switched(self, plain: Tensor, x: Tensor | None, norm: _Norm | None) -> Tensor:
        """See `_Switch`. torch.func would take an argument with `__torch_function__` for a tensor."""
        switched: Tensor = _Switch.apply(plain, lambda: self, x, norm)
        return switched

    def takes_function(self, func: Any) -> bool:
        return (self.norms and func in _NORMS) or (self.attention and func in _ATTENTION)

    def on_call(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a norm with the gradient of a linear function, or of attention with constant weights."""
        if func in _NORMS:
            return _NORMS[func](self, func, *args, **kwargs)
        if func is with_sink:
            out, lse, logit = args  # the log-sum-exp has the part of a score that only a sink sees
            return func(out, self.constant(lse), self.constant(logit))
        return self._attention(func, *args, **kwargs)

    def on_result(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        node = result.grad_fn if isinstance(result, Tensor) else None
        if node is None:
            return
        kind = node.name().partition("Backward")[0]
        if self.norms and kind in ("Mul", "Div"):
            self._find_norm(run, node, kind)
        elif self.attention and func in SOFTMAX:  # edits may have changed its shape
            for each, of_each in _walk(node, _EDITED).items():
                if of_each in _SOFTMAX and _is_attention(each, result):
                    self._hold(each)
        elif self.attention and kind in _SOFTMAX and _is_attention(node, result):
            self._hold(node)

    # --- nodes of the graph ---

    def _hold(self, node: Any) -> None:
        """No gradient goes back through the node, from its first output."""
        node.metadata[_HELD] = True
        node.register_prehook(lambda grads: (None, *grads[1:]) if self.holds else None)

    def _find_norm(self, run: ModuleRun, node: Any, kind: str) -> None:
        """Holds what one factor is divided by, if that is a norm of the other factor."""
        factors = [factor for factor, _ in node.next_functions]
        if len(factors) < 2 or None in factors:
            return
        for number, factor in enumerate(factors):
            for divisor in _divisors(factor, -1 if kind == "Div" and number else 1):
                measured = _measured(divisor)
                if _HELD not in divisor.metadata and not measured.nodes.isdisjoint(_near(factors[1 - number], _LINEAR)):
                    self._divides(run, divisor, measured)

    def _divides(self, run: ModuleRun, divisor: Any, measured: _Measured) -> None:
        """A tensor is divided by this magnitude of its own."""
        if measured.is_of_squares and (measured.is_mean or self._similarities):
            self._hold(divisor)
        elif measured.is_of_squares and run.module is not None:
            divisor.metadata[_HELD] = False
            run.lengths.append(divisor)
        elif run.module is not None:
            run.magnitudes |= measured.nodes

    # --- modules ---

    def on_leave(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.norms or (run.has_parts and not (run.lengths or run.magnitudes)):
            return
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        if not isinstance(first, Tensor) or first.shape not in [x.shape for x in inputs]:
            if run.around is not None and run.around.module is not None:
                run.around.lengths += run.lengths
            return
        for root in run.lengths:
            self._hold(root)
        starts = {torch.autograd.graph.get_gradient_edge(x).node for x in inputs if x.requires_grad}
        if not run.magnitudes.isdisjoint(starts) or (not run.has_parts and _ends_in_fused_norm(first.grad_fn, starts)):
            assert run.module is not None
            self.missed = [*dict.fromkeys([*self.missed, named(run.path or "", run.module)])]

    # --- calls ---

    def _attention(self, func: Any, *args: Any, **options: Any) -> Any:
        """The call with everything but the values constant: a mask may be computed from tokens."""
        constants = [x if n == _VALUES[func] else self._constant(x) for n, x in enumerate(args)]
        return func(*constants, **{name: x if name == "value" else self._constant(x) for name, x in options.items()})

    def _constant(self, option: Any) -> Any:
        return self.constant(option) if isinstance(option, Tensor) and option.requires_grad else option

    def linear(self, func: Any, args: tuple[Any, ...], x: Tensor, norm: _Norm) -> Any:
        """func(*args), a norm of x, whose backward pass is that of a linear function."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return func(*args)
        if not self._switches:
            return _Linear.apply(x, norm, func, args)
        return self._switched(func(*args), x, norm)


class _Norm(NamedTuple):
    """y = (x - mean) / root * weight + bias, over the last dimension of x in the shape `groups`."""

    groups: Sequence[int]
    weight: Tensor | None  # broadcasts to x
    centred: bool
    eps: float

    def over_root(self, x: Tensor) -> Tensor:
        """1 / root, over the groups, in float32 or float64."""
        rows = x.reshape(*self.groups).to(torch.promote_types(x.dtype, torch.float32))
        squares = rows.var(-1, correction=0, keepdim=True) if self.centred else rows.square().mean(-1, keepdim=True)
        return (squares + self.eps).rsqrt()

    def scaled(self, x: Tensor, over_root: Tensor) -> Tensor:
        """(x - mean) / root, which is also the transposed of this map."""
        rows = x.reshape(*self.groups).to(over_root.dtype)
        return ((rows - rows.mean(-1, keepdim=True) if self.centred else rows) * over_root).reshape(x.shape)

    def times_weight(self, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight


class _Linear(torch.autograd.Function):
    """A norm whose root is a constant; its weight and bias are constants as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: _Norm, func: Any, args: tuple[Any, ...]) -> Any:
        ctx.norm, ctx.dtype = norm, x.dtype
        ctx.set_materialize_grads(False)  # no zeros of a layer that no score depends on: FSDP has freed its weights
        ctx.save_for_backward(norm.over_root(x))
        return func(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, None, None
        (over_root,) = ctx.saved_tensors
        return _linear_gradient(ctx, grad, over_root), None, None, None


class _Switch(torch.autograd.Function):
    """A tensor. While the owner holds values constant, its gradient bypasses it: to nothing, or to the norm's input x as that
    of a linear function. No tensor is saved, since a layer under torch.utils.checkpoint saves what it saves without this
    context."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plain: Tensor, owner: Callable[[], Frozen], x: Tensor | None, norm: _Norm | None) -> Tensor:
        """A copy, since a model may write into the output of a norm."""
        return plain.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, owner, x, ctx.norm = inputs
        ctx.owner = owner()
        ctx.set_materialize_grads(False)  # see `_Linear`
        if ctx.norm is not None:
            ctx.over_root, ctx.dtype, ctx.x = ctx.norm.over_root(x), x.dtype, x if ctx.owner.differentiable else None

    @staticmethod
    def jvp(ctx: Any, plain: Tensor, *_: Any) -> Tensor:
        """That of the forward pass, which is the model's own."""
        return plain.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None]:
        if grad is None or not ctx.owner.holds:
            return grad, None, None, None
        if ctx.norm is None:
            return None, None, None, None
        return None, None, _linear_gradient(ctx, grad, ctx.over_root if ctx.x is None else ctx.norm.over_root(ctx.x)), None


def _linear_gradient(ctx: Any, grad: Tensor, over_root: Tensor) -> Tensor:
    gradient: Tensor = ctx.norm.scaled(ctx.norm.times_weight(grad), over_root).to(ctx.dtype)
    return gradient


# --- torch's functions ---


def _layer_norm(
    frozen: Frozen, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    norm = _Norm(_trailing(input, normalized_shape), weight, True, eps)
    cudnn = () if func is functional.layer_norm else (cudnn_enable,)
    return frozen.linear(func, (input, normalized_shape, weight, bias, eps, *cudnn), input, norm)


def _rms_norm(frozen: Frozen, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    norm = _Norm(_trailing(input, normalized_shape), weight, False, torch.finfo(input.dtype).eps if eps is None else eps)
    return frozen.linear(func, (input, normalized_shape, weight, eps), input, norm)


def _group_norm(
    frozen: Frozen, func: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:  # fmt: skip
    channels = None if weight is None else weight.reshape(-1, *(1,) * (input.ndim - 2))
    norm = _Norm((len(input), num_groups, -1), channels, True, eps)
    cudnn = () if func is functional.group_norm else (cudnn_enabled,)
    return frozen.linear(func, (input, num_groups, weight, bias, eps, *cudnn), input, norm)


def _trailing(x: Tensor, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    return (*x.shape[: x.ndim - len(normalized_shape)], -1)


_NORMS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((functional.rms_norm, torch.rms_norm), _rms_norm),
    **dict.fromkeys((functional.group_norm, torch.group_norm), _group_norm),
}
_VALUES = {  # their places among the arguments
    functional.scaled_dot_product_attention: 2,
    SCORE_ATTENTION: list(schema_of(ScoreAttentionInputs).types).index("value"),
}
_ATTENTION = (*_VALUES, with_sink)


# --- the graph of a run ---

# Nodes that keep each number, or compute it with one of another tensor.
_ELEMENTWISE = frozenset(
    "Add Sub Rsub Mul Div Neg Abs Reciprocal Clamp ClampMin ClampMax Maximum Minimum Where MaskedFill NativeDropout "
    "ToCopy Clone torch::autograd::Copy torch::autograd::CopySlices Alias View UnsafeView ReshapeAlias AsStrided Expand Repeat "
    "Unsqueeze Squeeze Permute Transpose T Slice Select Split SplitWithSizes Unbind Cat Stack".split()
)
_LINEAR = _ELEMENTWISE | {"Mm", "Addmm"}
_ROOTS = ("Sqrt", "Rsqrt", "Std", "StdMean", "LinalgVectorNorm")
_REDUCTIONS = ("Mean", "Sum", "Cumsum", "Amax", "Max")
_SOFTMAX = ("Softmax", "SafeSoftmax", "MaskedSoftmax", "Exp")
_EDITED = ("View", "UnsafeView", "MaskedFill")  # what `intervene` does to a softmax
_FAR = 40  # nodes; a norm has fewer


def is_held(node: Any) -> bool:
    """Whether no gradient goes back through this node."""
    return node.metadata.get(_HELD, False) is True


class _Measured(NamedTuple):
    """What a divisor is the magnitude of."""

    nodes: set[Any]  # of the tensor; empty = the divisor is no magnitude
    is_of_squares: bool = False  # it is the root of the tensor's squares
    is_mean: bool = False  # of their mean


def _walk(start: Any, through: Container[str], ends: Container[Any] = ()) -> dict[Any, str]:
    """The nodes that `start` is computed from, nearest first, and their kinds: "Mul" for MulBackward0. They do not go beyond
    nodes of other kinds than `through`, nor beyond `ends`."""
    nodes, ahead = {start: ""}, [start]
    for node in ahead:
        kind = nodes[node] = node.name().partition("Backward")[0]
        if kind in through and node not in ends and len(nodes) < _FAR:
            for before, _ in node.next_functions:
                if before is not None and before not in nodes:
                    nodes[before] = ""
                    ahead.append(before)
    return nodes


def _near(start: Any, through: Container[str] = _ELEMENTWISE) -> set[Any]:
    """The nodes of the tensors that a tensor has its numbers from. Parameters are left out: a norm of them is no token's."""
    return {node for node in _walk(start, through) if not isinstance(getattr(node, "variable", None), nn.Parameter)}


def _exponent(node: Any) -> float:
    """That of a power; 1.0 = it is none, or a tensor."""
    return float(node._saved_exponent) if node.name() == "PowBackward0" else 1.0


def _divisors(start: Any, sign: int) -> list[Any]:
    """The roots and reductions that a factor divides by, with `sign` -1 those that a divisor multiplies by."""
    divisors, ahead, seen = [], [(start, sign)], {start}
    for node, sign in ahead:
        kind = node.name().partition("Backward")[0]
        exponent = _exponent(node) if kind == "Pow" else 1.0
        if kind in _ROOTS or kind in _REDUCTIONS or exponent % 1:
            divisors += [node] if (sign < 0) != (kind == "Rsqrt" or exponent < 0) else []
        elif (kind in _ELEMENTWISE or exponent == -1) and len(ahead) < _FAR:
            for number, (before, _) in enumerate(node.next_functions):
                if before is not None and before not in seen:
                    inverts = kind == "Reciprocal" or exponent == -1 or (kind == "Div" and number == 1)
                    ahead.append((before, -sign if inverts else sign))
                    seen.add(before)
    return divisors


def _measured(divisor: Any) -> _Measured:
    kind, start = divisor.name().partition("Backward")[0], divisor.next_functions[0][0]
    if start is None:
        return _Measured(set())
    if kind in ("Std", "StdMean", "LinalgVectorNorm"):
        return _Measured(_near(start), kind != "LinalgVectorNorm" or divisor._saved_ord == 2, kind != "LinalgVectorNorm")
    is_root, squares, others, mean = kind in ("Sqrt", "Rsqrt") or abs(_exponent(divisor)) == 0.5, set[Any](), set[Any](), False
    ahead = [(start if is_root or kind == "Pow" else divisor, False, False)]
    for node, is_reduced, is_mean in ahead:
        kind = node.name().partition("Backward")[0]
        exponent = _exponent(node) if kind == "Pow" else 1.0
        before = [each for each, _ in node.next_functions if each is not None]
        both = _near(before[0]) & _near(before[1]) if kind in ("Mul", "Bmm") and len(before) == 2 else set[Any]()
        if kind in ("Var", "VarMean"):
            squares, mean = squares | _near(before[0]), True
        elif (is_reduced and exponent == 2) or (both and (is_reduced or kind == "Bmm")):
            squares, mean = squares | (both or _near(before[0])), mean or is_mean
        elif is_reduced and (kind in ("Abs", "LinalgVectorNorm") or kind == "Pow"):
            others |= _near(before[0])
        elif (kind in _ELEMENTWISE or kind in _REDUCTIONS) and len(ahead) < _FAR:
            is_mean = is_mean or kind == "Mean" or (kind in ("Mul", "Div") and len(before) == 1)
            ahead += [(each, is_reduced or kind in _REDUCTIONS, is_mean) for each in before]
    return _Measured(squares, True, mean) if is_root and squares else _Measured(others)


def _ends_in_fused_norm(end: Any, starts: set[Any]) -> bool:
    """Whether the last that a module computes from `starts` is a norm in one node, which shows nothing but its name."""
    for node, kind in _walk(end, _ELEMENTWISE, starts).items() if starts and end is not None else ():
        if (
            "norm" in kind.lower()
            and kind != "LinalgVectorNorm"
            and node not in starts
            and getattr(node, "_saved_training", True)
        ):
            return True
    return False


def _is_attention(node: Any, weights: Tensor) -> bool:
    """Whether the weights, the result of `node`, are a softmax over keys."""
    if node.name().startswith("Exp"):  # of a log_softmax
        node = node.next_functions[0][0]
        if node is None or not node.name().startswith("LogSoftmax"):
            return False
    dim = -1 if node._saved_dim == 2**64 - 1 else node._saved_dim
    is_one_query = weights.ndim == 4 and weights.shape[2] == 1 and dim in (-1, 3)
    if is_one_query or (weights.ndim == 3 and is_map(weights, dim)):
        return _is_of_products(node)
    return is_map(weights, dim)


def _is_of_products(softmax: Any) -> bool:
    """Whether its scores are products of activations, and not those of a router (B, N, experts) with as many experts as tokens,
    which a linear layer gives."""
    nodes, visited = [softmax], set[Any]()
    while nodes and len(visited) < 100:
        node = nodes.pop()
        if node is None or node in visited or node.name().startswith(("MmBackward", "AddmmBackward")):
            continue
        if "bmm" in node.name().lower():
            return True
        visited.add(node)
        nodes += [before for before, _ in node.next_functions]
    return False
