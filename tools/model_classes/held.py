"""One model of one class with norms held fixed, beside norms written out with detached denominators, in float64.

The plain implementation is told nothing by the package. A call of torch's norm functions is written out. A module that has "norm"
in its class's name is written out by the first of a few formulas that gives the module's own output. In layers, what other
modules divide rows by is detached, if it is a Euclidean norm. Three numbers are compared:
the gradient of the score by the embeddings, and the rows of `va.explain` with norms, then with norms and attention held fixed,
which the published rule makes of stored maps of the plain implementation.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tools.model_classes import compare
from tools.model_classes.compare import BOUND, Row, described, score_of
from tools.tiny_models.shrink import HEADS
from tools.tiny_models.stored import SOFTMAX
from vlattn_fast.attach.frozen import Frozen
from vlattn_fast.attach.observer import Observer

EQUAL = 1e-11  # how far a formula may be from a module's output, as a part of its largest number
SEEN_CHANGE = 1e-6  # of the gradient, by constant denominators
ROOTS = (torch.sqrt, torch.rsqrt, torch.norm, torch.linalg.norm, torch.linalg.vector_norm, functional.normalize)
ROOTS += (Tensor.sqrt, Tensor.rsqrt, Tensor.norm)
POWERS = (torch.pow, Tensor.pow, Tensor.__pow__)
KEPT = "; keeps its derivative: "


class Constant(torch.autograd.Function):
    """A tensor whose gradient is zero, so that maps still tell what they were made of."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


class Detached(TorchFunctionMode):
    """A context in which the norms of a model have detached denominators, and with `attention` its maps are constants.

    Attributes:
        norms: how many calls were written out.
        kept: where a root of something with a gradient is taken beside them, by class.
    """

    def __init__(self, model: nn.Module, attention: bool = False) -> None:
        super().__init__()
        self.model, self.attention, self.norms, self.kept = model, attention, 0, dict[str, None]()
        self._stack: list[tuple[nn.Module, int, int]] = []  # and how many norms and roots there were in front of it
        self._layers = {module for path, module in model.named_modules() if any(part.isdigit() for part in path.split("."))}
        self._roots = 0  # of rows, in layers

    def __enter__(self) -> Detached:
        self._handles = []
        for module in self.model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._begin),
                module.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._stack.append((module, self.norms, self._roots))

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        try:
            outputs = output if isinstance(output, tuple) else (output,)
            is_plain = self._stack[-1][1] == self.norms  # it calls no norm of torch
            if is_norm(module) and is_plain and any(isinstance(one, Tensor) and one.requires_grad for one in outputs):
                return self._written(module, [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)], output)
        finally:
            self._stack.pop()
        return None

    def _written(self, module: nn.Module, tensors: list[Tensor], output: Any) -> Tensor | None:
        for formula in formulas(module, tensors) if isinstance(output, Tensor) else ():
            try:
                written = formula()
            except RuntimeError:  # of other sizes
                continue
            if written.shape == output.shape and bool((written - output).abs().max() <= EQUAL * output.abs().max()):
                self.norms += 1
                return written
        if self._stack[-1][2] == self._roots:
            self.kept[type(module).__name__] = None
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WRITTEN:
            self.norms += 1
            return WRITTEN[func](*args, **kwargs)
        if self.attention and func is functional.multi_head_attention_forward:
            return func(Constant.apply(args[0]), Constant.apply(args[1]), *args[2:], **kwargs)
        if self.attention and (func is torch.logsumexp or func in SOFTMAX) and are_scores(args[0]):
            return func(Constant.apply(args[0]), *args[1:], **kwargs)
        inside = self._stack[-1][0] if self._stack else self.model
        if func is functional.normalize and inside in self._layers:
            self._roots += 1
            return args[0] / args[0].norm(dim=kwargs.get("dim", 1), keepdim=True).clamp_min(1e-12).detach()
        result = func(*args, **kwargs)
        is_root = func in ROOTS or (func in POWERS and isinstance(args[1], float) and abs(args[1]) == 0.5)
        if is_root and inside in self._layers and result.shape[-1:] == (1,) and kwargs.get("p", 2) == 2:
            self._roots += 1
            return result.detach()
        if is_root and result.requires_grad and not is_norm(inside):
            self.kept[type(inside).__name__] = None
        return result


def are_scores(tensor: Tensor) -> bool:
    """Whether these are scores (B, H, N, M), or (B * H, N, N), of which H is known; not those of a router (B, N, experts)."""
    return tensor.ndim == 4 or (tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2] and len(tensor) % HEADS == 0)


def is_norm(module: nn.Module) -> bool:
    """Whether a module may write a norm out, by its name."""
    name = type(module).__name__.lower()
    is_named = "norm" in name and "batchnorm" not in name and not type(module).__module__.startswith("torch.nn.")
    return is_named and next(module.children(), None) is None


def formulas(module: nn.Module, tensors: list[Tensor]) -> Iterator[Callable[[], Tensor]]:
    """Norms of the first tensor, which another one may gate, with the module's numbers."""
    x, *gates = tensors
    parameters, numbers = dict(module.named_parameters()), vars(module).values()
    weight, bias = parameters.get("weight", next(iter(parameters.values()), None)), parameters.get("bias")
    sizes = [one for one in numbers if isinstance(one, int) and one > 0]
    epsilons = [*(one for one in numbers if isinstance(one, float)), 1e-5, 1e-6, 0.0]
    has_channels = x.ndim == 4 and weight is not None and x.shape[1] == weight.numel()
    for dim, gate in itertools.product((-1, 1) if has_channels else (-1,), (None, *gates)):
        groups = dict.fromkeys([x.shape[dim], *(size for size in sizes if x.shape[dim] % size == 0)])
        shape = (-1, *(1,) * (x.ndim - 2)) if dim == 1 else (-1,)
        factors = [None] if weight is None else [weight.reshape(shape), 1 + weight.reshape(shape)]
        gated = [None] if gate is None else [functional.silu(gate), gate.sigmoid()]
        choices = itertools.product(groups, factors, (False, True), (True, False), epsilons, gated, ("behind", "front", "first"))
        for group, factor, centred, mean, eps, open_, place in choices:
            yield functools.partial(written_out, x, open_, dim, group, factor, bias, centred, mean, eps, place)
    if weight is not None and bias is not None:
        yield lambda: x * weight + bias  # NoNorm, of MobileBERT


