"""Which token each position of a tensor holds, while a model moves its tokens.

A function of torch that moves positions (an index, a flip, a view into windows) is run once more, over the numbers of its tensor.
All else leaves a token in its position, or loses the numbers if the result has another shape.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.interpret.relevancy.tracking.tensor_records import MODEL, TOKENS, TensorRecords
from vlattn_fast.interpret.relevancy.tracking.token_numbers import (
    ANY,
    BROADCASTS,
    CONCATENATIONS,
    JOINS,
    LAYOUTS,
    LOST,
    MADE,
    MERGED,
    MOVES,
    NONE,
    PRODUCTS,
    SUMS,
    VIEWS,
    WRITES,
    Numbers,
    TorchCall,
    are_equal,
    fits,
    is_flat,
    key_of,
    leaves_last,
    name_of,
    narrowed,
    on_cpu,
    summed,
    thinned,
)


class TokenMoves:
    """The numbers of all tensors of a run, in its `records`. Tokens that are joined before the first attention call are new
    tokens, and those that are merged after one are lost. The model's own tensors have none."""

    def __init__(self, records: TensorRecords) -> None:
        self._records = records
        self._names: dict[Any, str] = {}
        self._results: dict[Hashable, tuple[Any, Any]] = {}  # of moves that were made before, with what the keys are ids of
        self._same: dict[Hashable, Numbers] = {}
        self._next = 0
        self._renamed: list[tuple[Tensor, Tensor]] = []  # new numbers, and those that their positions had
        self._begins: list[tuple[int, tuple[int, ...], int]] = []  # of each tensor of new tokens: first number, sizes, origin
        self._parts: list[tuple[int, Tensor]] = []  # of those that were joined: the first number, and the numbers of the parts

    # --- numbers of tensors ---

    def of(self, tensor: Any) -> Numbers | None:
        return self._records.of(tensor).numbers

    def _is_after_attention(self, tensor: Tensor) -> bool:
        return self._records.of(tensor).calls > 0

    def give(self, tensor: Any, numbers: Any, is_constant: bool = False) -> None:
        """Gives a tensor its numbers, or several theirs; None = its tokens are lost."""
        for place, part in enumerate(tensor) if isinstance(tensor, (tuple, list)) else [(0, tensor)]:
            if isinstance(part, Tensor):
                record = self._records.at(part)
                record.numbers = numbers[place] if isinstance(numbers, list) else numbers
                record.is_followed, record.is_constant = True, is_constant

    def hand_on(self, view: Tensor, tensor: Tensor, dim: int | None = None) -> None:
        """Gives `view`, that is made outside of torch's functions, the numbers of `tensor`; with a new dimension `dim`, or if
        it is negative without that one."""
        numbers = self.of(tensor)
        if numbers is not None and dim is not None:
            ids = numbers.ids.unsqueeze(dim) if dim >= 0 else numbers.ids.squeeze(-dim)
            make = lambda: Numbers(tuple(ids.shape), why=numbers.why, _ids=ids)  # noqa: E731
            numbers = self._once(("dim", id(numbers), dim), numbers, make)
        self.give(view, numbers)

    def new(self, shape: Sequence[int], origin: int = TOKENS, parts: Numbers | None = None) -> Numbers:
        """Numbers of new tokens, along all dimensions of `shape` that are larger than 1. `origin`: see `where_from`; `parts`: the
        numbers of what they were joined of."""
        numbers = Numbers(tuple(shape), self._next)
        self._begins.append((self._next, numbers.shape, origin))
        if parts is not None:
            self._parts.append((self._next, parts.ids[..., :1].expand(shape).flatten()))
        self._next += prod(shape)
        return numbers

    def rename(self, tensor: Tensor, numbers: Numbers, before: Tensor | None) -> None:
        """Gives `tensor` other numbers, which replace `before`, the numbers of what it was made of; None = they are not known."""
        ids = numbers.ids.flatten()
        self._renamed.append((ids, torch.full_like(ids, ANY) if before is None else before.flatten()))
        self.give(tensor, numbers)

    def _before(self, ids: Tensor) -> Tensor:
        """The numbers that positions had when they got these, if they had others."""
        for new, old in reversed(self._renamed):
            order = new.argsort()
            at = order[torch.searchsorted(new[order], ids.contiguous()).clamp(max=len(new) - 1)]
            ids = torch.where(new[at] == ids, old[at], ids)
        return ids

    def levels(self, tensor: Tensor) -> Iterator[Tensor]:
        """The numbers of the first sample's keys (B, H, M, D), then of what they were joined of, and so on; none if lost."""
        numbers = self.of(tensor)
        ids = None if numbers is None or len(numbers.shape) != 4 else numbers.ids[0].expand(-1, tensor.shape[2], -1)[0, :, 0]
        while ids is not None:
            yield ids
            before = ids
            for begin, parts in self._parts:  # the parts of one have lower numbers
                at = ids - begin
                ids = torch.where((at >= 0) & (at < len(parts)), parts[at.clamp(0, len(parts) - 1)], ids)
            ids = None if torch.equal(ids, before) else ids

    def origins(self, ids: Tensor) -> Tensor:
        """Where positions with these numbers are from, as `where_from` says."""
        begins, _, origins = zip(*self._begins, strict=True)
        places = torch.bucketize(ids.contiguous(), torch.tensor(begins), right=True).clamp(min=1) - 1
        return torch.where(ids >= 0, torch.tensor(origins)[places], torch.where(ids == NONE, MODEL, TOKENS))

    def beginning(self, number: int) -> tuple[int, tuple[int, ...], int]:
        """The first number, the sizes and the origin of the tensor in which a token appeared."""
        return self._begins[bisect.bisect_right(self._begins, number, key=lambda begin: begin[0]) - 1]

    # --- functions of torch ---

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, path: str) -> None:
        """Gives the result of a function its numbers; a function without a result changed its first argument."""
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = name_of(func)
        first = args[0] if args else None
        if result is None:
            result = first
        several = isinstance(result, (tuple, list))
        if not several and not (isinstance(result, Tensor) and result.is_floating_point()):
            return
        is_made = name in MADE and self._records.where_from(result) != TOKENS  # which a list of numbers may be
        if is_made or (name in LAYOUTS and self._is_constant(first)):
            self.give(result, None, is_constant=True)
            return
        if name in JOINS and args:
            for part in args[0]:
                self._of_outside(part)
        numbered = []
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                record = getattr(value, self._records.name, None)
                numbers = record.numbers if record is not None and record.is_followed else self._of_outside(value)
                if numbers is not None:
                    numbered.append((value, numbers))
        rule = _RULES.get(name)
        if rule is None and len(numbered) == 1 and not several and numbered[0][0].shape == result.shape:
            record = getattr(result, self._records.name)
            record.numbers, record.is_followed, record.is_constant = numbered[0][1], True, False  # most functions
            return
        call = TorchCall(name, func, args, kwargs, result, path, numbered)
        try:
            if several:
                numbers = self._move(call) if name in MOVES else None
            else:
                numbers = self._kept(call, numbered) if rule is None else rule(self, call)
        except LOST:  # a form of the function that the rule does not know: its tokens are lost
            numbers = None
        is_constant = False
        if numbers is None and not several and result.ndim > 1 and not self._is_after_attention(result):
            numbers = self._as_new(call)
            is_constant = numbers is None
        self.give(result, numbers, is_constant)

    def _of_outside(self, tensor: Any) -> Numbers | None:
        """Numbers for a tensor that comes from outside of the run, as an input of the model does. Its own tensors have none."""
        if not isinstance(tensor, Tensor):
            return None
        record = self._records.of(tensor)
        if record.is_followed or id(tensor) in self._records.constants or record.calls:
            return record.numbers
        if tensor.ndim < 2 or not tensor.is_floating_point():
            return None
        record = self._records.outside(tensor)
        record.numbers = self.new((*tensor.shape[:-1], 1), self._records.where_from(tensor))
        record.is_followed = True
        return record.numbers

    def _is_constant(self, tensor: Any) -> bool:
        """Whether a tensor is a parameter, or was made of one, or out of nothing."""
        return id(tensor) in self._records.constants or self._records.of(tensor).is_constant

    def _as_new(self, call: TorchCall) -> Numbers | None:
        """New tokens: all dimensions but the last one are theirs. A sum or a join of the same tokens gives the same ones. None
        if a function only took constants, such as a cast of a parameter."""
        tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
        if tensors and all(map(self._is_constant, tensors)):
            return None
        shape = (*call.result.shape[:-1], 1)
        parts = call.args[0] if call.name in JOINS and call.args else call.args
        numbers = [self.of(x) for x in parts] if isinstance(parts, (tuple, list)) else []
        make = lambda: self.new(shape, self._records.where_from(call.result), call.parts)  # noqa: E731
        if sum(n is not None for n in numbers) < 2 and call.name not in JOINS and call.parts is None:
            return make()
        return self._once(("new", call.name, shape, *map(id, numbers), id(call.parts)), (numbers, call.parts), make)

    def _once(self, key: Hashable, held: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, cached for the next time; None is the key of no other call. `held` outlives the key's ids."""
        if key is None:
            return make()
        if key not in self._results:
            self._results[key] = make(), held
        return self._results[key][0]

    # --- functions that leave tokens in their positions ---

    def _kept(self, call: TorchCall, numbered: Sequence[tuple[Tensor, Numbers]]) -> Numbers | None:
        """The numbers of the arguments, if the result has the positions of their tokens."""
        shape = call.result.shape
        whole = [(x, n) for x, n in numbered if fits(x.shape, n.shape, shape)]
        if not whole:
            return None
        if all(n is whole[0][1] for _, n in whole):
            return self._aligned(whole[0][1], len(shape))
        after = [(x, n) for x, n in whole if self._is_after_attention(x)]
        first, *others = (self._aligned(n, len(shape)) for _, n in after or whole)
        result: Numbers | None = first
        for second in others:
            result = None if result is None else self._joined(result, second, bool(after), call)
        return result

    def _expand(self, call: TorchCall) -> Numbers | None:
        return self._aligned(call.numbered[0][1], call.result.ndim) if call.numbered else None

    def _aligned(self, numbers: Numbers, ndim: int) -> Numbers:
        """The numbers with leading dimensions, as torch broadcasts them."""
        if len(numbers.shape) == ndim:
            return numbers
        shape = (*(1,) * (ndim - len(numbers.shape)), *numbers.shape)
        return self._once(
            ("aligned", id(numbers), ndim), numbers, lambda: Numbers(shape, numbers.begin, numbers.why, numbers.ids.view(shape))
        )

    def _joined(self, one: Numbers, second: Numbers, after: bool, call: TorchCall) -> Numbers | None:
        """The numbers of a position that depends on two tensors; before the first attention they are new tokens where these
        have others."""
        return self._once(("join", id(one), id(second), after), (one, second), lambda: self._join(one, second, after, call))

    def _join(self, one: Numbers, second: Numbers, after: bool, call: TorchCall) -> Numbers | None:
        a, b = one.ids, second.ids
        if one.shape == second.shape and torch.equal(a, b):
            return one
        if not after:
            return None
        a, b = torch.broadcast_tensors(a, b)
        before_a, before_b = self._before(a), self._before(b)
        a, b = (
            torch.where((before_b == a) | (before_b == ANY), b, a),
            torch.where((before_a == b) | ((before_a == ANY) & (before_b != ANY)), a, b),
        )
        joined = torch.where((a == b) | (b < 0), a, torch.where(a < 0, b, MERGED))
        if joined.shape == one.ids.shape and torch.equal(joined, one.ids):
            return one
        return self._numbers(joined, call, [one, second])

    def _numbers(self, ids: Tensor, call: TorchCall, sources: Sequence[Numbers] = ()) -> Numbers:
        """Numbers of these ids; the same ones if a tensor with them is known, so that later functions find their results."""
        for source in sources:
            self._known(source)
        why = next((n.why for n in sources if n.why), "")
        if not why and bool((ids == MERGED).any()):
            why = f"{call.name} in '{call.path}'"
        return self._known(Numbers(tuple(ids.shape), why=why, _ids=ids))

    def _known(self, numbers: Numbers) -> Numbers:
        key = numbers.shape, hash(numbers.ids.numpy().tobytes())
        first = self._same.setdefault(key, numbers)
        return first if first is numbers or torch.equal(first.ids, numbers.ids) else numbers

    # --- functions that move tokens ---

    def _view(self, call: TorchCall) -> Numbers | None:
        if not call.numbered:
            return None
        (source, numbers), shape = call.numbered[0], tuple(call.result.shape)
        key = ("view", id(numbers), tuple(source.shape), shape)
        return self._once(
            key, numbers, lambda: self._numbers(narrowed(numbers.over(source.shape).reshape(shape)), call, [numbers])
        )

    def _move(self, call: TorchCall) -> Any:
        source: Any = call.args[0] if call.args else call.kwargs.get("input")
        if (numbers := self.of(source)) is None:
            return None
        key = key_of(call.args[1:], tuple(call.kwargs.items()))
        key = None if key is None else (call.func, id(numbers), tuple(source.shape), key)
        return self._once(key, numbers, lambda: self._moved(call, source, numbers))

    def _moved(self, call: TorchCall, source: Tensor, numbers: Numbers) -> Any:
        rest: Sequence[Any] = [on_cpu(x) for x in call.args[1:]]
        kwargs: Mapping[str, Any] = {name: on_cpu(x) for name, x in call.kwargs.items() if name != "input"}
        ids, thin = numbers.over(source.shape), numbers.shape[-1] == 1
        if thin and call.name == "getitem" and rest and leaves_last(rest[0], source.ndim):
            ids = ids[..., :1]
        elif thin and call.name in ("gather", "take_along_dim"):
            ids, rest, kwargs = thinned(ids, rest, kwargs)
        moved = call.func(ids, *rest, **kwargs)
        if thin and call.name in ("gather", "take_along_dim"):  # an index may take the features of a position from several tokens
            moved = torch.where((moved == moved[..., :1]).all(-1, keepdim=True), moved[..., :1], MERGED)
        if isinstance(moved, (tuple, list)):
            return [self._numbers(narrowed(part), call, [numbers]) for part in moved]
        return self._numbers(narrowed(moved), call, [numbers])

    def _cat(self, call: TorchCall) -> Numbers | None:
        tensors, rest = (call.args[0], call.args[1:]) if call.args else (call.kwargs["tensors"], ())
        kwargs = {name: value for name, value in call.kwargs.items() if name != "tensors"}
        numbers = [self.of(x) for x in tensors]
        numbered = [n for n in numbers if n is not None]
        if not numbered:
            return None
        are_new = len(numbered) < len(numbers) and not any(map(self._is_after_attention, tensors))
        shapes = [tuple(x.shape) for x in tensors]
        if call.name in CONCATENATIONS:
            dim: int = (rest[0] if rest else kwargs.get("dim", 0)) % len(shapes[0])
            if all(n.shape[dim] == 1 for n in numbered) and min(shape[dim] for shape in shapes) > 1:  # features side by side
                both = zip(tensors, numbers, strict=True)
                after = [n for x, n in both if n is not None and self._is_after_attention(x)] or numbered
                return after[0] if not are_new and all(are_equal(n, after[0]) for n in after) else None
            if dim < len(shapes[0]) - 1 and all(n.shape[-1] == 1 for n in numbered):  # the same for all features
                shapes = [(*shape[:-1], min(shape[-1], 1)) for shape in shapes]

        def join() -> Numbers:
            none = torch.tensor(NONE)
            parts = [none.expand(s) if n is None else n.over(s) for n, s in zip(numbers, shapes, strict=True)]
            return self._numbers(narrowed(call.func(parts, *rest, **kwargs)), call, numbered)

        key = key_of(rest, tuple(kwargs.items()))
        joined: Numbers = self._once(key and (call.func, key, *map(id, numbers), *shapes), numbers, join)
        call.parts = joined if are_new else None  # before the first attention they are new tokens
        return None if are_new else joined

    def _pad(self, call: TorchCall) -> Numbers | None:
        if not call.numbered:
            return None
        source, numbers = call.numbered[0]
        amounts = call.args[1] if len(call.args) > 1 else call.kwargs["pad"]
        mode = call.args[2] if len(call.args) > 2 else call.kwargs.get("mode", "constant")
        if mode != "constant":
            return None
        amounts = [int(x) for x in amounts]
        kept = [0 if numbers.shape[-1 - i // 2] == 1 and source.shape[-1 - i // 2] > 1 else x for i, x in enumerate(amounts)]
        if not any(kept):
            return numbers
        key = ("pad", id(numbers), tuple(source.shape), tuple(kept))
        make = lambda: self._numbers(functional.pad(numbers.ids, kept, value=NONE), call, [numbers])  # noqa: E731
        call.parts = self._once(key, numbers, make)
        return call.parts if self._is_after_attention(source) else None

    def _write(self, call: TorchCall) -> Numbers | None:
        """A function that puts numbered values at some positions of a tensor."""
        args = list(call.args)
        if call.name == "setitem":
            base, index, value = args
            if self.of(value) is None:  # a constant masks, and moves nothing
                return self.of(base)
            ids = self._base(base).clone()
            ids[on_cpu(index)] = self._base(value)
            return self._numbers(narrowed(ids), call, [n for _, n in call.numbered])
        if call.name == "copy":
            return self._kept(call, [(x, n) for x, n in call.numbered if x is args[1]])
        values = [x for x in (*args[1:], *call.kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        if call.name == "where":
            numbers = [n for _, n in call.numbered]
            if len(numbers) < 2 or numbers[0] is numbers[1] or are_equal(*numbers[:2]):
                return self._kept(call, call.numbered[:1])
        elif not any(self.of(x) is not None for x in values[-1:]) or call.kwargs.get("accumulate"):
            return self.of(args[0])
        thin = self._thin_write(call)
        over = [self._put(x, thin) for x in args]
        over[0] = over[0].clone()  # the function may write into it
        ids = call.func(*over, **{name: self._put(x, thin) for name, x in call.kwargs.items()})
        return self._numbers(narrowed(ids), call, [n for _, n in call.numbered])

    def _sum(self, call: TorchCall) -> Numbers | None:
        """A function that adds numbered values to some positions of a tensor."""
        base, dim, index, value = call.args[:4]
        if self.of(value) is None:
            return self.of(base)
        flat = self._thin_write(call)
        ids, index, values = self._put(base, flat), self._put(index, flat), self._put(value, flat)
        return self._numbers(narrowed(summed(ids, dim, index, values)), call, [n for _, n in call.numbered])

    def _base(self, tensor: Tensor) -> Tensor:
        numbers = self.of(tensor)
        return torch.full(tensor.shape, NONE) if numbers is None else numbers.over(tensor.shape)

    def _thin_write(self, call: TorchCall) -> bool:
        """Whether a write does the same for all features, the last dimension."""
        tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
        numbers = [self.of(x) for x in tensors]
        same = len({x.shape[-1] for x in tensors if x.ndim > 1 and x.is_floating_point()}) == 1
        flat = all(n is None or n.shape[-1] == 1 for n in numbers)
        indices = [x for x in tensors if not x.is_floating_point()]
        return same and flat and all(is_flat(x, call.result.ndim) for x in indices)

    def _put(self, value: Any, thin: bool) -> Any:
        """An argument of a write, over numbers."""
        if not isinstance(value, Tensor):
            return value
        value = self._base(value) if value.is_floating_point() else value.cpu()
        return value[..., :1] if thin and value.ndim > 1 else value

    # --- products ---

    def _product(self, call: TorchCall) -> Numbers | None:
        """A matrix product: a row is of the token of the first factor's row. A product with another matrix mixes tokens."""
        if not call.numbered:
            return None
        factors = call.args[-2:] if call.name in ("baddbmm", "addmm", "addbmm") else call.args[:2]
        if call.name == "rmatmul":
            factors = factors[::-1]
        first, second = (self.of(x) for x in factors)
        mixes = second is not None and self._is_after_attention(factors[1]) and not self._is_after_attention(factors[0])
        if first is not None and first.shape[-1] == 1 and not mixes:
            return self._kept(call, [(factors[0], first)])
        if second is None or factors[1].ndim < 2:
            return None
        if second.shape[-2] == 1:
            return self._kept(call, [(factors[1], second)])
        return self._mixed(call) if mixes else None

    def _mixed(self, call: TorchCall) -> Numbers:
        return self._numbers(torch.full((1,) * call.result.ndim, MERGED), call)

    def _einsum(self, call: TorchCall) -> Numbers | None:
        equation, operands = call.args[0], call.args[1:]
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = operands[0]
        if not isinstance(equation, str) or "..." in equation or "->" not in equation:
            return None
        sources, _, product = equation.replace(" ", "").partition("->")
        is_after = False
        for labels, x in zip(sources.split(","), operands, strict=True):
            numbers = self.of(x)
            if numbers is None:
                continue
            is_after = is_after or self._is_after_attention(x)
            if all(label in product for label, size in zip(labels, numbers.shape, strict=True) if size > 1):
                ids = numbers.ids.permute([labels.index(label) for label in product if label in labels])
                for dim, label in enumerate(product):
                    ids = ids if label in labels else ids.unsqueeze(dim)
                return self._numbers(ids, call, [numbers])
        return self._mixed(call) if is_after else None


_Rule = Callable[[TokenMoves, TorchCall], Any]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(VIEWS, TokenMoves._view),
    **dict.fromkeys(MOVES, TokenMoves._move),
    **dict.fromkeys(BROADCASTS, TokenMoves._expand),
    **dict.fromkeys(JOINS, TokenMoves._cat),
    **dict.fromkeys(WRITES, TokenMoves._write),
    **dict.fromkeys(SUMS, TokenMoves._sum),
    **dict.fromkeys(PRODUCTS, TokenMoves._product),
    "pad": TokenMoves._pad,
    "einsum": TokenMoves._einsum,
}
