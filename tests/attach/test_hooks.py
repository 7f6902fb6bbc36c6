"""Hooks come and go while a module's hooks run, and the hooks of others stay as they are."""

import copy
import dis
import functools
import gc
import itertools
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.test_threads import uniter
from vlattn_fast._ground import attachments
from vlattn_fast._ground.attachments import add_hook, add_pre_hook

X = torch.ones(2)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError


def dicts(*modules: nn.Module) -> list[Any]:
    """The dicts of hooks that torch goes through in a call."""
    kinds = ("forward_pre_hooks", "forward_hooks")
    owners = [(vars(nn.modules.module), "_global_"), *((vars(module), "_") for module in modules)]
    return [owner[prefix + kind] for owner, prefix in owners for kind in kinds]


@pytest.mark.parametrize("ours", [True, False])
def test_options_are_those_of_torch(ours: bool) -> None:
    """The same calls with the hooks of torch and with ours."""
    module, calls = nn.Identity(), list[Any]()

    def note(name: str) -> Callable[..., None]:
        return lambda module, *args: calls.append((name, len(args)))

    before, after = (add_pre_hook, add_hook) if ours else (nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook)
    for name, options in {"a": {}, "b": {"prepend": True}, "c": {"with_kwargs": True}, "d": {"prepend": True}}.items():
        before(module, note(name), **options)
        after(module, note(name + "2"), **options)
    module(X)
    assert calls == [("d", 1), ("b", 1), ("a", 1), ("c", 2), ("d2", 2), ("b2", 2), ("a2", 2), ("c2", 3)]


def test_hooks_of_all_modules() -> None:
    module, calls = nn.Sequential(nn.Identity(), Fails()), list[str]()
    removes = [add_pre_hook(None, lambda module, args: calls.append(f"into {type(module).__name__}"))]
    removes += [add_hook(None, lambda module, args, output: calls.append(f"out of {type(module).__name__}"), always_call=True)]
    with pytest.raises(ArithmeticError):
        module(X)
    for remove in removes:
        remove()
    with pytest.raises(ArithmeticError):
        module(X)
    into, out = ["into Sequential", "into Identity", "out of Identity", "into Fails"], ["out of Fails", "out of Sequential"]
    assert calls == into + out
    assert not any(dicts(module)) and not nn.modules.module._global_forward_hooks_always_called


def test_a_result_replaces_that_of_the_module() -> None:
    module = nn.Identity()
    add_pre_hook(module, lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    remove = add_hook(module, lambda module, args, kwargs, output: output * 10, with_kwargs=True)
    assert module(X).tolist() == [20.0, 20.0]
    remove()
    assert module(X).tolist() == [2.0, 2.0]


def test_explaining_in_the_middle_of_a_call() -> None:
    """torch is within the dicts of a model's hooks while another thread explains the model, and this one observes it."""
    model, inputs = uniter()
    modules = [*model.modules()]
    plain = [id(each) for each in dicts(*modules)]
    expected = va.explain(model, inputs, method="weighted").relevancy
    passes, others = list[Iterator[Any]](), list[Any]()

    def observe(*args: Any) -> None:
        passes.extend(iter(each.items()) for each in dicts(*modules))
        for each in passes:
            next(each, None)
        others.append(va.explain(model, inputs, method="weighted").relevancy)

    def within(*args: Any) -> None:
        if not others and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=observe)
            thread.start()
            thread.join()

    remove = add_pre_hook(modules[-1], within)
    got = va.explain(model, inputs, method="weighted").relevancy
    remove()
    for each in passes:
        list(each)  # "OrderedDict mutated during iteration"
    assert all(torch.equal(others[0][name], x) and torch.equal(got[name], x) for name, x in expected.items())
    assert [id(each) for each in dicts(*modules)] == plain


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_hooks_of_others_stay(first: str, last: str) -> None:
    """Before ours and within ours, removed before ours and after."""
    module, calls = nn.Identity(), list[str]()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    def called() -> set[str]:
        calls.clear()
        module(X)
        return set(calls)

    removes = {}
    for name in (first, "ours" if first == "theirs" else "theirs"):
        removes[name] = add_hook(module, note(name)) if name == "ours" else module.register_forward_hook(note(name)).remove
    more = add_hook(module, note("more"))
    assert called() == {"ours", "theirs", "more"}
    removes["ours" if last == "theirs" else "theirs"]()
    assert called() == {last, "more"}
    removes[last]()
    assert called() == {"more"}
    more()
    assert called() == set() and not module._forward_hooks
    left = module._forward_hooks
    add_hook(module, note("again"))
    assert called() == {"again"} and not left


