"""Registration of the operators with torch.library under the namespace of `_ops`, and a fast path past torch's dispatcher.

Derivatives, of forward and reverse mode, are those of an autograd.Function in the operator's own kernel for torch's key Autograd:
torch.library.register_autograd has no forward mode (tangents would be zeros in silence), and torch.func.grad does not take the
operators that it makes. Batches of torch.func.vmap: `_batches`.

For an operator written in Python the dispatcher takes longer than a kernel on small tensors: 15 microseconds, 45 if autograd
records the call, 20 in the backward pass. If the dispatcher would only do autograd, the fast path calls the kernel, in the same
autograd.Function if a gradient is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from vlattn_fast._ground.checks import varies
from vlattn_fast._ground.tensors import promised_layouts, without_autocast
from vlattn_fast.backends.inputs import Schema, schema_of
from vlattn_fast.ops._batches import over_batches
from vlattn_fast.ops._ops import NAMESPACE, add_op_namespace_prefix

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # in the kernel hub's folder a C++ library opens the namespace
_SYMBOLIC = "_symbolic"  # suffix of an operator's twin, see `define`
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    float: "float",
    bool: "bool",
    int: "SymInt",
}


class _Derivatives(NamedTuple):
    """Those of an operator, see `differentiable`."""

    backward: Callable[..., Mapping[str, Any]]
    setup_context: Callable[..., None]
    jvp: Callable[..., Any]


_DERIVATIVES: dict[str, _Derivatives] = {}  # by operator


def define(
    name: str, inputs_type: type[Any], returns: str, implementation: Callable[..., Any] | None, fake: Callable[..., Any]
) -> Any:
    """Registers the operator `name(inputs) -> returns` for every device and returns the function that calls it.

    `inputs_type` is the operator's NamedTuple of vlattn_fast.backends.inputs, from which its schema follows. The returned
    function, `implementation` and `fake` take one of it. If both give None for an output, the function returns None, or an empty
    tensor, since torch's dispatcher does not support None. Without an implementation the operator is one that a library of
    torch's stable ABI has registered.

    torch.compile makes a graph for each value of a float argument. So an operator with floats gets a twin with 0-dim tensors
    instead of them, which compiled code calls if a float varies.
    """
    schema = schema_of(inputs_type)
    flat, tensors_of, first_float = schema.flat, schema.tensors, schema.first_float
    types = {argument: _TYPES[kind] for argument, kind in schema.types.items()}
    floats = [argument for argument, kind in types.items() if kind == "float"]
    by_library = implementation is None
    implementation = implementation or _call_of_library(name, schema)
    kernel = _below_autograd(implementation)
    apply = _autograd_function(name, kernel, schema)
    dispatched = _register(name, schema, types, None if by_library else returns, implementation, fake, apply)
    twin: Any = None

    def with_floats(inputs: Any) -> Any:
        return implementation(schema.inputs([float(x) if y in floats else x for y, x in zip(types, flat(inputs), strict=True)]))

    if floats:
        tensors_for_floats = {argument: "Tensor" if kind == "float" else kind for argument, kind in types.items()}
        twin = _register(name + _SYMBOLIC, schema, tensors_for_floats, returns, with_floats, fake, apply)

    def call(inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            pairs = list(zip(types, flat(inputs), strict=True))
            if any([isinstance(x, Tensor) or varies(x) for argument, x in pairs if argument in floats]):
                one = torch.ones((), dtype=torch.float64, device="cpu")  # times it: torch.compile makes a tensor of a product
                return twin(*[one * x if argument in floats else x for argument, x in pairs])
            return dispatched(*flat(inputs))
        if twin is not None and isinstance(first_float(inputs), Tensor):  # the backward pass of the twin
            return twin(*flat(inputs))
        tensors = tensors_of(inputs)
        records = _records(tensors) if _HAS_FAST_PATH else None
        if records is None:
            return dispatched(*flat(inputs))
        if not records:
            return kernel(inputs)
        if _C._dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD:
            return dispatched(*flat(inputs))  # an autograd.Function runs even if autograd is excluded
        return apply(*tensors, inputs, None)

    return call


def _call_of_library(name: str, schema: Schema) -> Callable[..., Any]:
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    return lambda inputs: registered(*schema.flat(inputs))


def _keys(*names: str) -> Any:
    """The set of these dispatch keys."""
    first, *rest = [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in names]
    for keys in rest:
        first = first | keys
    return first


def _records(tensors: Sequence[Tensor | None]) -> bool | None:
    """Returns whether autograd would record an operator on these tensors; None if the dispatcher would do more than call autograd
    and the kernel. It does more for tensors without memory of their own (meta, fake, functorch's, subclasses, negated views), in
    modes (of dispatch, of functions, vmap, tracing, forward mode), and for a profiler, which shows operators by name.
    """
    if _C._has_torch_function(tensors) or _C._autograd._profiler_enabled() or forward_ad._current_level >= 0:
        return None
    if _C._dispatch_tls_local_include_set().raw_repr() & _OTHER_THREAD_KEYS:
        return None
    keys_of, enabled, records = _C._dispatch_keys, torch.is_grad_enabled(), False
    for x in tensors:
        if x is not None:
            if keys_of(x).raw_repr() & _OTHER_TENSOR_KEYS:
                return None
            if enabled and x.requires_grad:
                records = True
    return records


def _below_autograd(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the kernel of the fast path. As in `_register`, autocast is off and no output is a view: autograd tracks none."""

    def kernel(inputs: Any) -> Any:
        try:
            with _C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS):
                return implementation(inputs)
        except Exception as error:
            _note_the_way_out(error, inputs)
            raise

    return kernel


