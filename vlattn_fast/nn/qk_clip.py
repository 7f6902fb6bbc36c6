"""QK-clip: projections of heads whose attention logits have grown too large are rescaled after a step of the optimizer.

Kimi K2 (arXiv 2507.20534, section 2.1 and algorithm 1): with S the largest logit of a head over the batch, and gamma =
min(1, threshold / S), the weights of its query and key become gamma^(1/2) times themselves, so that its logits are at most the
threshold on this batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_number
from vlattn_fast._ground.tensors import resolve_scale, scaled_dot_default
from vlattn_fast.attach.attention_calls import AttentionCall, Watch
from vlattn_fast.attach.session import uncompiled, unwrapped
from vlattn_fast.ops.attention_statistics import attention_statistics

# children that project the query and the key, by the names that models give them
_PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("to_q", "to_k"), ("wq", "wk"), ("q", "k"))
_FUSED = ("qkv", "c_attn", "qkv_proj", "in_proj", "Wqkv")  # all queries, then all keys, then all values; else refused


class QKClip:
    """A context in which the largest attention logits of `model` are kept, and `step` bounds them by the threshold.

    In a loop of one's own, `step()` follows `optimizer.step()`:

        with QKClip(model, threshold=100.0) as clip:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                clip.step()

    transformers' Trainer takes `callbacks=[QKClip(model).trainer_callback()]`, Lightning's `QKClip(model).lightning_callback()`;
    these enter the context when training begins. Among processes (torch.distributed) the largest logit of all counts.

    The model runs as it is, without a map: a layer's logits are looked at by `attention_statistics`, beside the attention that
    the model runs. On a CPU a layer is passed over where no product of two norms |q| |k| reaches the threshold. Inside of the
    context compiled code runs as plain Python, since compiled code shows no attention.

    Where several query heads share a key head, the key head is scaled by gamma^(1/2) for the smallest gamma among them, and each
    query head by what is then left of its own.

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention, this package's, or
            written out by hand, with linear projections q_proj and k_proj, query and key, to_q and to_k, ..., or one projection
            of all queries, keys and values. Wrappers (DDP, FSDP, torch.compile) are allowed.
        threshold: the largest logit that is left alone, as the softmax gets it: scaled, behind a softcap and float masks.

    Raises:
        ValueError: an argument is wrong; a layer's projections are not found, or do not reach its logits (as under a norm of
            queries and keys, which takes every factor back); attention that does more than scale and mask its logits.
        RuntimeError: `step` without a forward pass of the model in the context.
        FloatingPointError: a logit is NaN or infinite.

    >>> attention = nn.MultiheadAttention(16, 2, batch_first=True)
    >>> x = 10 * torch.randn(2, 5, 16)
    >>> with QKClip(attention, threshold=0.5) as clip:
    ...     _ = attention(x, x, x)
    ...     clipped = clip.step()
    >>> sorted(clipped[""])  # the heads of the module "", which is the model itself
    [0, 1]
    """

    def __init__(self, model: nn.Module, threshold: float = 100.0) -> None:
        check_number("threshold", threshold)
        if threshold <= 0:
            raise ValueError(f"threshold must be greater than 0; got {threshold!r}")
        self.model, self.threshold = unwrapped(model), float(threshold)
        each = ((module, _projections(module)) for module in self.model.modules())
        self._projections = {module: projections for module, projections in each if projections is not None}
        self._paths = {module: path for path, module in self.model.named_modules()}
        self._running: list[nn.Module] = []
        self._outputs: dict[nn.Module, Tensor] = {}  # of projections that are to be checked
        self._largest: dict[nn.Module, Tensor] = {}
        self._contexts: list[Any] = []
        self._seen = 0

    def __enter__(self) -> QKClip:
        if self._contexts:
            raise RuntimeError("this QKClip is entered already; make another one")
        watch = Watch(self.model, {}, lambda _: None, self._see, parts=self._projections)
        self._contexts = [uncompiled(self.model), watch]
        for context in self._contexts:
            context.__enter__()
        self._hooks = []
        for module, projections in self._projections.items():
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
            self._hooks += [each.register_forward_hook(self._projected) for each in projections.modules()]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        while self._contexts:
            self._contexts.pop().__exit__(*error)

    @torch.no_grad()
    def step(self) -> dict[str, dict[int, float]]:
        """Rescales the heads whose largest logit since the last step passed the threshold. Returns path of an attention module ->
        head -> that logit, of the heads that were rescaled."""
        if self._seen == 0:
            raise RuntimeError(
                "QKClip saw no attention since its last step; run the model inside of its context, with attention that torch "
                "shows (attn_implementation='sdpa' or 'eager')"
            )
        self._seen = 0
        clipped: dict[str, dict[int, float]] = {}
        for module, projections in self._projections.items():
            largest = self._largest.pop(module, None)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                largest = _of_all_processes(largest, projections)
            if largest is None:
                continue
            if not bool(largest.lt(torch.inf).all()):  # NaN as well
                raise FloatingPointError(f"the largest logits of '{self._paths[module]}' must be finite; got {largest.tolist()}")
            heads = (largest > self.threshold).nonzero()[:, 0].tolist()
            if heads:
                projections.rescale(torch.clamp(self.threshold / largest.clamp(min=self.threshold), max=1.0))
                clipped[self._paths[module]] = {head: float(largest[head]) for head in heads}
        return clipped

    def trainer_callback(self) -> Any:
        """A callback of transformers' Trainer."""
        from transformers import TrainerCallback

        clip = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clip.__enter__()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clip.step()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                clip.__exit__(None, None, None)

        return Callback()

    def lightning_callback(self) -> Any:
        """A callback of Lightning's Trainer."""
        from lightning import Callback as Base

        clip = self

        class Callback(Base):
            steps = 0

            def on_train_start(self, trainer: Any, module: Any) -> None:
                self.steps = trainer.global_step
                clip.__enter__()

            def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
                if trainer.global_step != self.steps:  # else the batch was accumulated
                    self.steps = trainer.global_step
                    clip.step()

            def on_train_end(self, *_: Any) -> None:
                clip.__exit__(None, None, None)

        return Callback()

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def _projected(self, projection: nn.Module, _: Any, output: Tensor) -> None:
        if self._running and not self._projections[self._running[-1]].is_checked:
            self._outputs[projection] = output.detach()

    def _see(self, number: int, call: AttentionCall) -> None:
        """Takes up the largest logits of one call of attention."""
        if not self._running:
            raise ValueError(
                "QKClip found no projections around a call of attention; it knows modules with children "
                f"{', '.join(' and '.join(pair) for pair in _PAIRS)}, with one of {', '.join(_FUSED)}, and nn.MultiheadAttention"
            )
        module = self._running[-1]
        self._seen += 1
        with torch.no_grad():
            self._projections[module].check(self._paths[module], call, self._outputs)
            self._outputs.clear()
            largest = self._max_logits(module, call)
        if largest is not None:
            before = self._largest.get(module)
            self._largest[module] = largest if before is None else torch.maximum(before, largest)

    def _max_logits(self, module: nn.Module, call: AttentionCall) -> Tensor | None:
        """(H,); None where no logit can reach the threshold."""
        if call.masks is None or call.score != "dot":
            raise ValueError(
                f"the attention of '{self._paths[module]}' must only scale and mask its logits for QKClip; it does more"
            )
        query, key, options = call.query.detach(), call.key.detach(), {**call.masks}
        options["enable_gqa"] = key.shape[1] != query.shape[1]
        if query.device.type == "cpu" and _bound(query, key, options) <= self.threshold:
            return None
        statistics: Any = attention_statistics(query, key, statistics=["max_logit"], **options)
        return statistics.max_logit_of_heads()


