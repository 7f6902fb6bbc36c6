"""Terms that are added to a model's own loss in its forward pass: CACR and IAIS, and losses on relevancy.

A training loop that takes the loss from the model's outputs, as Trainer of transformers does, then trains on the sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.attachments import add_hook, add_pre_hook
from vlattn_fast._ground.checks import check_callable, check_number, describe
from vlattn_fast.attach.events import RUNNING, AttentionEvent
from vlattn_fast.nn.capture_attention import AttentionCapture
from vlattn_fast.nn.capture_relevancy import capture_relevancy
from vlattn_fast.nn.congruence_loss import CongruenceLoss
from vlattn_fast.nn.relevancy_loss import RelevancyLoss
from vlattn_fast.train.attached import Attached, Mean

_MASK = "attention_mask"  # its name in models of transformers; your own model may have none


class Term(Attached):
    """Adds a term to the loss of `model`: a hook after its forward pass adds it to the outputs' loss.

    The hook acts in training mode and with gradients. Evaluations, and passes that `explain` runs, have no term.
    """

    name = ""  # in the log
    target: str | None = None  # an input that the model does not take

    def __init__(self, model: nn.Module, every: int) -> None:
        super().__init__(model, every)
        self._mean, self._taken = Mean(), dict[str, Any]()

    def _value(self, batch: dict[str, Any], outputs: Any) -> Tensor:
        """Returns the scalar to add."""
        raise NotImplementedError

    def _enter(self, stack: ExitStack) -> None:
        stack.callback(add_pre_hook(self.model, self._begin_pass, with_kwargs=True))
        stack.callback(add_hook(self.model, self._end_pass, with_kwargs=True))

    def _counts(self) -> bool:
        running = RUNNING.get()
        return torch.is_grad_enabled() and self.model.training and (running is None or not running.explains)

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._taken = {name: x for name, x in kwargs.items() if name == self.target}
        return args, {name: x for name, x in kwargs.items() if name != self.target}

    def _end_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self._counts():
            return outputs
        value = self._value({**kwargs, **self._taken}, outputs)
        self._mean.add(value)
        return _with_loss(outputs, value * self._share("num_items_in_batch" in kwargs))

    def _share(self, has_items: bool) -> float:
        """Returns the factor of a mean if Trainer divides the loss in another way.

        Trainer leaves the division by all accumulated batches to a model that is told their number of items, and multiplies the
        loss by the number of processes, over which the mean is taken.
        """
        trainer = self._trainer
        if trainer is None:
            return 1.0
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        share = 1.0
        if has_items if is_scaled is None else is_scaled:
            share /= getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
        if has_items and trainer.args.average_tokens_across_devices and trainer.model_accepts_loss_kwargs:
            share /= trainer.accelerator.num_processes // getattr(trainer, "get_tp_size", lambda: 1)()
        return share

    def _end_step(self, step: int, is_first_process: bool) -> dict[str, float]:
        if step % self.every:
            return {}
        mean = self._mean.take()
        if mean is None:
            raise self._no_pass()
        return {self.name: mean}

    def _begin_training(self) -> None:
        for name in ("compute_loss_func", "label_smoother"):
            if getattr(self._trainer, name, None) is not None:
                raise ValueError(
                    f"trainer must take the loss from the model's outputs, to which {type(self).__name__} adds its own; got one "
                    f"with a {name}. Add the loss there, or leave that out"
                )
        super()._begin_training()


class CongruenceTerm(Term):
    """Adds CACR or IAIS to a model's loss while it trains.

    The outputs of the model must have a loss. The cost is that of `CongruenceLoss` on one layer, without a map per head. The mean
    of the term is logged as "congruence_loss".

        trainer = Trainer(model, arguments, train_dataset=data)
        term = va.train.CongruenceTerm(model, va.nn.CongruenceLoss("cacr", schedule="exp", num_steps=arguments.max_steps))
        trainer.add_callback(term.trainer_callback(trainer))

    In your own loop, put `with term:` around it. Set term.step = step before each step if the loss has a schedule and several
    forward passes make a step.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import VisualBertConfig, VisualBertForQuestionAnswering
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, visual_embedding_dim=20, vocab_size=99)
        >>> model = VisualBertForQuestionAnswering(VisualBertConfig(**sizes, num_labels=4)).train()
        >>> with va.train.CongruenceTerm(model, va.nn.CongruenceLoss("iais_distributed")):
        ...     outputs = model(torch.ones(2, 5, dtype=torch.long), visual_embeds=torch.randn(2, 3, 20),
        ...                     attention_mask=torch.ones(2, 5).long(), labels=torch.eye(4)[:2])
        >>> outputs.loss.backward()

    Args:
        model: any model that `capture_attention` supports; wrappers (DDP, FSDP, torch.compile) are supported, and a compiled
            model runs uncompiled.
        loss: a `CongruenceLoss`, with its weight and schedule.
        text_mask, image_mask: the names of the model's inputs with 1 for each real token. None, an input that a batch does not
            have, or an attention_mask of words and image tokens in one, as decoders take, means the layer's own mask.
        layers, modality: see `capture_attention`; one layer.
        every: steps from one log to the next.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it); if the outputs have no loss; if a Trainer computes
            its loss elsewhere.
    """

    name = "congruence_loss"
    step: int | None = None  # of the optimizer

    def __init__(
        self,
        model: nn.Module,
        loss: CongruenceLoss,
        *,
        text_mask: str | None = _MASK,
        image_mask: str | None = None,
        layers: int = -1,
        modality: Mapping[str, str] | None = None,
        every: int = 10,
    ) -> None:
        super().__init__(model, every)
        if not isinstance(loss, CongruenceLoss):
            raise TypeError(f"loss must be a CongruenceLoss; got {type(loss).__name__}")
        if isinstance(layers, bool) or not isinstance(layers, int):
            raise ValueError(f"layers must be one index; got {layers!r}")
        self.loss, self._masks = loss, {"text_mask": text_mask, "image_mask": image_mask}
        for name, key in self._masks.items():
            if key is not None and not isinstance(key, str):
                raise TypeError(f"{name} must be the name of one of the model's inputs, or None; got {describe(key)}")
        self._capture = _TrainingCapture(self.model, layers, modality)

    def _enter(self, stack: ExitStack) -> None:
        stack.enter_context(self._capture)  # whose hook comes first
        super()._enter(stack)

    def _begin_step(self, step: int) -> None:
        self.step = step

    def _end_training(self) -> None:
        self.step = None
        super()._end_training()

    def _value(self, batch: dict[str, Any], outputs: Any) -> Tensor:
        masks, joint = {}, self._capture.layer.joint
        for name, key in self._masks.items():
            mask = None if key is None else batch.get(key)
            if key == _MASK and mask is not None and joint is not None and mask.shape[1] == joint[0].shape[2]:
                continue  # of words and image tokens in one: the layer's own
            if mask is not None:
                masks[name] = mask.bool()
            elif key not in {None, _MASK, *batch} and key not in inspect.signature(self.model.forward).parameters:
                raise ValueError(f"{name} must name one of the model's inputs; got {key!r}, and the inputs {', '.join(batch)}")
        return self.loss(self._capture, **masks, step=self.step).mean()


class _TrainingCapture(AttentionCapture):
    """Captures only the passes of a training: `generate` in an evaluation has no layers to show."""

    def _finish(self, calls: Sequence[AttentionEvent]) -> None:
        if torch.is_grad_enabled() and self.model.training:
            super()._finish(calls)


class RelevancyTerm(Term):
    """Adds a loss on relevancy to a model's loss while it trains.

    Each training pass also runs a backward pass of the score; see `capture_relevancy` for its memory. The mean of the term is
    logged as "relevancy_loss".

        trainer = Trainer(model, arguments, train_dataset=data)  # with remove_unused_columns=False
        term = va.train.RelevancyTerm(model, va.nn.RelevancyLoss("inside", prefix=1), target="mask", weight=0.8)
        trainer.add_callback(term.trainer_callback(trainer))

    The samples have one field more than the model takes, `target`: the masks or relevancy vectors of the loss. The model gets all
    other fields. In your own loop, put `with term:` around it.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8, num_labels=4)
        >>> model, labels = ViTForImageClassification(ViTConfig(**sizes)).train(), torch.tensor([1, 3])
        >>> with va.train.RelevancyTerm(model, va.nn.RelevancyLoss("inside", prefix=1)):
        ...     outputs = model(pixel_values=torch.rand(2, 3, 16, 16), labels=labels, mask=torch.ones(2, 2, 2, dtype=torch.bool))
        >>> outputs.loss.backward()

    Args:
        model: a model that `explain` supports; wrappers (DDP, FSDP, torch.compile) are supported, and a compiled model runs
            uncompiled.
        loss: a `RelevancyLoss`.
        target: the name of the field.
        score: (outputs, batch) -> the scores whose relevancy counts, (B,) or their sum. Default: each sample's logit of its
            label, for a classifier with `logits` (B, classes) and `labels` (B).
        weight: multiplies the loss.
        tower: the tower whose relevancy counts, if the model has several.
        every: steps from one log to the next.
        position, options: see `capture_relevancy` and its `relevancy`: method, higher_order.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it); if the outputs have no loss; if a Trainer computes
            its loss elsewhere.
    """

    name = "relevancy_loss"

    def __init__(
        self,
        model: nn.Module,
        loss: RelevancyLoss,
        *,
        target: str = "mask",
        score: Callable[[Any, dict[str, Any]], Tensor] | None = None,
        weight: float = 1.0,
        tower: str | None = None,
        position: Any = None,
        every: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(model, every)
        if not isinstance(loss, RelevancyLoss):
            raise TypeError(f"loss must be a RelevancyLoss; got {type(loss).__name__}")
        check_number("weight", weight, low=0.0)
        check_callable(score=score)
        capture_relevancy(self.model, **options)  # raises for wrong options now
        self.loss, self.target, self.score, self.weight = loss, target, score or _logit_of_label, weight
        self.tower, self._position, self._options = tower, position, options
        self._around: ExitStack | None = None

    def _enter(self, stack: ExitStack) -> None:
        super()._enter(stack)
        self._renew()
        stack.callback(self._leave)

    def _renew(self) -> None:
        """Enters a new capture, since a capture is of one pass."""
        self._leave()
        with ExitStack() as stack:
            self._capture = stack.enter_context(capture_relevancy(self.model, **self._options))
            self._around = stack.pop_all()

    def _leave(self) -> None:
        around, self._around = self._around, None
        if around is not None:
            around.close()

    def _value(self, batch: dict[str, Any], outputs: Any) -> Tensor:
        try:
            if self.target not in batch:
                raise ValueError(f"target must be a field of each sample; got {self.target!r}, and the fields {', '.join(batch)}")
            rows = self._capture.relevancy(self.score(outputs, batch), position=self._position)
        finally:
            self._renew()
        if isinstance(rows, dict):
            if self.tower not in rows:
                raise ValueError(f"tower must be one of {', '.join(rows)}; got {self.tower!r}")
            rows = rows[self.tower]
        return self.weight * self.loss(rows, batch[str(self.target)])


def _logit_of_label(outputs: Any, batch: dict[str, Any]) -> Tensor:
    logits, labels = getattr(outputs, "logits", None), batch.get("labels")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not isinstance(labels, Tensor) or labels.dim() != 1:
        raise ValueError(
            "score must be given if the model is not a classifier with logits (B, classes) and labels (B); got logits "
            f"{describe(logits)} and labels {describe(labels)}"
        )
    return logits.gather(1, labels[:, None]).sum()


def _with_loss(outputs: Any, value: Tensor) -> Any:
    """Returns the outputs with the value added to their loss."""
    if isinstance(outputs, dict) and outputs.get("loss") is not None:
        outputs["loss"] = outputs["loss"] + value
        return outputs
    if isinstance(outputs, Tensor) and outputs.dim() == 0:
        return outputs + value
    if isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0:
        return (outputs[0] + value, *outputs[1:])
    has = ", ".join(map(str, outputs)) if isinstance(outputs, dict) else describe(outputs)
    raise ValueError(f"the model's outputs must have a loss in training, so pass it labels; got {has}")
