"""`probe`: probes of heads and states over a data set (VALUE: Cao et al., "Behind the Scene", ECCV 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import check_bool, check_callable, check_choice, check_integer, check_items, check_names
from vlattn_fast._ground.extras import extra, with_progress
from vlattn_fast.attach.session import at_rest, never_compiled, unwrapped
from vlattn_fast.attach.token_kinds import check_modality
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.explaining.request import renamed
from vlattn_fast.interpret.probing.gathered import Gathered
from vlattn_fast.interpret.probing.labels import read_item
from vlattn_fast.interpret.probing.layout import Layouts, Parts
from vlattn_fast.interpret.probing.report import ProbeReport
from vlattn_fast.interpret.probing.watched import TwoStreams, Watched

TESTS = ("modality", "cross_modal", "coreference", "relation", "fusion", "linguistic")


@never_compiled
@renamed
def probe(
    model: nn.Module,
    dataset: Iterable[tuple[Mapping[str, Any], Any]],
    *,
    tests: Sequence[str] | None = None,
    special: bool = True,
    position: str = "mean",
    parts: Parts | None = None,
    modality: Mapping[str, str] | None = None,
    seed: int = 0,
) -> ProbeReport:
    """The probes of VALUE over a data set: the targets of a model's heads, and the information in its states.

    `probe` takes models with one stream of words and image tokens (UNITER, VisualBERT, ViLT, decoders that see images), or texts
    alone for "linguistic". Models with a stream of each (LXMERT) have "coreference" in the layers where both streams attend to
    one another, "relation" in the image's layers, and "linguistic". Only `attention_statistics` are kept, layer by layer.
    Attention that goes to a sink (gpt-oss) counts for no token.

    Tests of attention, for each layer and head:

    - "modality": the attention of the read row to the text and to the image, each a sum over tokens; mean over samples. The read
      row is the one that `explain` reads: [CLS], in decoders the last token, in VisualBERT for questions the one before [SEP].
    - "cross_modal": the share of samples in which some image token gives more than half of its attention to the text. Only image
      tokens count that see a word and the whole image: behind a causal mask the last one, and none where the image comes first.
      Samples without one are left out.
    - "coreference": accuracy of a linear probe that tells a phrase's region from another of the same image. The probe reads the
      trace: for every head, the largest attention of the phrase's tokens on the region, and of the region on the phrase. Rows of
      one head have the accuracy with that head's two numbers.
    - "relation": accuracy of a linear probe that tells the class of a relation from the trace of its two regions.

    Tests of the states behind each layer:

    - "fusion": normalised mutual information (arithmetic mean) of two clusters (k-means) with the modality, averaged. Low =
      fused.
    - "linguistic": accuracy of linear probes on the text, as SentEval's: "length" (number of words, in six classes at most),
      "word_content" (whether the text has the word that is in about half of the texts), "word_order" (whether two neighbours were
      exchanged; every text is run once more), and the tasks that the data set names.

    Linear probes are logistic regressions on standardised features. Accuracy is held out, over five folds that split no input.

    Args:
        model: as `explain` takes it.
        dataset: (inputs, labels) for each sample or batch; labels: a dict, a dataclass or None, in a list with one per row for a
            batch. "phrases": ((start, stop), region or regions) each, columns of input_ids and the numbers of image tokens;
            "relations": (region, region, class) each; "sentence": a dict of further tasks -> the text's class.
        tests: some of the names above. None = all; the record of an impossible test says why.
        special: whether tokens like [CLS] and [SEP] count as text, and an image's [CLS] as image. False = special tokens are a
            separate kind in "modality", and left out in "cross_modal" and "fusion".
        position: "mean" = linguistic probes read the mean state of the words; "cls" = the state of the read row.
        parts: a callable(inputs) -> (N) or (B, N), 0 = text, 1 = image, -1 = neither, for models without an adapter; spans of
            phrases then count positions of the sequence, and the read row is the first. Linguistic probes need the text first or
            last in the sequence.
        modality: input name -> "text" or "image", see `capture_attention`.
        seed: of folds, shuffled labels, k-means, the regions to tell apart and the words to exchange.

    Returns:
        A `ProbeReport`.

    Raises:
        TypeError, ValueError: an argument is wrong (it is named), attention is not of one stream, the data set has no sample, a
            test that is named is impossible.
    """
    names = TESTS if tests is None else check_names("tests", tests, TESTS, "None or a sequence of names")
    check_choice("position", position, ("mean", "cls"))
    check_bool(special=special)
    check_integer("seed", seed, low=0, high=2**32 - 1)
    modality = check_modality(modality)
    check_callable(parts=parts)
    check_items("dataset", dataset, "(inputs, labels) for each sample or batch")
    with extra("probe"):
        import sklearn  # noqa: F401 (fails before the forward passes)
    inner = unwrapped(model)
    layouts = Layouts(inner, find_adapter(inner), parts)
    watched = (Watched if layouts.pair is None else TwoStreams)(inner, layouts, modality, special)
    gathered = Gathered(names, special, position, seed)
    with torch.no_grad(), at_rest(inner):
        for item in with_progress(dataset, "probing"):
            gathered.add(watched, *read_item(item, layouts.adapter))
    if not gathered.count:
        raise ValueError("dataset must hold at least one sample; got none")
    table = gathered.table()
    for record in table:
        if tests is not None and record["value"] is None and record["kind"] is None and record["layer"] is None:
            test, note = record["test"], record["note"]
            raise ValueError(f"Test {test!r} is impossible with this model and data set: {note}. Leave it out of tests=")
    facts = {"model": type(inner).__name__, "tests": list(names), "special": special, "position": position, "seed": seed}
    return ProbeReport(table, {**facts, "inputs": gathered.count})