def _bound(query: Tensor, key: Tensor, options: dict[str, Any]) -> float:
    """A number that no logit passes."""
    scale = resolve_scale(options.get("scale"), scaled_dot_default(query.shape[-1]))
    norms = [x.norm(dim=-1).amax().float() if x.numel() else x.new_zeros(()) for x in (query, key)]
    mask = options.get("attn_mask")
    added = mask.amax().float().clamp(min=0.0) if mask is not None and mask.is_floating_point() and mask.numel() else 0.0
    bound = float(abs(scale) * norms[0] * norms[1] * 1.01 + added)
    return bound if bound == bound else torch.inf


def _of_all_processes(largest: Tensor | None, projections: _Projections) -> Tensor | None:
    """The largest logits among the processes, which all take part."""
    device = projections.device
    sizes = torch.tensor([0 if largest is None else len(largest)], device=device)
    torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MAX)
    if int(sizes) == 0:
        return None
    if largest is None:
        largest = torch.full((int(sizes),), -torch.inf, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest


# --- projections ---


class _Rows(NamedTuple):
    """Rows of a linear map: views of its weight (rows, in) and bias, the first of them, and the map where it is a module."""

    weight: Tensor
    bias: Tensor | None
    first: int = 0
    module: nn.Module | None = None

    def rescale(self, factors: Tensor) -> None:
        """Each of len(factors) heads by its factor."""
        of_rows = factors.repeat_interleave(len(self.weight) // len(factors))
        self.weight.mul_(_beside(self.weight, of_rows[:, None]))
        if self.bias is not None:
            self.bias.mul_(_beside(self.bias, of_rows))

    def norms(self, output: Tensor, size: int) -> Tensor:
        """The norms of the heads in the map's output, (B, H, N)."""
        rows = output[..., self.first : self.first + len(self.weight)]
        return rows.unflatten(-1, (-1, size)).norm(dim=-1).transpose(-1, -2)


def _beside(like: Tensor, x: Tensor) -> Tensor:
    """x in the dtype and on the device of `like`; on each of its processes where that is a DTensor."""
    x = x.to(like.device, like.dtype)
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


class _Projections:
    """How a module makes its queries and keys.

    rows: from the numbers of rows of query and key in a fused weight, which the weight does not tell, to those of both.
    """

    def __init__(self, rows: Callable[[int, int], tuple[_Rows, _Rows]]) -> None:
        self._rows = rows
        self._checked: tuple[_Rows, _Rows] | None = None
        self._heads = self._key_heads = 0

    @property
    def is_checked(self) -> bool:
        return self._checked is not None

    @property
    def device(self) -> torch.device:
        return self._rows(0, 0)[0].weight.device

    def modules(self) -> set[nn.Module]:
        return {rows.module for rows in self._rows(0, 0) if rows.module is not None}

    def check(self, path: str, call: AttentionCall, outputs: dict[nn.Module, Tensor]) -> None:
        """At the first call: ValueError where a factor of the projections is none of the logits."""
        if self._checked is not None:
            return
        (_, heads, _, size), key_heads = call.query.shape, call.key.shape[1]
        for shared in range(1, heads + 1):  # models may expand the heads of keys before they attend
            query, key = self._rows(heads * size, key_heads // shared * size)
            of_each = _ratio(query, call.query, outputs, 1), _ratio(key, call.key, outputs, shared)
            if key_heads % shared == 0 and all(of_each):
                self._checked, self._heads, self._key_heads = (query, key), heads, key_heads // shared
                return
        raise ValueError(
            f"the heads of '{path}' must be its projections, turned by rotary embeddings or times a number, for QKClip; got "
            "others (a norm of queries and keys takes every factor back, and bounds the logits by itself)"
        )

    def rescale(self, gamma: Tensor) -> None:
        """The logits of each head by gamma (H,)."""
        assert self._checked is not None  # since the module has been called
        query, key = self._checked
        of_keys = gamma.view(self._key_heads, -1).amin(1).sqrt()
        key.rescale(of_keys)
        query.rescale(gamma / of_keys.repeat_interleave(self._heads // self._key_heads))


def _ratio(rows: _Rows, attended: Tensor, outputs: dict[nn.Module, Tensor], shared: int) -> bool:
    """Whether what is attended with, (B, H, N, D), has the norms of what was projected, but for one factor."""
    size = attended.shape[3]
    if len(rows.weight) * shared != attended.shape[1] * size:
        return False
    if rows.module is None:  # nn.MultiheadAttention, which has nothing in between
        return True
    output = outputs.get(rows.module)
    if output is None:
        return False
    before, after = rows.norms(output, size).repeat_interleave(shared, -2), attended.norm(dim=-1)
    if before.numel() != after.numel():
        return False
    before, after = before.reshape(after.shape).double(), after.double()
    factor = after.sum() / before.sum()
    return bool(torch.allclose(after, before * factor, rtol=0.03, atol=1e-3 * float(after.amax())))


def _projections(module: nn.Module) -> _Projections | None:
    """Those of an attention module; None for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return _Projections(partial(_of_multihead, module))
    children = dict(module.named_children())
    for names in _PAIRS:
        query, key = (children.get(name) for name in names)
        if _is_linear(query) and _is_linear(key):
            return _Projections(partial(_of_pair, query, key))
    fused = next((children[name] for name in _FUSED if _is_linear(children.get(name))), None)
    return None if fused is None else _Projections(partial(_of_fused, fused))


def _of_pair(query: Any, key: Any, *_: int) -> tuple[_Rows, _Rows]:
    return _rows(query), _rows(key)


def _of_fused(module: Any, queries: int, keys: int) -> tuple[_Rows, _Rows]:
    return _rows(module, 0, queries), _rows(module, queries, queries + keys)


def _of_multihead(module: nn.MultiheadAttention, *_: int) -> tuple[_Rows, _Rows]:
    if module.in_proj_weight is None:
        weights = module.q_proj_weight, module.k_proj_weight
    else:
        weights = module.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[:2]
    return _Rows(weights[0], biases[0]), _Rows(weights[1], biases[1])


def _rows(module: Any, first: int = 0, last: int | None = None) -> _Rows:
    weight, bias = module.weight.mT if _is_transposed(module) else module.weight, module.bias
    if last is not None:
        weight, bias = weight[first:last], None if bias is None else bias[first:last]
    return _Rows(weight, bias, first, module)


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module | None) -> bool:
    """Whether the weight is (in, out), as in transformers' Conv1D."""
    return type(module).__name__ == "Conv1D"
