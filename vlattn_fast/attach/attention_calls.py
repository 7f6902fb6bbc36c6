"""Sees the attention calls of a model while it runs, and whether their tokens come from text or from an image.

A mode of torch sees the calls, and the products in front of a softmax where a module writes attention out by hand. Every tensor
carries a mark: whether it was computed from an input with text or with an image. A query's tokens are of the kind of their
residual stream; the output of cross-attention does not change the kind.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast._ground.marks import add_mark, new_mark, read_mark
from vlattn_fast.attach.current import RUNNING, SCORE_ATTENTION, SOFTMAX, first_argument
from vlattn_fast.attach.multihead import heads, joined_masks
from vlattn_fast.attach.session import Steps, Stepwise, as_mode, overridden
from vlattn_fast.attach.written_scores import WrittenScores
from vlattn_fast.backends.inputs import ScoreAttentionInputs

Pair = tuple[Tensor, Tensor]  # query (B, H, N, D), key (B, H, M, D)
TEXT, IMAGE = 1, 2  # as bits: what a tensor was computed from
_KINDS = {"text": TEXT, "image": IMAGE}
_TEXT_INPUTS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds", "text")
_IMAGE_INPUTS = ("pixel_values", "visual_feats", "visual_embeds", "region_features", "image", "images", "video")
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_SCATTERS = (torch.masked_scatter, Tensor.masked_scatter)
_JOINS = (torch.cat, torch.concat, *_SCATTERS)
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention."""

    kinds: int  # what the tokens of the queries come from, as bits (TEXT, IMAGE)
    key_kinds: int  # and those of the keys
    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, H, M, D)
    # Options of `attention_statistics`; None where hand-written attention does more than scale and mask its scores.
    masks: Mapping[str, Any] | None = None
    score: str = "dot"  # the core score
    again: bool = False  # the module has called attention with these kinds before in this run, as for one image after another
    image: Tensor | None = None  # bool (N) or (B, N), which tokens of a joint sequence are of the image; None = not known


@dataclass
class _Running:
    """A module whose forward pass is under way."""

    product: WrittenScores | None = None  # the module's last matmul
    written: int = 0  # the kinds of the queries of its hand-written attention
    listed: bool = False  # the module is one of a list of modules, as layers are
    calls: list[int] = field(default_factory=list)  # the numbers of the calls within, but not inside a listed module further in
    seen: set[tuple[int, int]] = field(default_factory=set)  # the kinds of queries and keys of its own calls


class _FastPath:
    """torch's process-wide switch for the fast path of nn.MultiheadAttention, as an attribute that `overridden` can set."""

    enabled = property(
        lambda _: torch.backends.mha.get_fastpath_enabled(), lambda _, value: torch.backends.mha.set_fastpath_enabled(value)
    )


_FAST_PATH = _FastPath()


