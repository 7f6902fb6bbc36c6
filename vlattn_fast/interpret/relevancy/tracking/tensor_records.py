"""What a run knows of each tensor: a `TracedTensor` that is an attribute of it.

A result takes over from the tensors that it was computed from where they came from (here), and which token each of its positions
holds (`token_moves`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlattn_fast._ground.attachments import Record, Records, add_hook, add_pre_hook
from vlattn_fast._ground.checks import is_distributed, is_dtensor
from vlattn_fast.interpret.relevancy.tracking.token_numbers import Numbers

# Bits of an origin: functions of the run made the tensor; it came from the first, second, ... tensor that the model was given
# (the last bit for all further ones); through the first, second, ... states that entered a layer.
_MADE, _GIVEN, _ENTERED, _BITS = 1, 1, 16, 48
_FROM = (1 << _ENTERED) - 2
TOKENS, MODEL, ELSEWHERE = range(3)  # where a tensor is from
_SHAPED = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # take nothing but a shape or a dtype from a second tensor
_READING = {"tensor", "as_tensor", "asarray", "from_numpy"}  # take numbers from Python, as ids of a model that is given texts
_FILLED = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # nor numbers from the first


class TracedTensor(Record):
    """What a trace knows of a tensor."""

    calls = 0  # the attention calls that it came through, as bits, 1 << 0 the first
    origin = 0  # where it is from, as bits
    entry: int | None = None  # how many attention calls were before it entered a module, where that is noted
    numbers: Numbers | None = None  # of its tokens; None = it has none, or they are lost
    is_followed = False  # its numbers are known
    is_constant = False  # it is made of the model's own tensors, or out of nothing
    input: tuple[str, Tensor] | None = None  # the input that it is from, and which entry of it each position holds

    @property
    def entered(self) -> int:
        """The states that entered a layer and that the tensor came through, as bits."""
        return self.origin & ~_FROM & ~_MADE


class TensorRecords(Records):
    """The records of one run of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(TracedTensor)
        self.constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._outside: list[Tensor] = []  # tensors with a record that functions of the run did not make
        self._ended: dict[int, TracedTensor] = {}  # their records after the run
        self._inputs, self._entered = 0, 0

    def of(self, tensor: Any) -> TracedTensor:
        record: TracedTensor | None = getattr(tensor, self.name, None)
        return record or self._ended.get(id(tensor), self.nothing)

    def outside(self, tensor: Tensor) -> TracedTensor:
        """The record of a tensor that functions of the run did not make, until the run ends."""
        self._outside.append(tensor)
        return self.at(tensor)

    def forget(self) -> None:
        """Takes the records off tensors that functions of the run did not make."""
        for tensor in self._outside:
            if (record := vars(tensor).pop(self.name, None)) is not None:
                self._ended[id(tensor)] = record

    def give(self, arguments: Mapping[Any, Any]) -> None:
        """Notes the tensors that the model is called with. Caches are not tensors, or hold them deeper."""
        for value in arguments.values():
            if isinstance(value, Mapping):
                self.give(value)
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    self.outside(tensor).origin |= 1 << min(_GIVEN + self._inputs, _ENTERED - 1)
                    self._inputs += 1

    def enter(self, states: Any) -> None:
        """Notes the states (B, N, C) that a member of a list of layers takes, if they came through no call yet."""
        if self._entered < _BITS - _ENTERED and isinstance(states, Tensor) and states.ndim == 3 and not self.of(states).calls:
            self.outside(states).origin |= 1 << _ENTERED + self._entered
            self._entered += 1

    def across_processes(self, model: nn.Module, within_run: Callable[..., Any]) -> Iterator[Callable[[], None]]:
        """Hooks by which modules whose parameters several processes share pass records on: they exchange tensors outside of
        any mode. Yields a function that removes each hook."""
        entering: list[list[tuple[Tensor, TracedTensor]]] = []

        def enters(module: nn.Module, args: Sequence[Any]) -> None:
            entering.append(self.among(args))

        def leaves(module: nn.Module, args: Any, output: Any) -> None:
            taken = entering.pop()
            if isinstance(output, Tensor) and not (self.of(output).calls or self.of(output).origin & ~_MADE):
                self.copy(output, *(tensor for tensor, _ in taken))

        for module in model.modules() if is_distributed() else ():
            if not module._modules and any(map(is_dtensor, module.parameters())):
                yield add_pre_hook(module, within_run(enters), prepend=True)
                yield add_hook(module, within_run(leaves), always_call=True)

    # --- functions of torch ---

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
        """After a function of torch: its results come from where its arguments do. Returns the calls that they come through."""
        name = getattr(func, "__name__", "")
        recorded = self.among([*args, *kwargs.values()])
        first = args[0] if args else None
        if name in _FILLED or name in _SHAPED:
            recorded = [(value, record) for value, record in recorded if value is first and name in _SHAPED]
        calls = origin = 0
        for _, record in recorded:
            calls |= record.calls
            origin |= record.origin
        if name in _READING and not self._inputs:
            origin |= 1 << _GIVEN
        if not (calls or origin or result is None or result is first):
            origin = _MADE
        ahead = [first if result is None else result]  # a tensor keeps what is written into it in place
        for each in ahead:
            if isinstance(each, Tensor):
                made = self.at(each)
                made.calls |= calls
                made.origin |= origin
            elif isinstance(each, (tuple, list)):
                ahead += each
        return calls

    # --- attention calls ---

    def copy(self, tensor: Tensor, *sources: Tensor, calls: int | None = None) -> None:
        """`tensor` has the origin of `sources`, and came through `calls`; None = through theirs."""
        record = self.at(tensor)
        record.calls |= calls or 0
        for source in map(self.of, sources):
            record.origin |= source.origin
            record.calls |= source.calls if calls is None else 0

    def from_same(self, query: Tensor, key: Tensor) -> bool:
        """Whether both came from the same of the tensors that the model was given, or both from none."""
        first, second = (self.of(tensor).origin & _FROM for tensor in (query, key))
        return bool(first & second) or not (first or second)

    def where_from(self, tensor: Tensor) -> int:
        """TOKENS; MODEL = learned or constant; ELSEWHERE, such as from a cache."""
        record = self.of(tensor)
        if record.calls or record.origin & _FROM:
            return TOKENS
        is_constant = isinstance(tensor, nn.Parameter) or id(tensor) in self.constants  # offloading puts other parameters in
        return MODEL if record.origin or is_constant else ELSEWHERE
