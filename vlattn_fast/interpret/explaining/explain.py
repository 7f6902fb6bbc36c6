"""`explain`, `explain_layers` and `find_sinks`: one forward pass with a carrier through the layers, one backward pass, and one
relevancy vector for each tower.

Six stages, each a function of what the one before it gives: `Request.check` and `lay_out` in request.py, `run_traced` in
forward_pass.py, `ask` in question.py, `carry_back` and `assemble` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.session import at_rest, never_compiled
from vlattn_fast.interpret.adapters.patch_grid import PatchGrid
from vlattn_fast.interpret.explaining.baseline import with_baseline
from vlattn_fast.interpret.explaining.fields import parts, vision_maps, why_no_map
from vlattn_fast.interpret.explaining.forward_pass import run_traced
from vlattn_fast.interpret.explaining.inputs import packing
from vlattn_fast.interpret.explaining.named_sinks import FindsSinks, named_sinks
from vlattn_fast.interpret.explaining.occluded import occluded
from vlattn_fast.interpret.explaining.question import (
    Question,
    UndefinedRelevancy,
    ask,
    backward_pass,
    check_relevancy,
    lost_gradients,
    missed_norms,
    other_keys,
    warn_of,
)
from vlattn_fast.interpret.explaining.request import Position, Prompt, Request, Target, lay_out
from vlattn_fast.interpret.relevancy.embedding_method import BaselineMethod, scaled
from vlattn_fast.interpret.relevancy.layer_maps import LayerMaps, Selection
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY, BackwardPass, Method
from vlattn_fast.interpret.relevancy.methods.registry import lists_methods, method_of
from vlattn_fast.interpret.relevancy.occluding_method import OccludingMethod
from vlattn_fast.interpret.relevancy.sink_detection import KEEP
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.result.by_layer import LayerExplanation
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.numbers.explained import subtract_self
from vlattn_fast.interpret.result.numbers.interference import with_filtered_image
from vlattn_fast.interpret.result.numbers.sink_tokens import Sinks

_LARGEST_GAP = 0.1  # of the score's gain: what entries may miss without a remark


@dataclass(frozen=True)
class Vectors:
    """The relevancy vector (B, N) of each tower, by its name; (B, T, N) with one for each token of an answer, or each layer or
    head."""

    question: Question
    relevancy: dict[str, Tensor]
    contribution: dict[str, Tensor] = field(default_factory=dict)  # the part of it from attention, if the method knows
    remarks: list[str] = field(default_factory=list)  # caveats
    gap: Tensor | None = None  # the sum of all entries less the score's gain, of a method whose entries add up


@never_compiled
@lists_methods
def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: Target = None,
    answer: Any = None,
    per_token: bool = True,
    method: str | Method = "gradient",
    position: None | Position | Mapping[str, Position] = None,
    processor: Any = None,
    patches: PatchGrid | None = None,
) -> Explanation:
    """Explains a score of a model: gives each input token its relevancy to that score.

    It takes one forward and one backward pass, or one backward pass for each token of an `answer`; other methods may take more or
    fewer (`va.methods`). It takes the memory of these passes: no attention map is stored, and no weight gets a gradient. During
    the call the model is in eval mode; on exit it is restored, even after an error.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=16))  # random weights
        >>> explanation = va.explain(model, {"pixel_values": torch.randn(1, 3, 64, 64)}, target=1)
        >>> explanation.relevancy["vision"].shape, explanation.image.shape
        (torch.Size([1, 17]), torch.Size([1, 4, 4]))

    Args:
        model: a Hugging Face model with an adapter, listed (`va.interpret.ADAPTERS`) or derived; `va.models.UNITER`; or any other
            model, if you pass `position` and `target`. Wrappers such as torch.compile, DDP, PEFT or a pipeline are allowed.
        inputs: the model's keyword arguments, for example what a processor returns.
        target: the score. None = what the model predicts; for CLIP-like models the similarity of image i and text i. An int, or
            (B,) ints = that class, token, object query or text. A word, or (B,) words = a class's name, or a decoder's token as
            the tokenizer has it (byte-level BPE: " red" with a space). A callable(outputs) or (outputs, inputs) -> (B,) scores;
            images and texts must then be equal in number. "similarity" = the cosine of samples 0 and 1, 2 and 3, ..., for an
            encoder without logits. A `va.Action`, for a robot policy. The guide "What to explain" has the details.
        answer: instead of `target`, a decoder's answer to the prompts of `inputs`: a text, or one for each sample, token ids
            (B, T) or (T,), lists of ids, or what `model.generate` returned (its prompts, and all from the first end token on,
            are left out).
        method: a name, or an object with options, such as `va.methods.Weighted(weighting="norm", start_layer=2)`, or its label,
            "weighted(weighting=norm, start_layer=2)".
        processor: a processor, a tokenizer or an image processor. It names the words of the explanation and the special tokens,
            and encodes a `target` or an `answer` that is text.
        per_token: True = each token of the answer separately: relevancy (B, T, N + T) and scores (B, T), its log-probabilities.
            False = the answer as a whole, in one backward pass: relevancy (B, N + T) and scores (B,), their sum. A tower of M
            tokens that is attended to has (B, T, M) or (B, M).
        position: the explained token. None = the adapter's choice, or for a callable the token that its gradient names. "cls"
            (token 0), "last" (the last real token), "mean" (of the real tokens), an index, or weights (N,) or (B, N); or a dict
            from towers to these. The index of a masked token makes `target` a masked language model's token there, by its
            log-probability.
        patches: `va.PatchGrid(rows, columns, prefix=0)`, the grid of the image patches in a tower without an adapter. None =
            derived if the inputs are a single image tensor (B, C, H, W) that is cut into equal squares.

    Returns:
        An `Explanation`; values are raw. `relevancy` includes what the explained token gives itself; `image` and `text` do not.

    Raises:
        TypeError: an argument has a wrong type or a former name; the message shows the line to write.
        ValueError: an argument is wrong (the message names it); the model has no adapter and `position` is None (the message
            lists its towers); the attention of a layer was not traced (it names the layer); the score is NaN, or does not depend
            on the explained layers or on the explained token.

    Several threads may explain the same model; no thread may train or run it meanwhile. Processes that share a model by tensor
    parallelism or FSDP2 must all make the call, and each gets the whole result.

    The methods, where r is the relevancy vector, carried from the last layer to the first, A an attention map, dA the score's
    gradient there, x the embedding of a token and g the score's gradient there. A colon marks an ablation of a published method.

    <methods>

    For towers that attend to one another, the rules for two modalities apply (Chefer, Gur, Wolf, ICCV 2021, equations 5 to 11,
    and its baselines).
    """
    asked = {"target": target, "answer": answer, "per_token": per_token, "position": position}
    return _explained(Request.check(model, inputs, method=method, processor=processor, patches=patches, **asked))


@never_compiled
def explain_layers(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    per: str = "layer",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    target: Target = None,
    answer: Any = None,
    method: str | Method = "gradient",
    position: None | Position | Mapping[str, Position] = None,
    processor: Any = None,
    patches: PatchGrid | None = None,
) -> LayerExplanation:
    """Explains a score with the attention map of each layer, or of each head, separately.

    One forward and one backward pass give all relevancy vectors; no map is stored. A map is relu(A * dA) for method "gradient"
    and A for "attention"; its relevancy vector is the row of the explained token.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=16))  # random weights
        >>> heads = va.explain_layers(model, {"pixel_values": torch.randn(1, 3, 64, 64)}, per="head", layers=[-1])
        >>> heads.relevancy["vision"].shape  # layers, heads, samples, tokens
        torch.Size([1, 4, 1, 17])

    Args:
        model, inputs, target, position, processor, patches: as in `explain`.
        per: "layer" = relevancy (L, B, N), a layer's vector being the mean over its heads; "head" = (L, H, B, N).
        layers: the numbers of the layers, 0 the first and -1 the last. None = all.
        heads: the numbers of the heads, over which per="layer" takes the mean. None = all.
        method: "gradient" or "attention", or an object of these with options.
        answer: as in `explain`, but as a whole: the score is the sum of the log-probabilities of its tokens.

    Returns:
        A `LayerExplanation`. A tower that others attend to has the relevancy of the cross-attention, numbered by the layers of
        the tower that attends.

    Raises:
        TypeError, ValueError: `per`, `layers` or `heads` is wrong (the message names it); the method has no map of a single
            layer; and what `explain` raises.
    """
    maps = LayerMaps(method_of(method), Selection.check(per, layers, heads))
    asked = {"target": target, "answer": answer, "per_token": answer is None, "position": position}
    found = _explained(Request.check(model, inputs, method=maps, processor=processor, patches=patches, **asked))
    assert isinstance(found, LayerExplanation)
    return found


@never_compiled
def find_sinks(model: nn.Module, inputs: Mapping[str, Any], *, processor: Any = None, patches: PatchGrid | None = None) -> Sinks:
    """Finds the tokens that receive attention without content.

    In a layer, such a token receives at least five times the median attention of the tokens, and the norm of its values is at
    most 0.8 times the median. It takes one forward pass. `va.methods.Gradient(sinks="remove")` leaves their share out of the
    maps.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=16))  # random weights
        >>> print(va.find_sinks(model, {"pixel_values": torch.zeros(1, 3, 64, 64)}))
        No token receives attention without content.

    Args:
        model, inputs, processor, patches: as in `explain`. A model without an adapter needs no `position` here.

    Returns:
        A list for each sample, of `Sink`s with a tower, an index and layers; printed, one line names them. Learned sinks, such as
        those of gpt-oss, are not tokens and are not listed.

    Raises:
        TypeError, ValueError: attention over a part of the keys, such as in windows; and what `explain` raises.
    """
    request = Request.check(model, inputs, method=FindsSinks(), processor=processor, patches=patches)
    with torch.inference_mode(False), torch.no_grad(), at_rest(request.model), packing(request.model, request.packs):
        return named_sinks(run_traced(lay_out(request)))


def _explained(request: Request) -> Explanation:
    """The stages, one after the other."""
    with torch.inference_mode(False), torch.enable_grad(), at_rest(request.model), packing(request.model, request.packs):
        prompt = lay_out(request)
        if isinstance(request.method, BaselineMethod) and not prompt.empty:
            prompt = with_baseline(prompt, request.method)
        once = not (request.method.n_runs or request.method.reads_score)  # else only further runs have gradients, or none
        with torch.set_grad_enabled(once):
            question = ask(run_traced(prompt))
        vectors = carry_back(question)
    return assemble(vectors)


def carry_back(question: Question) -> Vectors:
    """The relevancy vectors of all towers: for a method with several runs of the model, their mean."""
    prompt, method = question.run.prompt, question.run.request.method
    if isinstance(method, OccludingMethod) and not prompt.empty:
        return Vectors(question, occluded(question, method))
    if not method.n_runs or prompt.empty:
        return _vectors_of_run(question)
    if question.target is not None:  # changed inputs may have another
        prompt = prompt.about(question.target)
    mean = Vectors(question, {})
    for enter in with_progress(method.changes(), "explaining", unit="pass"):
        vectors = _vectors_of_run(ask(run_traced(prompt, enter)))
        mean.remarks.extend(vectors.remarks)
        for total, rows in ((mean.relevancy, vectors.relevancy), (mean.contribution, vectors.contribution)):
            for name, row in rows.items():
                share = row / method.n_runs
                total[name] = total[name] + share if name in total else share
    if method.completes and not method.freeze:
        return replace(mean, gap=_gap(prompt, mean))
    return mean


@torch.no_grad()
def _gap(prompt: Prompt, vectors: Vectors) -> Tensor | None:
    """The sum of all entries less the score's gain over the baseline, with a remark if it is large; None if the baseline
    has no score."""
    question = vectors.question
    try:
        before = ask(run_traced(prompt, scaled(0.0))).scores
    except UndefinedRelevancy:  # it is not a number
        return None
    if before is None or question.scores is None:
        return None
    gain = (question.scores - before).detach()
    gap = torch.stack([row.to(gain).sum(-1) for row in vectors.relevancy.values()]).sum(0) - gain
    if bool(gap.abs().sum() > _LARGEST_GAP * gain.abs().sum()):
        vectors.remarks.append(
            f"The entries do not add up to the score's gain over the baseline: more than a tenth is missing, or too much. Pass "
            f"n_steps above {prompt.request.method.n_runs}, or another baseline; `explanation.gap` has the difference"
        )
    return gap


def _vectors_of_run(question: Question) -> Vectors:
    """The relevancy vectors of one run, from a backward pass for each token of an answer, or for several."""
    run, request, count = question.run, question.run.request, len(question.passes)
    contribution: dict[TowerTrace, Tensor] = {}
    joined: list[Tensor] = []
    filled = [0] * len(run.towers)
    shows, remarks = count > 1 and not request.method.n_runs, [*missed_norms(run)]
    for number in with_progress(range(count), "explaining", unit="pass") if shows else range(count):
        backward = _pass_back(question, number)
        rows = request.method.carried(backward)
        remarks += backward.remarks
        # Kept apart, a small tensor of each pass would fragment the memory that the next pass reuses.
        joined = joined or [row.new_empty(len(row), row.shape[1] * count, row.shape[2]) for row in rows]
        for tower, row in enumerate(rows):
            joined[tower][:, filled[tower] : filled[tower] + row.shape[1]] = row.detach()
            filled[tower] += row.shape[1]
        if count == 1:  # the tokens of an answer are explained one by one
            contribution = without_self_entries(backward)
    if question.passes:
        joined = [x if x.shape[1] == n else x[:, :n].clone() for x, n in zip(joined, filled, strict=True)]
        check_relevancy(question, joined, contribution)
    else:
        joined = [torch.zeros(0, request.method.n_vectors_of(x), x.size, dtype=x.dtype, device=x.device) for x in run.towers]
    has_rows = (question.answer is not None and request.per_token) or isinstance(request.method, LayerMaps)
    read = (row if has_rows else row[:, 0] for row in joined)
    relevancy = {tower.name: row for tower, row in zip(run.towers, read, strict=True)}
    return Vectors(question, relevancy, {tower.name: row.detach()[:, 0] for tower, row in contribution.items()}, remarks)


def _pass_back(question: Question, number: int) -> BackwardPass:
    """The backward pass of this number, from the score's gradient."""
    run, (score, starts) = question.run, question.passes[number]
    if run.vision is not None:  # its relevancy starts from the decoder's image tokens
        starts = [*starts, torch.zeros_like(run.vision.carriers.leaving()[:, :1])]
    logits = run.request.adapter.scoring.logits(run.outputs) if run.request.method.takes_logits else None
    predicted = None if logits is None else question.predicted(logits, number)
    return backward_pass(run, score, starts, keep=number + 1 < len(question.passes), predicted=predicted)


