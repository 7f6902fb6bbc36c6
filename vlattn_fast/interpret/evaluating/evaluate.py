"""`evaluate`: measures, as the papers do, how well maps show the parts of an input that a model's answer depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool, check_items
from vlattn_fast._ground.extras import with_progress
from vlattn_fast._ground.origin import place_of
from vlattn_fast.attach.session import never_compiled
from vlattn_fast.interpret.adapters.patch_grid import PatchGrid
from vlattn_fast.interpret.evaluating.attention_cuts import cut_attention
from vlattn_fast.interpret.evaluating.evaluation import Evaluation, Tally
from vlattn_fast.interpret.evaluating.items import check_tokens, items_of
from vlattn_fast.interpret.evaluating.maps import Batch, explain_batch
from vlattn_fast.interpret.evaluating.measures import check_samples, compare_randomised, lacks, perturb, score_boxes
from vlattn_fast.interpret.evaluating.model_answers import Judge, judged_adapter
from vlattn_fast.interpret.evaluating.perturbation import Words
from vlattn_fast.interpret.evaluating.plan import INTERVENTION, CustomMethod, Plan
from vlattn_fast.interpret.explaining.request import Position
from vlattn_fast.interpret.relevancy.method import Method


@never_compiled
def evaluate(
    model: nn.Module,
    dataset: Iterable[tuple[Mapping[str, Any], Any, Any] | Mapping[str, Any]],
    *,
    methods: Sequence[str | Method | CustomMethod] | Mapping[str, str | Method | CustomMethod] = ("gradient",),
    tests: Sequence[str] | None = None,
    steps: Sequence[float] | None = None,
    accuracy: Callable[[Any], Tensor] | None = None,
    probability: Callable[[Any], Tensor] | None = None,
    words: Words | None = None,
    tokens: str | Sequence[int] | Callable[[list[str]], Sequence[bool]] | None = None,
    per_token: bool = True,
    sanity_stages: int = 5,
    batch_size: int = 64,
    seed: int = 0,
    position: None | Position | Mapping[str, Position] = None,
    processor: Any = None,
    patches: PatchGrid | None = None,
) -> Evaluation:
    """Measures how well explanations show the parts of the inputs that a model's answers depend on, over a data set.

    Returns an `Evaluation`: a table with an entry per method, test and part, and the curves. Each method explains each sample
    once, and "sanity" once more per randomised model; the tests with steps run a forward pass per step, in batches, and share
    equal inputs. A progress bar on a terminal estimates the rest.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
        >>> model = ViTForImageClassification(ViTConfig(**sizes))
        >>> boxes = [torch.tensor([[0.0, 0.0, 0.5, 0.5]])]  # the object is in the upper left quarter
        >>> dataset = [({"pixel_values": torch.rand(1, 3, 16, 16)}, None, boxes)]
        >>> evaluation = va.evaluate(model, dataset, methods=("gradient", "random"), tests=("deletion", "pointing"))
        >>> 0 <= evaluation.value("gradient", "deletion") <= 1
        True

    Tests of the "image" (patches or regions) and of the "text" (words), each with the other part whole:

    - "positive", "negative": the area under the accuracy while the most (the least) relevant entries are removed (Chefer, Gur,
      Wolf, ICCV 2021). A good map has a low positive and a high negative area. Relevancy is computed once. int((1 - step) n)
      entries stay, truncated as in the published code. Areas are trapezoids over the fraction removed, not normalised, so from 0
      to 1.
    - "insertion", "deletion": the area under the probability while the most relevant entries are put into an empty input (or
      removed from the whole one): int(step n) of n (Petsiuk, Das, Saenko, BMVC 2018, with removed entries instead of a blurred
      image).
    - "comprehensiveness", "sufficiency": the drop of the probability without the most relevant entries (equation 1), or with only
      these (equation 2), averaged over the most relevant 1, 5, 10, 20 and 50 % (rounded up) (DeYoung et al., "ERASER", ACL 2020).
      A good map has much of the first and little of the second.

    A test of image and text together, whose part in the table is "both":

    - "synergy": synergistic faithfulness (Ky, Ghamizi, Cordy, arXiv 2605.22168), as in the code published with the paper. I and T
      are the most relevant patches and words, round(step n) of n; v is the probability. Their joint Harsanyi dividend
      v(I, T) - v(I) - v(T) + v(neither) is taken in the empty input and, with I and T removed instead of put in, in the whole
      one; divided by |v(whole) - v(neither)|, at least 0.05; clipped to [0, 1]; and averaged. The value is the area over the
      steps. It is high for a map that finds the patches and words that the model needs together, and 0 for parts that can replace
      each other. (The published code blurs pixels and pads words; here both are removed, as in all other tests.)

    Tests against ground truth: of the image, boxes or a mask; of the text, true words, each of the same area:

    - "pointing": 1 if the centre of the largest entry lies inside (Zhang et al., ECCV 2016).
    - "iou": the intersection over union of the ground truth and the entries above the map's mean. Areas are exact.
    - "mass": the share of positive mass inside.

    A constant map has 0 in the first two. Equal entries are ordered by position, here and above. Logits that differ by no more
    than the rounding of the model's dtype are a tie, and the first of them counts as the largest; a map is constant if its
    entries differ by no more than the rounding of float32.

    A test of image and text, each by itself:

    - "sanity": Spearman's correlation with the map of the same model with every weight randomised (Adebayo et al., NeurIPS
      2018). It is near 0 for a map that depends on the learned weights. The curve has the cascade from the output to the input.
      Weights become normal numbers with the mean and standard deviation of the trained tensor. Samples with a constant or
      non-finite map have no correlation and are left out.

    A test of image and text, each by itself, that leaves the input whole and cuts attention (see `intervene_each`):

    - "intervention": Spearman's correlation of a map's mass on each group of tokens with the group's true effect. Groups are
      single words, or 4 x 4 pieces of an image. A cut masks a group for the explained token, in all layers and heads: for a
      decoder its last token, else the special tokens, such as [CLS]. The effect is the drop of the score. The table has three
      more entries: "intervention:top", the share of the largest quarter of the groups by mass (rounded up) that is among the
      largest quarter by effect; "intervention:insertion" and "intervention:deletion", the areas under the probability while the
      groups with most mass are restored, or cut, in tenths. Exactly one tower must attend to itself, and a sample needs three
      groups of a part. A constant map, or equal effects, have no correlation and no overlap.

    Removed patches become 0, the mean pixel of normalised images. Removed regions and words are dropped from the inputs; a text
    of open_clip's or the authors' CLIP keeps its length, filled with its last token. Special tokens stay, and so does the
    explained token of decoders and of VisualBERT for questions.

    Args:
        model: a model that `explain` supports; or any model with `logits` (B, classes) in its outputs, or with a callable
            `target`, if `methods` are callables. Its patches are then those of the maps' grid.
        dataset: (inputs, target, boxes) for each sample or batch. inputs and target as for `explain`. target None = the model's
            answer to the whole input: the class, the token or, for an image with several texts, the text. boxes: ground truth (K,
            4), x1, y1, x2, y2 relative to the image; a mask, bool (h, w) of any size, which covers the whole image; `va.Seconds`,
            one or several, of a sound, whose part is also called "image"; or None. For a batch, one of these per sample. Or a
            mapping: {"inputs", "target", "boxes", "text_truth"}, or {"inputs", "answer", "boxes", "text_truth"} of one sample.
            The answer is as for `explain`, and the truths are those of all its tokens, or a dict by the number of a token or by
            its word. Each token of an answer is then a sample, with the answer before it in place: its map explains its
            log-probability, and the tests ask for its probability. The answer's own words are not removed. text_truth: the true
            words of the text: a word or phrase, or several, as they stand there (this needs `processor`); columns of `input_ids`;
            or bool (N,) over these.
        methods: names of `explain`'s methods and ablations, objects of `va.methods`, "random", "attribute_edges" (the
            first-order effects, only for the test "intervention"), or callables (model, inputs, target) -> an object
            with `.image` (B, h, w), `.regions` (B, R) or `.text` (B, T) as in an `Explanation`, tensors or NumPy arrays. T is
            the largest number of words of a text of the batch, with zeros after shorter texts, or the width of `input_ids`, with
            a number for each column, special tokens and padding included. A dict gives them names.
        tests: some of the names above. None = "positive", "negative" and "pointing"; then the entry of an impossible test has no
            value.
        steps: increasing fractions removed ("insertion": put in, "sufficiency": left), from 0 to 1. None = as published: 0, .25,
            .5, .75, .8, .85, .9, .95, 1; for "insertion" and "deletion" 0, .05, ..., 1; for "synergy" 0, .1, ..., 1; for the
            tests of ERASER .01, .05, .1, .2, .5.
        batch_size: the number of perturbed inputs in a forward pass.
        position, processor, patches: as in `explain`, for its methods.
        seed: for the random maps and weights.
        accuracy: the measure of "positive" and "negative", a callable(outputs) or (outputs, inputs) -> (B,). None = 1 if the
            target has the largest logit, else 0; for a callable target, its score.
        probability: the same for the other tests with steps. None = the softmax of the target's logit, or a callable target's
            score.
        words: a callable(inputs) -> bool (B, N), True = a token that may be removed. None = every word; for a model without an
            adapter, all but padding and the first and last token.
        tokens: which tokens of an answer are judged: "words", those of words with a letter or a digit; "all"; their numbers; or a
            callable(names) -> a bool for each, to leave out stopwords or markup. None = "words" with a processor, else "all".
        per_token: False = an answer is one sample: one map explains the sum of its log-probabilities, and the tests ask for the
            probability of all of it. Not for "intervention".
        sanity_stages: the number of randomised models in the cascade, including the wholly randomised one; at most 1000.

    Returns:
        An `Evaluation`. An entry leaves out samples without its part, or without ground truth, and counts them. Its note says if
        the model's answers never change, whatever is removed: such a value cannot compare maps.

    Raises:
        TypeError, ValueError: an unknown method or test, an argument that no chosen test or method uses, steps out of order, an
            item of `dataset` that is neither a triple nor such a mapping, boxes outside of the image, a mask that is not bool,
            a similarity without a second text, a map that is not a tensor or array, that is not finite or whose shape does not
            fit, a text whose width may be that of words or of columns of a padded batch, a data set without a sample, attention
            that cannot be cut, a test that is named and leaves out every sample; and what `explain` raises.
    """
    chosen = {"accuracy": accuracy, "probability": probability, "words": words, "sanity_stages": sanity_stages}
    told = {"position": position, "processor": processor, "patches": patches}
    options = {name: value for name, value in told.items() if value is not None}
    plan = Plan.check(model, methods, tests, steps, **chosen, batch_size=batch_size, seed=seed, options=options)
    check_items("dataset", dataset, "(inputs, target, boxes) for each sample or batch")
    check_tokens(tokens)
    check_bool(per_token=per_token)
    if not per_token and INTERVENTION in plan.tests:
        raise ValueError(f"per_token must be True for the test {INTERVENTION!r}, which cuts one token's attention; got False")
    judge = Judge(plan.model, judged_adapter(plan.model), accuracy, probability, batch_size)
    generator = torch.Generator().manual_seed(seed)
    tally = Tally(plan.keys)
    batches: list[Batch] = []
    for number, whole in enumerate(with_progress(dataset, "evaluating")):
        for item in items_of(plan.model, number, whole, tokens, per_token, processor):
            batch = explain_batch(plan, judge, item, generator)
            if batch is None:
                continue
            tally.place = item.place
            lacks(tally, batch, plan)
            score_boxes(plan, batch, tally)
            perturb(plan, judge, batch, tally)
            cut_attention(plan, batch, tally)
            if "sanity" in plan.tests:
                batches.append(batch)
    if batches:
        compare_randomised(plan, batches, tally, generator)
    check_samples(tally, () if tests is None else plan.tests)
    return Evaluation(tally.table(), tally.curves(plan.x_axes), {**plan.metadata, **place_of(plan.model)}, tally.tokens)
