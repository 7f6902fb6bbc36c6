"""Queries and keys of chosen layers of any model, as the congruence losses take them, while the model runs as it is.

Nothing of the model is replaced: a mode of torch sees the attention calls, and the products in front of a softmax where a module
writes attention out by hand. So dropout, autocast and gradients are those of the model. What torch.compile made of it runs as
plain Python meanwhile, since compiled code shows no calls.

Words and image are told apart by where tokens come from. Every tensor remembers whether it was computed from an input with text
or with an image. A query's tokens are those that its own residual stream comes from; what cross-attention adds does not count.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast._tensors import expand_heads
from vlattn_fast.interpret._run import uncompiled, unwrapped
from vlattn_fast.interpret.multihead import heads
from vlattn_fast.interpret.trace import SCORE_ATTENTION, SOFTMAX

Pair = tuple[Tensor, Tensor]  # query (B, H, N, D), key (B, H, M, D)
MODALITIES = ("text", "image")
TEXT, IMAGE = 1, 2  # as bits: what a tensor was computed from
_KINDS = {"text": TEXT, "image": IMAGE}
_TEXT_INPUTS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds", "text")
_IMAGE_INPUTS = ("pixel_values", "visual_feats", "visual_embeds", "region_features", "image", "images", "video")
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


@dataclass(frozen=True)
class CapturedLayer:
    """One layer's queries and keys, (B, H, N, D) each, keys with as many heads as queries.

    text, image: of self-attention over words alone, and over image tokens alone. cross: ((text query, image key), (image query,
    text key)) where the model has cross-attention both ways. joint: of self-attention over words and image tokens together. None
    where the model has no such attention.
    """

    text: Pair | None = None
    image: Pair | None = None
    cross: tuple[Pair, Pair] | None = None
    joint: Pair | None = None

    def split(self, num_text_tokens: int) -> tuple[Pair, Pair, None]:
        """(text, image, cross) of one sequence with the words first, as `congruence_loss` takes them; cross is None, since one
        attention serves for all."""
        if self.joint is None:
            raise ValueError("split must be called for a model that attends to words and image together; got two streams")
        query, key = self.joint
        if isinstance(num_text_tokens, bool) or not 0 <= num_text_tokens <= query.shape[2]:
            raise ValueError(f"num_text_tokens must be from 0 to {query.shape[2]}, the tokens; got {num_text_tokens!r}")
        n = num_text_tokens
        return (query[:, :, :n], key[:, :, :n]), (query[:, :, n:], key[:, :, n:]), None


@dataclass(frozen=True)
class _Call:
    kinds: int  # of the queries' tokens
    key_kinds: int
    query: Tensor
    key: Tensor


def capture_attention(
    model: nn.Module, *, layers: int | Sequence[int] = -1, modality: Mapping[str, str] | None = None
) -> AttentionCapture:
    """A context in which a forward pass of `model` leaves the queries and keys of some layers behind, with their gradients.

    The last forward pass within it counts, and what it left stays readable behind the context. DDP, FSDP, PEFT and torch.compile
    are seen through; a compiled model runs uncompiled within.

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention, this package's, or
            written out by hand as matmul, softmax, matmul.
        layers: which ones, negative from the end; several give a sequence. They are counted for words, image and both
            together by themselves.
        modality: input name -> "text" or "image", for inputs that do not have the usual names (input_ids, pixel_values,
            visual_feats, ...).

    Raises:
        ValueError: within, a forward pass without such attention, or with fewer layers; an input of unknown modality.

    >>> from vlattn_fast.models import UNITER, UNITERConfig
    >>> config = UNITERConfig(99, 32, 2, 4, 64, region_dim=8)
    >>> with capture_attention(UNITER(config)) as seen:
    ...     outputs = seen.model(input_ids=torch.ones(2, 5, dtype=torch.int64), region_features=torch.randn(2, 3, 8),
    ...                          region_positions=torch.randn(2, 3, 7))
    >>> text, image, cross = seen.split(5)
    >>> text[0].shape, image[1].shape
    (torch.Size([2, 4, 5, 8]), torch.Size([2, 4, 3, 8]))
    """
    return AttentionCapture(model, layers, modality)


class AttentionCapture:
    """What `capture_attention` gives: a context, and then the layers. With one layer, its fields are attributes of this."""

    def __init__(self, model: nn.Module, layers: int | Sequence[int], modality: Mapping[str, str] | None) -> None:
        self.model = model
        self._single = isinstance(layers, int)
        asked: Any = (layers,) if isinstance(layers, int) else tuple(layers)
        if not asked or any(isinstance(i, bool) or not isinstance(i, int) for i in asked):
            raise ValueError(f"layers must be an int, or some; got {layers!r}")
        for name, kind in (modality or {}).items():
            if kind not in MODALITIES:
                raise ValueError(f"modality must be one of {MODALITIES}; got {kind!r} for {name!r}")
        self._layers: tuple[int, ...] = asked
        self._modality = dict(modality or {})
        self._captured: list[CapturedLayer] | None = None
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> AttentionCapture:
        if self._stack is not None:
            raise RuntimeError("capture_attention must not be entered twice")
        inner = unwrapped(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled(inner))
            stack.enter_context(_Mode(inner, self._modality, self._finish))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        self._stack.__exit__(*error)
        self._stack = None

    def __len__(self) -> int:
        return len(self._found())

    def __getitem__(self, index: int) -> CapturedLayer:
        return self._found()[index]

    def _found(self) -> list[CapturedLayer]:
        if self._captured is None:
            raise ValueError("model must have run within capture_attention; got no forward pass")
        return self._captured

    @property
    def layer(self) -> CapturedLayer:
        """The only layer that was asked for."""
        if not self._single:
            raise ValueError(f"layers must be one index where fields are read directly; got {len(self)}: read capture[i]")
        return self._found()[0]

    @property
    def text(self) -> Pair:
        return self._field("text")

    @property
    def image(self) -> Pair:
        return self._field("image")

    @property
    def cross(self) -> tuple[Pair, Pair] | None:
        return self.layer.cross

    @property
    def query(self) -> Tensor:
        return self._sequence()[0]

    @property
    def key(self) -> Tensor:
        return self._sequence()[1]

    def _sequence(self) -> Pair:
        """Of the joint sequence, or of the only one that there is."""
        layer = self.layer
        pairs = [pair for pair in (layer.text, layer.image) if pair is not None]
        return pairs[0] if layer.joint is None and len(pairs) == 1 else self._field("joint")

    def _field(self, name: str) -> Pair:
        layer = self.layer
        pair: Pair | None = getattr(layer, name)
        if pair is None:
            has = ", ".join(field for field in ("text", "image", "joint") if getattr(layer, field) is not None)
            hint = "; split(num_text_tokens) parts one sequence of both" if name != "joint" and layer.joint is not None else ""
            raise ValueError(f"model must have self-attention over {name} tokens by themselves; got attention over {has}{hint}")
        return pair

    def split(self, num_text_tokens: int) -> tuple[Pair, Pair, None]:
        """(text, image, cross) of one sequence with the words first, see `CapturedLayer.split`."""
        return self.layer.split(num_text_tokens)

    def _finish(self, calls: Sequence[_Call]) -> None:
        own = {kinds: _in_order(c for c in calls if c.kinds == c.key_kinds == kinds) for kinds in (TEXT, IMAGE, TEXT | IMAGE)}
        across = {
            kinds: _in_order(c for c in calls if (c.kinds, c.key_kinds) == kinds) for kinds in ((TEXT, IMAGE), (IMAGE, TEXT))
        }
        lengths = {len(found) for found in own.values() if found}
        if not lengths:
            raise ValueError("model must have self-attention over tokens of text or image; got none in its forward pass")
        for index in self._layers:
            if any(not -n <= index < n for n in lengths):
                raise ValueError(f"layers must be among {min(lengths)} layers; got {index}")
        self._captured = [
            CapturedLayer(
                text=_at(own[TEXT], index),
                image=_at(own[IMAGE], index),
                cross=_both(across[TEXT, IMAGE], across[IMAGE, TEXT], index),
                joint=_at(own[TEXT | IMAGE], index),
            )
            for index in self._layers
        ]


def _at(found: Sequence[Pair], index: int) -> Pair | None:
    return found[index] if found else None


def _both(one: Sequence[Pair], other: Sequence[Pair], index: int) -> tuple[Pair, Pair] | None:
    """Cross-attention both ways, in a layer that has it. Layers are counted from the end, where they meet."""
    last = index if index < 0 else index - len(one)
    fits = len(one) == len(other) and -len(one) <= last < 0
    return (one[last], other[last]) if fits else None


def _in_order(calls: Iterable[_Call]) -> list[Pair]:
    return [(call.query, expand_heads(call.key, call.query.shape[1])) for call in calls]


@dataclass
class _Running:
    """A module whose forward pass is under way.

    product: the last matmul in it, its operands and the shape of its result; written: the kinds of the queries of attention that
    it writes out by hand.
    """

    product: tuple[Tensor, Tensor, torch.Size] | None = None
    written: int = 0


class _Mode(TorchFunctionMode):
    """Sees one model's forward passes; calls `finish` with the attention calls of each."""

    def __init__(self, model: nn.Module, modality: Mapping[str, str], finish: Callable[[Sequence[_Call]], None]) -> None:
        super().__init__()
        self._model, self._modality, self._finish = model, modality, finish
        self._mark = f"_vlattn_kinds_{id(self)}"
        self._stack: list[_Running] = []
        self._calls: list[_Call] = []
        self._marked: list[Tensor] = []

    def __enter__(self) -> _Mode:
        self._thread = threading.get_ident()
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it hides the attention of nn.MultiheadAttention in eval mode
        self._handles: list[Any] = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for module in self._model.modules():
            if not isinstance(module, (nn.Softmax, nn.Dropout)):  # whoever asks takes the softmax
                self._handles.append(module.register_forward_pre_hook(self._push))
                self._handles.append(module.register_forward_hook(self._pop, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self._fast)
        for handle in self._handles:
            handle.remove()
        self._forget()

    def _forget(self) -> None:
        for tensor in self._marked:
            if hasattr(tensor, self._mark):
                delattr(tensor, self._mark)
        self._stack, self._calls, self._marked = [], [], []

    # --- modules ---

    def _push(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == self._thread:
            self._stack.append(_Running())

    def _pop(self, module: nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() != self._thread or not self._stack:
            return
        run = self._stack.pop()
        if run.written:
            self._set(result, run.written)
        if module is self._model and result is not None:
            calls = self._calls
            self._forget()
            self._finish(calls)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The inputs of a forward pass get the kinds that their names tell."""
        if threading.get_ident() != self._thread:
            return
        self._calls, self._learns = [], torch.is_grad_enabled()
        named = list(kwargs.items())
        if args:
            names = [name for name in inspect.signature(module.forward).parameters if name not in ("args", "kwargs")]
            named += list(zip(names, args, strict=False))
        for name in self._modality:
            if name not in dict(named):
                raise ValueError(f"modality must name inputs of the model; got {name!r}, the inputs are {[n for n, _ in named]}")
        for name, value in named:
            kind = _KINDS.get(self._modality.get(name, ""), _kind_of(name))
            if kind and isinstance(value, Tensor):
                setattr(value, self._mark, kind)
                self._marked.append(value)

    # --- tensors ---

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._stack:
            return func(*args, **kwargs)
        run = self._stack[-1]
        attends = self._attends(func, args, kwargs)
        result = func(*args, **kwargs)
        if attends is not None:
            self._set(result, attends)
            return result
        if func in _PRODUCTS and isinstance(result, Tensor) and result.ndim == 4:
            run.product = args[0], args[1], result.shape
        elif func in SOFTMAX:
            self._softmax(run, args[0])
        kinds = self._kinds(args) | self._kinds(kwargs.values())
        if kinds:
            self._set(args[0] if result is None and args else result, kinds, also=True)
        return result

    def _attends(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """The kinds of the queries, where `func` is attention; the call is kept."""
        if func is functional.scaled_dot_product_attention or func is SCORE_ATTENTION:
            query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            kinds = self._kinds((query,)), self._kinds((key,))
            query, key = (x.unsqueeze(1) if x.ndim == 3 else x for x in (query, key))
            return self._keep((query, key), kinds)
        if func is functional.multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            return self._multihead(bound.arguments)
        return None

    def _multihead(self, given: Mapping[str, Any]) -> int:
        """nn.MultiheadAttention splits into heads where no mode sees it, so its projections are made once more."""
        query, key, size = given["query"], given["key"], given["embed_dim_to_check"] // given["num_heads"]
        kinds = self._kinds((query,)), self._kinds((key,))
        if given["use_separate_proj_weight"]:
            weights = given["q_proj_weight"], given["k_proj_weight"]
        else:
            weights = given["in_proj_weight"].chunk(3)[:2]
        biases = (None, None) if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)[:2]
        states = (x[:, None] if x.ndim == 2 else x for x in (query, key))  # torch takes (N, C) as well as (N, B, C)
        projected = (functional.linear(x.transpose(0, 1), w, b) for x, w, b in zip(states, weights, biases, strict=True))
        query, key = (heads(x, size) for x in projected)
        return self._keep((query, key), kinds)

    def _softmax(self, run: _Running, scores: Tensor) -> None:
        """A module takes a softmax itself: its last product was of queries and keys, if it has the shape of the scores."""
        if run.product is None or run.product[2] != scores.shape:
            return
        query, key, _ = run.product
        run.written |= self._keep((query, key.transpose(-1, -2)), (self._kinds((query,)), self._kinds((key,))))
        run.product = None

    def _keep(self, pair: Pair, kinds: tuple[int, int]) -> int:
        """Keeps a call, and gives the kinds of its queries."""
        if self._learns and not torch.is_grad_enabled():
            raise ValueError(
                "model must keep the graph of its attention; got a call without gradients, as torch.utils.checkpoint makes with "
                "use_reentrant=True"
            )
        self._calls.append(_Call(*kinds, *pair))
        return kinds[0]

    def _kinds(self, values: Any) -> int:
        """What `values` were computed from."""
        kinds = 0
        for value in values:
            if isinstance(value, Tensor):
                kinds |= getattr(value, self._mark, 0)
            elif isinstance(value, (tuple, list)):
                kinds |= self._kinds(value)
        return kinds

    def _set(self, value: Any, kinds: int, also: bool = False) -> None:
        if isinstance(value, Tensor):
            setattr(value, self._mark, kinds | (getattr(value, self._mark, 0) if also else 0))
        elif isinstance(value, (tuple, list)):
            for part in value:
                self._set(part, kinds, also)
        elif isinstance(value, Mapping):
            for part in value.values():
                self._set(part, kinds, also)


def _kind_of(name: str) -> int:
    if name in _TEXT_INPUTS:
        return TEXT
    return IMAGE if name in _IMAGE_INPUTS or name.startswith("pixel_values") else 0
