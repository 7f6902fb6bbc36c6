"""What a run attaches to a model: marks on tensors, names of attributes with bits that a result takes over from what it was
computed from; and hooks of modules, which come and go while other threads call the modules."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# --- marks on tensors ---

_numbers = itertools.count()


def new_mark(name: str) -> str:
    """A new name for the marks of a run on tensors; an id() would not do: models may keep tensors that earlier runs marked."""
    return f"_vlattn_{name}_{next(_numbers)}"


def read_mark(values: Iterable[Any], mark: str) -> int:
    """The union of the bits that the tensors in `values`, also in nested tuples and lists, have as `mark`."""
    bits = 0
    for value in values:
        if isinstance(value, Tensor):
            bits |= getattr(value, mark, 0)
        elif isinstance(value, (tuple, list)):
            bits |= read_mark(value, mark)
    return bits


def add_mark(value: Any, mark: str, bits: int, keep: bool = True) -> None:
    """Marks a tensor, or each in a tuple, list or mapping, with `bits`, in addition to those that it has if they are to stay."""
    if isinstance(value, Tensor):
        setattr(value, mark, bits | (getattr(value, mark, 0) if keep else 0))
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            add_mark(part, mark, bits, keep)


# --- hooks of modules ---

# torch goes through a module's dict of hooks with each call, and fails if another thread changes it meanwhile: "OrderedDict
# mutated during iteration". So a dict with our hooks never changes. Each step sets another one in its place, and the last one
# puts back the empty dict that was there. A dict with hooks of others is changed in place, as torch does: their handles refer
# to it.

Hook = Callable[..., Any]

_lock = threading.RLock()  # Python may run a finalizer in the middle of a step, and it may remove hooks


def add_pre_hook(module: nn.Module | None, hook: Hook, *, prepend: bool = False, with_kwargs: bool = False) -> Callable[[], None]:
    """Adds a hook that runs before `module`, None = before every module, with the options of torch's `register_forward_pre_hook`.
    Returns the function that removes it."""
    return _add(module, "forward_pre_hooks", hook, prepend, ["with_kwargs"] * with_kwargs)


def add_hook(
    module: nn.Module | None, hook: Hook, *, prepend: bool = False, with_kwargs: bool = False, always_call: bool = False
) -> Callable[[], None]:
    """Adds a hook that runs after `module`, None = after every module, with the options of torch's `register_forward_hook`.
    Returns the function that removes it."""
    return _add(module, "forward_hooks", hook, prepend, ["with_kwargs"] * with_kwargs + ["always_called"] * always_call)


def _add(module: nn.Module | None, kind: str, hook: Hook, prepend: bool, flags: Sequence[str]) -> Callable[[], None]:
    owner, name = (vars(nn.modules.module), f"_global_{kind}") if module is None else (vars(module), f"_{kind}")
    count = 3 if kind == "forward_pre_hooks" else 4
    with _lock:
        number = RemovableHandle(owner[name]).id

    def take_away() -> None:
        _put(owner, name, number, None)
        for flag in flags:
            owner[f"{name}_{flag}"].pop(number, None)

    def remove() -> None:
        try:
            take_away()
        except KeyboardInterrupt:
            take_away()
            raise

    try:
        for flag in flags:
            owner[f"{name}_{flag}"][number] = True
        _put(owner, name, number, functools.partial(_unless_removed, hook, count) if "with_kwargs" in flags else hook, prepend)
        return remove
    except BaseException:  # Ctrl-C, also after the hook has been put there
        remove()
        raise


def _put(owner: dict[str, Any], name: str, number: int, hook: Hook | None, prepend: bool = False) -> None:
    """Puts a hook into the dict, as the last one or the first; None = removes the one of this number.

    A dict that is set here has two attributes, which copies of a model have as well: the `ids` of its hooks, which are all unless
    others have added theirs, and the empty dict that was there `before`.
    """
    with _lock:
        while True:
            hooks = owner[name]
            others = dict.copy(hooks)  # which no other thread interrupts
            seen = {*others}
            if seen and seen != getattr(hooks, "ids", None):
                if hook is None:
                    hooks.pop(number, None)
                else:
                    hooks[number] = hook
                    hooks.move_to_end(number, last=not prepend)
                return
            others.pop(number, None)
            given = {} if hook is None else {number: hook}
            made, before = OrderedDict({**given, **others} if prepend else {**others, **given}), getattr(hooks, "before", hooks)
            vars(made).update(ids={*made}, before=before)
            made = made or before
            # A finalizer may have set another dict meanwhile, or a hook of others have come. Neither can happen after `keys`.
            if hooks.keys() == seen and owner[name] is hooks:
                owner[name] = made
                return


def _unless_removed(hook: Hook, count: int, *args: Any) -> Any:
    """A hook with kwargs that another thread removes in the middle of a call may be called without them."""
    return hook(*args) if len(args) == count else None
