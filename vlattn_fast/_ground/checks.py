"""The checks of the public calls. Each message names the argument and says "must be ...; got ...".

Every call pays for its checks, so a check gets no property twice and formats text only when it raises.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad
from torch.nn import Parameter

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, Parameter)


def describe(x: Any) -> str:
    """Returns a value as an error message shows it: tensors by dtype, shape and device."""
    if isinstance(x, Tensor):
        if foreign := _foreign(x):
            return foreign
        return f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r:.80}"


def check_tensor(name: str, x: Any, *, rank: int | None = None, shape: str | tuple[int, ...] = "") -> None:
    """Raises unless `x` is a dense tensor of `rank` dimensions. The message shows `shape`: words, or the sizes of a parameter
    that may also have a leading (H, ...)."""
    if type(x) not in _PLAIN or x.is_nested or x.layout is not torch.strided:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor{_legend(shape)}; got {describe(x)}")
        if _foreign(x):
            raise TypeError(f"{name} must be a dense torch.Tensor{_legend(shape)}; got {describe(x)}")
    if rank is not None and x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions{_legend(shape)}; got {describe(x)}")


def _legend(shape: str | tuple[int, ...]) -> str:
    if isinstance(shape, tuple):
        return f" of shape {shape} or (H, ...)"
    return f" {shape}" if shape else ""


def _foreign(x: Tensor) -> str:
    """Returns the kind of a tensor whose elements are not in one dense block of this device's memory; "" for others."""
    if x.is_nested:
        return f"a nested {x.dtype} tensor"
    if x.layout is not torch.strided:
        return f"a {x.layout} {x.dtype} tensor"
    if type(x) not in _PLAIN and any(base.__name__ == "DTensor" for base in type(x).__mro__):
        return f"a DTensor of {x.dtype}"
    return ""


def has_forward_mode() -> bool:
    """Returns whether a level of forward-mode derivatives is open, in this thread's code outside torch.compile."""
    return getattr(forward_ad, "_current_level", -1) >= 0  # a private name, which may vanish


def is_transformed() -> bool:
    """Returns whether forward mode or a transform of torch.func is on; in code that torch.compile traces, where it traces."""
    return has_forward_mode() or torch._C._functorch.maybe_current_level() is not None


# As by torch.compiler.assume_constant_result, which would import all of torch.compile
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Returns whether derivatives of an operator on these tensors may be asked for: by backward(), forward mode or torch.func."""
    if is_transformed():
        return True
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def autocasts(x: Tensor) -> bool:
    """Returns whether autocast is on for tensors like `x`; never for meta tensors, for which torch raises."""
    return torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def readable(x: Tensor) -> bool:
    """Returns whether the values of `x` are available: not in traces, under vmap, during CUDA graph capture, or of meta and fake
    tensors."""
    if x.is_meta or is_traced_or_batched(x):
        return False
    may_be_fake = type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0  # a closer look takes microseconds
    if may_be_fake and detect_fake_mode(x) is not None:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_traced_or_batched(x: Tensor) -> bool:
    """Returns whether `x` stands for many values: in traced code (torch.compile, torch.jit.trace, make_fx) and under
    torch.func.vmap."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return True
    return _is_batched(x)


def is_dtensor(x: Any) -> bool:
    """Returns whether `x` is a DTensor; never if DTensors are not imported."""
    distributed: Any = None if type(x) is Tensor else sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(x, distributed.DTensor)


def is_distributed() -> bool:
    """Returns whether several processes may share tensors."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_jit_traced() -> bool:
    """Returns whether torch.jit.trace runs. It checks a trace with a second one without gradients; both need the same graph."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_wrapped(x: Tensor) -> bool:
    """Returns whether a transform of torch.func has wrapped `x`."""
    functorch = torch._C._functorch
    return functorch.maybe_current_level() is not None and functorch.is_functorch_wrapped_tensor(x)


def _is_batched(x: Tensor) -> bool:
    """Returns whether `x` stands for the samples of a torch.func.vmap, including within torch.func.grad and the like."""
    functorch = torch._C._functorch
    while functorch.maybe_current_level() is not None and functorch.is_functorch_wrapped_tensor(x):  # not is_wrapped: calls cost
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def varies(x: float) -> bool:
    """Returns whether `x` is a symbol in code that torch.compile traces: a float that may differ from call to call."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a slow import

    return not has_static_value(x)


def check_floating(**tensors: Tensor) -> None:
    """Raises unless tensors share device and floating dtype.

    Under autocast dtypes may differ, except float64, which is not cast.
    """
    items = iter(tensors.items())
    first_name, first = next(items)
    dtype, device = first.dtype, first.device
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{first_name} must be float16, bfloat16, float32 or float64; got {describe(first)}")
    for name, x in items:
        if x.dtype != dtype:
            castable = autocasts(first) and x.dtype in FLOAT_DTYPES and torch.float64 not in (x.dtype, dtype)
            if not castable:
                raise TypeError(f"{name} must have the dtype of {first_name}, {dtype}; got {describe(x)}")
        if x.device != device:
            check_device(name, x, first_name, first)


def check_constant(name: str, x: Tensor) -> None:
    """Raises if `x` requires a gradient, unless gradients are off, or has a forward-mode tangent."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, since none is computed for it; got {describe(x)} with requires_grad=True"
        )
    if not torch.compiler.is_compiling() and has_forward_mode() and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(f"{name} must not have a forward-mode tangent, since it is a constant; got one with {describe(x)}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {describe(x)}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"{name} must be one of {allowed}; got {describe(value)}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}")


