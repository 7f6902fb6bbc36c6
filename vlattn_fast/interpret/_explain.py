"""The call: one forward pass with a carrier threaded through the layers, one backward pass, one relevancy row per tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._tensors import compute_dtype
from vlattn_fast.interpret.explanation import Explanation
from vlattn_fast.interpret.families import find_family
from vlattn_fast.interpret.inputs import prepare_inputs, real_tokens
from vlattn_fast.interpret.methods import Weighting, check_weighting, find_method, gradcam, raw_attention
from vlattn_fast.interpret.readout import gather_words, image_maps, start_rows, word_positions
from vlattn_fast.interpret.taps import TowerTap, resting, tapped
from vlattn_fast.interpret.targets import choose_score


def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: None | int | Tensor | list[int] | Callable[[Any], Tensor] = None,
    method: str = "gradient",
    start_layer: int = 0,
    weighting: Weighting = "contribution",
) -> Explanation:
    """Relevancy of every input token to a score of the model.

    `model(**inputs)` is run once and differentiated once. No attention map is held, no weight gradient is computed, and the
    model is left as it was, also after an error. During the call the model is changed in place (eval mode, frozen
    parameters, attention function), so it must not be used from another thread.

    Methods, for one row r of the relevancy matrix, from the last layer to `start_layer`:

    - "gradient": r <- r + r Abar, Abar = mean_h relu(A * dA) (Chefer, Gur, Wolf, ICCV 2021, equations 5 and 6).
    - "weighted": r <- r*a + (r*b) Abar, rows of Abar summing to one, a and b the shares of the two terms of the residual sum
      behind the layer (after Huang et al. 2023; their code is not public and the weights are this package's reading, see
      `weighting`). The sum is taken where the family's record says it is; scalings inside the branch are part of its term.
    - "rollout": r <- (r + r mean_h A) / 2 (Abnar and Zuidema 2020); no gradient.
    - "attention": the read-out row of mean_h A in the last layer; no gradient, `start_layer` has no effect.
    - "gradcam": the read-out row of relu(mean_h w_h A_h) in the last layer, w_h = mean_ij dA_h; `start_layer` has no effect.

    Args:
        model: a Hugging Face model of a known family (CLIP, SigLIP, ViT, DINOv2, BERT, LLaVA, Qwen-VL, ...; see `FAMILIES`),
            or `vlattn_fast.models.UNITER`.
        inputs: the model's keyword arguments, e.g. what a processor returns.
        target: None = CLIP-like: similarity logit of image i with text i (one image and T texts: T rows); classifier: the
            argmax class; decoder: the argmax token after the last real position. An int or (B,) ints = that text, class or
            token. A callable(outputs) -> (B,) scores; inputs are then not repeated, so images and texts must be as many.
        start_layer: 0 = all layers, -1 = the last only, i = layers i and later.
        weighting: for "weighted": "contribution" (|g.x| and |g.o|), "norm" (|x| and |o|), "equal" (1 and 1), or a
            callable(residual, branch, gradient) -> (a, b), (B, N) each.

    Returns:
        An `Explanation`; values are raw.

    Raises:
        TypeError: `model` is no module, `inputs` no mapping, `target` of no known kind.
        ValueError: unknown method or family, a layer that cannot be tapped (named), indices out of range, an attention
            option the operator has no form of (softcap, sinks), a score that does not depend on the layers.
    """
    rule = find_method(method)
    check_weighting(weighting)
    if not isinstance(start_layer, int) or isinstance(start_layer, bool):
        raise TypeError(f"start_layer: expected an int, got {type(start_layer).__name__}")
    family = find_family(model)
    with torch.inference_mode(False), torch.enable_grad(), resting(model):
        given, pairs = prepare_inputs(model, inputs, family, target)
        with tapped(model, family, rule, start_layer, weighting) as taps:
            outputs = model(**given)
        for tap in taps:
            tap.check()
        shapes = [tap.shape for tap in taps]
        scores, chosen = choose_score(outputs, family, target, given, pairs, shapes, rule.needs_score)
        read = _carried if rule.carries else _last_only
        rows = read(taps, given, scores if rule.needs_score else None)
    relevancy = {tap.tower.name: row.detach()[:, 0] for tap, row in zip(taps, rows, strict=True)}
    return Explanation(
        relevancy=relevancy,
        **_cut(model, taps, given, relevancy),
        scores=None if scores is None else scores.detach(),
        target=chosen,
        method=method,
        start_layer=start_layer,
    )


def _carried(taps: list[TowerTap], given: dict[str, Any], scores: Tensor | None) -> list[Tensor]:
    """The finished rows (B, 1, N): one backward pass from the score and from the end of every tower."""
    carriers = [tap.carriers() for tap in taps]
    ends = [end for _, end in carriers]
    rows = [start_rows(tap.tower, tap.config, given, end) for tap, end in zip(taps, ends, strict=True)]
    if scores is not None:
        ends, rows = [scores.sum(), *ends], [torch.ones_like(scores.sum()), *rows]
    return list(torch.autograd.grad(ends, [start for start, _ in carriers], rows))


def _last_only(taps: list[TowerTap], given: dict[str, Any], scores: Tensor | None) -> list[Tensor]:
    """The rows (B, 1, N) of the last attention alone: Grad-CAM with a score, raw attention without."""
    calls = [tap.last_call() for tap in taps]
    grads: tuple[Tensor | None, ...] = (None,) * len(calls)
    if scores is not None:
        grads = torch.autograd.grad(scores.sum(), [call.output for call in calls], allow_unused=True)
    rows = []
    with torch.no_grad():
        for tap, call, grad in zip(taps, calls, grads, strict=True):
            dtype = compute_dtype(call.query)
            like = torch.zeros(call.query.shape[0], 1, call.query.shape[2], dtype=dtype, device=call.query.device)
            start = start_rows(tap.tower, tap.config, given, like)
            if scores is None:
                rows.append(raw_attention(start, call))
                continue
            grad = torch.zeros_like(call.output) if grad is None else grad
            real = real_tokens(tap.tower, given, tap.shape)
            real = None if real is None else real.to(start.device)
            rows.append(gradcam(start, call, call.grad_output(grad), None if tap.pooling is not None else real, real))
    return rows


def _cut(model: nn.Module, taps: list[TowerTap], given: dict[str, Any], relevancy: dict[str, Tensor]) -> dict[str, Any]:
    """The image and text parts of the rows, as fields of an Explanation."""
    parts: dict[str, Any] = {}
    ids = given["input_ids"].view(-1, given["input_ids"].shape[-1]) if given.get("input_ids") is not None else None
    for tap in taps:
        tower, row = tap.tower, relevancy[tap.tower.name]
        config = model.config if tower.tokens == "image_text" else tap.config
        if (maps := image_maps(tower, config, given, row)) is not None:
            parts["image"], parts["image_rows"] = maps
        if ids is not None and (words := word_positions(tower, config, given, ids, tap.shape)) is not None:
            parts["text"], parts["token_ids"] = gather_words(row, words, ids)
        if tower.tokens == "regions":
            count = given["region_features"].shape[1]
            parts["regions"] = row[:, -count:]
            parts["boxes"] = given["region_positions"][..., :4].detach()
    return parts
