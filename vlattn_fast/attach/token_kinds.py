"""The attention calls of a model while it runs, and whether their tokens come from text or from an image.

The record of a tensor says whether it was computed from an input with text or with an image. The kind of a query's tokens is that
of their residual stream; the output of cross-attention does not change the kind.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.attachments import Records
from vlattn_fast._ground.groups import mask_of_groups
from vlattn_fast._ground.tensors import joined
from vlattn_fast.attach.events import Attend, AttentionEvent, ModuleRun, Subscriber
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.written import PRODUCTS

TEXT, IMAGE = 1, 2  # as bits: what a tensor was computed from
_KINDS = {"text": TEXT, "image": IMAGE}
_TEXT_INPUTS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds", "text")
_IMAGE_INPUTS = ("pixel_values", "visual_feats", "visual_embeds", "region_features", "image", "images", "video")
_SCATTERS = (torch.masked_scatter, Tensor.masked_scatter)
_JOINS = (torch.cat, torch.concat, *_SCATTERS)


@dataclass
class _Module:
    """What is known of a module that runs."""

    written: int = 0  # the kinds of the queries of its hand-written attention
    calls: list[int] = field(default_factory=list)  # the numbers of the calls within, but not inside a listed module further in
    called: set[tuple[int, int]] = field(default_factory=set)  # the kinds of queries and keys of its own calls
    map: tuple[int, torch.Size] | None = None  # number and shape of a hand-written map that has not met its values


class TokenKinds(Subscriber):
    """Observes the kinds of the tokens of each attention call in the forward passes of one model.

    Args:
        modality: input name -> "text" or "image", for inputs without the usual names.
        finish: called after a forward pass with its attention calls.
        sees: called with each attention call's number and the call, with options of `attention_statistics` and without values;
            then the calls are not stored, and `finish` gets none.
        leaves: called with the number of a call and the result of the layer around it.
        outputs: called with the number of a call and the output (B, H, N, Dv) of its heads; not for nn.MultiheadAttention, which
            does not show it.
        needs_graph: whether calls whose graph torch.utils.checkpoint drops in a forward pass with gradients raise a ValueError.
    """

    def __init__(
        self,
        model: nn.Module,
        modality: Mapping[str, str],
        finish: Callable[[Sequence[AttentionEvent]], None] | None = None,
        sees: Callable[[int, AttentionEvent], None] | None = None,
        leaves: Callable[[int, Any], None] | None = None,
        outputs: Callable[[int, Tensor], None] | None = None,
        needs_graph: bool = True,
    ) -> None:
        self._needs_graph = needs_graph
        self._learns, self._image = False, dict[int, Tensor]()  # length of a sequence -> which of its tokens are of the image
        self._model, self._modality, self._finish, self._sees, self._leaves = model, modality, finish, sees, leaves
        self._outputs = outputs
        lists = (module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential)))
        self._listed = {part for parts in lists for part in parts}
        self._number = 0
        self._records = Records()
        self._modules: dict[ModuleRun, _Module] = {}  # those that run, the outermost first
        self._calls: list[AttentionEvent] = []
        self._marked: list[Tensor] = []

    def observer(self, parts: Iterable[nn.Module] = (), keeps_order: bool = False) -> Observer:
        """The context. `parts`: modules whose calls count also outside of a forward pass of the model, as a training step makes
        them by itself. `keeps_order`: see `Observer`."""
        return Observer(self._model, [self], starts=(self._model, *parts), keeps_order=keeps_order)

    def on_end(self) -> None:
        for tensor in self._marked:
            vars(tensor).pop(self._records.name, None)
        self._modules, self._calls, self._marked = {}, [], []

    # --- modules ---

    def on_enter(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if run.begins_anew:
            self._modules.clear()
        self._modules[run] = _Module()
        if run.module is self._model:
            self._begin(args, kwargs)

    def on_leave(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        module = self._modules.pop(run)
        if module.written:
            self._give(output, module.written)
        if self._leaves is not None and output is not None:
            for number in module.calls:
                self._leaves(number, output)
        if run.module is self._model and output is not None:
            calls = self._calls
            self.on_end()
            if self._finish is not None:
                self._finish(calls)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Marks the inputs of a forward pass with their kinds, by their names."""
        self._calls, self._number, self._learns = [], 0, self._needs_graph and torch.is_grad_enabled()
        self._image = {}
        named = list(kwargs.items())
        if args:
            inner: Any = self._model
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
                self._records.at(value).kinds = kind
                self._marked.append(value)

    # --- tensors ---

    def on_result(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func in _JOINS:
            self._join(func, args, kwargs, result)
        kinds = self._kinds(args) | self._kinds(kwargs.values())
        if kinds:
            self._give(args[0] if result is None and args else result, kinds, keep=True)
        if self._outputs is not None and func in PRODUCTS and run in self._modules:
            module = self._modules[run]
            # In eval mode, all that a map meets on its way to the values leaves its shape as it is.
            if module.map is not None and len(args) == 2 and args[0].shape == module.map[1]:
                self._outputs(module.map[0], result)
                module.map = None

    def on_output(self, event: AttentionEvent, output: Any, result: Any) -> None:
        self._give(result, self._kinds(event.given[:1]))

    def on_attention(self, event: AttentionEvent, attend: Attend) -> Any:
        """Stores the call."""
        if self._learns and not torch.is_grad_enabled() and _runs_in_an_autograd_function():  # not a tower that is frozen
            raise ValueError(
                "model must keep the graph of its attention; got a call without it, e.g. from torch.utils.checkpoint with "
                "use_reentrant=True: pass use_reentrant=False"
            )
        kinds = self._kinds(event.given[:1]), self._kinds(event.given[1:2])
        module = self._modules[event.run]
        image = self._image.get(event.query.shape[2]) if kinds == (TEXT | IMAGE, TEXT | IMAGE) else None
        again = len(self._modules) > 1 and kinds in module.called
        call = replace(_for_statistics(event), kinds=kinds[0], key_kinds=kinds[1], again=again, image=image)
        module.called.add(kinds)
        if event.written is not None:
            module.written |= kinds[0]
        if self._sees is None:
            self._calls.append(call)
        else:
            self._sees(self._number, call)
        around = next((of for run, of in reversed(self._modules.items()) if run.module in self._listed), None)
        if around is not None:
            around.calls.append(self._number)
        number = self._number
        self._number += 1
        output = attend(event)
        if self._outputs is not None and isinstance(output, Tensor):
            if event.written is not None:
                module.map = number, output.shape
            else:
                self._outputs(number, output[:, None] if output.ndim == 3 else output)
        return output

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

    def kinds_of(self, value: Tensor) -> int:
        """What a tensor of the pass was computed from."""
        return self._kinds((value,))

    def _kinds(self, values: Iterable[Any]) -> int:
        return self._records.bits(values, "kinds")

    def _give(self, value: Any, kinds: int, keep: bool = False) -> None:
        """Notes the kinds of a tensor, or of each in a tuple, list or mapping; `keep`: those that it has stay."""
        if isinstance(value, Tensor):
            record = self._records.at(value)
            record.kinds = kinds | record.kinds if keep else kinds
        elif isinstance(value, (tuple, list, Mapping)):
            for part in value.values() if isinstance(value, Mapping) else value:
                self._give(part, kinds, keep)


def check_modality(modality: Mapping[str, str] | None) -> dict[str, str]:
    if modality is not None and not isinstance(modality, Mapping):
        raise TypeError(f"modality must be a mapping of input names to 'text' or 'image'; got {modality!r}")
    for name, kind in (modality or {}).items():
        if kind not in tuple(_KINDS):
            raise ValueError(f"modality must be one of {tuple(_KINDS)}; got {kind!r} for {name!r}")
    return dict(modality or {})


def _runs_in_an_autograd_function() -> bool:
    """Whether the forward of a torch.autograd.Function runs, as that of torch.utils.checkpoint with use_reentrant=True."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            return True
        frame = frame.f_back
    return False


def kind_of(name: str, modality: Mapping[str, str]) -> int:
    """TEXT or IMAGE, as an input of this name is; 0 = neither."""
    if name in modality:
        return _KINDS[modality[name]]
    if name in _TEXT_INPUTS:
        return TEXT
    return IMAGE if name in _IMAGE_INPUTS or name.startswith("pixel_values") else 0


def _for_statistics(event: AttentionEvent) -> AttentionEvent:
    """The call with options of `attention_statistics` and its core score, without values."""
    masks, score = event.masks, "dot"
    if event.inputs is None and masks is not None and "group_bias" in masks:  # of edited edges
        groups = {name: masks[name] for name in ("query_groups", "key_groups", "group_bias")}
        mask = joined(masks["attn_mask"], mask_of_groups(event.query, **groups))
        masks = {**{name: value for name, value in masks.items() if name not in groups}, "attn_mask": mask}
    elif event.inputs is not None:
        x, sink = event.inputs.attention, event.inputs.sink
        options: dict[str, Any] = {name: getattr(x, name) for name in ("attn_mask", "key_mask", "is_causal", "scale")}
        options["enable_gqa"] = x.key.shape[1] != x.query.shape[1]
        score = x.score
        if score == "dot_softcap":
            score, options["scale"], options["softcap"] = "dot", x.parameter * x.scale, x.scale
        if sink is not None and sink.ndim == 2:  # (H, 1)
            options["sink"] = sink[:, 0]
        elif sink is not None:
            score = f"{score} with an offset and a sink"
        if x.row_bias is not None:
            score = f"{score} with a group_bias"
        masks = options
    return replace(event, value=None, masks=masks, given=(None, None, None), inputs=None, sink=None, lse=None, score=score)