def _of_towers(vectors: Vectors) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """The relevancy of each tower and the part that comes from attention, including the vision tower before a connector; the
    fields of their tokens, and their towers."""
    question, relevancy, contribution = vectors.question, vectors.relevancy, vectors.contribution
    run, request, arguments = question.run, question.run.request, question.run.prompt.arguments
    positions = question.start_positions or {}
    if isinstance(request.method, LayerMaps):  # relevancy vectors are (B, K, N), one for each layer or head
        positions = {name: position[:, None] for name, position in positions.items()}
    contribution = {name: row for name, row in contribution.items() if name not in positions}
    without_self = {name: subtract_self(row, contribution.get(name), positions.get(name)) for name, row in relevancy.items()}
    fields, owners = parts(
        [*run.explained, *run.attended], arguments, without_self, question.answer, request.patches, request.special
    )
    fields["gap"] = vectors.gap
    if run.vision is not None:
        name = run.vision.name
        layouts = run.towers[0].tokens_in(arguments).layouts
        how = request.adapter.connector, request.model.config, arguments, fields, layouts
        row, maps = vision_maps(without_self[name], *how)
        relevancy[name], _ = vision_maps(relevancy[name], *how)
        contribution |= {name: row} if name in contribution else {}
        fields |= maps
    elif request.vision is not None:  # an empty batch
        relevancy[request.vision.name] = next(iter(relevancy.values())).new_zeros(0, 0)
    return relevancy, contribution, fields, owners