def check_names(name: str, value: Any, known: Iterable[str], legend: str = "a sequence of names") -> tuple[str, ...]:
    """Raises unless `value` names some of `known`; returns the names without repeats.

    `legend`: the message's text for "must be".
    """
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {legend}; got {value!r:.80}")
    names = tuple(value)
    if not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name} must be {legend}; got {value!r:.80}")
    names = tuple(dict.fromkeys(names))
    if not names:
        raise ValueError(f"{name} must name at least one; got none")
    for each in names:
        if each not in known:
            raise ValueError(f"{name} must be among {', '.join(known)}; got {each!r}")
    return names


def check_bool(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {describe(value)}")


def check_callable(**functions: Any) -> None:
    """Raises unless each is a function, or None."""
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a callable or None; got {describe(value)}")


def call_on(name: str, function: Any, outputs: Any, inputs: Any) -> Any:
    """Returns function(outputs), or function(outputs, inputs) if it takes two arguments, or one with the name `inputs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C
        return function(outputs)
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(each.kind in by_place and each.default is each.empty for each in parameters)
    if needed > 2:
        raise TypeError(f"{name} must be a callable of (outputs) or of (outputs, inputs); got one of {needed} arguments")
    if any(each.name == "inputs" and each.kind is not each.POSITIONAL_ONLY for each in parameters):
        return function(outputs, inputs=inputs)
    return function(outputs, inputs) if needed == 2 else function(outputs)


def check_items(name: str, value: Any, legend: str) -> None:
    """Raises unless `value` is iterable and not a string; `legend` is the message's text for "must be"."""
    if isinstance(value, str) or not isinstance(value, Iterable) or (isinstance(value, Tensor) and value.ndim == 0):
        raise TypeError(f"{name} must be {legend}; got {describe(value)}")


_LARGEST = sys.float_info.max  # an int may be larger
_INT64 = -(2**63), 2**63 - 1


def check_number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_high: bool = False) -> None:
    """Raises unless `value` is a finite real number in [low, high] (or [low, high) with open_high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number; got {describe(value)}")
    # torch.compile traces comparisons of a float that varies, but not math.isfinite
    if not (-_LARGEST <= value <= _LARGEST and low <= value <= high) or (open_high and value == high):
        within = "" if low == -math.inf and high == math.inf else f" in [{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be a finite number{within}; got {value!r:.80}")
    if isinstance(value, int) and not _INT64[0] <= value <= _INT64[1]:
        raise ValueError(f"{name} must be a float or an int of at most 64 bits; got {value!r:.80}")


def check_integer(name: str, value: Any, *, low: int = _INT64[0], high: int = _INT64[1]) -> None:
    """Raises unless `value` is an int in [low, high], by default of 64 bits, like torch's."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {describe(value)}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}; got {value!r:.80}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}; got {value!r:.80}")


def check_index(name: str, number: int, count: int, where: str) -> int:
    """Returns a number as an index from 0; negative ones count from the end of the `count` items in `where`."""
    if not -count <= number < count:
        raise ValueError(f"{name} must be from {-count} to {count - 1} in {where}, which has {count}; got {number}")
    return number % count


def check_writable(name: str, path: Path, *, folder: bool = False) -> None:
    """Raises unless `path` is a file that can be written, or a folder, which is created. For checks before long work."""
    try:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        else:
            existed = os.path.lexists(path)
            path.open("ab").close()
            if not existed:
                path.unlink()
    except OSError as error:
        kind, target = ("directory", path) if folder else ("file", path.parent)
        around = next((each for each in (target, *target.parents) if each.is_dir()), target)
        missing = isinstance(error, FileNotFoundError) and (folder or around == target)  # e.g. in /proc, which takes no files
        reason = f"nothing can be made in {around}" if missing else error.strerror
        raise ValueError(f"{name} must be a {kind} that can be written; got {path}: {reason}") from None


def check_place(name: str, path: Path) -> None:
    """Raises unless files can be created in the folder `path`, or in the one that will contain it. Creates nothing."""
    around = next((each for each in (path, *path.parents) if each.is_dir()), path)
    try:
        check_writable(name, around, folder=True)
    except ValueError as error:
        reason = str(error).rpartition(": ")[2]
        raise ValueError(f"{name} must be a directory that can be written; got {path}: {reason}") from None


_SHAPES = {"value": "(B, Hkv, M, Dv)", "grad_output": "(B, H, N, Dv)"}


