"""Traces the attention between image and text in a diffusion model, call by call, and adds up the attention to each text token.

A call is one of torch's scaled_dot_product_attention within the model's forward pass. Three kinds attend to text:

- cross-attention: N image queries, L text keys (UNets, PixArt);
- image queries with text and image keys together (UNets with added keys);
- joint attention: N + L queries and keys, one part after the other (SD3, Flux). The concatenation shows the order.

Other calls are ignored (self-attention, keys of image prompts). The rows of the image's queries become one (N, L) head mean per
call, which is added to the sum of its grid. No map per head, layer or denoising step is stored.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast import attention_map
from vlattn_fast.attach.events import Attend, AttentionEvent, ModuleRun, Subscriber
from vlattn_fast.attach.observer import Observer

Grid = tuple[int, int]
Layers = Callable[[str], bool]
TEXT_FIRST = {"FluxTransformer2DModel": True, "SD3Transformer2DModel": False}  # for text and image of one length
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_ELEMENTS = 1 << 20  # of a head mean whose keys are not all text


@dataclass
class _Module:
    """What is known of a module that runs."""

    run: ModuleRun
    image_grid: Grid | None  # h, w of the patches of its (B, C, H, W) argument
    tokens: int | None  # N of its (B, N, C) argument
    text: int | None  # L of its `encoder_hidden_states`
    called: bool = False  # whether the module called torch's attention
    counted: bool = False  # and whether for the text


class _Part(NamedTuple):
    """The counted part of an attention call: the queries of the image and the keys of the text."""

    grid: Grid
    queries: slice
    columns: slice


class TextAttention(Subscriber):
    """Adds up head means of attention to text in a denoising network without wrappers. `guidance` returns the kind of
    classifier-free guidance of each forward pass; the other arguments are those of `prompt_maps`."""

    def __init__(
        self, model: nn.Module, guidance: Callable[[], str], text_first: bool | None, grid: Grid | None, layers: Layers | None
    ) -> None:
        self.model, self.guidance, self.layers = model, guidance, layers
        self.sums: dict[Grid, Tensor] = {}  # (h, w) -> (B, h * w, L)
        self.maps = self.steps = 0  # heads of all calls in all passes; forward passes
        self._given_text_first, self._given_grid = text_first, grid
        self._chosen = (lambda path: True) if layers is None else layers
        self._modules: list[_Module] = []  # those that run, the outermost first
        self._passes = 0

    def observer(self) -> Observer:
        return Observer(self.model, [self], starts=[self.model])

    def on_end(self) -> None:
        self._modules.clear()

    def on_enter(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module = run.module
        assert module is not None
        if module is not self.model and next(module.children(), None) is None:
            return
        if module is self.model:
            self._begin(args, kwargs)
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        text = _length(argument(module, "encoder_hidden_states", args, kwargs))
        if text and text not in self._texts and (module is self.model or hasattr(module, "processor")):
            self._texts.append(text)
        size = getattr(getattr(module, "config", None), "patch_size", None)
        size = size if isinstance(size, int) and size > 0 else 1
        image_grid = (shape[2] // size, shape[3] // size) if len(shape) == 4 else None
        tokens = shape[1] if len(shape) == 3 else None
        self._modules.append(_Module(run, image_grid, tokens, text))

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass of the whole model."""
        self._modules.clear()
        self._guided = self.guidance()
        self._counts = not (self._guided == "calls" and self._passes % 2)
        self._passes += 1
        self._text_first: dict[tuple[int, int], bool | None] = {}  # (L, N) -> the order of the last concatenation
        self._before, self._other_sizes = self.maps, set[tuple[int, int]]()
        self._texts: list[int] = []  # lengths in this pass: the model's text, and texts that blocks extended
        self._packed: tuple[Grid | None, int] = None, 0  # the image's grid, and the number of image tokens
        if self._given_grid is not None:
            self._packed = self._given_grid, self._given_grid[0] * self._given_grid[1]
        elif self._counts:
            ids, shapes = (argument(self.model, name, args, kwargs) for name in ("img_ids", "img_shapes"))
            if isinstance(ids, Tensor):
                self._packed = _grid_of(ids), ids.shape[-2]
            elif shapes:  # (frames, h, w) of each image of each sample; the first one is generated
                images = shapes[0] if isinstance(shapes[0][0], (tuple, list)) else shapes[:1]
                frames, height, width = images[0]
                self._packed = (height, width) if frames == 1 else None, sum(f * h * w for f, h, w in images)

    def on_leave(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        while self._modules and self._modules[-1].run.number > run.number:
            self._modules.pop()  # left by an error that the model has caught
        if not self._modules or self._modules[-1].run is not run:
            return
        module = self._modules.pop()
        if output is None or not self._counts:
            return
        if not module.called and self._should_attend(module):
            raise ValueError(
                f"model must compute attention by torch's scaled_dot_product_attention; got {_computed_by(run.module)} in "
                f"'{run.path}', which did not call it (AttnProcessor2_0 and the backend 'native' do)"
            )
        if run.module is self.model:
            if self.maps == self._before:
                shapes = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(self._other_sizes)) or "none"
                way = "; pass patches=va.PatchGrid(rows, columns) if the model does not show the grid of its image tokens"
                hint = "" if self._given_grid is not None else way
                hint += "" if self.layers is None else "; layers= chooses the calls that count"
                raise ValueError(
                    f"model must attend from the tokens of one image to encoder_hidden_states; got a forward pass of "
                    f"{type(self.model).__name__} with {module.text or 'no'} text tokens and attention of queries x keys: "
                    f"{shapes}{hint}"
                )
            self.steps += 1

    def _should_attend(self, module: _Module) -> bool:
        """Whether attention between image and text is expected in a module."""
        if not hasattr(module.run.module, "processor") or not self._chosen(module.run.path or ""):
            return False
        if module.text is not None or module.tokens is None:
            return module.text is not None
        return any(self._grid(module.tokens - text) is not None for text in self._texts)

    def on_result(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func in _CONCATENATIONS and self._modules and self._counts:
            self._concatenation(*args, **kwargs)

    def on_attention(self, event: AttentionEvent, attend: Attend) -> Any:
        if self._modules and self._counts and event.value is not None and event.inputs is None:
            self._count(event)
        return attend(event)

    def _count(self, event: AttentionEvent) -> None:
        modules = reversed(self._modules)
        module = next((each for each in modules if hasattr(each.run.module, "processor")), self._modules[-1])
        query, key, options = event.query, event.key, dict(event.masks or {})
        part = None if event.is_one_head else self._part(module, query.shape[2], key.shape[2])
        module.called = True
        if part is None:
            self._other_sizes.add((query.shape[-2], key.shape[-2]))
            return
        path, is_processor = module.run.path or "", hasattr(module.run.module, "processor")
        if not self._chosen(path) or (module.counted and is_processor):
            return  # a processor's later calls are for image prompts
        module.counted = True
        if options.pop("is_causal"):
            raise ValueError(f"model must attend to the whole text; got causal attention in '{path}'")
        batch, prompted = query.shape[0], slice(None)
        if self._guided == "batch":
            if batch % 2:
                raise ValueError(f"guidance must be 'batch' only if half of the batch is unconditional; got a batch of {batch}")
            prompted = slice(batch // 2, batch)
        if (mask := options.pop("attn_mask")) is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])[prompted, :, part.queries]
        # A mode is off while it handles a call. Sums are made outside of inference mode, so that later calls can add to them.
        with torch.inference_mode(False), torch.no_grad():
            self._add(part, query[prompted, :, part.queries], key[prompted], mask, **options)

    def _add(self, part: _Part, query: Tensor, key: Tensor, attn_mask: Tensor | None, **options: Any) -> None:
        batch, heads, queries, keys = *query.shape[:3], key.shape[2]
        length = part.columns.stop - part.columns.start
        for total in self.sums.values():
            if (total.shape[0], total.shape[2]) != (batch, length):
                raise ValueError(
                    f"model must attend to texts of one length and in one batch size in all calls; got {length} tokens and a "
                    f"batch of {batch} after {total.shape[2]} and {total.shape[0]}"
                )
        step = queries if keys == length else max(1, _ELEMENTS // max(1, batch * keys))
        for i in range(0, queries, step):
            mask = None if attn_mask is None else attn_mask[:, :, i : i + step]
            mean = attention_map(query[:, :, i : i + step], key, attn_mask=mask, **options)
            if part.grid not in self.sums:
                self.sums[part.grid] = mean.new_zeros(batch, queries, length)
            total = self.sums[part.grid]
            total[:, i : i + step].add_(mean[:, :, part.columns].to(total), alpha=heads)
        self.maps += heads

    def _part(self, module: _Module, queries: int, columns: int) -> _Part | None:
        grid, text = self._grid(queries), module.text
        if grid is not None and text and columns in (text, queries + text):
            start = 0 if columns == text or self._is_text_first(module, text, queries) else queries
            return _Part(grid, slice(0, grid[0] * grid[1]), slice(start, start + text))
        for text in (self._texts if module.text is None else [module.text]) if queries == columns else ():
            grid = self._grid(queries - text)
            if grid is not None:
                first = self._is_text_first(module, text, queries - text)
                start, size = (text, grid[0] * grid[1]) if first else (0, grid[0] * grid[1])
                return _Part(grid, slice(start, start + size), slice(0, text) if first else slice(queries - text, queries))
        return None

    def _grid(self, tokens: int) -> Grid | None:
        """h, w of the image at the beginning of `tokens` image tokens."""
        grid, total = self._packed
        if grid is not None and tokens == total:
            return grid
        grids = (module.image_grid for module in reversed(self._modules) if module.image_grid is not None)
        return next((grid for grid in grids if grid[0] * grid[1] == tokens > 0), None)

    def _concatenation(self, tensors: Any = (), dim: int = 0, **_: Any) -> None:
        """Notes the order of two concatenated parts of a sequence: (B, N, C), (B, N, H, D) or (B, H, N, D)."""
        if len(tensors) != 2 or tensors[0].ndim != tensors[1].ndim:
            return
        dims = tensors[0].ndim
        dim = dim + dims if dim < 0 else dim
        if (dims, dim) not in ((3, 1), (4, 1), (4, 2)):
            return
        left, right = (tensor.shape[dim] for tensor in tensors)
        if left != right:
            self._text_first[left, right], self._text_first[right, left] = True, False

    def _is_text_first(self, module: _Module, text: int, image: int) -> bool:
        text_first = self._given_text_first
        if text_first is None and text != image:
            text_first = self._text_first.get((text, image))
        if text_first is None:
            text_first = TEXT_FIRST.get(type(self.model).__name__)
        if text_first is None:
            raise ValueError(
                f"text_first must be True or False if the model does not show the order of {text} text and {image} image "
                f"tokens; got None for {type(self.model).__name__}, in '{module.run.path}'"
            )
        return text_first


def argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of a forward pass; None if it is absent."""
    if name in kwargs or not args:
        return kwargs.get(name)
    kind: Any = type(module)  # mypy believes that a class has no hash
    names = _parameters(kind)
    return args[names.index(name)] if name in names[: len(args)] else None


@functools.cache
def _parameters(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]  # without self


def _length(text: Any) -> int | None:
    """L of (B, L, C), or of the first of a tuple, whose rest may be image prompts."""
    if isinstance(text, (tuple, list)) and text:
        text = text[0]
    return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else None


def _grid_of(ids: Tensor) -> Grid | None:
    """h, w of (N, 3) or (B, N, 3) ids: the image, row and column of each token. The first image is the generated one. A
    fourth id may count the tokens of the text.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.ndim != 2 or ids.shape[1] not in (3, 4) or not len(ids):
        return None
    ids = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(ids[:, i].unique().numel()) for i in (1, 2))
    return (height, width) if height * width == len(ids) else None


def _computed_by(module: Any) -> str:
    """The class of a module's processor, and its backend of diffusers."""
    processor = module.processor
    name, backend = type(processor).__name__, getattr(processor, "_attention_backend", "")
    if backend is None:  # the active one of all modules
        registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
        backend = "" if registry is None else registry.get_active_backend()[0]
    return f"{name} (backend {getattr(backend, 'value', backend)!r})" if backend else name
