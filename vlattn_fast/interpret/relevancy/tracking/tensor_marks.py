"""Where the tensors of a run are from: the attention calls that they were computed from, and whether the model was given them.

The marks are bits of an int, which a tensor passes to all that is computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlattn_fast._ground.attachments import add_hook, add_mark, add_pre_hook, new_mark, read_mark
from vlattn_fast._ground.checks import is_dtensor

# The lowest bits: functions of the run made the tensor; it came from the first, second, ... tensor that the model was given (the
# last bit for all further ones); through the first, second, ... states that entered a layer. Bits of calls are above them.
_MADE, _GIVEN, _ENTERED, _BITS = 1, 1, 16, 48
_LOWEST, _FROM = (1 << _BITS) - 1, (1 << _ENTERED) - 2
_SHAPED = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # take nothing but a shape or a dtype from a second tensor
_READING = {"tensor", "as_tensor", "asarray", "from_numpy"}  # take numbers from Python, as ids of a model that is given texts
_FILLED = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # nor numbers from the first


class TensorMarks:
    """The marks of one run of `model`. Calls are bits of an int, 1 << 0 the first."""

    def __init__(self, model: nn.Module) -> None:
        self._name = new_mark("calls")
        self.constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._marked: list[Tensor] = []
        self._inputs, self._entered = 0, 0

    def give(self, arguments: Mapping[Any, Any]) -> None:
        """Mark the tensors that the model is called with. Caches are not tensors, or hold them deeper."""
        for value in arguments.values():
            if isinstance(value, Mapping):
                self.give(value)
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    self._mark(tensor, min(_GIVEN + self._inputs, _ENTERED - 1))
                    self._inputs += 1

    def enter(self, path: str, args: Sequence[Any]) -> None:
        """Mark the states (B, N, C) that the module at `path` takes, a member of a list, if they came through no call yet."""
        if not path[-1:].isdigit() or self._entered == _BITS - _ENTERED:
            return
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3 and not self.calls(args[:1]):
            self._mark(args[0], _ENTERED + self._entered)
            self._entered += 1

    def _mark(self, tensor: Tensor, bit: int) -> None:
        add_mark(tensor, self._name, 1 << bit)
        self._marked.append(tensor)

    def forget(self) -> None:
        """Take the marks off tensors that functions of the run did not make."""
        for tensor in self._marked:
            vars(tensor).pop(self._name, None)

    def across_processes(self, model: nn.Module, within_run: Callable[..., Any]) -> Iterator[Callable[[], None]]:
        """Hooks by which modules whose parameters several processes share pass marks on: they exchange tensors outside of
        any mode. Yields a function that removes each hook."""
        entering: list[int] = []

        def enters(module: nn.Module, args: Sequence[Any]) -> None:
            entering.append(read_mark(args, self._name))

        def leaves(module: nn.Module, args: Any, output: Any) -> None:
            marks = entering.pop()
            if isinstance(output, Tensor) and not read_mark((output,), self._name) & ~_MADE:
                add_mark(output, self._name, marks)

        for module in model.modules():
            if not module._modules and any(map(is_dtensor, module.parameters())):
                yield add_pre_hook(module, within_run(enters), prepend=True)
                yield add_hook(module, within_run(leaves), always_call=True)

    def calls(self, values: Iterable[Any]) -> int:
        """The calls that the tensors among `values`, also in nested tuples and lists, came through."""
        return read_mark(values, self._name) >> _BITS

    def add_calls(self, tensor: Tensor, calls: int, *sources: Tensor) -> None:
        """`tensor` came through `calls`, and else has the origin of `sources`."""
        add_mark(tensor, self._name, calls << _BITS | read_mark(sources, self._name) & _LOWEST)

    def copy(self, tensor: Tensor, *sources: Tensor) -> None:
        add_mark(tensor, self._name, read_mark(sources, self._name))

    def hand_on(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
        """After a function of torch: its results have the marks of its arguments. Returns their calls."""
        name = getattr(func, "__name__", "")
        marks = 0
        if name not in _FILLED:
            marks = read_mark(args[:1] if name in _SHAPED else args, self._name)
            marks |= read_mark(kwargs.values(), self._name) if kwargs else 0
        if name in _READING and not self._inputs:
            marks |= 1 << _GIVEN
        first = args[0] if args else None
        if marks or not (result is None or result is first):
            # A tensor keeps what is written into it in place.
            add_mark(first if result is None else result, self._name, marks or _MADE)
        return marks >> _BITS

    def from_same(self, query: Tensor, key: Tensor) -> bool:
        """Whether both came from the same of the tensors that the model was given, or both from none."""
        first, second = (read_mark((tensor,), self._name) & _FROM for tensor in (query, key))
        return bool(first & second) or not (first or second)

    def entered_as_one(self, query: Tensor, key: Tensor) -> bool:
        """Whether both came through the same states that entered a layer."""
        return bool(self.entered(query) & self.entered(key))

    def entered(self, tensor: Tensor) -> int:
        """The states that entered a layer and that the tensor came through, as bits."""
        return read_mark((tensor,), self._name) & _LOWEST & ~_FROM & ~_MADE

    def origin(self, tensor: Tensor) -> str:
        """Where a part of the keys is from, as `JoinedKeys` takes it."""
        marks = read_mark((tensor,), self._name)
        if marks >> _BITS or marks & _FROM:
            return "tokens"
        is_constant = isinstance(tensor, nn.Parameter) or id(tensor) in self.constants  # offloading puts other parameters in
        return "model" if marks or is_constant else "elsewhere"
