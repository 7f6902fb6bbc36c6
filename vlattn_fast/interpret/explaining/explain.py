"""`explain`: one forward pass with a carrier through the layers, one backward pass, one relevancy row per tower.

Six stages, each of which takes what those before it give: `Request.check` and `lay_out` in request.py, `run_traced` in run.py,
`ask` in question.py, `carry_back` and `assemble` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.session import at_rest, never_compiled
from vlattn_fast.backends.reference.relevancy_residual import Weighting
from vlattn_fast.interpret.explaining.baseline import run_baseline
from vlattn_fast.interpret.explaining.fields import parts, vision_maps
from vlattn_fast.interpret.explaining.inputs import opened, packing
from vlattn_fast.interpret.explaining.named_sinks import named_sinks
from vlattn_fast.interpret.explaining.naming import tokenizer_of
from vlattn_fast.interpret.explaining.occluded import occluded
from vlattn_fast.interpret.explaining.patch_grid import PatchGrid
from vlattn_fast.interpret.explaining.question import (
    Question,
    ask,
    backward_pass,
    check_relevancy,
    warn_of_lost_gradients,
    warn_of_missed_norms,
    warn_of_other_keys,
    warn_of_remarks,
)
from vlattn_fast.interpret.explaining.request import Prompt, Read, Request, Target, lay_out
from vlattn_fast.interpret.explaining.run import Run, run_traced
from vlattn_fast.interpret.explaining.without_map import why_no_map
from vlattn_fast.interpret.records.unsupported import UndefinedRelevancy
from vlattn_fast.interpret.relevancy.layer_maps import LayerMaps
from vlattn_fast.interpret.relevancy.method import LOG_PROBABILITY, BackwardPass, Method
from vlattn_fast.interpret.relevancy.methods.registry import lists_methods
from vlattn_fast.interpret.relevancy.occluding_method import OccludingMethod
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.result.by_layer import LayerExplanation
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.numbers.explained import without_self
from vlattn_fast.interpret.result.numbers.interference import with_filtered_image

_LARGEST_GAP = 0.1  # of the score's gain: what entries may miss without a remark


class Rows(NamedTuple):
    """The row (B, N) of each tower, by its name; (B, T, N) where each token of an answer, or each layer or head, has one."""

    relevancy: dict[str, Tensor]
    brought: dict[str, Tensor]  # what attention brought to it, where the method knows
    gap: Tensor | None = None  # the sum of all entries less the score's gain, of a method whose entries add up


@never_compiled
@lists_methods
def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: Target = None,
    method: str | Method = "gradient",
    start_layer: int = 0,
    weighting: str | Weighting = "contribution",
    steps: int | None = None,
    per: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    read: None | Read | Mapping[str, Read] = None,
    answer: Any = None,
    each: bool = True,
    tokenizer: Any = None,
    processor: Any = None,
    through_connector: bool = False,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    like: str | None = None,
    sinks: str = "keep",
) -> Explanation:
    """Relevancy of every input token to a score of the model.

    `model(**inputs)` runs once and is differentiated once. No attention map is stored and no weight gets a gradient. The
    model is left as it was, also after an error.

    During the call the model is in eval mode, its parameters are frozen and its attention is replaced. Several threads may
    explain the same model, or models that share a config. No thread may train or run a model that another one explains.

    `method` is a name, or an object of `va.methods`, which takes the method's options: what the backward pass takes for constants
    (`freeze`), and which number of a class or token is explained (`of`). By default "gradient", "weighted" and "input_gradient"
    hold norms and attention weights fixed, and "gradcam" norms; `freeze=()` is the form that their papers published. Below, r is
    one row of the relevancy matrix, from the last layer to `start_layer`; A is an attention map and dA the score's gradient
    there; x is the embedding of a token and g the score's gradient there. A name with a colon is an ablation as published.

    <methods>

    Embeddings are what enters the first layer of a tower. The methods that read them take every model, with any attention or
    none; in a model without a record each input is a tower with its name.

    Towers that attend to one another have the rules for two modalities (Chefer, Gur, Wolf, ICCV 2021, equations 5 to 11, and its
    baselines). R_ti of "rollout" is rollout(t)^T mean_h A_ti rollout(i) with the last attention from t to i, of which a causal
    decoder has a part on later tokens: "rollout:one_hot" has e_t^T in place of rollout(t)^T. "attention" and "gradcam" read the
    last attention of t to itself and to i; with "weighted" an addition to R becomes diag(a) R + diag(b) (...).
    The entry of the token that is read is set to zero.

    Args:
        model: a Hugging Face model of a known family (CLIP, SigLIP, ViT, DINOv2, BERT, LLaVA, Qwen-VL, ...; all are in
            `vlattn_fast.interpret.FAMILIES`), any language model, decoder that sees images, encoder-decoder or dual encoder (its
            record is derived), a classifier that reads one token or a mean (the gradient names them),
            `vlattn_fast.models.UNITER`, or any other model, where `read` and `target` are given. Wrappers (torch.compile,
            DataParallel, DDP, PEFT, a pipeline) are seen through. Processes that share a model by tensor parallelism or FSDP2 all
            call this, and each gets the whole rows.
        inputs: the model's keyword arguments, e.g. what a processor returns. An empty batch gives empty results. The entries of a
            dict among them, as {"inputs": {...}} of a `forward` that takes one dict, count as inputs of their own.
        target: None = CLIP-like: similarity logit of image i with text i (one image and T texts: T rows); classifier: the
            argmax class; decoder: the argmax token after the last real position; detector: the largest class logit of the
            object query that is surest of its class. An int or (B,) ints = that text, class, token or object query. A word, or
            (B,) words = a decoder's token, as `tokenizer` makes it (byte-level BPE: " red" with a space), or a class's name. A
            callable(outputs) or (outputs, inputs) -> (B,) scores; inputs are then not repeated, so images and texts must be as
            many, and the score's gradient names the row that is read: of one token, or the mean of several. "similarity", of an
            encoder without logits: the cosine of rows 0 and 1, 2 and 3, ..., each with the other held fixed, of the states that
            `read` names, by default the mean. A `vlattn_fast.Action` = a dimension of a robot policy's actions.
        start_layer: 0 = all layers, -1 = the last only, i = layers i and later. Layers are the model's blocks, by their index in
            its list of blocks; -1 is the last one that mixes tokens.
        weighting: for "weighted": "contribution" (|g.x| and |g.o|), "norm" (|x| and |o|), "equal" (1 and 1), or a
            callable(residual, branch, gradient) -> (a, b), (B, N) each.
        steps: for "integrated_gradients": how many scaled inputs the model runs on, one after the other; 32. Its method object
            calls it `n_steps`. For "smoothgrad": the number of samples; 16.
        per: for "gradient" and "attention": "layer" = the row of each layer's own map by itself, relevancy (L, B, N); "head" =
            that of each head's, (L, H, B, N). The map is relu(A * dA), or A. The result is a `LayerExplanation`. Between towers,
            a tower that is attended to has the rows of the cross-attention, by the layers of the tower that attends.
        layers: with `per`: the numbers of the layers, as in `start_layer`; all by default.
        heads: with `per`: the numbers of the heads, which per="layer" takes the mean over; all by default.
        read: the row that is read, instead of what the model's record says: "cls" (token 0), "last" (the last real token),
            "mean" (1/N of each real token), an index (negative from the end), or weights (N,) or (B, N); or a dict from towers to
            these. Towers of a model without a record are called "tower0", "tower1", ... in the order in which they ran. A tower
            that is read through cross-attention alone needs no row of its own, see Chefer et al. 2021, equations 5 to 11.
        answer: for decoders and encoder-decoders, an answer to the prompts of `inputs` instead of `target`: token ids (B, T) or
            (T,), lists of ids, a text or one text a row; or what `model.generate` returned, ids whose rows begin with their
            prompts: these, and all from the first end token on, are left out. Its T tokens go behind the last real token of each
            prompt, of an encoder-decoder behind its start token or `decoder_input_ids`. The row that is read is that of the
            position which predicts the token. A model of your own is taken for an encoder-decoder where it takes
            `decoder_input_ids`, or no other ids (B, N), and returns logits (B, T, vocabulary).
        each: True = every token of the answer by itself: relevancy (B, T, N + T) and scores (B, T), its log-probabilities, from
            one forward pass and one backward pass a token ("rollout", which differentiates no score: up to 32 tokens a pass).
            False = all of them together, with the sum of the log-probabilities as score (B,): relevancy (B, N + T) of the sum of
            their rows, from one backward pass. A tower of M tokens that is attended to has (B, T, M), or (B, M).
        tokenizer: the tokenizer, or a processor with one: it names the words of the explanation, says by `all_special_ids` which
            tokens are none, and encodes a `target` or an `answer` that is text.
        processor: the same, where both are at hand `tokenizer` counts; an image processor names nothing.
        through_connector: for decoders that see images, method "gradient": carry the relevancy of the image tokens on into the
            vision tower, as relevancy["vision"]. Each image token's is divided equally among its patches.
        grid: rows and columns (h, w) of the patches of the picture, in a tower without a record that has `prefix` + h * w tokens:
            they become `image` (B, h, w). Without it the grid is derived where the inputs are one tensor of pictures (B, C, H, W)
            that equal squares cut up, or where `prefix` leaves a square number of tokens.
        prefix: tokens in front of the patches (CLS, registers); by default those that `grid` leaves, else the fewest that fit.
        sinks: tokens that receive attention without content: "keep" = maps as the methods make them; "report" = name these tokens
            in `explanation.sinks`; "remove" = leave their share out of each attention map as well, with the methods "gradient",
            "rollout", "attention" and "weighted" and with `per`. A token is one in a layer where the attention that it receives
            is at least five times the median of the tokens, and the norm of its values at most 0.8 times the median. With s_j = 1
            for these tokens, Abar_ij becomes Abar_ij (1 - s_j); where it is mean_h A, each row keeps its sum: the rest of row i
            is multiplied by sum_k Abar_ik / sum_k Abar_ik (1 - s_k). Learnt sinks, as gpt-oss has them, are no tokens and stay.
        like: the name of a class in `vlattn_fast.interpret.FAMILIES`, or of one of transformers, whose record is borrowed: that
            of a model with the same towers, as "Qwen2_5_VLForConditionalGeneration" for a class of yours that copies its parts.

    Returns:
        An `Explanation`; values are raw.

    Raises:
        TypeError: `model` is no module, `inputs` no mapping, `target`, `tokenizer`, `processor` or `grid` of no known kind.
        ValueError: an unknown method; a model without a record where `read` is None (the message shows its towers); a layer
            whose attention was not seen (the message names it); an index out of range; an attention option that the operator
            does not support (a paged cache); a score that does not depend on the explained layers, or is NaN; a row that
            nothing but itself counts for; a word that is no class and no single token; a `grid` that fits no tower.
    """
    request = Request.check(
        model, inputs, target=target, method=method, start_layer=start_layer, weighting=weighting, steps=steps, sinks=sinks,
        per=per, layers=layers, heads=heads, read=read, answer=answer, each=each, tokenizer=tokenizer_of(tokenizer, processor),
        through_connector=through_connector, patches=PatchGrid.check(grid, prefix), like=like,
    )  # fmt: skip
    packs = opened(inputs)[1]
    with torch.inference_mode(False), torch.enable_grad(), at_rest(request.model), packing(request.model, packs):
        prompt = lay_out(request, inputs)
        run_baseline(request, prompt, processor)
        once = not (request.method.steps or request.method.reads_score)  # else each step has a run with gradients, or none
        with torch.set_grad_enabled(once):
            run = run_traced(request, prompt)
            question = ask(request, prompt, run)
        rows = carry_back(request, prompt, run, question)
    return assemble(request, prompt, run, question, rows)


def carry_back(request: Request, prompt: Prompt, run: Run, question: Question) -> Rows:
    """The rows of all towers. A method of several steps runs the model once for each, and gives the mean of their rows."""
    method = request.method
    if isinstance(method, OccludingMethod) and not prompt.empty:
        return Rows(occluded(request, prompt, run, question, method), {})
    if not method.steps or prompt.empty:
        return _rows_of_run(request, prompt, run, question)
    if question.target is not None:  # scaled inputs may have another
        request = replace(request, target=question.target)
    mean = Rows({}, {})
    for step in with_progress(range(method.steps), "explaining", unit="step"):
        method.at_step(step + 0.5)
        scaled = run_traced(request, prompt)
        for total, rows in zip(mean[:2], _rows_of_run(request, prompt, scaled, ask(request, prompt, scaled))[:2], strict=True):
            for name, row in rows.items():
                share = row / method.steps
                total[name] = total[name] + share if name in total else share
    if method.completes and not method.freeze:
        return mean._replace(gap=_gap(request, prompt, question, mean))
    return mean


@torch.no_grad()
def _gap(request: Request, prompt: Prompt, question: Question, rows: Rows) -> Tensor | None:
    """The sum of all entries less the score's gain over the baseline, with a remark where it is large; None where the baseline
    has no score."""
    method = request.method
    method.at_step(0)
    try:
        before = ask(request, prompt, run_traced(request, prompt)).scores
    except UndefinedRelevancy:  # it is not a number
        return None
    if before is None or question.scores is None:
        return None
    gain = (question.scores - before).detach()
    gap = torch.stack([row.to(gain).sum(-1) for row in rows.relevancy.values()]).sum(0) - gain
    if bool(gap.abs().sum() > _LARGEST_GAP * gain.abs().sum()):
        method.remarks.append(
            f"The entries do not add up to the score's gain over the baseline: more than a tenth is missing, or too much. Pass "
            f"more steps than {method.steps}, or another baseline; `explanation.gap` has the difference"
        )
    return gap


def _rows_of_run(request: Request, prompt: Prompt, run: Run, question: Question) -> Rows:
    """The rows that one run gives, from a backward pass for each token of an answer, or for several."""
    brought: dict[TowerTrace, Tensor] = {}
    joined: list[Tensor] = []
    filled = [0] * len(run.towers)
    shows = len(question.passes) > 1 and not request.method.steps
    numbers = range(len(question.passes))
    for number in with_progress(numbers, "explaining", unit="pass") if shows else numbers:
        backward = _pass_back(request, prompt, run, question, number)
        rows = request.method.carried(backward)
        # A small tensor kept from each pass would lie between the large ones that the next pass cannot take again.
        joined = joined or [row.new_empty(len(row), row.shape[1] * len(question.passes), row.shape[2]) for row in rows]
        for tower, row in enumerate(rows):
            joined[tower][:, filled[tower] : filled[tower] + row.shape[1]] = row.detach()
            filled[tower] += row.shape[1]
        if len(question.passes) == 1:  # the tokens of an answer are read one by one
            brought = without_single_rows(backward)
    if question.passes:
        joined = [x if x.shape[1] == count else x[:, :count].clone() for x, count in zip(joined, filled, strict=True)]
        check_relevancy(request, question, run, joined, brought)
    else:
        of_tower = request.method.rows_of
        joined = [torch.zeros(0, of_tower(x), x.size, dtype=x.dtype, device=x.device) for x in run.towers]
    has_rows = (question.answer is not None and request.each) or request.selection is not None
    read = (row if has_rows else row[:, 0] for row in joined)
    relevancy = {tower.name: row for tower, row in zip(run.towers, read, strict=True)}
    return Rows(relevancy, {tower.name: row.detach()[:, 0] for tower, row in brought.items()})


def _pass_back(request: Request, prompt: Prompt, run: Run, question: Question, number: int) -> BackwardPass:
    """The backward pass of this number, from the score's gradient."""
    score, starts = question.passes[number]
    if run.vision is not None:  # its row starts from the decoder's image tokens
        starts = [*starts, torch.zeros_like(run.vision.carriers.leaving()[:, :1])]
    keep = number + 1 < len(question.passes)
    logits = request.record.scoring.logits(run.outputs) if request.method.takes_logits else None
    said = None if logits is None else question.said(logits, number)
    arguments = prompt.arguments if prompt.answer is None else prompt.answer.masked(prompt.arguments)
    return backward_pass(request, run, score, starts, arguments, keep=keep, said=said)


