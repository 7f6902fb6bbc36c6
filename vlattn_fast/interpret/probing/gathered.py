"""The numbers that the tests gather from each forward pass, and the table made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.interpret.probing.labels import Labels, regions_of, tokens_of
from vlattn_fast.interpret.probing.layout import IMAGE, SPECIAL, TEXT, Layout
from vlattn_fast.interpret.probing.linear import Array, Probed, fusion, linear_probe
from vlattn_fast.interpret.probing.streams import ForwardPass, OneStream, Sets

COLUMNS = ("test", "kind", "layer", "head", "value", "chance", "control", "samples", "left_out", "note")
KINDS = {TEXT: "text", IMAGE: "image", SPECIAL: "special"}
_CROSSING = 0.5  # a head with more attention to the text than this is cross-modal
_NO_TOKEN = "no image token sees a word and the whole image"
_CLASSES = 6  # of text lengths, at most
_OF_TRACES = {
    "coreference": "phrases",
    "coreference_class": "classes of phrases",
    "relation": "relations",
    "relation_detection": "relations",
    "word_relation": "word_relations",
}
_OF_TEXTS = ("linguistic", "linguistic_heads")


class _Text(NamedTuple):
    """What probes of a text use."""

    states: Array  # (L, C)
    outputs: Array | None  # of the heads (L, H, Dv); None = not seen


class Gathered:
    """Numbers of the tests by sample; the arguments are those of `probe`."""

    def __init__(self, tests: Sequence[str], special: bool, position: str, seed: int) -> None:
        self.tests, self.special, self.position, self.seed = tests, special, position, seed
        self.count = 0  # inputs
        self._two_streams = False
        self._left_out: Counter[str] = Counter()  # samples by test; for "relation" and "coreference", unusable labels
        self._mass: list[Array] = []  # (L, H, 3) each
        self._crossing: list[Array] = []  # (L, H)
        self._traces: dict[str, list[tuple[Array, Any, int]]] = {name: [] for name in _OF_TRACES}  # (L, H, 2), class, input
        self._fusion: list[list[tuple[float, float]]] = []  # per input and layer
        self._texts: list[tuple[_Text, list[int], dict[str, Any]]] = []  # with ids of the words, and classes by task
        self._pairs: dict[str, list[tuple[_Text, int, int]]] = {"word_order": []}  # by task, with changed or not, and the input

    def _random(self, test: str, number: int) -> np.random.Generator:
        """A generator per test and input, so that no result depends on the batches or on other tests."""
        return np.random.default_rng([self.seed, *test.encode(), number])

    def add(self, stream: OneStream, inputs: Mapping[str, Any], labels: Sequence[Labels]) -> None:
        """Runs the model on a batch and gathers the numbers."""
        asked: list[list[tuple[str, Any, Sets]]] = []

        def sets(layout: Layout) -> list[list[Sets]]:
            if not asked:  # equal for all layers
                asked.extend(self._asked(layout, number, label) for number, label in enumerate(labels))
            return [[one[2] for one in sample_pairs] for sample_pairs in asked]

        label_sets = sets if any(name in self.tests for name in _OF_TRACES) else None
        attends = label_sets is not None or any(name in self.tests for name in ("modality", "cross_modal"))
        of_heads = self._weights if "linguistic_heads" in self.tests else None
        run = stream.run(inputs, label_sets, statistics=attends, weights=of_heads)
        self._two_streams = run.mass is None
        for number, parts in enumerate(run.layout.parts):
            if attends and run.mass is not None and run.crossing is not None:
                if bool((parts == IMAGE).any()):
                    self._mass.append(run.mass[:, number].numpy())
                    self._crossing.append(run.crossing[:, number].numpy())
                else:
                    self._left_out["modality"] += 1
            for index, (test, kind, _) in enumerate(asked[number] if asked else ()):
                trace = run.maxima[number][index].numpy()
                if len(trace):
                    self._traces[test].append((trace, kind, self.count + number))
                else:
                    self._left_out[test] += 1
            if "fusion" in self.tests and run.joint:
                self._clusters(run, number)
        if any(name in self.tests for name in _OF_TEXTS):
            self._linguistic(stream, inputs, run, labels)
        self.count += len(run.layout.parts)

    def _asked(self, layout: Layout, number: int, label: Labels) -> list[tuple[str, Any, Sets]]:
        """The sets of tokens that a sample's labels name: (test, class, sets)."""
        asked: list[tuple[str, Any, Sets]] = []
        sample = self.count + number
        random = self._random("coreference", sample)
        for columns, regions, kind in label.phrases if {"coreference", "coreference_class"} & {*self.tests} else ():
            tokens, named = tokens_of(layout, number, columns, sample), regions_of(layout, number, regions, sample)
            if "coreference_class" in self.tests and kind is not None:
                asked.append(("coreference_class", kind, (tokens, named)))
            if "coreference" not in self.tests:
                continue
            unnamed = [place for place in layout.regions[number] if place not in named and layout.parts[number, place] == IMAGE]
            if len(unnamed) < len(named):
                self._left_out["coreference"] += 2  # samples: too few other regions
                continue
            drawn = sorted(random.choice(unnamed, len(named), replace=False).tolist())
            asked += [("coreference", 1, (tokens, named)), ("coreference", 0, (tokens, drawn))]
        related = [
            (*(regions_of(layout, number, [region], sample) for region in (one, two)), relation)
            for one, two, relation in (label.relations if {"relation", "relation_detection"} & {*self.tests} else ())
        ]
        if "relation" in self.tests:
            asked += [("relation", relation, (one, two)) for one, two, relation in related]
        if "relation_detection" in self.tests and related:
            image = [place for place in layout.regions[number] if layout.parts[number, place] == IMAGE]
            asked += self._detected({(one[0], two[0]) for one, two, _ in related}, image, sample)
        for one, two, relation in label.word_relations if "word_relation" in self.tests else ():
            first, second = (tokens_of(layout, number, columns, sample, "word_relations") for columns in (one, two))
            asked.append(("word_relation", relation, (first, second)))
        return asked

    def _detected(self, related: set[tuple[int, int]], image: list[int], sample: int) -> list[tuple[str, Any, Sets]]:
        """Each pair of related regions, and another pair of the image without a label."""
        random = self._random("relation_detection", sample)
        either = related | {(two, one) for one, two in related}
        if len({pair for pair in either if pair[0] != pair[1]}) >= len(image) * (len(image) - 1):
            self._left_out["relation_detection"] += 2 * len(related)
            return []
        asked: list[tuple[str, Any, Sets]] = []
        for one, two in sorted(related):
            while (unrelated := tuple(random.choice(image, 2, replace=False).tolist())) in either:
                pass
            asked += [("relation_detection", 1, ([one], [two])), ("relation_detection", 0, ([unrelated[0]], [unrelated[1]]))]
        return asked

    def _clusters(self, run: ForwardPass, number: int) -> None:
        parts = run.layout.groups(self.special)[number]
        taken = (parts == TEXT) | (parts == IMAGE)
        image = (parts[taken] == IMAGE).numpy()
        if image.all() or not image.any():
            self._left_out["fusion"] += 1
            return
        states = [state[number][taken.to(state.device)].double().cpu().numpy() for state in run.joint]
        shuffled = self._random("fusion", self.count + number).permutation(image)
        self._fusion.append([fusion(state, image, self.seed, shuffled) for state in states])

    def _linguistic(self, stream: OneStream, inputs: Mapping[str, Any], run: ForwardPass, labels: Sequence[Labels]) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError("inputs must contain 'input_ids' for linguistic probes; got none")
        words = run.layout.words_of(ids)
        texts = self._text(run)
        changed: dict[str, dict[int, list[int]]] = {"word_order": {}}  # task -> sample -> the ids of the changed text
        for number, label in enumerate(labels):
            columns = words[number].nonzero()[:, 0].tolist()
            if not columns:
                self._left_out["linguistic"] += 1
                continue
            text_ids = ids[number].tolist()
            self._texts.append((texts[number], [text_ids[column] for column in columns], label.sentence))
            pairs = [i for i, j in zip(columns, columns[1:], strict=False) if j == i + 1 and text_ids[i] != text_ids[j]]
            if pairs:
                place = int(self._random("word_order", self.count + number).choice(pairs))
                order = [*text_ids[:place], text_ids[place + 1], text_ids[place], *text_ids[place + 2 :]]
                changed["word_order"][number] = order
            for task, variant in label.variants.items():
                if len(variant) != len(text_ids):
                    got = f"{len(variant)} ids for {task!r} in input {self.count + number}"
                    raise ValueError(f"variants must have as many ids as the input's text, {len(text_ids)}; got {got}")
                changed.setdefault(task, {})[number] = variant
        for task, variants in changed.items():
            if not variants:
                continue
            other_ids = ids.clone()
            for number, variant in variants.items():
                other_ids[number] = torch.tensor(variant, device=ids.device)
            again = self._text(self._rerun(stream, {**inputs, "input_ids": other_ids}))
            for number in variants:
                pair = ((texts[number], 0, self.count + number), (again[number], 1, self.count + number))
                self._pairs.setdefault(task, []).extend(pair)

    def _rerun(self, stream: OneStream, inputs: Mapping[str, Any]) -> ForwardPass:
        return stream.run(inputs, statistics=False, weights=self._weights if "linguistic_heads" in self.tests else None)

    def _weights(self, layout: Layout) -> Tensor:
        """The weights (B, N) of the tokens of a sequence in the mean that stands for its text."""
        if self.position == "cls":
            return torch.nn.functional.one_hot(layout.position.cpu(), layout.parts.shape[1]).double()
        weight = layout.words.cpu().double()
        return weight / weight.sum(-1, keepdim=True).clamp(min=1)

    def _text(self, run: ForwardPass) -> list[_Text]:
        """What stands for the text of each sample."""
        weights = self._weights(run.layout)[:, : run.states[0].shape[1]]  # with two streams, the states are those of the text
        means = [torch.einsum("bn,bnc->bc", weights, state.double().cpu()).numpy() for state in run.states]
        outputs = None if run.outputs is None else run.outputs.numpy()
        return [
            _Text(np.stack([mean[number] for mean in means]), None if outputs is None else outputs[:, number])
            for number in range(len(weights))
        ]

    def table(self) -> list[dict[str, Any]]:
        """See `ProbeReport`."""
        makers = {"modality": self._of_heads, "cross_modal": self._of_heads, "fusion": self._of_fusion}
        makers |= {**dict.fromkeys(_OF_TEXTS, self._of_texts), **dict.fromkeys(_OF_TRACES, self._of_traces)}
        return [entry for test in self.tests for entry in makers[test](test)]

    def _reason(self, otherwise: str) -> str:
        return "words and image in two streams" if self._two_streams else otherwise

    def _of_heads(self, test: str) -> list[dict[str, Any]]:
        counts: dict[str, Any] = {"samples": len(self._mass), "left_out": self._left_out["modality"]}
        if not self._mass:
            return [_entry(test, note=self._reason("no image tokens"), **counts)]
        if test == "cross_modal":
            return self._of_crossing(np.stack(self._crossing), counts["left_out"])
        mass = np.stack(self._mass).mean(0)
        return [
            _entry(test, name, layer, head, value=float(value), **counts)
            for kind, name in KINDS.items()
            if kind != SPECIAL or not self.special
            for (layer, head), value in np.ndenumerate(mass[..., kind])
        ]

    def _of_crossing(self, crossing: Array, left_out: int) -> list[dict[str, Any]]:
        """Crossing heads (S, L, H): each layer and head counts the samples in which an image token sees both kinds."""
        counted = (~np.isnan(crossing)).sum(0)
        if not counted.any():
            return [_entry("cross_modal", note=_NO_TOKEN, left_out=left_out + len(crossing))]
        crosses = (crossing > _CROSSING).sum(0)
        return [
            _entry(
                "cross_modal",
                None,
                layer,
                head,
                value=float(crosses[layer, head] / count) if count else None,
                samples=int(count),
                left_out=left_out + len(crossing) - int(count),
                note=None if count else _NO_TOKEN,
            )
            for (layer, head), count in np.ndenumerate(counted)
        ]

    def _of_traces(self, test: str) -> list[dict[str, Any]]:
        left_out = self._left_out[test]
        if not self._traces[test]:
            missing = "no attention both ways" if self._two_streams and left_out else f"no {_OF_TRACES[test]} in the labels"
            return [_entry(test, note=missing, left_out=left_out)]
        traces, classes, groups = zip(*self._traces[test], strict=True)
        stacked = np.stack(traces)  # (S, L, H, 2)
        whole = linear_probe(stacked.reshape(len(stacked), -1), classes, groups, self.seed)
        entries = [_entry(test, left_out=left_out, **vars(whole))]
        heads = list(np.ndindex(*stacked.shape[1:3])) if whole.value is not None else []
        for layer, head in with_progress(heads, f"fitting probes of {test}", leave=False):
            one = linear_probe(stacked[:, layer, head], classes, groups, self.seed, control=False)
            entries.append(_entry(test, None, layer, head, left_out=left_out, **vars(one)))
        return entries

    def _of_fusion(self, test: str) -> list[dict[str, Any]]:
        counts: dict[str, Any] = {"samples": len(self._fusion), "left_out": self._left_out[test]}
        if not self._fusion:
            missing = "no words together with image tokens"
            return [_entry(test, note="no attention both ways" if self._two_streams else missing, **counts)]
        means = enumerate(np.array(self._fusion).mean(0))  # (L, 2)
        return [_entry(test, None, i, value=float(value), control=float(control), **counts) for i, (value, control) in means]

    def _of_texts(self, test: str) -> list[dict[str, Any]]:
        left_out = self._left_out["linguistic"]
        if not self._texts:
            return [_entry(test, note="no words", left_out=left_out)]
        of_heads = test == "linguistic_heads"
        if of_heads and any(text.outputs is None for text, _, _ in self._texts):
            return [_entry(test, note="no call shows the outputs of single heads", left_out=len(self._texts) + left_out)]

        def of_task(task: str, samples: Sequence[Any], classes: Sequence[Any], groups: Sequence[int], without: int) -> Any:
            features = np.stack([text.outputs if of_heads else text.states for text in samples]) if samples else np.zeros((0, 0))
            return _of_task(test, task, features, classes, groups, self.seed, without)

        whole, texts, classes_of_texts = (list(column) for column in zip(*self._texts, strict=True))
        counts = Counter(word for text in texts for word in set(text))
        # the id whose number of texts is nearest to half of them; the smallest of several
        word = min(counts, key=lambda word: (abs(counts[word] - len(texts) / 2), word))
        entries = of_task("length", whole, _length_classes([len(text) for text in texts]), range(len(whole)), left_out)
        entries += of_task("word_content", whole, [word in text for text in texts], range(len(whole)), left_out)
        for task, pairs in self._pairs.items():  # two samples per text
            samples, changed, inputs = (list(column) for column in zip(*pairs, strict=True)) if pairs else ([], [], [])
            entries += of_task(task, samples, changed, inputs, 2 * self.count - len(pairs))
        for task in dict.fromkeys(name for classes in classes_of_texts for name in classes):
            having = [index for index, classes in enumerate(classes_of_texts) if task in classes]
            classes = [classes_of_texts[index][task] for index in having]
            entries += of_task(task, [whole[index] for index in having], classes, having, left_out + len(whole) - len(having))
        return entries


def _of_task(
    test: str, task: str, features: Array, classes: Sequence[Any], groups: Sequence[int], seed: int, left_out: int
) -> list[dict[str, Any]]:
    """The entries of a task from features (S, L, C) of layers, or (S, L, H, C) of heads, which have no control."""
    places = list(np.ndindex(*features.shape[1:-1]))
    of_layers, entries = features.ndim == 3, []
    for layer, *head in with_progress(places if len(features) else [], f"fitting probes of {task}", leave=False):
        probed = linear_probe(features[(slice(None), layer, *head)], classes, groups, seed, control=of_layers)
        if probed.value is None:
            return [_entry(test, task, left_out=left_out, **vars(probed))]
        entries.append(_entry(test, task, layer, *head, left_out=left_out, **vars(probed)))
    return entries or [_entry(test, task, left_out=left_out, **vars(Probed(None, None, None, 0, "no samples")))]


def _length_classes(lengths: Sequence[int]) -> list[int]:
    """A class per length or, for too many lengths, classes of about equal size."""
    if len(set(lengths)) <= _CLASSES:
        return list(lengths)
    edges = np.quantile(lengths, np.linspace(0, 1, _CLASSES + 1)[1:-1])
    return np.searchsorted(edges, lengths, side="left").tolist()


def _entry(test: str, kind: str | None = None, layer: int | None = None, head: int | None = None, **facts: Any) -> dict[str, Any]:
    """An entry of the table; None and 0 by default."""
    named = {"test": test, "kind": kind, "layer": layer, "head": head, **facts}
    return {**dict.fromkeys(COLUMNS), "samples": 0, "left_out": 0, **named}