def assemble(vectors: Vectors) -> Explanation:
    question, run = vectors.question, vectors.question.run
    request, method = run.request, run.request.method
    warn_of([*lost_gradients(run), *other_keys(run), *vectors.remarks])
    relevancy, contribution, fields, owners = _of_towers(vectors)
    fields |= {
        "position": question.start_positions,
        "contribution": {name: row for name, row in contribution.items() if not torch.equal(row, relevancy[name])} or None,
        "scores": None if question.scores is None else question.scores.detach(),
        "target": question.target,
        "of": method.of or (None if question.answer is None else LOG_PROBABILITY),
        "method": method.label,
        "start_layer": method.start_layer,
        "no_map": why_no_map(request.model, run.towers, run.prompt.arguments, fields),
        "sinks": None if method.sinks == KEEP else named_sinks(run, fields.get("image_samples")),
    }
    if isinstance(method, LayerMaps):
        counts = {tower.name: method.counts(tower) for tower in run.towers}
        explanation: Explanation = LayerExplanation.from_rows(method.selection.per, counts, owners, relevancy, fields)
    else:
        explanation = Explanation(relevancy=relevancy, **fields)
        explanation = with_filtered_image(explanation) if method.rank_filter else explanation
    named = explanation.token_ids is not None and hasattr(request.tokenizer, "convert_ids_to_tokens")
    return explanation.with_tokens(request.tokenizer) if named else explanation


def without_self_entries(backward: BackwardPass) -> dict[TowerTrace, Tensor]:
    """The part of each relevancy vector (B, 1, N) that comes from attention, without the entry of the explained token, if it is
    the only one of its sample."""
    starts = dict(zip(backward.towers, backward.starts, strict=False))
    contribution = {}
    for tower, row in backward.contribution.items():
        start = starts.get(tower)
        if start is not None and start.shape == row.shape:  # else those of the probes of a pooling head
            row = row.masked_fill((start == 1) & ((start != 0).sum(-1, keepdim=True) == 1), 0.0)
        contribution[tower] = row
    return contribution