def _of_towers(
    request: Request, prompt: Prompt, run: Run, question: Question, rows: Rows
) -> tuple[Rows, dict[str, Any], dict[str, str]]:
    """The rows of each tower, also of one behind a connector; the fields of their tokens, and whose they are."""
    arguments, (relevancy, brought, gap) = prompt.arguments, rows
    positions = question.start_positions or {}
    brought = {name: row for name, row in brought.items() if name not in positions}
    beside = {
        name: without_self(row, brought.get(name), _of_rows(request, positions.get(name))) for name, row in relevancy.items()
    }
    fields, owners = parts([*run.read, *run.attended], arguments, beside, question.answer, request.patches, request.special)
    fields["gap"] = gap
    if run.vision is not None:
        name = run.vision.name
        layouts = run.towers[0].tokens_in(arguments).layouts
        how = request.record.connector, request.model.config, arguments, fields, layouts
        row, maps = vision_maps(beside[name], *how)
        relevancy[name], _ = vision_maps(relevancy[name], *how)
        brought |= {name: row} if name in brought else {}
        fields |= maps
    elif request.vision is not None:  # an empty batch
        relevancy[request.vision.name] = next(iter(relevancy.values())).new_zeros(0, 0)
    return Rows(relevancy, brought), fields, owners


def assemble(request: Request, prompt: Prompt, run: Run, question: Question, rows: Rows) -> Explanation:
    warn_of_lost_gradients(run)
    warn_of_missed_norms(request.method)
    warn_of_other_keys(run)
    warn_of_remarks(request.method)
    (relevancy, brought, _), fields, owners = _of_towers(request, prompt, run, question, rows)
    fields |= {
        "position": question.start_positions,
        "brought": {name: row for name, row in brought.items() if not torch.equal(row, relevancy[name])} or None,
        "scores": None if question.scores is None else question.scores.detach(),
        "target": question.target,
        "of": request.method.of or (None if question.answer is None else LOG_PROBABILITY),
        "method": request.method.label,
        "start_layer": request.start_layer,
        "no_map": why_no_map(request.model, run.towers, prompt.arguments, fields),
        "sinks": named_sinks(request, prompt, run, fields.get("image_rows")),
    }
    explanation = (
        Explanation(relevancy=relevancy, **fields)
        if request.selection is None
        else _by_layer(request, run, relevancy, fields, owners)
    )
    if request.method.rank_filter:
        explanation = with_filtered_image(explanation)
    named = explanation.token_ids is not None and hasattr(request.tokenizer, "convert_ids_to_tokens")
    return explanation.with_tokens(request.tokenizer) if named else explanation


def without_single_rows(backward: BackwardPass) -> dict[TowerTrace, Tensor]:
    """The part of each row (B, 1, N) that attention brought, without the entry of a token that alone is read of its sample."""
    starts = dict(zip(backward.towers, backward.starts, strict=False))
    brought = {}
    for tower, row in backward.brought.items():
        start = starts.get(tower)
        if start is not None and start.shape == row.shape:  # else those of the probes of a pooling head
            row = row.masked_fill((start == 1) & ((start != 0).sum(-1, keepdim=True) == 1), 0.0)
        brought[tower] = row
    return brought


def _of_rows(request: Request, position: Tensor | None) -> Tensor | None:
    """The read token (B,) as (B, 1) where rows are (B, K, N), one for each layer or head."""
    return position if position is None or request.selection is None else position[:, None]


def _by_layer(
    request: Request, run: Run, relevancy: dict[str, Tensor], fields: dict[str, Any], owners: dict[str, str]
) -> LayerExplanation:
    assert request.selection is not None and isinstance(request.method, LayerMaps)
    counts = {tower.name: request.method.counts(tower) for tower in run.towers}
    return LayerExplanation.of_rows(request.selection.per, counts, owners, relevancy, fields)
