"""Inputs prepared one by one, grouped by shape, and explained in batches."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.attach.session import unwrapped
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.dataset.items import Item, Items
from vlattn_fast.interpret.dataset.pieces import split
from vlattn_fast.interpret.explaining.answer import token_ids, with_prompts
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.interpret.explaining.inputs import prepare_inputs
from vlattn_fast.interpret.explaining.loading import build_inputs, check_parts, generate, on_device
from vlattn_fast.interpret.explaining.similarity import SIMILARITY
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import method_of
from vlattn_fast.interpret.result.explanation import Explanation

_WINDOW = 32  # batches whose inputs may wait for others of their shape


@dataclass(frozen=True)
class Options:
    """The options that decide the results; text, target and answer are for inputs without them."""

    model: Any  # directory or id; or what tells a model in memory
    method: Method
    text: tuple[str, ...] = ()
    target: int | str | None = None
    answer: str | None = None
    generate: int | None = None  # the most tokens of the model's own answer, which is explained if an input has none
    dtype: str | None = None  # of the model; None = the stored dtype
    position: str | int | None = None  # the explained token; None = the adapter's

    @classmethod
    def check(cls, model: str | Path | nn.Module, *, method: str | Method = "gradient", **options: Any) -> Options:
        """The options, checked; raises the errors of `explain_dataset`."""
        if not isinstance(model, (str, Path, nn.Module)):
            raise TypeError(f"model must be a directory, an id or a torch.nn.Module; got {type(model).__name__}")
        names = [field.name for field in fields(cls) if field.name != "model"]
        if unknown := [name for name in options if name not in names]:
            raise TypeError(f"options must be among {', '.join(names)}; got {', '.join(unknown)}")
        text, dtype = options.get("text", ()), options.get("dtype")
        if dtype is not None and not (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)):
            raise ValueError(f"dtype must be the name of a torch dtype, e.g. 'bfloat16'; got {dtype!r}")
        if dtype is not None and isinstance(model, nn.Module):
            raise ValueError(f"dtype must be None for a model in memory, which has one; got {dtype!r}")
        texts = (text,) if isinstance(text, str) else tuple(text)
        told = _told(unwrapped(model)) if isinstance(model, nn.Module) else str(model)
        return cls(**{**options, "text": texts, "model": told, "method": method_of(method)})

    @property
    def settings(self) -> dict[str, Any]:
        """All options for JSON, with those of the method by name, defaults included: a release with other defaults must not
        resume a run. TypeError for options that JSON cannot hold."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = {name: getattr(self.method, name) for name in self.method.option_names()}
        try:
            stored: dict[str, Any] = json.loads(json.dumps({**told, "method": self.method.name, **chosen}))
        except TypeError:
            raise TypeError(
                f"method must have options that JSON can store, i.e. names and numbers; got {self.method.label}"
            ) from None
        return stored


