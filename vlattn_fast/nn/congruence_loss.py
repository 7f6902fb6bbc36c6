"""The congruence losses as a module for training loops, and their authors' schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_choice, check_number
from vlattn_fast.backends.reference.congruence_loss import DIRECTIONS, KINDS, NORMALIZATIONS, REDUCTIONS
from vlattn_fast.nn.capture_attention import AttentionCapture
from vlattn_fast.nn.captured_layer import CapturedLayer, QueryKey
from vlattn_fast.ops import BACKEND_NAMES
from vlattn_fast.ops._documents import Ids
from vlattn_fast.ops.congruence_loss import congruence_loss

SCHEDULES = ("linear", "exp", "log", "const")


class CongruenceLoss(nn.Module):
    """Computes a congruence loss in a training loop: `vlattn_fast.congruence_loss` on tensors or on a capture, with a schedule.

    Returns the weighted loss; the cost is that of `vlattn_fast.congruence_loss`. The authors add the loss times the schedule's
    weight to the task's loss, summed over one positive and 31 negatives, so `weight` is worth a search.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> loss = va.nn.CongruenceLoss("iais_singular", direction="text")
        >>> words, regions = (torch.randn(2, 4, 6, 8),) * 2, (torch.randn(2, 4, 9, 8),) * 2
        >>> loss(words, regions).shape
        torch.Size([])

    CACR is tiny for a fresh model, whose maps are close to uniform on both sides of the divergence: 3e-4 with 7 words and 5
    regions, 2e-6 with 60 and 100. IAIS is then 0.01, and about 1 for sharp attention, where CACR is larger, too.

    Each block is its own softmax over all words or all image tokens, even if the model's layer is causal or masks pairs of
    tokens. The blocks use a layer's mask only for padding.

    Args:
        kind, direction, scale, reduction, backend, normalize: see `vlattn_fast.congruence_loss`; direction also "alternate":
            "image" at the first call and every second one from there, "text" at the others, as the official training does.
        weight: multiplies the loss, in addition to the schedule.
        schedule: "linear", "exp", "log" or "const", see `training_signal_annealing`; needs num_steps unless "const".
        num_steps: steps of the training; the schedule's weight stays from there on.

    If the schedule or "alternate" needs the step, the module counts its calls with gradients in training mode. The count is part
    of its state, and of a checkpoint that includes the module. A call with `step` is not counted. Pass `step` if several calls
    make one step of the optimizer, such as with accumulation, or if no checkpoint includes the module; in a Trainer of
    transformers it is `self.state.global_step`. Do not compile a module with a schedule: torch.compile would compile it anew for
    each step.
    """

    def __init__(
        self,
        kind: str = "cacr",
        direction: str = "both",
        scale: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        *,
        normalize: str = "softmax",
        schedule: str = "const",
        num_steps: int | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_choice("normalize", normalize, NORMALIZATIONS)
        check_choice("direction", direction, (*DIRECTIONS, "alternate"))
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, BACKEND_NAMES)
        check_choice("schedule", schedule, SCHEDULES)
        check_number("weight", weight, low=0.0)
        if scale is not None:
            check_number("scale", scale)
        if num_steps is not None:
            check_number("num_steps", num_steps, low=1)
        elif schedule != "const":
            raise ValueError(f"num_steps must be the number of training steps if schedule is {schedule!r}; got None")
        self.kind, self.direction, self.scale, self.reduction, self.backend = kind, direction, scale, reduction, backend
        self.normalize = normalize
        self.schedule, self.num_steps, self.weight = schedule, num_steps, weight
        self.calls = 0

    def forward(
        self,
        text: tuple[Tensor, Tensor] | AttentionCapture | CapturedLayer,
        image: tuple[Tensor, Tensor] | None = None,
        cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        step: int | None = None,
        document_ids: Ids = None,
        cu_seqlens: Ids = None,
    ) -> Tensor:
        """Computes the weighted loss from (query, key) of words and of image tokens, or from a capture.

        Args:
            text, image, cross, text_mask, image_mask: see `vlattn_fast.congruence_loss`. A capture replaces text, image and
                cross: the captured layer's scale holds unless the module has one, and its mask marks padding unless you pass
                text_mask or image_mask. A joint sequence is split as the model joined it; if the model's run does not show that,
                the length L of text_mask (B, L) is the number of words, which come first.
            document_ids, cu_seqlens: see `vlattn_fast.congruence_loss`.
            step: of the training, from 0. Default: the number of earlier calls in training mode, with gradients and without a
                step.
        """
        scale = self.scale
        if isinstance(text, (AttentionCapture, CapturedLayer)):
            if image is not None or cross is not None:
                raise ValueError("image and cross must be left out if the first argument is a capture; got both")
            layer = text.layer if isinstance(text, AttentionCapture) else text
            text, image, cross = words, regions, _ = _parts(layer, text_mask)
            scale = layer.scale if scale is None else scale
            text_mask = words.key_mask if text_mask is None else text_mask
            image_mask = regions.key_mask if image_mask is None else image_mask
        elif image is None:
            raise ValueError("image must be the (query, key) of image tokens; got None")
        counts = step is None and (self.direction == "alternate" or self.schedule != "const")
        if step is None:
            step = self.calls if counts else 0
        elif not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step must be an int from 0 on; got {step!r}")
        direction = ("image", "text")[step % 2] if self.direction == "alternate" else self.direction
        options: dict[str, Any] = {name: getattr(self, name) for name in ("kind", "normalize", "reduction", "backend")}
        options |= {"direction": direction, "scale": scale, "text_mask": text_mask, "image_mask": image_mask}
        options |= {"document_ids": document_ids, "cu_seqlens": cu_seqlens}
        loss = congruence_loss(text, image, cross, **options)
        weight = self.weight
        if self.num_steps is not None:
            weight *= training_signal_annealing(step, self.num_steps, self.schedule)
        if counts and self.training and torch.is_grad_enabled():  # an evaluation often runs only the model, and not its loss
            self.calls += 1
        return loss if weight == 1.0 else weight * loss

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls, device="cpu")  # safetensors, in which Trainer stores a model, supports only tensors

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)

    def extra_repr(self) -> str:
        names = ("direction", "scale", "reduction", "normalize", "schedule", "num_steps", "weight")
        return ", ".join([repr(self.kind), *(f"{name}={getattr(self, name)!r}" for name in names)])


def _parts(layer: CapturedLayer, text_mask: Tensor | None) -> tuple[QueryKey, QueryKey, Any]:
    """Returns text, image and cross of a captured layer."""
    if layer.text is not None and layer.image is not None:
        return layer.text, layer.image, layer.cross
    if layer.joint is None:
        has = "image" if layer.text is None else "text"
        raise ValueError(f"the captured layer attends only to {has}; capture one that attends to words and image tokens")
    if layer.is_image is not None:
        return layer.split()
    if text_mask is None:
        raise ValueError("text_mask (B, L) must be given, to tell how many tokens of the captured sequence are words; got None")
    return layer.split(text_mask.shape[1])


def training_signal_annealing(step: int, num_steps: int, schedule: str = "exp") -> float:
    """Returns the weight of the congruence loss at training step `step` of `num_steps`, relative to the task's own loss.

    With x = step / num_steps (1 from there on): "linear" x, "exp" e^(5(x-1)), "log" 1 - e^(-5x), "const" 1.

    Examples:
        >>> import vlattn_fast as va
        >>> va.nn.training_signal_annealing(500, 1000, "linear")
        0.5

    Raises:
        ValueError, TypeError: if the step is below 0, there are no steps, or the schedule is unknown.

    Reference: utils/training_signal_annealing.py of KhoomeiK/CACR; "exp" is the authors' choice.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_number("step", step, low=0)
    check_number("num_steps", num_steps, low=1)
    x = min(step / num_steps, 1.0)
    return {"linear": x, "exp": math.exp(5 * (x - 1)), "log": 1 - math.exp(-5 * x), "const": 1.0}[schedule]
