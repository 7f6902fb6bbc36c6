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
from vlattn_fast.interpret.probing.gathered import Gathered
from vlattn_fast.interpret.probing.labels import read_item
from vlattn_fast.interpret.probing.layout import Layouts, Parts
from vlattn_fast.interpret.probing.report import ProbeReport
from vlattn_fast.interpret.probing.streams import OneStream, TwoStreams

TESTS = (
    *("modality", "cross_modal", "coreference", "coreference_class", "relation", "relation_detection", "word_relation"),
    *("fusion", "linguistic", "linguistic_heads"),
)


@never_compiled
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
    """Probes what a model's heads attend to and which information its states hold, over a data set (VALUE, ECCV 2020).

    Returns a `ProbeReport`: a table with an entry per test, layer and head. Each sample takes one forward pass, and "word_order"
    and each variant of the texts one more. Memory holds `attention_statistics`, layer by layer, and no map. scikit-learn fits the
    linear probes on the CPU.

    `probe` supports models with one stream of words and image tokens (UNITER, VisualBERT, ViLT, decoders that see images), and
    text models for the linguistic tests. Models with a stream of each (LXMERT) support the tests of coreference and "fusion" in
    the layers in which both streams attend to one another, those of relations in the image's layers, and those of words and texts
    in the layers of the words.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=100)
        >>> dataset = [({"input_ids": torch.randint(5, 100, (1, 8))}, None) for _ in range(10)]
        >>> report = va.probe(BertModel(BertConfig(**sizes)), dataset, tests=["linguistic"])
        >>> 0 <= report.value("linguistic", layer=1, kind="word_order") <= 1
        True

    Tests of attention, for each layer and head:

    - "modality": the attention of the explained token to the text and to the image, each a sum over tokens; mean over samples.
      The explained token is that of `explain`: [CLS], for decoders the last token, for VisualBERT for questions the one before
      [SEP].
    - "cross_modal": the share of samples in which some image token gives more than half of its attention to the text. Only image
      tokens that see a word and the whole image count: under a causal mask the last one, and none if the image comes first.
      Samples without such a token are left out.
    - "coreference": the accuracy of a linear probe that distinguishes a phrase's region from another region of the same image.
      Its features are the largest attention of the phrase's tokens to the region, and of the region to the phrase, for every
      head. Entries of one head have the accuracy with that head's two numbers.
    - "coreference_class": the accuracy for the class of a phrase and its region, from the same features.
    - "relation": the accuracy for the class of a relation, from the same features of its two regions.
    - "relation_detection": the accuracy of telling two related regions from two others of the same image.
    - "word_relation": the accuracy for the class of a relation of two words or phrases, from the same features.

    - "linguistic_heads": the tasks of "linguistic", from the output of each head, before heads are joined.

    Tests of the states after each layer:

    - "fusion": the normalised mutual information (arithmetic mean) of two clusters (k-means) with the modality, averaged. Low =
      fused.
    - "linguistic": the accuracy of linear probes on the text, as in SentEval: "length" (number of words, in at most six classes),
      "word_content" (whether the text has the word that is in about half of the texts), "word_order" (whether two neighbours were
      exchanged), and the tasks and variants of texts that the data set names.

    Linear probes are logistic regressions on standardised features. Accuracy is held out, over five folds that split no input.
    Attention to a sink (gpt-oss) counts for no token.

    Args:
        model: a model that `explain` supports.
        dataset: (inputs, labels) for each sample or batch; labels: a dict, a dataclass or None, for a batch a list with one per
            sample. "phrases": ((start, stop), region or regions) each, columns of input_ids and the numbers of image tokens, and
            a class as a third part if there is one; "relations": (region, region, class) each; "word_relations": ((start, stop),
            (start, stop), class) each; "sentence": a dict of further tasks -> the text's class; "variants": a dict of further
            tasks -> the input ids of a changed text, which a probe has to tell from the text itself.
        tests: some of the names above. None = all; the entry of an impossible test has the reason as its note.
        position: the state, or the output of a head, for linguistic probes: "mean" = the mean over the words; "cls" = that of the
            explained token.
        special: whether tokens like [CLS] and [SEP] count as text, and an image's [CLS] as image. False = special tokens are a
            separate kind in "modality", and left out in "cross_modal" and "fusion".
        parts: for models without an adapter: a callable(inputs) -> (N) or (B, N), 0 = text, 1 = image, -1 = neither. Spans of
            phrases then count positions of the sequence, and the explained token is the first. Linguistic probes need the text
            first or last in the sequence.
        modality: input name -> "text" or "image", see `capture_attention`.
        seed: for folds, shuffled labels, k-means, the other regions and their pairs, and the words to exchange.

    Raises:
        TypeError, ValueError: an argument is wrong (it is named), attention is not over one stream, the data set has no sample, a
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
    stream = (OneStream if layouts.pair is None else TwoStreams)(inner, layouts, modality, special)
    gathered = Gathered(names, special, position, seed)
    with torch.no_grad(), at_rest(inner):
        for item in with_progress(dataset, "probing"):
            inputs, labels = read_item(item, layouts.adapter)
            gathered.add(stream, inputs, labels)
    if not gathered.count:
        raise ValueError("dataset must hold at least one sample; got none")
    table = gathered.table()
    for entry in table:
        if tests is not None and entry["value"] is None and entry["kind"] is None and entry["layer"] is None:
            test, note = entry["test"], entry["note"]
            raise ValueError(f"Test {test!r} is impossible with this model and data set: {note}. Leave it out of tests=")
    facts = {"model": type(inner).__name__, "tests": list(names), "special": special, "position": position, "seed": seed}
    return ProbeReport(table, {**facts, "inputs": gathered.count})
