"""Hooks of modules that may come and go while other threads call the modules.

torch goes through a module's dict of hooks with each call, and fails if another thread changes it meanwhile: "OrderedDict mutated
during iteration". So a dict with our hooks never changes. Each step sets another one in its place, and the last one puts back
the empty dict that was there. A dict with hooks of others is changed in place, as torch does: their handles refer to it.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[..., Any]


class _Set(NamedTuple):
    """A dict that is set in place of another one."""

    hooks: dict[int, Hook]
    ids: set[int]  # of this package's hooks, which are all unless others have added theirs
    before: dict[int, Hook]  # the other one, which is empty


_lock = threading.RLock()  # Python may run a finalizer in the middle of a step, and it may remove hooks
_sets: dict[tuple[int, str], _Set] = {}  # by the id of the owner's attributes, and the name of the dict


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
        hooks = owner[name]
        number = RemovableHandle(hooks).id
        for flag in flags:
            owner[f"{name}_{flag}"][number] = True
        given = {number: functools.partial(_unless_removed, hook, count) if "with_kwargs" in flags else hook}
        if _is_ours(owner, name) or not hooks:
            _replace(owner, name, {**given, **hooks} if prepend else {**hooks, **given})
        else:
            hooks.update(given)
            hooks.move_to_end(number, last=not prepend)

    def remove() -> None:
        with _lock:
            hooks = owner[name]
            if _is_ours(owner, name):
                _replace(owner, name, {key: value for key, value in hooks.items() if key != number})
            else:
                hooks.pop(number, None)
            for flag in flags:
                owner[f"{name}_{flag}"].pop(number, None)

    return remove


def _is_ours(owner: dict[str, Any], name: str) -> bool:
    """Whether the dict was set here and has no hooks of others."""
    held = _sets.get((id(owner), name))
    return held is not None and held.hooks is owner[name] and held.hooks.keys() == held.ids


def _replace(owner: dict[str, Any], name: str, hooks: dict[int, Hook]) -> None:
    before = _sets.pop((id(owner), name)).before if _is_ours(owner, name) else owner[name]
    if hooks:
        held = _sets[id(owner), name] = _Set(OrderedDict(hooks), {*hooks}, before)
    owner[name] = held.hooks if hooks else before


def _unless_removed(hook: Hook, count: int, *args: Any) -> Any:
    """A hook with kwargs that another thread removes in the middle of a call may be called without them."""
    return hook(*args) if len(args) == count else None
