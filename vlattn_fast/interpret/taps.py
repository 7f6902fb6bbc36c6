"""Puts the relevancy operator where a model computes attention, for the length of one call, and takes it out again.

transformers looks its attention function up by the name in the config. Two names are registered:

- "vlattn" gets the masks that SDPA gets (bool, or None where the pattern is causal or complete), for models that support SDPA;
- "vlattn_additive" gets eager attention's float masks, for models that also add the mask by hand somewhere.

A config may belong to several models, so it stays as it is: for the run each module holds a copy that names our function.
The function finds the state of its run through a context variable, so each thread and each nested run has its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._tensors import compute_dtype
from vlattn_fast.interpret._override import overridden
from vlattn_fast.interpret.families import Family, Tower, require_dispatch
from vlattn_fast.interpret.methods import Attended, Method, weigh
from vlattn_fast.ops.relevancy_attention import relevancy_attention, relevancy_step
from vlattn_fast.ops.relevancy_residual import Weighting

SDPA_NAME, ADDITIVE_NAME = "vlattn", "vlattn_additive"

_taps: contextvars.ContextVar[dict[nn.Module, TowerTap] | None] = contextvars.ContextVar("vlattn_taps", default=None)


class TowerTap:
    """The state of one tower during a run: its layers in order, its carrier, and the attention call that is read later.

    Args:
        tower: the record.
        model: the whole model.
        method, weighting: see `explain`.
        start_layer: first layer that takes part; -1 = the last only.
    """

    def __init__(self, tower: Tower, model: nn.Module, method: Method, start_layer: int, weighting: str | Weighting) -> None:
        self.tower, self.method, self.weighting = tower, method, weighting
        self.root = _submodule(model, tower.path, tower)
        self.config = getattr(self.root, "config", getattr(model, "config", None))
        self.layers = list(_submodule(self.root, tower.layers, tower).children())
        self.modules = [_submodule(layer, tower.attention, tower) for layer in self.layers]
        prefix = ".".join(part for part in (tower.path, tower.layers) if part)
        self.names = [f"{prefix}.{i}.{tower.attention}" for i in range(len(self.modules))]
        for name, layer, module in zip(self.names, self.layers, self.modules, strict=True):
            _refuse_others(name.removesuffix(f".{tower.attention}"), layer, module)
        self.pooling = None if tower.pooling is None else _submodule(self.root, tower.pooling, tower)
        count = len(self.modules)
        if not -1 <= start_layer < count:
            raise ValueError(
                f"start_layer must be from -1 (the last layer) to {count - 1} for tower '{tower.name}'; got {start_layer}"
            )
        self.first = count - 1 if start_layer == -1 or not method.carries else start_layer
        self.calls = 0
        self.shape = (0, 0)  # (B, N)
        self.dtype, self.device = torch.float32, torch.device("cpu")  # of the carrier
        self.carrier_in: Tensor | None = None
        self.carrier: Tensor | None = None
        self.branch_carrier: Tensor | None = None
        self.stream: Tensor | None = None
        self.last: Attended | None = None
        # Where the score's gradient enters the tapped attention; they tell whether a score depends on it.
        self.edges: list[torch.autograd.graph.GradientEdge] = []

    @property
    def running(self) -> bool:
        """Whether this tap's run is the innermost one of this thread."""
        taps = _taps.get()
        return taps is not None and any(taps.get(module) is self for module in self.modules)

    # --- the attention call ---

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any]) -> Tensor:
        """The attention (B, H, N, D) of one layer; the carrier passes through it. Each layer must be called once, in order."""
        layer = self.modules.index(module)
        if layer != self.calls:
            raise ValueError(
                f"model must call each attention layer once, in order; got '{self.names[layer]}' as call {self.calls}"
            )
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "inputs must give the whole sequence in one forward pass, without past_key_values; got "
                f"{query.shape[2]} queries and {key.shape[2]} keys in attention '{self.names[layer]}'"
            )
        self.calls += 1
        self.shape = (query.shape[0], query.shape[2])
        self.dtype, self.device = compute_dtype(query), query.device
        last = layer == len(self.modules) - 1
        if layer < self.first or (not self.method.carries and (self.pooling is not None or not last)):
            return _attention(query, key, value, masks)
        if not self.method.carries:
            # Only the gradient at this output is used, so the graph starts here.
            output = _attention(query, key, value, masks).transpose(1, 2).detach().requires_grad_()
            self.last = Attended(query.detach(), key.detach(), value.detach(), masks, output)
            self.edges.append(torch.autograd.graph.get_gradient_edge(output))
            return output.transpose(1, 2)
        return self._carry(query, key, value, masks)

    def _carry(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any]) -> Tensor:
        method = self.method
        if self.carrier is None:
            shape = (query.shape[0], 1, query.shape[2])
            self.carrier_in = torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)
            self.carrier = self.carrier_in
        output, carrier = relevancy_attention(
            query,
            key,
            value,
            self.carrier,
            rule=method.rule,
            row_normalize=method.row_normalize,
            residual_weight=method.residual_weight,
            attention_weight=method.attention_weight,
            **masks,
        )
        if method.weighted:
            self.branch_carrier = carrier
        else:
            self.carrier = carrier
        if not method.needs_score:
            return output.detach()  # only the carrier needs a graph between the layers
        self.edges.append(torch.autograd.graph.get_gradient_edge(output))
        return output

    # --- hooks ---

    def install(self) -> Iterator[Any]:
        """Register the hooks that this method needs; yields their handles."""
        if self.pooling is not None:
            if not isinstance(self.pooling, nn.MultiheadAttention) or not self.pooling._qkv_same_embed_dim:
                raise ValueError(
                    f"model must have an nn.MultiheadAttention of one embedding size as pooling head '{self.tower.pooling}'; "
                    f"got {type(self.pooling).__name__}"
                )
            yield self.pooling.register_forward_hook(self._of_this_run(self._pool), with_kwargs=True)
        if self.method.weighted:
            for layer in self.layers[self.first :]:
                stream = _submodule(layer, self.tower.stream, self.tower)
                yield stream.register_forward_pre_hook(self._of_this_run(self._keep_stream), with_kwargs=True)
                branch = _submodule(layer, self.tower.branch, self.tower)
                yield branch.register_forward_hook(self._of_this_run(self._weigh))

    def _of_this_run(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, silent in runs over the same model by other threads and by hooks."""
        return lambda *args: hook(*args) if self.running else None

    def _keep_stream(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        self.stream = None if stream is None else stream.detach()

    def _weigh(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        branch = output[0] if isinstance(output, tuple) else output
        if self.carrier is None or self.branch_carrier is None or self.stream is None or self.stream.shape != branch.shape:
            raise ValueError(
                f"model must add the output of '{self.tower.branch}' to its residual stream behind attention "
                f"'{self.names[self.calls - 1]}'; got {'no stream' if self.stream is None else tuple(self.stream.shape)} "
                f"and a branch of {tuple(branch.shape)}"
            )
        branch, self.carrier = weigh(self.stream, branch, self.carrier, self.branch_carrier, self.weighting)
        self.branch_carrier = self.stream = None
        return (branch, *output[1:]) if isinstance(output, tuple) else branch

    def _pool(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("attn_mask") is not None or kwargs.get("key_padding_mask") is not None or len(args) != 3:
            raise ValueError(f"model must call its pooling head '{self.tower.pooling}' without a mask; got one")
        query, key, value = _projected(module, *args)
        masks = {"attn_mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
        pooled = output[0]
        self.calls += 1
        if self.method.carries:
            if self.method.needs_score and pooled.requires_grad:
                self.edges.append(torch.autograd.graph.get_gradient_edge(pooled))
            pooled, self.carrier = PoolingRead.apply(
                pooled, self.carrier, query, key, value, module.out_proj.weight, self.method.rule, self.method.row_normalize
            )
            return (pooled if self.method.needs_score else pooled.detach(), *output[1:])
        pooled = pooled.detach().requires_grad_()
        self.edges.append(torch.autograd.graph.get_gradient_edge(pooled))
        self.last = Attended(query.detach(), key.detach(), value.detach(), masks, pooled, module.out_proj.weight.detach())
        return (pooled, *output[1:])

    # --- after the forward pass ---

    def check(self) -> None:
        """ValueError, naming the module, if a layer did not call this tap."""
        expected = self.names if self.tower.pooling is None else [*self.names, self.tower.pooling]
        if self.calls != len(expected):
            raise ValueError(
                f"model must call every attention of tower '{self.tower.name}' through the attention interface; got "
                f"{self.calls} of {len(expected)} calls, '{expected[self.calls]}' was not called"
            )
        if self.branch_carrier is not None:
            raise ValueError(
                f"model must call '{self.tower.branch}' in every layer of tower '{self.tower.name}'; got no last call"
            )

    def carriers(self) -> tuple[Tensor, Tensor]:
        """The carrier that entered the tower and the one that left it."""
        if self.carrier_in is None or self.carrier is None or not self.carrier.requires_grad:
            raise ValueError(
                f"model must run tower '{self.tower.name}' with gradients on; got a forward pass that turns them off"
            )
        return self.carrier_in, self.carrier

    def last_call(self) -> Attended:
        """The last attention call, for methods that read no other."""
        if self.last is None:
            raise ValueError(f"model must call the last attention of tower '{self.tower.name}'; got no call")
        return self.last


class PoolingRead(torch.autograd.Function):
    """The identity on the output of an attention-pooling head. Its backward pass turns the relevancy r of the head's queries
    into that of the tokens, r Abar.

    The head's queries are learnt and no tokens, so there is no residual term.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pooled: Tensor,
        carrier: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        projection: Tensor,
        rule: str,
        row_normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query, key, value, projection)
        ctx.rule, ctx.row_normalize = rule, row_normalize
        return pooled.view_as(pooled), carrier.new_zeros(carrier.shape[0], carrier.shape[1], query.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, relevancy: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, projection = ctx.saved_tensors
        call = Attended(query, key, value, {}, grad, projection)
        grad_output = call.grad_output(grad) if ctx.rule == "gradient" else None
        tokens = relevancy_step(relevancy, query, key, value, grad_output, rule=ctx.rule, row_normalize=ctx.row_normalize)
        return grad, tokens, None, None, None, None, None, None


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The (B, H, N, D) query, key and value of an nn.MultiheadAttention call."""
    weights = module.in_proj_weight.chunk(3)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    projected = []
    for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True):
        tensor = tensor if module.batch_first else tensor.transpose(0, 1)
        heads = nn.functional.linear(tensor.detach(), weight, bias).unflatten(-1, (module.num_heads, -1))
        projected.append(heads.transpose(1, 2))
    return projected[0], projected[1], projected[2]


def _attention(query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any]) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, **masks)


def _refuse_others(path: str, layer: nn.Module, tapped: nn.Module) -> None:
    """ValueError if a layer has an attention besides the tapped one, such as cross-attention: the map would leave it out."""
    for name, module in layer.named_modules(prefix=path):
        related = any(m is tapped for m in module.modules()) or any(m is module for m in tapped.modules())
        if "Attention" in type(module).__name__ and not related:
            kind = type(module).__name__
            raise ValueError(f"model must have one attention in each layer; got '{name}' ({kind}) beside the one of its record")


def _submodule(module: nn.Module, path: str, tower: Tower) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"model must have a module '{path}' in tower '{tower.name}'; got {type(module).__name__} without"
        ) from error


# --- transformers' contract -----------------------------------------------------------------------------------------


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    *,
    causal_by_module: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: query, key, value (B, H, N, D) in, (output (B, N, H, D), None) out.

    A mask already contains causality and windows. Without a mask `is_causal` decides, and where that is None too,
    `module.is_causal` if `causal_by_module` is set (SDPA's rule). Dropout is off, since explained models run in eval mode.

    Raises:
        ValueError: an option that the operator does not support (softcap, attention sinks, paged or packed sequences), or an
            attention module that belongs to no layer of this run.
    """
    taps = _taps.get()
    tap = None if taps is None else taps.get(module)
    if tap is None:
        where = "outside of explain" if taps is None else "which belongs to no known layer of an explained tower"
        raise ValueError(f"model must call only the attention of explained layers; got {type(module).__name__} {where}")
    refused = {"softcap": softcap, "s_aux": s_aux, "cache": cache, "cu_seq_lens_q": cu_seq_lens_q}
    for name, option in refused.items():
        if option is not None:
            raise ValueError(
                f"model must not use {name}, which relevancy attention does not support; got {type(module).__name__}"
            )
    if attention_mask is None and sliding_window is not None and sliding_window < key.shape[2]:
        raise ValueError(
            f"model must pass the mask of a sliding window; got {type(module).__name__} with {sliding_window} and none"
        )

    causal = attention_mask is None and query.shape[2] > 1
    if causal:
        causal = getattr(module, "is_causal", True) if is_causal is None and causal_by_module else bool(is_causal)
    if position_bias is not None:
        attention_mask, causal = _with_bias(position_bias, attention_mask, causal), False
    masks = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    output = tap.attend(module, query, key, value, masks)
    return output.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _sdpa_named(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return attention_function(*args, causal_by_module=True, **kwargs)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, function, mask in ((SDPA_NAME, _sdpa_named, sdpa_mask), (ADDITIVE_NAME, attention_function, eager_mask)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


@contextlib.contextmanager
def tapped(
    model: nn.Module, family: Family, method: Method, start_layer: int, weighting: str | Weighting
) -> Iterator[list[TowerTap]]:
    """The model with the taps of `family`'s towers in place; everything is put back on leaving, also by an exception."""
    taps = [TowerTap(tower, model, method, start_layer, weighting) for tower in family.towers]
    replace = _configs if family.dispatch == "transformers" else _functions
    with contextlib.ExitStack() as stack:
        for tap in taps:
            stack.enter_context(overridden(replace(tap)))
            for handle in tap.install():
                stack.callback(handle.remove)
        token = _taps.set({module: tap for tap in taps for module in tap.modules})
        stack.callback(_taps.reset, token)
        yield taps


def _configs(tap: TowerTap) -> Iterator[tuple[nn.Module, str, Any]]:
    """For each module of the tower, a copy of its config that names our attention function.

    Sub-configs stay as they are: they belong to other towers. A generator, since `overridden` runs it while no other run puts
    configs in or takes them out.
    """
    require_dispatch(tap.root, tap.tower.path)
    _register()
    name = SDPA_NAME if getattr(tap.root, "_supports_sdpa", False) else ADDITIVE_NAME
    copies: dict[int, Any] = {}
    for module in tap.root.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            # The public setter would also overwrite the sub-configs.
            copies[id(config)]._attn_implementation_internal = name
    # A module may hold its config under other names as well.
    for module in tap.root.modules():
        for attribute, value in list(vars(module).items()):
            if id(value) in copies:
                yield module, attribute, copies[id(value)]


def _functions(tap: TowerTap) -> list[tuple[nn.Module, str, Any]]:
    """Our attention function for each attention module that calls its own `attention_function`."""
    for name, module in zip(tap.names, tap.modules, strict=True):
        if not callable(getattr(module, "attention_function", None)):
            raise ValueError(f"model must call attention_function in '{name}'; got {type(module).__name__} without one")
    return [(module, "attention_function", attention_function) for module in tap.modules]


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with frozen parameters; the last run over it puts every mode and requires_grad back."""
    modes = [(module, "training", False) for module in model.modules()]
    frozen = [(parameter, "requires_grad", False) for parameter in model.parameters()]
    with overridden([*modes, *frozen]):
        yield
