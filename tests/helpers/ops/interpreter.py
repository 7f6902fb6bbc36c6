"""Triton's interpreter at less than half its time, which goes to types, shapes and its own functions rather than to numbers; and
with products that are the same on every processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor


def make_faster(patch: pytest.MonkeyPatch) -> None:
    """The same results, but for products. Types, and what they say of tensors, are made once a launch and then shared."""
    from triton.runtime import interpreter

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):  # that of Triton 3.6 alone keeps NaN
        patch.setattr(interpreter.InterpreterBuilder, name, _binary(function))
    if hasattr(interpreter, "_LangPatchScope"):  # not in another version of Triton
        _share(patch, interpreter, _patch_once_a_launch(patch, interpreter))


def _dot(_: Any, a: Any, b: Any, d: Any, *_precision: Any) -> Any:
    """a @ b + d, the product rounded once. A kernel computes a logit in two passes by two shapes of tiles: the GPU finds the same
    bits, numpy's float32 finds them on some processors."""
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
    return type(d)(product + d.data, d.dtype.scalar)


def _binary(function: Any) -> Any:
    return lambda builder, one, two: builder.binary_op(one, two, function)


def _patch_once_a_launch(patch: pytest.MonkeyPatch, interpreter: Any) -> list[Any]:
    """The interpreter puts its own functions into triton.language at each launch, and looks through it again at each call of a
    device function. Here it does so once a launch for each module that kernels use. What the list holds is cleared at its end."""
    patch_lang, restore, modules = interpreter._patch_lang, interpreter._LangPatchScope.restore, {}
    done: set[frozenset[str]] = set()
    of_launch: list[Any] = [done]

    def once(function: Any) -> Any:
        if function not in modules:
            names = [x.__name__ for x in function.__globals__.values() if isinstance(x, ModuleType)]
            modules[function] = frozenset(name for name in names if name in ("triton.language", "triton.language.core"))
        if modules[function] in done:
            return None
        scope = patch_lang(function)
        done.add(modules[function])
        return scope

    def end(scope: Any) -> None:
        for one in of_launch:
            one.clear()
        restore(scope)

    patch.setattr(interpreter, "_patch_lang", once)
    patch.setattr(interpreter._LangPatchScope, "restore", end)  # at the end of a launch
    return of_launch


def _share(patch: pytest.MonkeyPatch, interpreter: Any, of_launch: list[Any]) -> None:  # noqa: C901
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    block_type, tensor, constexpr = core.block_type, core.tensor, core.constexpr
    make_block_type, make_tensor, np_dtype = block_type.__init__, tensor.__init__, interpreter._get_np_dtype
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}
    tensors: dict[int, dict[str, Any]] = {}
    joined: dict[Any, Any] = {}
    dtypes: dict[str, Any] = {}
    of_launch += [types, shapes, tensors, joined]
    operands: list[bool] = []
    computed: dict[Any, tuple[Any, Any]] = {}
    plain = {tensor, core.dtype, block_type, core.pointer_type, int, float, bool, str, type(None)}
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([x.value if x.__class__ is constexpr else x for x in shape])
        key = id(element_ty), sizes
        if key not in types:
            make_block_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        block = type.__class__ is block_type
        key = id(type.shape) if block else 0
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = {"numel": self.numel, "shape": self.shape, "type": type}  # with the type its shape stays alive
        self.__dict__.update(tensors[key])
        self.handle, self.type, self.dtype = handle, type, type.element_ty if block else type

    def takes(one: Any, number: Any, options: tuple[bool, ...]) -> bool:
        """Whether a number of no higher kind becomes one of the tensor's type."""
        kind, name = number.__class__, one.dtype.name
        if kind is int and name in ("int32", "int64"):
            return -(2**31) <= number < 2**31
        return kind in (int, float) and (name in ("fp32", "fp64") or name in ("bf16", "fp16") and len(options) < 3)

    def check_operands(self: Any, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
        """What becomes of two tensors is remembered by their types."""
        left, right = lhs.__class__, rhs.__class__
        key = (lhs.dtype.name, rhs.dtype.name, options) if left is right is tensor and not named else None
        if key in computed:
            one, two = computed[key]
            lhs = lhs if lhs.dtype.name == one.name else self.cast(lhs, one)
            return join_operands(self, lhs, rhs if rhs.dtype.name == two.name else self.cast(rhs, two))
        if left is tensor and not named and takes(lhs, rhs, options):
            return join_operands(self, lhs, self.scalar_constant(rhs, lhs.dtype))
        if right is tensor and not named and takes(rhs, lhs, options):
            return join_operands(self, self.scalar_constant(lhs, rhs.dtype), rhs)
        operands.append(True)
        try:
            made = check(self, lhs, rhs, *options, **named)
        finally:
            operands.pop()
        if key is not None:
            computed[key] = made[0].dtype, made[1].dtype
        return made

    def join(self: Any, lhs: Any, rhs: Any) -> Any:
        return join_operands(self, lhs, rhs) if operands else broadcast(self, lhs, rhs)

    def join_operands(self: Any, lhs: Any, rhs: Any) -> Any:
        """Operands keep their numbers, which NumPy broadcasts, and take the type."""
        one, two = lhs.type, rhs.type
        left = one.shape if one.__class__ is block_type else None
        right = two.shape if two.__class__ is block_type else None
        if left is right:
            return lhs, rhs
        key = id(left), id(right)
        if key not in joined:
            joined[key] = broadcast(self, lhs, rhs)[0].type.shape
        shape = joined[key]
        lhs = lhs if left is shape else tensor(lhs.handle, block_type(lhs.dtype, shape))
        return lhs, rhs if right is shape else tensor(rhs.handle, block_type(rhs.dtype, shape))

    def np_dtype_of(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = np_dtype(dtype)
        return dtypes[name]

    def unwrap_sooner(o: Any) -> Any:
        return o if o.__class__ in plain else unwrap(o)

    def equals(self: Any, another: Any) -> Any:
        return self is another or equal(self, another)

    def set_function(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*args: Any, _semantic: Any = None, **options: Any) -> Any:
            return function(*args, **options, _semantic=semantic)

        scope.set_attr(owner, name, call)

    patch.setattr(block_type, "__init__", init_block_type)
    patch.setattr(tensor, "__init__", init_tensor)
    patch.setattr(TritonSemantic, "binary_op_type_checking_impl", check_operands)
    patch.setattr(TritonSemantic, "broadcast_impl_value", join)
    patch.setattr(core, "_unwrap_if_constexpr", unwrap_sooner)
    patch.setattr(core.dtype, "__eq__", equals)
    patch.setattr(interpreter, "_get_np_dtype", np_dtype_of)
    patch.setattr(interpreter, "_patch_attr", set_function)


@contextmanager
def reads_outside(room: Tensor, *inside: Tensor) -> Iterator[list[int]]:
    """The offsets in bytes of what kernels read in a contiguous room outside of the tensors that lie inside it.

    It stays empty where kernels are compiled; the emulator of compiled kernels reports reads outside of all tensors.
    """
    from triton.runtime import interpreter

    load, outside = interpreter.InterpreterBuilder.create_masked_load, list[int]()

    def noted(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        read = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        wrong = _within(read, room) & ~np.any([_within(read, x) for x in inside], axis=0)
        outside.extend((read[wrong] - room.data_ptr()).tolist())
        return load(builder, pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", noted)
        yield outside


def _within(addresses: Any, x: Tensor) -> Any:
    return (addresses >= x.data_ptr()) & (addresses < x.data_ptr() + x.nbytes)