try:
    _ABOVE_KERNELS = _keys("AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView")
    _OTHER_TENSOR_KEYS = ~(_ABOVE_KERNELS | _keys("CPU", "CUDA")).raw_repr()  # all keys but an ordinary tensor's
    _OTHER_THREAD_KEYS = ~_keys("BackendSelect", "ADInplaceOrView").raw_repr()  # all keys but every thread's
    _AUTOGRAD = _keys("AutogradCPU").raw_repr() & ~_keys("CPU").raw_repr()
    _C._dispatch_tls_local_exclude_set().raw_repr()
    _below_autograd(_records)([torch.empty(0)])
    _HAS_FAST_PATH = True
except AttributeError:  # a torch whose private functions have other names
    _HAS_FAST_PATH = False


def _autograd_function(name: str, kernel: Callable[..., Any], schema: Schema) -> Callable[..., Any]:
    """Returns a function that calls the operator in an autograd.Function with its derivatives. It takes the operator's tensors,
    then all inputs as one tuple, which autograd does not unpack, and a function that the dispatcher goes on with; None for the
    kernel."""
    num_tensors = schema.num_tensors
    tensor_names = list(schema.types)[:num_tensors]

    def forward(ctx: Any, *tensors_and_inputs: Any) -> Any:
        *tensors, inputs, below = tensors_and_inputs
        outputs = kernel(inputs) if below is None else below(inputs)
        ctx.set_materialize_grads(False)  # None is zero: not as many zeros as a gradient or a tangent has numbers
        _DERIVATIVES[name].setup_context(ctx, inputs, outputs)
        if below is not None:  # `jvp` may be next, and reads what is saved for it
            ctx.present = [x is not None for x in tensors]
            ctx.save_for_forward(*[x for x in tensors if x is not None], *_flat(outputs))
            ctx.options_of_jvp = schema.flat(inputs)[num_tensors:]
        return outputs

    def backward(ctx: Any, *grads: Any) -> Any:
        gradients = _DERIVATIVES[name].backward(ctx, *grads) if any([grad is not None for grad in grads]) else {}
        needs = ctx.needs_input_grad[:num_tensors]  # a backend may give what stands for None, or what comes with others
        return *[gradients.get(x) if need else None for x, need in zip(tensor_names, needs, strict=True)], None, None

    def jvp(ctx: Any, *tangents: Any) -> Any:
        with _open_level():
            # What is saved are duals of this level, of which a rule takes the primals. Below it are other levels, with their own
            saved = iter([forward_ad.unpack_dual(x).primal if x.is_floating_point() else x for x in ctx.saved_tensors])
            tensors = [next(saved) if present else None for present in ctx.present]
            inputs = schema.inputs((*tensors, *ctx.options_of_jvp))
            return _DERIVATIVES[name].jvp(inputs, dict(zip(tensor_names, tangents[:num_tensors], strict=True)), tuple(saved))

    methods = {"forward": forward, "backward": backward, "jvp": jvp}
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
    # Function.apply, in Python, first looks for functorch's tensors. There are none (`_records`), or only those of one level
    return super(torch.autograd.Function, function).apply


