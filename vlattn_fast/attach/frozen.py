"""Constants of the backward pass: denominators of norms, attention weights. The forward pass stays unchanged.

A norm is y = (x - mean(x)) / d(x) * weight + bias, or the same without the mean; d(x) is the norm of the numerator. A
gradient that comes back through it is orthogonal to x, so the contributions of tokens to x cancel. With a constant d, y is linear
in x (Ali et al., ICML 2022; studies of circuits linearise models so).

torch's own functions are replaced by one with this gradient. A module that writes its norm out is found by what it computes: a
copy of it runs on test inputs, and on a multiple of them. If the output is the same, it divides by a norm of its input,
and the roots that it takes become constants. The gradient shows whether that is all: a linear function has <gradient, x> =
<cotangent, y - bias>, a norm has <gradient, x> = 0.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast._ground.attachments import add_hook, add_pre_hook
from vlattn_fast.attach.events import SCORE_ATTENTION, SOFTMAX, first_argument, is_map
from vlattn_fast.attach.session import Steps, Stepwise, as_mode, named
from vlattn_fast.ops._sinks import with_sink

_ROOTS: tuple[Any, ...] = (
    *(torch.sqrt, torch.rsqrt, torch.std, torch.norm, torch.linalg.norm, torch.linalg.vector_norm),
    *(Tensor.sqrt, Tensor.rsqrt, Tensor.std, Tensor.norm),
)
_POWERS = (torch.pow, Tensor.pow, Tensor.__pow__)
_LARGER = 64.0  # an input so many times as large has the same normalised output, except for the eps in the denominator
_EQUAL = 0.02  # relative to the largest number: below, outputs are the same, and a gradient is as expected

_NONE, _HELD, _MISSED = "no norm", "held fixed", "not held fixed"
_kinds: weakref.WeakKeyDictionary[type[nn.Module], str] = weakref.WeakKeyDictionary()


class Frozen(Stepwise, TorchFunctionMode):
    """A context in which the backward pass of `model` treats some values as constants.

    Args:
        model: the model; other models that run meanwhile in this thread have their torch functions replaced, too.
        norms: the denominators of norms are constants.
        attention: so are attention weights. A run that computes attention itself calls `constant` for queries and keys.
        trains: the model trains on the same graph: values are constants only while `holds` is set.

    Attributes:
        differentiable: the gradients with these constants are differentiated themselves, if the model trains.
        missed: the modules, named, that divide by a norm of their input which keeps its derivative.
    """

    def __init__(self, model: nn.Module, norms: bool = True, attention: bool = False, trains: bool = False) -> None:
        super().__init__()
        self.norms, self.attention, self.trains, self.holds = norms, attention, trains, not trains
        self.differentiable = False
        self._thread, self._within = threading.get_ident(), 0
        modules = model.named_modules() if norms else ()
        written = [(path, module, _kind(module)) for path, module in modules if _may_be_written(module)]
        self._written = [module for _, module, kind in written if kind == _HELD]
        self.missed = [named(path, module) for path, module, kind in written if kind == _MISSED]

    def _steps(self) -> Steps:
        if not (self.norms or self.attention):
            return
        yield from as_mode(self)
        for module in self._written:
            yield add_pre_hook(module, lambda *_: self._step(1))
            yield add_hook(module, lambda *_: self._step(-1), always_call=True)

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
        return self._switched(tensor, None, None) if self.trains else tensor.detach()

    def _switched(self, plain: Tensor, x: Tensor | None, norm: _Norm | None) -> Tensor:
        """See `_Switch`. torch.func would take an argument with `__torch_function__` for a tensor."""
        switched: Tensor = _Switch.apply(plain, lambda: self, x, norm)
        return switched

    def _step(self, into: int) -> None:
        if threading.get_ident() == self._thread:
            self._within += into

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.followed(func, args, kwargs or {}, roots=self._within > 0)

    def followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], roots: bool) -> Any:
        """The result of a function of torch: a norm's with the gradient of a linear function, a root's as a constant."""
        if self.norms and func in _NORMS:
            return _NORMS[func](self, func, *args, **kwargs)
        if self.attention and func in (functional.scaled_dot_product_attention, SCORE_ATTENTION):
            return self._attention(func, *args, **kwargs)
        if self.attention and func is with_sink:
            out, lse, logit = args  # the log-sum-exp has the part of a score that only a sink sees
            return func(out, self.constant(lse), self.constant(logit))
        if roots and func is functional.normalize:
            return _normalize(self.constant, *args, **kwargs)
        result = func(*args, **kwargs)
        is_constant = roots and (
            func in _ROOTS or (func in _POWERS and len(args) > 1 and isinstance(args[1], float) and abs(args[1]) == 0.5)
        )
        if self.attention and func in SOFTMAX:
            scores = first_argument(args, kwargs)
            is_constant = is_map(scores, args[1] if len(args) > 1 else kwargs.get("dim"))
            is_constant = is_constant and (scores.ndim == 4 or _is_of_products(scores))
        return self.constant(result) if is_constant else result

    def _attention(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        """The call with everything but the values constant: a mask may be computed from tokens."""
        rest = tuple(map(self._constant, rest))
        options = {name: self._constant(option) for name, option in options.items()}
        return func(self.constant(query), self.constant(key), value, *rest, **options)

    def _constant(self, option: Any) -> Any:
        return self.constant(option) if isinstance(option, Tensor) and option.requires_grad else option

    def linear(self, func: Any, args: tuple[Any, ...], x: Tensor, norm: _Norm) -> Any:
        """func(*args), a norm of x, whose backward pass is that of a linear function."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return func(*args)
        if not self.trains:
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


