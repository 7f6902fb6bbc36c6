"""Relevancy that a model trains on: that of `va.explain` with its gradient, from the forward pass of a training step.

The model is unchanged, with its dropout, autocast and wrappers. Its attention calls store queries, keys, values and outputs,
which the backward pass needs anyway; `relevancy` is computed from them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlattn_fast._ground.checks import check_bool, describe, is_wrapped
from vlattn_fast.attach.events import RUNNING
from vlattn_fast.attach.session import check_has_gradients, is_sharded, never_compiled, uncompiled, unwrapped
from vlattn_fast.interpret.explaining.answer import adapter_of
from vlattn_fast.interpret.explaining.explained_positions import start_vectors
from vlattn_fast.interpret.explaining.forward_pass import run_of_trace
from vlattn_fast.interpret.explaining.question import (
    Question,
    backward_pass,
    check_relevancy,
    check_scores,
    lost_gradients,
    missed_norms,
    other_keys,
    warn_of,
)
from vlattn_fast.interpret.explaining.request import Position, Prompt, Request, check_position
from vlattn_fast.interpret.relevancy.live_calls import LiveCalls
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import method_of
from vlattn_fast.interpret.relevancy.model_trace import Trace


def capture_relevancy(model: nn.Module, *, method: str | Method = "gradient", higher_order: bool = False) -> RelevancyCapture:
    """Captures the forward pass of a training step, so that its relevancy has a gradient with respect to the model's parameters.

    Returns a context around the forward pass; call its `relevancy` afterwards. In addition to what training stores anyway, it
    stores the gradients of the score at each attention's output, O(N), and no map. `relevancy` runs one backward pass of the
    score.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
        >>> model = ViTForImageClassification(ViTConfig(**sizes))
        >>> with va.nn.capture_relevancy(model) as captured:
        ...     logits = model(pixel_values=torch.rand(2, 3, 16, 16)).logits
        >>> relevancy = captured.relevancy(logits[:, 0].sum())  # before loss.backward()
        >>> va.nn.RelevancyLoss("inside")(relevancy, torch.rand(2, 5) > 0.5).requires_grad
        True

    The model runs as usual: in train mode, under autocast, inside of DDP or FSDP. A compiled model runs uncompiled. Exactly one
    forward pass with gradients must run inside the context. Other passes, such as those under torch.no_grad or those that
    `explain` runs, do not count, and layers under torch.utils.checkpoint with use_reentrant=False count once. With dropout of
    attention weights, relevancy is that of the map before dropout, with the score's gradient at the output.

    Args:
        model: a model that `explain` supports. Attention must be dot products, and its bias constant.
        method: "gradient", "weighted", "rollout", or an ablation of these; or one with options, such as
            `va.methods.Gradient(freeze=())` for the published form. The loss always uses the plain derivatives.
        higher_order: False = the score's gradient in the maps is a constant, as RobustViT trains. True = the relevancy's
            gradient goes through it, too: attention is then computed by `score_attention`, and the rest of the
            model must have second derivatives. Tangents of torch.autograd.forward_ad.dual_level follow the same rule.

    Raises:
        TypeError, ValueError: if an argument is wrong (the message names it); in the forward pass, if the relevancy of an
            attention module has no gradient (the message names the module).
    """
    return RelevancyCapture(model, method, higher_order)


class RelevancyCapture:
    """Holds the result of `capture_relevancy`: a context, then `relevancy`."""

    def __init__(self, model: nn.Module, method: str | Method, higher_order: bool) -> None:
        check_bool(higher_order=higher_order)
        self.model, self._inner = model, unwrapped(model)
        check_has_gradients(self._inner)
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError("model must run in this thread; got DataParallel over several devices. Use DistributedDataParallel")
        if higher_order and is_sharded(model):
            raise ValueError("higher_order must be False under FSDP, whose first backward pass frees the weights; got True")
        self._higher_order, chosen = higher_order, LiveCalls(method_of(method), higher_order)
        if chosen.needs_score and any(isinstance(x, DistributedDataParallel) and x.static_graph for x in model.modules()):
            raise ValueError(
                "model must support several backward passes per step; got DistributedDataParallel(static_graph=True), which "
                "treats the relevancy's as the loss's, and then does not reduce the loss's gradients. Pass static_graph=False"
            )
        adapter = adapter_of(self._inner)
        chosen.formula.check_adapter(adapter, type(self._inner).__name__)
        if adapter.bimodal:
            chosen.check_between(adapter.towers)
        self._request = Request(self._inner, adapter, chosen, target=_given)
        self._passes: list[tuple[Trace, Prompt]] = []
        self._stack: contextlib.ExitStack | None = None

    # --- the context ---

    @never_compiled
    def __enter__(self) -> RelevancyCapture:
        before = vars(self._inner).get("forward")
        if self._stack is not None or hasattr(before, "captures_relevancy"):
            raise RuntimeError("a capture_relevancy of this model is already entered. Leave it first")
        self._passes, self._thread = [], threading.get_ident()
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled(self._inner))
            forward = self._inner.forward
            stack.callback(_put_back, self._inner, before)

            @functools.wraps(forward)
            def captured(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if module is not self._inner:  # a copy of the model
                    return type(module).forward(module, *args, **kwargs)
                return self._forward(forward, *args, **kwargs)

            signature = inspect.signature(forward)
            first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)  # which a method leaves out
            vars(captured)["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
            vars(captured)["captures_relevancy"] = True
            vars(self._inner)["forward"] = types.MethodType(captured, self._inner)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.__exit__(*error)

    @never_compiled
    def _forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's forward pass, and traces it if it has gradients and no other run traces it."""
        if RUNNING.get() is not None or not torch.is_grad_enabled() or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        arguments = {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs}
        with Trace(self._inner, self._request.adapter, self._request.method, finds_position=True) as trace:
            trace.prepare(arguments)
            outputs = forward(*args, **kwargs)
        trace.check()
        self._passes.append((trace, Prompt(self._request, arguments)))
        return outputs

    # --- afterwards ---

    @never_compiled
    def relevancy(
        self, score: Tensor | None = None, position: None | Position | Mapping[str, Position] = None
    ) -> Tensor | dict[str, Tensor]:
        """Returns the relevancy (B, N) of each token to the score, with its gradient.

        Values are those of `va.explain`. Call it before the loss's backward pass; you may ask for several scores. If several
        towers have a relevancy vector, or `position` is a dict, the result is a dict of towers.

        Args:
            score: a scalar, the sum of the samples' scores, or the scores (B,), which are summed. Leave it out for method
                "rollout".
            position: the explained token, see `va.explain`. Default: the one that the score's gradient names, one token or the
                mean of several, or that of the model's adapter.

        Raises:
            TypeError, ValueError: if `score` or `position` is wrong; if no forward pass with gradients, or several, ran inside
                the context; if the score is NaN, or does not depend on the layers or on the explained token.
            RuntimeError: for a score inside torch.func.jvp or vmap; or the graph of the forward pass is freed.
        """
        trace, prompt = self._single_pass()
        check_position(position)
        scores = self._checked(score)
        run = run_of_trace(replace(prompt, request=replace(self._request, position=position)), trace, None)
        if scores is not None:
            check_scores("score", scores, run)
        how = {"keep": True, "differentiable": self._higher_order}
        with _naming_a_freed_graph(), trace.frozen.holding():
            starts = start_vectors(run, position, scores, "score")
            backward = backward_pass(run, scores, starts, **how)
            rows = run.request.method.carried(backward)
        check_relevancy(Question(run, scores, [(scores, starts)]), rows, backward.contribution)
        warn_of([*lost_gradients(run), *missed_norms(run), *other_keys(run)])
        by_tower = {tower.name: row[:, 0] for tower, row in zip(run.towers, rows, strict=True)}
        return by_tower if len(by_tower) > 1 or isinstance(position, Mapping) else next(iter(by_tower.values()))

    def _single_pass(self) -> tuple[Trace, Prompt]:
        if not self._passes:
            raise ValueError(
                "capture_relevancy traced no forward pass with gradients. Run the model itself within the `with` block, outside "
                "of torch.no_grad. In evaluations without gradients, such as Trainer.evaluate, leave relevancy and loss out: "
                "`if torch.is_grad_enabled():`"
            )
        if len(self._passes) > 1:
            raise ValueError(
                f"capture_relevancy traced {len(self._passes)} forward passes, and a score may come from each of "
                "them. Use a context for each pass"
            )
        return self._passes[0]

    def _checked(self, score: Any) -> Tensor | None:
        """Returns the scores (B,), or (1,) of a sum."""
        if score is None:
            if self._request.method.needs_score:
                raise ValueError(
                    f"score must be given for method {self._request.method.name!r}, which takes its gradient; got None"
                )
            return None
        if not isinstance(score, Tensor):
            raise TypeError(f"score must be a tensor of the model's outputs; got {type(score).__name__}")
        if score.ndim > 1 or not score.is_floating_point():
            raise ValueError(f"score must be a floating scalar, or scores (B,); got {describe(score)}")
        if self._request.method.needs_score and is_wrapped(score) and not score.requires_grad:
            raise RuntimeError(
                "relevancy takes the gradient of its score, which torch.func.jvp and vmap do not support inside. Use "
                "torch.autograd.forward_ad.dual_level around the forward pass and relevancy"
            )
        if not score.requires_grad and self._request.method.needs_score:
            raise ValueError("score must depend on the model's forward pass; got a tensor that is detached from it")
        return score.reshape(-1)


@contextlib.contextmanager
def _naming_a_freed_graph() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "capture_relevancy needs the graph of the forward pass, which a backward pass has freed. Ask for the relevancy "
            "before loss.backward()"
        ) from error


def _given(outputs: Any) -> Tensor:
    """Stands for the target of a request whose score the caller takes from the outputs."""
    raise AssertionError


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward
