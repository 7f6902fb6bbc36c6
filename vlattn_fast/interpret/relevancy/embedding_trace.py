"""Sees the embeddings that enter each tower in one forward pass. It asks nothing of the attention, so it takes every model.

The embeddings of a tower with an entry are the input (B, N, C) of the first of its layers that runs. A model without an adapter
has a tower for each input, with the input's name: the embeddings of ids, the pixels of images (B, C, H, W), features (B, N, C),
or (B, C, N) if the model convolves them over N, other numbers one by one. Ids are followed from the input to where they are
looked up: a table of positions is looked up with other numbers, which may be equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast._ground.attachments import add_hook, add_pre_hook
from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.attach.events import ModuleRun, Subscriber, edits_of
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.session import Steps
from vlattn_fast.interpret.adapters.adapter import Adapter
from vlattn_fast.interpret.adapters.image_grids import square_patches
from vlattn_fast.interpret.adapters.pixels import Shape
from vlattn_fast.interpret.relevancy.method import Enter, Link, Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace, note_lost_gradient
from vlattn_fast.interpret.relevancy.tracking.tensor_records import TensorRecords
from vlattn_fast.interpret.relevancy.tracking.token_moves import TokenMoves
from vlattn_fast.interpret.relevancy.tracking.token_numbers import LAYOUTS, LOST, NONE, name_of

# Functions that models call on ids before they look them up, and that leave each in its position.
_ELEMENTWISE = {
    *"clone contiguous detach to type type_as long int cpu cuda".split(),
    *"clamp clip add radd sub mul remainder masked_fill where".split(),
}

Origin = Callable[[TowerTrace, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings that entered a tower, whose tokens lie along all dimensions but the first and that of the features."""

    values: Tensor
    passed: Tensor  # what the model went on with
    dim: int | None  # of the features; None = each number is a token
    origin: Tensor | None  # the embeddings of the method's baseline; None = zeros

    def per_token(self, combine: Callable[[Tensor, int], Tensor], values: Tensor) -> Tensor:
        """`values` like the embeddings, combined over the features: (B, N)."""
        rows = values.unsqueeze(-1) if self.dim is None else values.movedim(self.dim, -1)
        return combine(rows, -1).flatten(1)

    def over_features(self, rows: Tensor) -> Tensor:
        """Relevancy vectors (B, N) in a shape that broadcasts to the embeddings of a batch of B."""
        if self.dim is None:
            return rows.reshape(-1, *self.values.shape[1:])
        sizes = [size for dim, size in enumerate(self.values.shape) if dim not in (0, self.dim % self.values.ndim)]
        return rows.reshape(-1, *sizes).unsqueeze(self.dim)


def without_origin(tower: TowerTrace, values: Tensor) -> Tensor | None:
    """No embeddings of a baseline: it is zero."""
    return None


def unchanged(tower: TowerTrace, values: Tensor, origin: Tensor | None) -> Tensor:
    return values * 1


class EmbeddingTrace(Subscriber):
    """The embeddings of one run of a model. It is a context, and observes the run.

    Args:
        model: the model, without wrappers.
        adapter: it names the towers; if it names none, each input is a tower.
        method: says whether the embeddings have a gradient, and what is constant in its pass.
        origin: gives the embeddings of a baseline for those that enter a tower.
        enter: gives those with which the model continues, see `Method.changes`.
    """

    explains, trains = True, False

    def __init__(
        self, model: nn.Module, adapter: Adapter, method: Method, origin: Origin = without_origin, enter: Enter = unchanged
    ) -> None:
        self.model, self.adapter, self._needs_score = model, adapter, method.needs_score
        self._origin, self._change = origin, enter
        self._records = TensorRecords(model)
        self._moves = TokenMoves(self._records)  # none
        self.towers = [TowerTrace(entry, model, self._moves) for entry in adapter.towers]
        self.calls: list[Link] = []  # none is traced
        self.findings: list[Any] = []
        self.without_gradient: list[str] = []  # the innermost modules in which a gradient ends
        self._names = {module: path for path, module in model.named_modules()}
        self._ids: dict[str, tuple[int, ...]] = {}  # the inputs that hold integers, where no adapter names towers: their shapes
        # Attention is frozen at its calls of torch's and this package's functions.
        self.frozen = method.constants()
        subscribers = [self, *([self.frozen] if method.freeze else [])]
        self._observer = Observer(model, subscribers, parts=[model] if self.frozen.attention else [])

    def __enter__(self) -> Self:
        self._observer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._observer.__exit__(*error)

    @property
    def links(self) -> set[tuple[TowerTrace, TowerTrace]]:
        """The pairs of an explained tower and one that it attends to, if the adapter names them."""
        if self.adapter.towers:
            first = self.towers[0] if self.adapter.bimodal else None
        else:  # of an encoder-decoder
            decoders = (tower for tower in self.towers if tower.name == self.adapter.answers != "input_ids")
            first = next(decoders, None)
        return set() if first is None else {(first, tower) for tower in self.towers if tower is not first}

    # --- the run ---

    def before_run(self) -> None:
        edits_of(None)

    def begins(self, observer: Observer) -> Steps:
        for tower in self.towers:
            hook = observer.hook(functools.partial(self._enter_layer, tower))
            for layer in (layer for layers in tower.calls.lists for layer in self.model.get_submodule(layers).children()):
                yield add_pre_hook(layer, hook, with_kwargs=True)  # the first that runs
        for module in self._names:
            yield add_hook(module, observer.hook(self._at_output))

    def prepare(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that the model is called with: numbers among them are embeddings if no adapter names towers."""
        prepared = dict(arguments)
        for name, value in () if self.adapter.towers else arguments.items():
            if isinstance(value, Tensor) and value.ndim > 1 and not name.endswith("mask"):
                if value.is_floating_point():
                    prepared[name] = self._enter_input(name, value, {3: 2, 4: 1}.get(value.ndim))
                else:
                    self._ids[name] = tuple(value.shape)
                    prepared[name] = value.detach()  # one tensor may be several inputs
                if value.ndim == 3 or name in self._ids:
                    numbers = torch.arange(value.numel(), device=value.device).view(value.shape)
                    self._records.at(prepared[name]).input = (name, numbers)
        return prepared

    # --- embeddings ---

    def _enter_layer(self, tower: TowerTrace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if tower.calls.paths:
            return None
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        number, stream = next(((i, x) for i, x in named if isinstance(x, Tensor) and x.is_floating_point()), (0, None))
        if stream is None or stream.ndim < 3:
            got = "none" if stream is None else tuple(stream.shape)
            raise ValueError(f"model must pass embeddings (B, N, C) to the first layer of tower '{tower.name}'; got {got}")
        flat = stream.flatten(2)  # a model may have several streams
        passed = self._enter(tower, tower.calls.lists[0], flat, 2).view(stream.shape)
        if isinstance(number, int):
            return (*args[:number], passed, *args[number + 1 :]), kwargs
        return args, {**kwargs, number: passed}

    def _source(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The argument of a function that holds an input, if any."""
        several = func in (torch.where, Tensor.__setitem__)
        return next((x for x in (args if several else (*args, kwargs.get("input"))[:1]) if self._records.of(x).input), None)

    def takes_function(self, func: Any) -> bool:
        return func is functional.embedding

    def on_call(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function that embeds an input of a model without an adapter."""
        source = self._source(func, args, kwargs)
        if source is None:
            return NotImplemented
        of, numbers = self._records.at(source).input
        return self._looked_up(of, numbers, func(*args, **kwargs))

    def on_result(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follows inputs of a model without an adapter to the function that embeds them."""
        source = self._source(func, args, kwargs)
        if source is None or func is functional.embedding:
            return
        of, numbers = self._records.at(source).input
        if func is functional.conv1d:
            self._note_convolution(of, numbers)
        into = args[0] if func is Tensor.__setitem__ else result
        try:
            moved = self._numbers_after(func, args, kwargs, source, into)
        except LOST:  # a form of the function that does not take numbers
            moved = None
        for part, part_numbers in zip(into, moved, strict=True) if isinstance(moved, (tuple, list)) else [(into, moved)]:
            if part_numbers is not None:
                self._records.at(part).input = (of, part_numbers)
            elif part is source:
                self._records.at(part).input = None

    def _numbers_after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, result: Any) -> Any:
        """The numbers of the result of a function; None = it does not hold the input any more."""
        (of, numbers), name = self._records.at(source).input, name_of(func)
        numbers = numbers.to(source.device)
        if func is Tensor.__setitem__:
            base, index, value = args
            after = numbers.clone() if base is source else torch.full(base.shape, NONE, device=base.device)
            owner, written = self._records.of(value).input or (None, numbers)
            after[index] = written if owner == of else NONE
            return after
        if name == "pad":
            return func(numbers, *args[1:3], **{"value": NONE} | {x: kwargs[x] for x in ("pad", "mode") if x in kwargs})
        if name in LAYOUTS:
            kwargs = {x: numbers if value is source else value for x, value in kwargs.items()}
            return func(*(numbers if value is source else value for value in args), **kwargs)
        stays = name in _ELEMENTWISE or source.is_floating_point()
        return numbers if stays and isinstance(result, Tensor) and result.shape == source.shape else None

    def _looked_up(self, name: str, numbers: Tensor, output: Tensor) -> Tensor:
        """The embeddings of ids that are looked up, maybe in another order or some of them only, after they have entered."""
        if not (name in self._ids and output.is_floating_point()):
            return output
        shape, at = self._ids[name], numbers.to(output.device).flatten()
        flat, is_token = output.reshape(len(at), output.shape[-1]), at != NONE
        values = flat.new_zeros(prod(shape), flat.shape[1]).index_copy(0, at[is_token], flat[is_token])
        passed = self._enter_input(name, values.view(*shape, -1), -1).reshape(values.shape)
        if not len(values):
            return output
        return torch.where(is_token[:, None], passed[at.clamp(min=0)], flat).view(output.shape)

    def _note_convolution(self, name: str, numbers: Tensor) -> None:
        """Notes along which dimension of features a convolution goes: their tokens lie along it."""
        places = numbers.flatten(0, -2)[0]  # of one channel
        tower = next(tower for tower in self.towers if tower.name == name)
        columns = places[places != NONE] % tower.cached[0].values.shape[2]
        if len(columns.unique()) > 1:
            tower.cached = [replace(part, dim=1) for part in tower.cached]
            tower.size = tower.cached[0].values.shape[2]

    def _enter_input(self, name: str, values: Tensor, dim: int | None) -> Tensor:
        tower = next((tower for tower in self.towers if tower.name == name), None)
        if tower is None:
            tower = TowerTrace(None, self.model, self._moves)
            tower.name, tower.grid = name, (values.shape[2], values.shape[3]) if values.ndim == 4 and dim == 1 else None
            self.towers.append(tower)
        return self._enter(tower, name, values, dim)

    def _enter(self, tower: TowerTrace, path: str, values: Tensor, dim: int | None) -> Tensor:
        """Take embeddings in; returns those that the model goes on with."""
        values = values if values.requires_grad or not self._needs_score else values.detach().requires_grad_()
        origin = self._origin(tower, values)
        passed = self._change(tower, values, origin)
        embeddings = Embeddings(values, passed, dim, origin)
        tower.batch, tower.size = embeddings.per_token(torch.sum, values.detach()).shape
        tower.dtype, tower.device, tower.numbers.last = compute_dtype(values), values.device, 0
        tower.calls.paths.append(path)
        tower.enters_gradient(passed)
        tower.cached.append(embeddings)
        return passed

    def _at_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        for tower in self.towers:
            if tower.grid is not None and tower.patches is None and isinstance(first, Tensor):
                tower.patches = _patches_of(module, args, first, tower.grid, only=len(self.towers) == 1 and not self._ids)
        if path := self._names[module]:
            note_lost_gradient(self.without_gradient, path, args, first)

    # --- after the forward pass ---

    def check(self) -> None:
        """ValueError that names the tower, if no embeddings were traced."""
        for tower in self.towers:
            if not tower.calls.paths and not tower.calls.lists:
                raise ValueError(
                    f"method must use attention if an adapter names no layers of a tower, where its embeddings enter; got "
                    f"tower '{tower.name}' of {type(self.model).__name__}. Pass method='gradient'"
                )
            if not tower.calls.paths:
                raise ValueError(
                    f"model must run layers '{tower.calls.lists[0]}' of tower '{tower.name}'; got a forward pass without them"
                )
        if not self.towers:
            raise ValueError(
                "model must embed an input: ids with nn.Embedding, images (B, C, H, W), or features (B, N, C); got "
                f"{type(self.model).__name__}, which embeds none"
            )


def _patches_of(module: nn.Module, args: tuple[Any, ...], output: Tensor, pixels: Shape, only: bool) -> Shape | None:
    """The grid of the patches that a module cuts an image of `pixels` into: a convolution that steps from patch to patch; or, if
    the image is the `only` input, what gives tokens (B, N, C), if N fits squares and at most eight tokens before them.
    None for other modules."""
    if isinstance(module, nn.Conv2d):
        steps = all(size == step > 1 for size, step in zip(module.kernel_size, module.stride, strict=True))
        shape = (output.shape[-2], output.shape[-1])
        whole = bool(args) and tuple(args[0].shape[-2:]) == pixels
        return shape if steps and whole and not pixels[0] % shape[0] and not pixels[1] % shape[1] else None
    if not only or output.ndim != 3 or not output.is_floating_point():
        return None
    fitting = square_patches(output.shape[1], pixels, None)
    return None if fitting is None else fitting[1]
