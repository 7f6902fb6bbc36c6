"""QK-clip: projections of heads whose attention logits have grown too large are rescaled after a step of the optimizer.

Kimi K2 (arXiv 2507.20534, section 2.1 and algorithm 1): with S the largest logit scale * q_i . k_j of a head over the batch,
and gamma = min(1, threshold / S), the weights of its query and key become gamma^(1/2) times themselves, so that its logits are at
most the threshold on this batch.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.attachments import add_hook, add_pre_hook
from vlattn_fast._ground.checks import check_number, is_distributed
from vlattn_fast._ground.tensors import resolve_scale, scaled_dot_default
from vlattn_fast.attach.events import AttentionEvent
from vlattn_fast.attach.session import uncompiled, unwrapped
from vlattn_fast.attach.token_kinds import TokenKinds
from vlattn_fast.attach.training import TrainingContext
from vlattn_fast.nn.projections import FUSED, PAIRS, Projections, faults_of, misfit, projections_of
from vlattn_fast.ops.attention_statistics import attention_statistics

_MASKED = -9999.0  # a float mask adds at most this to mask a key; some models add -10000, biases add less


@dataclass
class _StepCalls:
    """Calls of attention since the last step."""

    calls: int = 0
    largest: dict[nn.Module, Tensor] = field(default_factory=dict)  # (H,) of a module
    misfits: dict[nn.Module, Tensor] = field(default_factory=dict)  # whether a factor would miss logits above the threshold
    error: Exception | None = None  # of a call, which `step` raises in all processes


class QKClip(TrainingContext):
    """Bounds the attention logits of `model` during training, by rescaling heads whose logits grew too large.

    A context records each head's largest logit. After a step of the optimizer, `step` multiplies the weights of query and key so
    that the logits stay at or below the threshold on this batch. It returns the rescaled heads. The model runs its own attention,
    and `attention_statistics` computes the largest logits without a map. On a CPU a layer is skipped if no product of two norms
    |q| |k| reaches the threshold.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        >>> x = 10 * torch.randn(2, 5, 16)
        >>> with va.nn.QKClip(attention, threshold=0.5) as clip:
        ...     _ = attention(x, x, x)
        ...     clipped = clip.step()  # after optimizer.step()
        >>> sorted(clipped[""])  # the heads of the module "", which is the model itself
        [0, 1]

    transformers' Trainer takes `callbacks=[QKClip(model).trainer_callback()]`, Lightning takes
    `QKClip(model).lightning_callback()`. They enter the context when training begins, unless it is already entered; evaluation
    between steps does not count. transformers does not end its callbacks after an exception: if you use the model afterwards,
    train inside of `with QKClip(model) as clip`. Among processes (torch.distributed) the largest logit of all counts, and if
    `step` raises an error in one process, it raises it in all.

    Inside of the context compiled code runs as plain Python, since compiled code shows no attention. If several query heads share
    a key head, the key head is scaled by gamma^(1/2) for the smallest gamma among them, and each query head by the rest of its
    own.

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention, this package's, or
            written out by hand, with linear projections q_proj and k_proj, query and key, to_q and to_k, ..., or one projection
            of all queries, keys and values. Wrappers (DDP, fully_shard, torch.compile) are supported. A module whose projections
            are all frozen stays unchanged, and so does one whose attention torch does not show, such as a kernel of its own.
        threshold: the largest logit that stays unchanged: the scaled product of a query with a key that it attends to. A softcap
            and the biases of a float mask do not count, since no factor reaches them.

    Raises:
        ValueError: if an argument is wrong; if a layer's projections are not found, do not reach its logits (such as under a norm
            of queries and keys, which cancels every factor), are used elsewhere as well, are not plain parameters, or are partly
            frozen; if attention does more than scale and mask its logits.
        RuntimeError: if `step` follows no forward pass of the model in the context, or of a layer in one of several processes.
        FloatingPointError: if a logit is NaN or infinite.

    Reference: Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1.
    """

    def __init__(self, model: nn.Module, threshold: float = 100.0) -> None:
        check_number("threshold", threshold)
        if threshold <= 0:
            raise ValueError(f"threshold must be greater than 0; got {threshold!r}")
        self.model, self.threshold = unwrapped(model), float(threshold)
        each = ((module, projections_of(module)) for module in self.model.modules())
        self._projections = {module: projections for module, projections in each if projections is not None}
        self._paths = {module: path for path, module in self.model.named_modules()}
        self._running: list[nn.Module] = []
        self._outputs: dict[nn.Module, Tensor] = {}  # of projections, until their module ends
        self._faults: dict[nn.Module, str] = {}
        self._current, self._aside = _StepCalls(), _StepCalls()  # aside: those of the current step, during an evaluation

    def _enter(self, stack: ExitStack) -> None:
        self._faults = faults_of(self.model, self._projections)
        self._running.clear()
        self._forget()
        stack.enter_context(uncompiled(self.model))
        kinds = TokenKinds(self.model, {}, sees=self._see, needs_graph=False)
        stack.enter_context(kinds.observer(parts=self._projections))
        for module, projections in self._projections.items():
            stack.callback(add_pre_hook(module, self._begin))
            stack.callback(add_hook(module, self._end, always_call=True))
            for each in projections.modules():
                stack.callback(add_hook(each, self._projected))

    @torch.no_grad()
    def step(self) -> dict[str, dict[int, float]]:
        """Rescales the heads whose largest logit since the last step is above the threshold.

        Returns path of an attention module -> head -> that logit, for the rescaled heads.
        """
        recorded = self._current
        self._forget()
        if recorded.error is None and recorded.calls == 0:
            recorded.error = RuntimeError(
                "QKClip recorded no attention since its last step; run the model inside of its context, with attention that "
                "torch shows (attn_implementation='sdpa' or 'eager')"
            )
        self._raise_in_all_processes(recorded.error)
        largest = recorded.largest
        if is_distributed():
            for_all = {module: _max_over_processes(largest.get(module), x) for module, x in self._projections.items()}
            largest = {module: x for module, x in for_all.items() if x is not None}
        heads = {module: (x > self.threshold).nonzero()[:, 0].tolist() for module, x in largest.items()}
        errors = (self._error_of(module, largest[module], heads[module], recorded.misfits) for module in heads)
        self._raise_in_all_processes(next((error for error in errors if error is not None), None))
        clipped: dict[str, dict[int, float]] = {}
        for module, too_large in heads.items():
            if too_large:
                x = largest[module]
                self._projections[module].rescale(torch.clamp(self.threshold / x.clamp(min=self.threshold), max=1.0))
                clipped[self._paths[module]] = {head: float(x[head]) for head in too_large}
        return clipped

    def _error_of(
        self, module: nn.Module, largest: Tensor, heads: list[int], misfits: dict[nn.Module, Tensor]
    ) -> Exception | None:
        """Returns why the module cannot be rescaled, or None."""
        path = self._paths[module]
        if not bool(largest.lt(torch.inf).all()):  # NaN as well
            return FloatingPointError(f"the largest logits of '{path}' must be finite; got {largest.tolist()}")
        if heads and not self._projections[module].is_checked:
            return RuntimeError(f"'{path}' must attend in each process between two steps; got none in this one")
        if heads and bool(misfits.get(module, False)):
            return misfit(path)
        return None

    def _raise_in_all_processes(self, error: Exception | None) -> None:
        """Raises one process's error in each of them: a process that went on would wait for the others forever."""
        if not is_distributed():
            if error is not None:
                raise error
            return
        device = next((x.device for x in self.model.parameters()), torch.device("cpu"))
        several, here = torch.distributed.get_world_size(), torch.distributed.get_rank()
        first = torch.tensor([several if error is None else here], device=device)
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        if (rank := int(first)) < several:
            errors = [error]
            torch.distributed.broadcast_object_list(errors, rank, device=device)
            raise type(errors[0])(f"rank {rank}: {errors[0]}") from error  # type: ignore[misc]

    def trainer_callback(self) -> Any:
        """Returns a callback for transformers' Trainer."""
        return self._callback_of_trainer()

    def _begin_training(self) -> None:
        self._forget()
        super()._begin_training()

    def _end_step(self, step: int, is_first_process: bool) -> dict[str, float]:
        self.step()
        return {}

    def _begin_evaluation(self) -> None:
        self._aside, self._current = self._current, _StepCalls()

    def _end_evaluation(self) -> None:
        self._current, self._aside = self._aside, _StepCalls()

    def _forget(self) -> None:
        """Drops what was recorded since the last step."""
        self._current, self._aside = _StepCalls(), _StepCalls()
        self._outputs.clear()

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _end(self, module: nn.Module, *_: Any) -> None:
        self._running.pop()
        for projection in self._projections[module].modules():
            self._outputs.pop(projection, None)

    def _projected(self, projection: nn.Module, _: Any, output: Tensor) -> None:
        if self._running:
            self._outputs[projection] = output.detach()

    def _see(self, number: int, call: AttentionEvent) -> None:
        """Records the largest logits of one call of attention. One of several processes leaves an error to `step`."""
        try:
            self._take_up(call)
        except ValueError as error:
            if not is_distributed():
                raise
            self._current.error = self._current.error or error

    def _take_up(self, call: AttentionEvent) -> None:
        if not self._running:
            raise ValueError(
                "QKClip found no projections around a call of attention; it supports modules with children "
                f"{', '.join(' and '.join(pair) for pair in PAIRS)}, with one of {', '.join(FUSED)}, and nn.MultiheadAttention"
            )
        module, recorded = self._running[-1], self._current
        recorded.calls += 1
        path, projections = self._paths[module], self._projections[module]
        if module in self._faults:
            raise ValueError(f"the projections of '{path}' must {self._faults[module]}, for QKClip")
        if projections.is_frozen(path):
            return
        with torch.no_grad():
            projections.check(path, call, self._outputs)
            largest = self._max_logits(module, call) if projections.is_checked else None
            if largest is None:
                return
            misses = largest.gt(self.threshold).any() & ~projections.fit(call, self._outputs)
            before = recorded.largest.get(module)
            recorded.largest[module] = largest if before is None else torch.maximum(before, largest)
            recorded.misfits[module] = misses if before is None else recorded.misfits[module] | misses

    def _max_logits(self, module: nn.Module, call: AttentionEvent) -> Tensor | None:
        """Returns (H,); None if no logit can reach the threshold."""
        if call.masks is None or call.score != "dot":
            raise ValueError(
                f"the attention of '{self._paths[module]}' must only scale and mask its logits for QKClip; got one that does more"
            )
        query, key, mask = call.query.detach(), call.key.detach(), call.masks.get("attn_mask")
        options = {name: x for name, x in call.masks.items() if name not in ("softcap", "sink")}
        options["enable_gqa"] = key.shape[1] != query.shape[1]
        if mask is not None and mask.is_floating_point():
            options["attn_mask"] = mask > _MASKED
        if query.device.type == "cpu" and _bound(query, key, options) <= self.threshold:
            return None
        statistics: Any = attention_statistics(query, key, statistics=["max_logit"], **options)
        return statistics.max_logit_of_heads()


def _bound(query: Tensor, key: Tensor, options: dict[str, Any]) -> float:
    """Returns an upper bound of the logits."""
    scale = resolve_scale(options.get("scale"), scaled_dot_default(query.shape[-1]))
    norms = [x.norm(dim=-1).amax().float() if x.numel() else x.new_zeros(()) for x in (query, key)]
    bound = float(abs(scale) * norms[0] * norms[1] * 1.01)
    return bound if bound == bound else torch.inf


def _max_over_processes(largest: Tensor | None, projections: Projections) -> Tensor | None:
    """Returns the largest logits of all processes."""
    device = projections.device
    sizes = torch.tensor([0 if largest is None else len(largest)], device=device)
    torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MAX)
    if int(sizes) == 0:
        return None
    if largest is None:
        largest = torch.full((int(sizes),), -torch.inf, device=device)
    largest = torch.where(largest.isnan(), torch.inf, largest)  # so that all processes raise for NaN
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest
