"""A plug-in of pytest: torch's own products on the CPU come out in other bits, as another processor may round them.

`-p tests.helpers.bits`, as `make test-all ARGS=bits` asks for it. In a result of
`PRODUCTS`, forward and backward, each row is moved up or down by an ulp, or left, by the row's place, the result's shape and
SEED: equal rows differ, and so does a batch from its samples. A number that is exact is the same on every processor, and stays.
No test may rest on the others.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

SEED = 52
_SHARED = ("mm", "addmm", "bmm", "baddbmm", "addmv")  # each of which can also write into a tensor of the caller
PRODUCTS = (*_SHARED, *(f"{name}.out" for name in _SHARED), "addmm_", "baddbmm_", "addmv_", "convolution", "convolution_backward")
_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
_FINE, _SMALL = 2.0**8, 2.0**12  # sums of thousands of products of multiples of 1 / _FINE below _SMALL are exact in float64
_SKIP = eval_frame._FrameAction.SKIP  # torch.compile looks into no function that a product runs
_inside = threading.local()  # a product that computes another one moves its result once


@functools.lru_cache(maxsize=1024)
def steps(shape: torch.Size) -> Tensor:
    """-1, 0 or 1 for each row of a result, as (..., 1); for each number of a vector."""
    rows = tuple(shape[:-1]) if len(shape) > 1 else tuple(shape)
    drawn_of = np.random.default_rng([SEED, *shape])
    return torch.from_numpy(drawn_of.integers(-1, 2, rows)).view(*rows, *([1] if len(shape) > 1 else []))


def moved(out: Tensor, wide: Tensor | None) -> Tensor:
    """`out` with its rows an ulp away, but for what is exact by `wide` in float64, zero or not finite. In place.

    In 16 bits the sums of all processors are rounded once: the exact number lies between `out` and what it becomes.
    """
    bits = out.view(_INTEGERS[out.dtype])
    near = (bits + steps(out.shape).to(bits.dtype)).view(out.dtype)
    moves = out.isfinite() & near.isfinite() & (out != 0)
    if wide is not None:
        moves &= out.double() != wide
    if wide is not None and out.itemsize == 2:
        moves &= (near.double() - wide).abs() < (near.double() - out.double()).abs()
    return out.copy_(near.where(moves, out))


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _exact_in_float64(args: Sequence[Any]) -> bool:
    """Whether all numbers have so few digits that float64 has the sums of their products exactly."""
    scaled = [value * _FINE for value in args if isinstance(value, Tensor)]
    return all(bool(((value == value.round()) & (value.abs() < _SMALL * _FINE)).all()) for value in scaled)


def _other_bits(name: str) -> Callable[..., Any]:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if getattr(_inside, "product", False) or tensors[0].dtype not in _INTEGERS:
            return kernel.call_boxed(keys, *args, **kwargs)
        _inside.product = True
        try:
            with torch._C.DisableTorchFunction():  # whoever watches torch's functions sees the product alone
                return _computed(kernel, keys, args, kwargs)
        finally:
            _inside.product = False

    eval_frame.set_code_exec_strategy(product.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))
    return product


def _computed(kernel: Any, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    in_float64 = next(value for value in args if isinstance(value, Tensor)).dtype == torch.float64
    if in_float64 and _exact_in_float64(args):
        return kernel.call_boxed(keys, *args, **kwargs)
    wide = None
    if not in_float64:  # before the product, which may write over what it reads
        named = {key: _in_float64(value) for key, value in kwargs.items()}
        wide = kernel.call_boxed(keys, *map(_in_float64, args), **named)
    results = kernel.call_boxed(keys, *args, **kwargs)
    several = isinstance(results, (tuple, list))
    for number, result in enumerate(results if several else (results,)):
        if result is None or not result.numel() or (several and result.ndim == 1):  # the gradient of a bias is a sum
            continue
        moved(result, wide[number] if several and wide is not None else wide)
    return results


@contextlib.contextmanager
def other_bits() -> Iterator[None]:
    """Within it the products of torch come out in other bits."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PRODUCTS:
            library.impl(name, _other_bits(name), "CPU", with_keyset=True, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest takes this file for a plug-in; an import, as of the doctests, changes nothing."""
    whole_run = contextlib.ExitStack()
    whole_run.enter_context(other_bits())
    config.add_cleanup(whole_run.close)