def _told(model: nn.Module) -> dict[str, str]:
    """The class of a model in memory and a hash of its weights: a later run must have the same."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        if isinstance(x, Tensor) and not x.is_meta:
            numbers = x.detach().flatten().double()
            digest.update(f"{name} {tuple(x.shape)} {float(numbers.sum())!r} {float(numbers.square().sum())!r}".encode())
    return {"class": type(model).__name__, "weights": digest.hexdigest()[:16]}


@dataclass(frozen=True)
class Prepared:
    """One input as tensors."""

    number: int  # its number in the dataset
    item: Item
    inputs: dict[str, Any]
    count: int  # of its samples in a batch
    target: list[Any] | None  # of each sample; for CLIP-like models the text that its image is already paired with
    answer: list[int] | None  # token ids
    shape: Any  # equal for all inputs of one batch, so that no input is padded for another


@dataclass(frozen=True)
class Failed:
    """An input that could not be explained, and the reason."""

    number: int
    item: Item
    error: str


def reason(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"


def in_threads(make: Callable[[int], Any], numbers: Iterable[int], workers: int) -> Iterator[Any]:
    """`make` of each number, in order, with `workers` threads that run a little ahead; 0 = in this thread."""
    if workers == 0:
        yield from map(make, numbers)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Any] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Batches:
    """Explains items with one model."""

    def __init__(self, model: Any, processor: Any, options: Options) -> None:
        self.model, self.processor, self.options = model, processor, options
        adapter = find_adapter(model)
        if adapter is None:
            name = type(model).__name__
            raise ValueError(f"{name} has no adapter. Register one with va.register_adapter")
        if not adapter.scoring.predicts and (options.generate is not None or options.answer is not None):
            raise ValueError(f"answer and generate must be used with a decoder; got {type(model).__name__}")
        self.adapter = adapter
        self._of_thread = threading.local()

    def check_parts(self, items: Items) -> None:
        """ValueError if every input lacks an image or a text that the model takes, or has one that it does not take."""
        refusals = []
        for image, text in sorted(items.parts):
            try:
                check_parts(self.model, self.processor, image, text or bool(self.options.text))
            except ValueError as error:
                refusals.append(error)
        if refusals and len(refusals) == len(items.parts):
            raise refusals[0]

    def prepare(self, number: int, item: Item) -> Prepared | Failed:
        """The processor's tensors of one item. Threads may call it."""
        try:
            return Failed(number, item, item.problem) if item.problem is not None else self._prepared(number, item)
        except Exception as error:
            return Failed(number, item, reason(error))

    def _prepared(self, number: int, item: Item) -> Prepared:
        if not hasattr(self._of_thread, "processor"):  # a fast tokenizer does not support two threads at once
            self._of_thread.processor = copy.deepcopy(self.processor)
        processor, options = self._of_thread.processor, self.options
        if item.inputs is not None:
            inputs = dict(item.inputs)
        else:
            inputs = build_inputs(self.model, processor, item.load_image(), item.texts or options.text)
        targets: list[Any] | None
        target = item.target if item.target is not None else options.target
        chosen = item.answer if item.answer is not None else options.answer
        if target is not None and (chosen is not None or options.generate is not None):
            raise ValueError("answer must be None if target is given; got both")
        answer = None if chosen is None else token_ids(chosen, processor, 1)[0]  # a text, or the ids of one
        if self.adapter.scoring.pairs:
            inputs, targets = prepare_inputs(self.model, inputs, self.adapter, target)
            count = len(targets or [])
        else:
            others = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.ndim]
            count = len(inputs[next(name for name in ("input_ids", "pixel_values", *others) if name in inputs)])
            targets = None if target is None else [target] * count
            if target == SIMILARITY and not self.adapter.scoring.predicts and count != 2:
                raise ValueError(f"text must be two texts, whose similarity is explained; got {count}")
        alike = [(k, (v.shape[1:], v.dtype) if isinstance(v, Tensor) else repr(v)) for k, v in sorted(inputs.items())]
        shape = (*alike, targets is None, None if answer is None else len(answer))
        return Prepared(number, item, inputs, count, targets, answer, shape)

    def explained(self, stream: Iterable[Prepared | Failed], batch_size: int) -> Iterator[list[tuple[Any, Explanation | str]]]:
        """Yields, batch by batch, each input with its explanation, or with the reason of the failure."""
        groups: dict[Any, list[Prepared]] = {}
        for one in stream:
            if isinstance(one, Failed):
                yield [(one, one.error)]
                continue
            group = groups.setdefault(one.shape, [])
            if group and _count(group) + one.count > batch_size:
                yield self._explain(group)
                group = groups[one.shape] = []
            group.append(one)
            if _count(group) >= batch_size:
                yield self._explain(groups.pop(one.shape))
            elif sum(map(_count, groups.values())) > _WINDOW * batch_size:
                yield self._explain(groups.pop(max(groups, key=lambda shape: _count(groups[shape]))))
        for group in groups.values():
            yield self._explain(group)

    def _explain(self, group: list[Prepared]) -> list[tuple[Any, Explanation | str]]:
        """The results of one batch; if the batch fails, those of its inputs one by one, so that only bad inputs fail."""
        try:
            return self._batch(group)
        except torch.AcceleratorError:
            raise  # the device runs nothing after this error
        except Exception as error:
            if len(group) == 1:
                return [(group[0], reason(error))]
        return [result for one in group for result in self._explain([one])]

    def _batch(self, group: list[Prepared]) -> list[tuple[Any, Explanation | str]]:
        first = group[0]
        joined = {
            name: torch.cat([one.inputs[name] for one in group]) if isinstance(value, Tensor) else value
            for name, value in first.inputs.items()
        }
        inputs = on_device(joined, self.model)
        answer = None if first.answer is None else [one.answer or [] for one in group]
        if answer is None and self.options.generate is not None:
            answer = generate(self.model, inputs, self.options.generate)
            if len({len(row) for row in answer}) > 1:  # a batch has answers of one length
                by_length: dict[int, list[Prepared]] = {}
                for one, row in zip(group, answer, strict=True):
                    by_length.setdefault(len(row), []).append(replace(one, answer=row))
                return [result for part in by_length.values() for result in self._explain(part)]
        if answer is not None:
            answer = with_prompts(answer, inputs, self.adapter)
        paired, options = self.adapter.scoring.pairs, self.options
        targets = None if paired or first.target is None else [index for one in group for index in one.target or []]
        alike = SIMILARITY if targets and set(targets) == {SIMILARITY} else targets
        how: dict[str, Any] = {"method": options.method, "position": options.position, "processor": self.processor}
        explanation = explain(self.model, inputs, target=alike, answer=answer, **how)
        results: list[tuple[Any, Explanation | str]] = []
        for one, piece in zip(group, split(explanation, [one.count for one in group]), strict=True):
            results.append((one, replace(piece, target=one.target) if paired else piece))
        return results


def _count(group: list[Prepared]) -> int:
    return sum(one.count for one in group)
