"""What a run attaches to a model: records of tensors; and hooks of modules, which come and go while other threads call the
modules."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# --- records of tensors ---

_numbers = itertools.count()


class Record:
    """What a run knows of a tensor: bits, which a subclass adds to."""

    maps = 0  # the attention map, written out by hand, that it holds
    kinds = 0  # of the inputs that it was computed from, see `TokenKinds`


class Records:
    """The records of one run, each of the class `kind`, as an attribute of its tensor: no tensor has two of a run."""

    def __init__(self, kind: type[Record] = Record) -> None:
        # A number, not an id(): models may keep tensors that earlier runs marked.
        self.name, self._kind = f"_vlattn_record_{next(_numbers)}", kind
        self.nothing: Any = kind()

    def of(self, tensor: Any) -> Any:
        """The record of a tensor, to read."""
        return getattr(tensor, self.name, None) or self.nothing

    def at(self, tensor: Tensor) -> Any:
        """The record of a tensor, to change."""
        record = getattr(tensor, self.name, None)
        if record is None:
            record = self._kind()
            setattr(tensor, self.name, record)
        return record

    def among(self, values: Iterable[Any]) -> list[tuple[Tensor, Any]]:
        """The tensors with a record among values, also in tuples and lists."""
        recorded, ahead = [], [*values]
        for value in ahead:
            if isinstance(value, Tensor):
                if (record := getattr(value, self.name, None)) is not None:
                    recorded.append((value, record))
            elif isinstance(value, (tuple, list)):
                ahead += value
        return recorded

    def bits(self, values: Iterable[Any], field: str) -> int:
        """The union of the bits of a field among values."""
        bits = 0
        for _, record in self.among(values):
            bits |= getattr(record, field)
        return bits


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
