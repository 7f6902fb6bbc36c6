"""Registration of the operators with torch.library under the namespace `vlattn`, and a fast path past torch's dispatcher.

For an operator written in Python the dispatcher takes longer than a kernel on small tensors: 15 microseconds, 45 where autograd
records the call, 20 in the backward pass. Where the dispatcher would only do autograd, the fast path calls the kernel, in an
autograd.Function if a gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor

from vlattn_fast._ground.checks import varies
from vlattn_fast._ground.tensors import promised_layouts, without_autocast

_LIBRARY = torch.library.Library("vlattn", "DEF")
_SYMBOLIC = "_symbolic"  # suffix of an operator's twin, see `define`
_HAS_TWIN: set[str] = set()
_FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}  # of each operator: backward and setup_context


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `name(tensors, options) -> outputs`, the tensors first, for every device and returns the function that calls it.

    torch.compile makes a graph for each value of a float argument. So an operator with floats gets a twin with 0-dim tensors in
    their places, which compiled code calls where a float varies.
    """
    name = schema.split("(", 1)[0]
    operator = _register(schema, implementation, fake)
    arguments, returns = operator.default._schema.arguments, operator.default._schema.returns
    floats = [i for i, x in enumerate(arguments) if str(x.type) == "float"]
    num_tensors = sum("Tensor" in str(x.type) for x in arguments)
    takes_lists, returns_lists = (any("List" in str(x.type) for x in each) for each in (arguments, returns))
    kernel = _below_autograd(implementation)
    recorded = _autograd_function(name, kernel, num_tensors, takes_lists)
    twin: Any = None
    if floats:

        def with_floats(*args: Any) -> Any:
            return implementation(*(float(x) if i in floats else x for i, x in enumerate(args)))

        _HAS_TWIN.add(name)
        twin = _register(schema.replace(name, name + _SYMBOLIC, 1).replace("float ", "Tensor "), with_floats, fake)

    def call(*args: Any) -> Any:
        if twin is not None and isinstance(args[floats[0]], Tensor):  # the backward pass of the twin
            return twin(*args)
        if torch.compiler.is_compiling():
            if any([varies(args[i]) for i in floats]):
                one = torch.ones((), dtype=torch.float64, device="cpu")  # times it: torch.compile makes a tensor of a product
                return twin(*[one * x if i in floats else x for i, x in enumerate(args)])
            return operator(*args)
        tensors = _flat(args[:num_tensors]) if takes_lists else args[:num_tensors]
        if not (_HAS_FAST_PATH and _needs_only_autograd(tensors)):
            return operator(*args)
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*tensors)):
            return kernel(*args)
        if returns_lists or _C._dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD:
            return operator(*args)  # an autograd.Function returns no lists, and runs also where autograd is excluded
        return recorded(*tensors, args)

    return call


def _keys(*names: str) -> Any:
    """The set of these dispatch keys."""
    first, *others = [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in names]
    for keys in others:
        first = first | keys
    return first


def _needs_only_autograd(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would only call autograd and the kernel for an operator on these tensors. The dispatcher does more
    for tensors without memory of their own (meta, fake, functorch's, subclasses, negated views), in modes (of dispatch, of
    functions, vmap, tracing), and for a profiler, which shows operators by name.
    """
    if _C._has_torch_function(tensors) or _C._autograd._profiler_enabled():
        return False
    if _C._dispatch_tls_local_include_set().raw_repr() & _OTHER_THREAD_KEYS:
        return False
    keys_of = _C._dispatch_keys
    for x in tensors:
        if x is not None and keys_of(x).raw_repr() & _OTHER_TENSOR_KEYS:
            return False
    return True


def _below_autograd(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of the fast path. As in `_register`, autocast is off and no output is a view, since autograd tracks none."""

    def kernel(*args: Any) -> Any:
        with _C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS):
            return implementation(*args)

    return kernel


try:
    _ABOVE_KERNELS = _keys("AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView")
    _OTHER_TENSOR_KEYS = ~(_ABOVE_KERNELS | _keys("CPU", "CUDA")).raw_repr()  # all keys but an ordinary tensor's
    _OTHER_THREAD_KEYS = ~_keys("BackendSelect", "ADInplaceOrView").raw_repr()  # all keys but every thread's
    _AUTOGRAD = _keys("AutogradCPU").raw_repr() & ~_keys("CPU").raw_repr()
    _C._any_requires_grad(torch.empty(0))
    _C._dispatch_tls_local_exclude_set().raw_repr()
    _below_autograd(_needs_only_autograd)([torch.empty(0)])
    _HAS_FAST_PATH = True
except AttributeError:  # a torch whose private functions have other names
    _HAS_FAST_PATH = False


def _autograd_function(name: str, kernel: Callable[..., Any], num_tensors: int, takes_lists: bool) -> Callable[..., Any]:
    """Calls the kernel in an autograd.Function with the operator's backward formula. The function's inputs are the operator's
    tensors, lists unpacked, and then all arguments as one tuple, which autograd ignores."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        outputs = kernel(*inputs[-1])
        _FORMULAS[name][1](ctx, inputs[-1], outputs)
        return outputs

    def backward(ctx: Any, *grads: Any) -> Any:
        of_tensors = _FORMULAS[name][0](ctx, *grads)[:num_tensors]
        return *(_flat(of_tensors) if takes_lists else of_tensors), None

    function: Any = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    # Function.apply, in Python, first looks for functorch's tensors; _needs_only_autograd has ruled them out
    return super(torch.autograd.Function, function).apply


def _flat(args: Sequence[Any]) -> list[Any]:
    """The arguments with lists unpacked."""
    return [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The registered operator.

    Autocast is off inside: the public calls cast their arguments, and autocast would round the float32 products of a tile. No
    output is a view to autograd, so that a caller may edit every output in place.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    operator = getattr(torch.ops.vlattn, name)
    types = [str(x.type) for x in operator.default._schema.arguments]
    first = next(i for i, x in enumerate(types) if x in ("Tensor", "List[Tensor]"))  # an argument that is never None
    is_list = types[first] == "List[Tensor]"

    def kernel(*args: Any) -> Any:
        with promised_layouts(), without_autocast(args[first][0] if is_list else args[first]):
            return _without_views(implementation(*args))

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlattn::{name}", fake, lib=_LIBRARY)
    return operator


def _without_views(outputs: Any) -> Any:
    """The same memory, without copies, in tensors that are no views."""
    if not isinstance(outputs, Tensor):
        return type(outputs)([_without_views(x) for x in outputs])
    if outputs._base is None:
        return outputs
    place = outputs.storage_offset(), outputs.shape, outputs.stride()
    return outputs.new_empty(0).set_(outputs.untyped_storage(), *place)


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Gives the operator and its twin their backward formula."""
    _FORMULAS[name] = backward, setup_context
    for each in (name, name + _SYMBOLIC) if name in _HAS_TWIN else (name,):
        torch.library.register_autograd(f"vlattn::{each}", backward, setup_context=setup_context, lib=_LIBRARY)


def not_differentiable(name: str, why: str) -> None:
    """Makes a backward pass through the operator an error that says why; torch's own would be silent or jargon."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"vlattn::{name}: {why}")

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    differentiable(name, backward, setup_context)


def once_differentiable(name: str) -> None:
    """Refuses second derivatives, for a backward operator."""
    stem = name.removesuffix("_backward")
    not_differentiable(name, f"{stem} has no second derivative; it is once differentiable (create_graph=True asked for more)")
