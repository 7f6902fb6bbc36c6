"""`explain`: one forward pass with a carrier through the layers, one backward pass, one relevancy row per tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._tensors import compute_dtype
from vlattn_fast.interpret.explanation import Explanation
from vlattn_fast.interpret.families import Family, find_family
from vlattn_fast.interpret.inputs import is_empty, prepare_inputs, real_tokens, with_one_row
from vlattn_fast.interpret.methods import check_weighting, find_method, gradcam, raw_attention
from vlattn_fast.interpret.readout import gather_words, image_maps, start_rows, word_positions
from vlattn_fast.interpret.taps import TowerTap, at_rest, tapped
from vlattn_fast.interpret.targets import check_scores, choose_score
from vlattn_fast.ops.relevancy_residual import Weighting


def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: None | int | Tensor | list[int] | Callable[[Any], Tensor] = None,
    method: str = "gradient",
    start_layer: int = 0,
    weighting: str | Weighting = "contribution",
) -> Explanation:
    """Relevancy of every input token to a score of the model.

    `model(**inputs)` runs once and is differentiated once. No attention map is stored and no weight gets a gradient. The
    model is left as it was, also after an error.

    During the call the model is in eval mode, its parameters are frozen and its attention is replaced. Several threads may
    explain the same model, or models that share a config. No thread may train or run a model that another one explains.

    Methods, for one row r of the relevancy matrix, from the last layer to `start_layer`:

    - "gradient": r <- r + r Abar, Abar = mean_h relu(A * dA) (Chefer, Gur, Wolf, ICCV 2021, equations 5 and 6).
    - "weighted": r <- r * a + (r * b) Abar. The rows of Abar are divided by their sums. a and b are the shares of the two terms
      of the residual sum behind the attention (after Huang et al. 2023, whose code is not public; `weighting` is this package's
      reading). The family's record says where that sum is. Scalings inside the branch are part of its term.
    - "rollout": r <- (r + r mean_h A) / 2 (Abnar and Zuidema 2020). It takes no gradient.
    - "attention": the read-out row of mean_h A in the last layer. It takes no gradient; `start_layer` has no effect.
    - "gradcam": the read-out row of relu(mean_h w_h A_h) in the last layer, w_h = mean_ij dA_h. `start_layer` has no effect.

    Args:
        model: a Hugging Face model of a known family (CLIP, SigLIP, ViT, DINOv2, BERT, LLaVA, Qwen-VL, ...; see `FAMILIES`),
            or `vlattn_fast.models.UNITER`.
        inputs: the model's keyword arguments, e.g. what a processor returns. An empty batch gives empty results.
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
        ValueError: an unknown method or family; a layer that cannot be tapped (the message names it); an index out of range;
            an attention option that the operator does not support (softcap, sinks); a score that does not depend on the
            explained layers, or is NaN.
    """
    rule = find_method(method)
    check_weighting(weighting)
    if not isinstance(start_layer, int) or isinstance(start_layer, bool):
        raise TypeError(f"start_layer must be an int; got {type(start_layer).__name__}")
    family = find_family(model)
    with torch.inference_mode(False), torch.enable_grad(), at_rest(model):
        arguments, pairs = prepare_inputs(model, inputs, family, target)
        empty = is_empty(arguments)
        with tapped(model, family, rule, start_layer, weighting) as taps:
            outputs = model(**(with_one_row(arguments, family) if empty else arguments))
        for tap in taps:
            tap.check()
        if empty:
            scores, chosen, rows = _nothing(taps, outputs, family, target)
        else:
            shapes = [tap.shape for tap in taps]
            scores, chosen = choose_score(outputs, family, target, arguments, pairs, shapes, rule.needs_score)
            if scores is not None:
                check_scores(scores, [edge for tap in taps for edge in tap.edges] if rule.needs_score else None)
            read = _carried if rule.carries else _last_only
            rows = read(taps, arguments, scores if rule.needs_score else None)
    relevancy = {tap.tower.name: row.detach()[:, 0] for tap, row in zip(taps, rows, strict=True)}
    return Explanation(
        relevancy=relevancy,
        **_cut(model, taps, arguments, relevancy),
        scores=None if scores is None else scores.detach(),
        target=chosen,
        method=method,
        start_layer=start_layer,
    )


def _nothing(
    taps: list[TowerTap], outputs: Any, family: Family, target: Any
) -> tuple[Tensor | None, list[int] | None, list[Tensor]]:
    """Scores, their indices and the rows (0, 1, N) of an empty batch, from a run over one made-up row."""
    rows = []
    for tap in taps:
        tap.shape = (0, tap.shape[1])
        rows.append(torch.zeros(0, 1, tap.shape[1], dtype=tap.dtype, device=tap.device))
    if callable(target):
        return rows[0].new_zeros(0), None, rows
    if family.score == "pair" or getattr(outputs, "logits", None) is not None:
        return rows[0].new_zeros(0), [], rows
    return None, None, rows


def _carried(taps: list[TowerTap], arguments: dict[str, Any], scores: Tensor | None) -> list[Tensor]:
    """The finished rows (B, 1, N). One backward pass starts at the score and at the carrier that leaves each tower."""
    carriers = [tap.carriers() for tap in taps]
    outputs = [carrier_out for _, carrier_out in carriers]
    rows = [start_rows(tap.tower, tap.config, arguments, output) for tap, output in zip(taps, outputs, strict=True)]
    if scores is not None:
        outputs, rows = [scores.sum(), *outputs], [torch.ones_like(scores.sum()), *rows]
    return list(torch.autograd.grad(outputs, [carrier_in for carrier_in, _ in carriers], rows))


def _last_only(taps: list[TowerTap], arguments: dict[str, Any], scores: Tensor | None) -> list[Tensor]:
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
            start = start_rows(tap.tower, tap.config, arguments, like)
            if scores is None:
                rows.append(raw_attention(start, call))
                continue
            grad = torch.zeros_like(call.output) if grad is None else grad
            real = real_tokens(tap.tower, arguments, tap.shape)
            real = None if real is None else real.to(start.device)
            rows.append(gradcam(start, call, call.grad_output(grad), None if tap.pooling is not None else real, real))
    return rows


def _cut(model: nn.Module, taps: list[TowerTap], arguments: dict[str, Any], relevancy: dict[str, Tensor]) -> dict[str, Any]:
    """The image and text parts of the rows, as fields of an Explanation."""
    parts: dict[str, Any] = {}
    ids = arguments.get("input_ids")
    ids = None if ids is None else ids.reshape(-1, ids.shape[-1])
    for tap in taps:
        tower, row = tap.tower, relevancy[tap.tower.name]
        config = model.config if tower.tokens == "image_text" else tap.config
        if (maps := image_maps(tower, config, arguments, row)) is not None:
            parts["image"], parts["image_rows"] = maps
        if ids is not None and (words := word_positions(tower, config, arguments, ids, tap.shape)) is not None:
            parts["text"], parts["token_ids"] = gather_words(row, words, ids)
        if tower.tokens == "regions":
            count = arguments["region_features"].shape[1]
            parts["regions"] = row[:, row.shape[1] - count :]
            parts["boxes"] = arguments["region_positions"][..., :4].detach()
    return parts