def written_out(
    x: Tensor,
    gate: Tensor | None,
    dim: int,
    group: int,
    factor: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    mean: bool,
    eps: float,
    place: str,
) -> Tensor:
    """(x - mean) / root * factor + bias over groups of `dim`, whose root is detached.

    Args:
        mean: the root is that of the mean of squares, not of their sum.
        place: where the gate multiplies, "front" or "behind"; "first" = the factor does so in front.
    """
    if gate is not None and place == "front":
        x = x * gate
    if factor is not None and place == "first":
        x = x * factor
    rows = x.unflatten(dim, (-1, group))
    axis = dim if dim < 0 else dim + 1
    rows = rows - rows.mean(axis, keepdim=True) if centred else rows
    squares = (rows * rows).mean(axis, keepdim=True) if mean else (rows * rows).sum(axis, keepdim=True)
    y = (rows / ((squares + eps) ** 0.5).detach()).flatten(*(dim - 1, dim) if dim < 0 else (dim, dim + 1))
    y = y * factor if factor is not None and place != "first" else y
    y = y if bias is None else y + bias.reshape(factor.shape if factor is not None else -1)
    return y * gate if gate is not None and place == "behind" else y


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _with(_over_root(input - input.mean(dims, keepdim=True), dims, eps), weight, bias)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _with(_over_root(input, dims, torch.finfo(input.dtype).eps if eps is None else eps), weight, None)


def _group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    rows = input.reshape(len(input), num_groups, -1)
    shape = (-1, *(1,) * (input.ndim - 2))
    y = _over_root(rows - rows.mean(-1, keepdim=True), (-1,), eps).reshape(input.shape)
    return _with(y, *(one if one is None else one.reshape(shape) for one in (weight, bias)))


def _over_root(rows: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return rows / (((rows * rows).mean(dims, keepdim=True) + eps) ** 0.5).detach()


def _with(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).contiguous()  # as torch's functions give it


WRITTEN: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((functional.rms_norm, torch.rms_norm), _rms_norm),
    **dict.fromkeys((functional.group_norm, torch.group_norm), _group_norm),
}


def gradients(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Those of the score by all embeddings, and by inputs that are numbers."""
    inputs = {name: one.clone().requires_grad_() if _is_read(name, one) else one for name, one in inputs.items()}
    leaves = [one for name, one in inputs.items() if _is_read(name, one)]

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output  # positions, and their number
        leaves.append(output.detach().requires_grad_())
        return leaves[-1] * 1  # models may write into it

    handles = [one.register_forward_hook(keep) for one in model.modules() if isinstance(one, nn.Embedding)]
    try:
        score = score_of(model(**inputs), inputs).sum()
    finally:
        for handle in handles:
            handle.remove()
    return [torch.zeros(1) if one is None else one for one in torch.autograd.grad(score, leaves, allow_unused=True)]


def _is_read(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("mask")


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference between gradients, as a part of the largest number of the leaf that they belong to."""
    return max(float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def detached(model: Any, attention: bool) -> Iterator[None]:
    """A context in which each run of the model has detached denominators."""
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with Detached(model, attention):
            return forward(*args, **kwargs)

    model.forward = run
    try:
        yield
    finally:
        del model.forward


def compared(mapping: str, model: nn.Module, eager: nn.Module, inputs: dict[str, Any]) -> Row:
    """The row of a model; `eager` is the same model with eager attention."""
    try:
        plain = gradients(model, inputs)
        with Detached(model) as written:
            expected = gradients(model, inputs)
        if not written.norms:
            return Row("cannot be compared", "it has no norm")
        with Observer(model, [frozen := Frozen()]):
            got = gradients(model, inputs)
    except Exception as error:
        return Row("cannot be compared", described(error))
    said = dict.fromkeys([*frozen.missed, *written.kept])
    kept = KEPT + ", ".join(said) if said else ""
    if distance(plain, expected) < SEEN_CHANGE:
        return Row("cannot be compared", f"constant denominators do not change its gradient{kept}")
    shares = [distance(got, expected)]
    if not shares[0] <= BOUND and written.kept:
        return Row("cannot be compared", f"the plain implementation does not tell whether a norm is in {', '.join(written.kept)}")
    if not shares[0] <= BOUND:
        return Row("wrong", f"gradients differ by {shares[0]:.1e} of their largest value{kept}")
    said_of_rows = []
    for freeze in (("norms",), ("norms", "attention")):
        with detached(eager, "attention" in freeze):
            row = compare.compared(mapping, model, eager, inputs, freeze)
        if row.outcome == "wrong":
            return Row("wrong", f"{' and '.join(freeze)} held fixed: {row.reason}{kept}")
        said_of_rows.append(row.reason if row.outcome == "equal" else row.outcome)
    return Row("equal", f"gradient {shares[0]:.0e}, rows {said_of_rows[0]}, with attention {said_of_rows[1]}{kept}")