def check_attention(query: Any, key: Any, enable_gqa: Any, **tensors: Any) -> None:
    """Raises unless the tensors of an attention call pass `check_tensor` and `check_floating`, and their sizes fit.

    query: (B, H, N, D). key: (B, Hkv, M, Dk). tensors: value (B, Hkv, M, Dv) and grad_output (B, H, N, Dv), the gradient of the
    attention's output; each may be absent.
    """
    check_tensor("query", query, rank=4, shape="(B, H, N, D)")
    check_tensor("key", key, rank=4, shape="(B, Hkv, M, D)")
    for name, x in tensors.items():
        check_tensor(name, x, rank=4, shape=_SHAPES[name])
    check_floating(query=query, key=key, **tensors)
    check_bool(enable_gqa=enable_gqa)
    (batch, heads, queries, _), (key_batch, key_heads, keys, _) = query.shape, key.shape
    if key_batch != batch:
        raise ValueError(f"key must have query's batch size {batch}; got {describe(key)}")
    if enable_gqa:
        if key_heads == 0 or heads % key_heads != 0:
            raise ValueError(f"key's number of heads must divide query's {heads} with enable_gqa=True; got {describe(key)}")
    elif key_heads != heads:
        raise ValueError(f"key must have query's {heads} heads (enable_gqa=True allows fewer); got {describe(key)}")
    if "value" in tensors:
        value_batch, value_heads, length, value_dim = tensors["value"].shape
        if (value_batch, value_heads, length) != (batch, key_heads, keys):
            raise ValueError(
                f"value must have key's batch, heads and length {(batch, key_heads, keys)} in its first three dimensions; "
                f"got {describe(tensors['value'])}"
            )
        shape = (batch, heads, queries, value_dim)
        if "grad_output" in tensors and tensors["grad_output"].shape != shape:
            raise ValueError(
                f"grad_output must have the shape {shape} of the attention's output; got {describe(tensors['grad_output'])}"
            )


def check_head_dim(query: Tensor, key: Tensor) -> None:
    """Raises unless query (B, H, N, D) and key (B, Hkv, M, D) have one head_dim."""
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have query's head_dim {query.shape[-1]}; got {describe(key)}")


def check_lse(lse: Any, query: Tensor, name: str = "lse") -> None:
    """Raises unless lse (B, H, N) may be a log-sum-exp for each query, or is None."""
    if lse is None:
        return
    check_tensor(name, lse, rank=3, shape="(B, H, N)")
    check_device(name, lse, "query", query)
    # rounded to 16 bits it would move each probability by up to some percent
    if lse.shape != query.shape[:3] or lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64 of shape (B, H, N) = {tuple(query.shape[:3])}; got {describe(lse)}")


def check_softcap(softcap: Any) -> None:
    """Raises unless the softcap of an attention call is a positive finite number, or None."""
    if softcap is not None:
        check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be above 0 (None for no cap); got {softcap!r:.80}")


def check_sink(sink: Any, query: Tensor) -> None:
    """Raises unless sink (H,) has a logit for each head of query (B, H, N, D), or is None."""
    if sink is None:
        return
    check_tensor("sink", sink, rank=1, shape="(H,)")
    check_device("sink", sink, "query", query)
    if sink.dtype not in FLOAT_DTYPES:
        raise TypeError(f"sink must be floating point; got {describe(sink)}")
    if sink.shape[0] != query.shape[1]:
        raise ValueError(f"sink must have one logit for each of query's {query.shape[1]} heads; got {describe(sink)}")


def check_masks(query: Tensor, key: Tensor, attn_mask: Any, key_mask: Any, is_causal: Any) -> None:
    """Raises unless attn_mask broadcasts to (B, H, N, M), bool or float; key_mask is bool (B, M)."""
    check_bool(is_causal=is_causal)
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask, shape="that broadcasts to (B, H, N, M)")
        if attn_mask.dtype != torch.bool and attn_mask.dtype not in FLOAT_DTYPES:
            raise TypeError(f"attn_mask must be bool (True = may attend) or floating point (added); got {describe(attn_mask)}")
        check_device("attn_mask", attn_mask, "query", query)
        full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        if attn_mask.dim() > 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
            padding = "; key_mask takes (B, M)" if shape == (1, 1, full[0], full[3]) else ""
            raise ValueError(f"attn_mask must broadcast to (B, H, N, M) = {full}; got {describe(attn_mask)}{padding}")
        check_constant("attn_mask", attn_mask)
    check_token_mask("key_mask", key_mask, "query", query, key.shape[2], "(B, M)")


def check_token_mask(name: str, mask: Any, like_name: str, like: Tensor, tokens: int, legend: str) -> None:
    """Raises unless `mask` is bool, True = a real token, of shape (B, tokens) with the batch size of `like`; or None."""
    if mask is None:
        return
    check_tensor(name, mask, rank=2, shape=legend)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = a real token); got {describe(mask)}")
    check_device(name, mask, like_name, like)
    if mask.shape[0] != like.shape[0] or mask.shape[1] != tokens:
        raise ValueError(f"{name} must have shape {legend} = {(like.shape[0], tokens)}; got {describe(mask)}")