class Watch(Stepwise, TorchFunctionMode):
    """Sees the forward passes of one model, except those that `explain` runs.

    Args:
        modality: input name -> "text" or "image", for inputs without the usual names.
        finish: called after a forward pass with its attention calls.
        sees: called with each attention call's number and the call; the calls are then not kept, and `finish` gets none.
        leaves: called with the number of a call and what the layer around it returned.
        parts: modules whose calls count also outside of a forward pass of the model, as a training step makes them by itself.
        needs_graph: whether calls without gradients are refused in a forward pass with gradients.
    """

    _thread: int | None = None

    def __init__(
        self,
        model: nn.Module,
        modality: Mapping[str, str],
        finish: Callable[[Sequence[AttentionCall]], None],
        sees: Callable[[int, AttentionCall], None] | None = None,
        leaves: Callable[[int, Any], None] | None = None,
        parts: Iterable[nn.Module] = (),
        needs_graph: bool = True,
    ) -> None:
        super().__init__()
        self._starts, self._needs_graph = {model, *parts}, needs_graph
        self._learns, self._image = False, dict[int, Tensor]()  # length of a sequence -> which of its tokens are of the image
        self._model, self._modality, self._finish, self._sees, self._leaves = model, modality, finish, sees, leaves
        lists = (module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential)))
        self._listed = {part for parts in lists for part in parts}
        self._number = 0
        self._mark = new_mark("kinds")
        self._stack: list[_Running] = []
        self._calls: list[AttentionCall] = []
        self._marked: list[Tensor] = []

    def __getstate__(self) -> None:
        """A model that is copied or pickled meanwhile takes its hooks along. A copy's hooks see nothing."""

    def _steps(self) -> Steps:
        self._thread, self._around = threading.get_ident(), RUNNING.get()
        yield self._forget
        slow = overridden([(_FAST_PATH, "enabled", False)])  # the fast path runs without calls of attention
        yield slow.__exit__
        slow.__enter__()
        yield self._model.register_forward_pre_hook(self._begin, with_kwargs=True).remove
        for module in self._model.modules():
            if not isinstance(module, (nn.Softmax, nn.Dropout)):  # their caller takes the softmax
                yield module.register_forward_pre_hook(self._push).remove
                yield module.register_forward_hook(self._pop, always_call=True).remove
        yield from as_mode(self)

    def _forget(self) -> None:
        for tensor in self._marked:
            if hasattr(tensor, self._mark):
                delattr(tensor, self._mark)
        self._stack, self._calls, self._marked = [], [], []

    def _is_on(self) -> bool:
        """Whether this thread makes the call, outside of any run of `explain` that began within."""
        if threading.get_ident() != self._thread:
            return False
        running = RUNNING.get()
        return running is None or running is self._around or not running.explains

    # --- modules ---

    def _push(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._is_on() and (self._stack or module in self._starts):  # a part alone is no forward pass of the model
            self._stack.append(_Running(listed=module in self._listed))

    def _pop(self, module: nn.Module, args: Any, result: Any) -> None:
        if not self._is_on() or not self._stack:
            return
        run = self._stack.pop()
        if run.written:
            add_mark(result, self._mark, run.written, keep=False)
        if self._leaves is not None and result is not None:
            for number in run.calls:
                self._leaves(number, result)
        if module is self._model and result is not None:
            calls = self._calls
            self._forget()
            self._finish(calls)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Marks the inputs of a forward pass with the kinds that their names tell."""
        if not self._is_on():
            return
        self._calls, self._number, self._learns = [], 0, self._needs_graph and torch.is_grad_enabled()
        self._image = {}
        named = list(kwargs.items())
        if args:
            inner: Any = module
            while isinstance(getattr(inner, "_fsdp_wrapped_module", None), nn.Module):  # whose own forward takes *args
                inner = inner._fsdp_wrapped_module
            names = [name for name in inspect.signature(inner.forward).parameters if name not in ("args", "kwargs")]
            named += list(zip(names, args, strict=False))
        for name in self._modality:
            if name not in dict(named):
                raise ValueError(f"modality must name inputs of the model; got {name!r}, the inputs are {[n for n, _ in named]}")
        for name, value in named:
            kind = kind_of(name, self._modality)
            if kind and isinstance(value, Tensor):
                setattr(value, self._mark, kind)
                self._marked.append(value)

    # --- tensors ---

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._stack or not self._is_on():
            return func(*args, **kwargs)
        run = self._stack[-1]
        attends = self._attends(func, args, kwargs)
        result = func(*args, **kwargs)
        if attends is not None:
            add_mark(result, self._mark, attends, keep=False)
            return result
        if func in _PRODUCTS and isinstance(result, Tensor) and result.ndim == 4:
            right = args[1] if len(args) > 1 else kwargs["other" if "other" in kwargs else "mat2"]
            run.product = WrittenScores(first_argument(args, kwargs), right, result)
        elif func in SOFTMAX:
            self._softmax(run, first_argument(args, kwargs))
        elif run.product is not None:
            run.product.follow(func, args, kwargs, result)
        if func in _JOINS:
            self._join(func, args, kwargs, result)
        kinds = self._kinds(args) | self._kinds(kwargs.values())
        if kinds:
            add_mark(args[0] if result is None and args else result, self._mark, kinds)
        return result

    def _attends(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Keeps the call where `func` is attention and returns the kinds of its queries; else None."""
        if func is functional.scaled_dot_product_attention or func is SCORE_ATTENTION:
            query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            kinds = self._kinds((query,)), self._kinds((key,))
            query, key = (x.unsqueeze(1) if x.ndim == 3 else x for x in (query, key))
            return self._keep((query, key), kinds, *_masks(func, args, kwargs))
        if func is functional.multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            return self._multihead(bound.arguments)
        return None

    def _multihead(self, arguments: Mapping[str, Any]) -> int:
        """Projects query and key once more: nn.MultiheadAttention splits into heads where no mode sees the tensors."""
        query, key, size = arguments["query"], arguments["key"], arguments["embed_dim_to_check"] // arguments["num_heads"]
        kinds = self._kinds((query,)), self._kinds((key,))
        if arguments["use_separate_proj_weight"]:
            weights = arguments["q_proj_weight"], arguments["k_proj_weight"]
        else:
            weights = arguments["in_proj_weight"].chunk(3)[:2]
        biases = (None, None) if arguments["in_proj_bias"] is None else arguments["in_proj_bias"].chunk(3)[:2]
        states = (x[:, None] if x.ndim == 2 else x for x in (query, key))  # torch takes (N, C) as well as (N, B, C)
        # torch.utils.checkpoint counts saved tensors and runs the layer again unwatched, so its hooks must not see these tensors.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            projected = [functional.linear(x.transpose(0, 1), w, b) for x, w, b in zip(states, weights, biases, strict=True)]
        query, key = (heads(x, size) for x in projected)
        if arguments["bias_k"] is not None or arguments["add_zero_attn"]:  # there are more keys
            return self._keep((query, key), kinds)
        padding = arguments["key_padding_mask"]
        padding = padding[None] if padding is not None and padding.ndim == 1 else padding
        mask = joined_masks(query, 0, arguments["attn_mask"], padding)
        return self._keep((query, key), kinds, {"attn_mask": mask, "is_causal": False, "scale": None})

    def _softmax(self, run: _Running, scores: Tensor) -> None:
        """Keeps the call of a module that takes a softmax itself: its last product, if that has the shape of the scores."""
        product = run.product
        if product is None or product.shape != scores.shape:
            return
        query, key = product.query, product.transposed_key
        kinds = self._kinds((query,)), self._kinds((key,))
        run.written |= self._keep((query, key.transpose(-1, -2)), kinds, product.masks(scores))
        run.product = None

    def _join(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Notes which tokens of a joint sequence (B, N, C) are of the image."""
        if func in _SCATTERS:
            whole, where, source = (*args, *kwargs.values())
            if where.ndim == whole.ndim and self._kinds((whole,)) & TEXT and self._kinds((source,)) == IMAGE:
                image = where[..., 0] if where.ndim == 3 else where
                before = self._image.get(image.shape[1]) if self._kinds((whole,)) & IMAGE else None
                self._image[image.shape[1]] = image if before is None else image | before
            return
        parts = args[0] if args else kwargs["tensors"]
        kinds = [self._kinds((part,)) for part in parts]
        if (args[1] if len(args) > 1 else kwargs.get("dim")) in (1, -2) and result.ndim == 3 and set(kinds) == {TEXT, IMAGE}:
            places = [torch.full((part.shape[1],), kind == IMAGE) for part, kind in zip(parts, kinds, strict=True)]
            self._image[result.shape[1]] = torch.cat(places).to(result.device)

    def _keep(self, pair: Pair, kinds: tuple[int, int], masks: Mapping[str, Any] | None = None, score: str = "dot") -> int:
        """Keeps a call and returns the kinds of its queries."""
        if self._learns and not torch.is_grad_enabled():
            raise ValueError(
                "model must keep the graph of its attention; got a call without gradients, as torch.utils.checkpoint makes with "
                "use_reentrant=True"
            )
        run = self._stack[-1]
        image = self._image.get(pair[0].shape[2]) if kinds == (TEXT | IMAGE, TEXT | IMAGE) else None
        call = AttentionCall(*kinds, *pair, masks, score, len(self._stack) > 1 and kinds in run.seen, image)
        run.seen.add(kinds)
        if self._sees is None:
            self._calls.append(call)
        else:
            self._sees(self._number, call)
        around = next((run for run in reversed(self._stack) if run.listed), None)
        if around is not None:
            around.calls.append(self._number)
        self._number += 1
        return kinds[0]

    def _kinds(self, values: Iterable[Any]) -> int:
        return read_mark(values, self._mark)


def check_modality(modality: Mapping[str, str] | None) -> dict[str, str]:
    if modality is not None and not isinstance(modality, Mapping):
        raise TypeError(f"modality must be a mapping of input names to 'text' or 'image'; got {modality!r}")
    for name, kind in (modality or {}).items():
        if kind not in tuple(_KINDS):
            raise ValueError(f"modality must be one of {tuple(_KINDS)}; got {kind!r} for {name!r}")
    return dict(modality or {})


def kind_of(name: str, modality: Mapping[str, str]) -> int:
    """TEXT or IMAGE, as an input of this name is; 0 = neither."""
    if name in modality:
        return _KINDS[modality[name]]
    if name in _TEXT_INPUTS:
        return TEXT
    return IMAGE if name in _IMAGE_INPUTS or name.startswith("pixel_values") else 0


def _masks(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Which keys a call lets its queries see, and its core score."""
    if func is SCORE_ATTENTION:
        inputs = ScoreAttentionInputs(*args)
        options = {name: getattr(inputs, name) for name in ("attn_mask", "key_mask", "is_causal", "scale")}
        options["enable_gqa"] = inputs.key.shape[1] != inputs.query.shape[1]
        score, sink = inputs.score, inputs.sink
        if score == "dot_softcap":
            score, options["scale"], options["softcap"] = "dot", inputs.parameter * inputs.scale, inputs.scale
        if sink is not None and sink.ndim == 2:  # (H, 1)
            options["sink"] = sink[:, 0]
        elif sink is not None:
            score = f"{score} with an offset beside its sink"
        if inputs.row_bias is not None:
            score = f"{score} with a group_bias"
        return options, score
    arguments = {**dict(zip(_SDPA, args, strict=False)), **kwargs}
    mask = arguments.get("attn_mask")
    if mask is not None and mask.ndim == 3 and arguments["query"].ndim == 3:
        mask = mask.unsqueeze(1)
    options = {name: arguments.get(name, False) for name in ("is_causal", "enable_gqa")}
    return {"attn_mask": mask, "scale": arguments.get("scale"), **options}, "dot"