@contextlib.contextmanager
def _open_level() -> Iterator[None]:
    """A context in which torch's Python knows the open level of forward mode: code of torch.compile(backend="eager") opens it in
    C++ only, and a kernel would open a second one."""
    before = forward_ad._current_level
    forward_ad._current_level = max(before, 0)
    try:
        yield
    finally:
        forward_ad._current_level = before


def _flat(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _register(
    name: str,
    schema: Schema,
    types: dict[str, str],
    returns: str | None,
    implementation: Any,
    fake: Any,
    apply: Callable[..., Any],
) -> Any:
    """The registered operator; `types` of the schema by argument. `returns`: None if the operator is there.

    Autocast is off inside: the public calls cast their arguments, and autocast would round the float32 products of a tile. No
    output is a view to autograd, so that a caller may edit every output in place, and none is an input.
    """
    first = list(schema.types.values()).index(Tensor)  # one that is never None

    def kernel(*args: Any) -> Any:
        inputs, like = schema.inputs(args), args[first]
        try:
            with promised_layouts(), without_autocast(like):
                return _without_views(implementation(inputs), like, args)
        except Exception as error:
            _note_the_way_out(error, inputs)
            raise

    if returns is not None:
        text = f"{name}({', '.join(f'{kind} {argument}' for argument, kind in types.items())}) -> {returns}"
        _LIBRARY.define(text, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    dispatched = getattr(getattr(torch.ops, NAMESPACE), name)

    def autograd(keyset: Any, *args: Any) -> Any:
        def below(inputs: Any) -> Any:
            # levels of functorch below this one record and carry tangents, too
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
                return dispatched.default.redispatch(keyset & _C._after_autograd_keyset, *schema.flat(inputs))

        with enable_single_level_autograd_function():
            return apply(*args[: schema.num_tensors], schema.inputs(args), below)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    operator_name = add_op_namespace_prefix(name)
    torch.library.register_fake(operator_name, lambda *args: _without_none(fake(schema.inputs(args)), args[first]), lib=_LIBRARY)
    torch.library.register_vmap(operator_name, over_batches(dispatched, schema), lib=_LIBRARY)
    return dispatched


def _note_the_way_out(error: Exception, inputs: Any) -> None:
    """Adds to an error from a backend how to run the call without that backend's kernels."""
    backend = getattr(inputs, "backend", "streaming")
    if backend not in ("streaming", "reference"):
        error.add_note(
            f"The backend {backend!r} failed. backend='streaming', or VLATTN_BACKEND=streaming in the environment for all calls, "
            "runs in plain PyTorch on any device"
        )


def _without_none(outputs: Any, like: Tensor) -> Any:
    """Returns empty tensors for None."""
    if isinstance(outputs, Tensor):
        return outputs
    return like.new_empty(0) if outputs is None else tuple([_without_none(x, like) for x in outputs])


def _without_views(outputs: Any, like: Tensor, args: tuple[Any, ...]) -> Any:
    """Returns the same memory, without copies, in tensors that are not views. An empty one stands for None, a copy for an
    input."""
    if outputs is None:
        return like.new_empty(0)
    if not isinstance(outputs, Tensor):
        return tuple([_without_views(x, like, args) for x in outputs])
    if any([outputs is x for x in args]):
        return outputs.clone()
    if outputs._base is None:
        return outputs
    layout = outputs.storage_offset(), outputs.shape, outputs.stride()
    return outputs.new_empty(0).set_(outputs.untyped_storage(), *layout)


def differentiable(
    name: str,
    backward: Callable[..., Mapping[str, Any]],
    setup_context: Callable[..., None],
    jvp: Callable[..., Any] | None = None,
) -> None:
    """Gives an operator, with its twin, its derivatives.

    Reverse mode: `setup_context(ctx, inputs, outputs)` saves for `backward(ctx, *grads)`, which returns gradients by the names of
    the operator's arguments. Arguments without a name there have none, and a gradient that is not needed is left out. Forward
    mode: `jvp(inputs, tangents, outputs)` returns the tangents of the outputs; tangents go by the names of the arguments. A
    gradient or a tangent that is None stands for zero; at least one gradient, and at least one tangent, is a tensor.
    """
    _DERIVATIVES[name] = _Derivatives(backward, setup_context, _no_forward_mode(name) if jvp is None else jvp)


def _no_forward_mode(name: str) -> Callable[..., Any]:
    def jvp(inputs: Any, tangents: Any, outputs: Any) -> Any:
        raise RuntimeError(f"{add_op_namespace_prefix(name)} has no forward-mode derivative; torch.func.grad and backward() work")

    return jvp


class Saved:
    """The tensors that an operator saves for its backward operator: the arguments that both have, and the named `outputs`.
    `grads` are those of the backward operator that come with its call.

    Tensors are saved with ctx.save_for_backward. Names are looked up here once, since a backward pass waits for Python.
    """

    def __init__(self, forward_type: Any, backward_type: Any, *, outputs: Sequence[str] = (), grads: Sequence[str]) -> None:
        schema, of_backward = schema_of(forward_type), schema_of(backward_type)
        arguments, num_tensors = list(schema.types), schema.num_tensors
        self._arguments = arguments
        tensors, options = (
            [name for name in some if name in of_backward.types] for some in (arguments[:num_tensors], arguments[num_tensors:])
        )
        self._flat, self._backward_inputs = schema.flat, of_backward.inputs
        self._tensors_of, self._options_of = _picked(arguments, tensors), _picked(arguments, options)
        self._in_order = _picked([*grads, *tensors, *outputs, *options], list(of_backward.types))

    def save(self, ctx: Any, inputs: Any, *outputs: Tensor | None) -> None:
        """Saves the tensors, in a setup_context."""
        arguments = self._flat(inputs)
        ctx.save_for_backward(*self._tensors_of(arguments), *outputs)
        ctx.options = self._options_of(arguments)

    def inputs(self, ctx: Any, *grads: Any) -> Any:
        """Returns the inputs of the backward operator."""
        return self._backward_inputs(self._in_order((*grads, *ctx.saved_tensors, *ctx.options)))

    def needed(self, ctx: Any) -> set[str]:
        """Returns the tensors that need a gradient."""
        return set(itertools.compress(self._arguments, ctx.needs_input_grad))


def _picked(fields: Sequence[str], some: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Returns a function that takes the values of `fields` and returns those of `some`."""
    indices = [fields.index(field) for field in some]
    if len(indices) < 2:  # for one index itemgetter returns the item, and not a tuple
        return lambda values: tuple([values[i] for i in indices])
    return operator.itemgetter(*indices)


def not_differentiable(name: str, why: str) -> None:
    """Makes derivatives of the operator an error that says why; torch would return a silent or obscure result."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{add_op_namespace_prefix(name)}: {why}")

    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        pass

    differentiable(name, backward, setup_context, backward)


def once_differentiable(name: str) -> None:
    """Makes second derivatives an error, for a backward operator."""
    stem = name.removesuffix("_backward")
    not_differentiable(name, f"{stem} has no second derivative; it is once differentiable (create_graph=True asked for more)")