def test_copies_and_models_that_are_gone() -> None:
    """A copy has the hooks that the model had, and a model of the same id those of its own."""
    module, calls = nn.Identity(), list[str]()
    remove = add_hook(module, lambda *_: calls.append("ours"))
    twin = copy.deepcopy(module)
    remove()
    twin(X)
    assert calls == ["ours"] and not module._forward_hooks
    remove = add_hook(twin, lambda *_: calls.append("its own"))
    twin(X)
    remove()
    twin(X)
    assert calls == ["ours"] * 2 + ["its own"] + ["ours"]
    for _ in range(50):
        add_hook(module := nn.Identity(), lambda *_: None)
        module = nn.Identity()
        own = module._forward_hooks
        add_hook(module, lambda *_: calls.append("gone"))()
        assert module._forward_hooks is own


def test_removed_in_the_middle_of_a_call() -> None:
    """A hook with kwargs of which torch has a copy, as other threads have, is not called with fewer arguments."""
    module, calls = nn.Identity(), list[Any]()
    removes = list[Callable[[], None]]()
    add_pre_hook(module, lambda *_: removes[0]())
    removes.append(add_pre_hook(module, lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True))
    module(X)
    assert calls == []


def test_a_model_is_freed_with_its_hooks() -> None:
    module = nn.Sequential(nn.Identity())
    add_hook(module, lambda *_, held=module: held)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("meanwhile", ["removed by a finalizer", "added by others"])
def test_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch, meanwhile: str) -> None:
    """Python may run a finalizer while a dict is made, and switch to a thread that adds a hook in torch's way."""
    module, calls = nn.Identity(), list[str]()
    remove = add_hook(module, lambda *_: calls.append("first"))

    def make(items: Any) -> OrderedDict[Any, Any]:
        monkeypatch.undo()
        if meanwhile == "removed by a finalizer":
            remove()
        else:
            module.register_forward_hook(lambda *_: calls.append("theirs"))
        return OrderedDict(items)

    monkeypatch.setattr(attachments, "OrderedDict", make)
    remove_last = add_hook(module, lambda *_: calls.append("last"))
    module(X)
    assert calls == (["last"] if meanwhile == "removed by a finalizer" else ["first", "theirs", "last"])
    remove()
    remove_last()
    assert len(module._forward_hooks) == (meanwhile == "added by others")


def test_ctrl_c_leaves_no_hook() -> None:
    """In each of the two steps, wherever Python looks for it: after calls and before it jumps back."""
    at, ended = 0, False
    while not ended:
        module, count, before = nn.Identity(), 0, sys.gettrace()

        def interrupt(frame: FrameType, event: str, _: Any, at: int = at) -> Any:
            nonlocal count
            code = frame.f_code
            if code.co_filename != attachments.__file__ or code.co_name in ("add_hook", "remove"):  # their first steps
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and frame.f_lasti in looks(code):
                count += 1
                if count > at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            add_hook(module, lambda *_: None, with_kwargs=True, always_call=True)()
            ended = True
        except KeyboardInterrupt:
            at += 1
        finally:
            sys.settrace(before)
        assert not module._forward_hooks and not module._forward_hooks_with_kwargs and not module._forward_hooks_always_called
    assert at > 20


@functools.cache
def looks(code: CodeType) -> set[int]:
    """The places in code before which Python looks for Ctrl-C."""
    steps = [*dis.get_instructions(code)]
    names = "CALL", "JUMP_BACKWARD", "RESUME"
    return {after.offset for step, after in itertools.pairwise(steps) if step.opname.startswith(names)}