def _is_of_products(scores: Tensor) -> bool:
    """Whether scores are products of activations, and not those of a router (B, N, experts) with as many experts as tokens, which
    a linear layer gives."""
    nodes, visited = [scores.grad_fn], set[Any]()
    while nodes and len(visited) < 100:
        node = nodes.pop()
        if node is None or node in visited or node.name().startswith(("MmBackward", "AddmmBackward")):
            continue
        if "bmm" in node.name().lower():
            return True
        visited.add(node)
        nodes += [before for before, _ in node.next_functions]
    return False


_NORMS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((functional.rms_norm, torch.rms_norm), _rms_norm),
    **dict.fromkeys((functional.group_norm, torch.group_norm), _group_norm),
}


# --- norms that a module writes out ---


def _may_be_written(module: nn.Module) -> bool:
    """Whether a module may write a norm out: it has no parts, and no parameters but vectors."""
    is_torchs = type(module).__module__.startswith("torch.nn.modules.")
    return not is_torchs and next(module.children(), None) is None and all(x.ndim < 2 for x in module.parameters())


def _reduces(kind: type[nn.Module]) -> bool:
    """Whether the code of a class, or its name, mentions a norm or a reduction. Other modules are never tried."""
    bases = [one for one in kind.__mro__ if one is not nn.Module and issubclass(one, nn.Module)]
    codes = [one.__code__ for base in bases for one in vars(base).values() if inspect.isfunction(one)]
    code_names = " ".join([*(base.__name__ for base in bases), *(name for code in codes for name in code.co_names)]).lower()
    return any(name in code_names for name in ("norm", "std", "var", "mean", "sum", "max", "dot"))


def _kind(module: nn.Module) -> str:
    kind = _kinds.get(type(module))
    if kind is None:
        with torch.random.fork_rng(devices=[]):  # a module may draw numbers
            tried = [_kind_of(module, x) for x in _numbers(module)] if _reduces(type(module)) else []
        kind = _kinds[type(module)] = next((each for each in tried if each != _NONE), _NONE)
    return kind


def _numbers(module: nn.Module) -> Iterator[Tensor]:
    """Inputs that a norm of the module's size may take, with features last or second."""
    size = max((x.numel() for x in module.parameters()), default=0)
    size = size if size > 1 else 12
    numbers = torch.sin(torch.arange(1.0, 6 * size + 1).square())
    yield numbers.reshape(2, 3, size)
    yield numbers[: 4 * size].reshape(1, size, 2, 2)


def _alike(module: nn.Module) -> nn.Module:
    """A copy of a module, with test numbers as parameters, since those of a model may be on another device. Its code
    changes nothing of the module."""
    made = copy.copy(module)
    parts = {name: x for name, x in vars(module).items() if name[0] != "_"}
    copies: dict[str, Any] = {name: copy.deepcopy(x) for name, x in parts.items() if isinstance(x, (list, dict, set))}
    copies |= {name: x.detach().clone() for name, x in parts.items() if isinstance(x, Tensor)}
    buffers = {name: None if x is None else x.detach().to("cpu", copy=True) for name, x in module._buffers.items()}
    vectors = {
        n: None if p is None else 1 + torch.cos(torch.arange(1.0, p.numel() + 1)) / 2 for n, p in module._parameters.items()
    }
    weights = {name: None if x is None else nn.Parameter(x, requires_grad=False) for name, x in vectors.items()}
    vars(made).update(copies, training=False, _buffers=buffers, _parameters=weights)
    return made


def _kind_of(module: nn.Module, x: Tensor) -> str:
    """The kind of a module, by a copy of it that runs on `x`."""
    try:
        alike = _alike(module)
    except Exception:  # as of tensors without storage
        return _NONE
    for gates in ((), (torch.ones_like(x),)):  # some take a gate, and have none by default

        def run(numbers: Tensor, gates: tuple[Tensor, ...] = gates) -> Tensor:
            output: Tensor = type(module).forward(alike, numbers, *gates)
            return output

        try:
            with torch.no_grad():
                output, larger, bias, unlike = run(x), run(x * _LARGER), run(torch.zeros_like(x)), run(x.roll(1, -1).square())
            bias = bias.nan_to_num(0.0)  # of a norm without eps
            largest = (output - bias).abs().max()
            if output.shape != x.shape or not bool((larger - output).abs().max() < _EQUAL * largest):
                continue
            if bool((unlike - output).abs().max() < _EQUAL * largest):
                continue
            return _HELD if _is_linear(run, x, (output - bias).detach()) else _MISSED
        except Exception:  # a module of another kind takes other arguments, or none
            continue
    return _NONE


def _is_linear(run: Callable[[Tensor], Tensor], x: Tensor, linear: Tensor) -> bool:
    """Whether the module has the gradient of a linear function if its roots are constants."""
    x = x.clone().requires_grad_()
    with torch.enable_grad(), AllRoots(nn.Module()):
        output = run(x)
    (grad,) = torch.autograd.grad(output, x, linear)
    expected = linear.square().sum()
    return bool(((grad * x).sum() - expected).abs() < _EQUAL * expected)


class AllRoots(Frozen):
    """Roots are constants wherever they are taken."""

    def followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], roots: bool = True) -> Any:
        return super().followed(func, args, kwargs, roots=True)


def _normalize(
    constant: Callable[[Tensor], Tensor], input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    return input / constant(input.norm(p, dim, keepdim=True).clamp_min(eps)).expand_as(input)
