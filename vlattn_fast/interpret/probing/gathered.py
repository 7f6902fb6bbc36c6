"""The numbers that the tests gather from each forward pass, and the table made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

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
_OF_TRACES = {"coreference": "phrases", "relation": "relations"}


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
        self._texts: list[tuple[Array, list[int], dict[str, Any]]] = []  # states (L, C), ids of the words, classes by task
        self._orders: list[tuple[Array, int, int]] = []  # states (L, C), exchanged or not, input

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
        run = stream.run(inputs, label_sets, statistics=attends)
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
            if "fusion" in self.tests and not self._two_streams:
                self._clusters(run, number)
        if "linguistic" in self.tests:
            self._linguistic(stream, inputs, run, labels)
        self.count += len(run.layout.parts)

    def _asked(self, layout: Layout, number: int, label: Labels) -> list[tuple[str, Any, Sets]]:
        """The sets of tokens that a sample's labels name: (test, class, sets)."""
        asked: list[tuple[str, Any, Sets]] = []
        sample = self.count + number
        random = self._random("coreference", sample)
        for columns, regions in label.phrases if "coreference" in self.tests else ():
            tokens, named = tokens_of(layout, number, columns, sample), regions_of(layout, number, regions, sample)
            unnamed = [place for place in layout.regions[number] if place not in named and layout.parts[number, place] == IMAGE]
            if len(unnamed) < len(named):
                self._left_out["coreference"] += 2  # samples: too few other regions
                continue
            drawn = sorted(random.choice(unnamed, len(named), replace=False).tolist())
            asked += [("coreference", 1, (tokens, named)), ("coreference", 0, (tokens, drawn))]
        for one, two, relation in label.relations if "relation" in self.tests else ():
            first, second = (regions_of(layout, number, [region], sample) for region in (one, two))
            asked.append(("relation", relation, (first, second)))
        return asked

    def _clusters(self, run: ForwardPass, number: int) -> None:
        parts = run.layout.groups(self.special)[number]
        taken = (parts == TEXT) | (parts == IMAGE)
        image = (parts[taken] == IMAGE).numpy()
        if image.all() or not image.any():
            self._left_out["fusion"] += 1
            return
        states = [state[number][taken.to(state.device)].double().cpu().numpy() for state in run.states]
        shuffled = self._random("fusion", self.count + number).permutation(image)
        self._fusion.append([fusion(state, image, self.seed, shuffled) for state in states])

    def _linguistic(self, stream: OneStream, inputs: Mapping[str, Any], run: ForwardPass, labels: Sequence[Labels]) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError("inputs must contain 'input_ids' for linguistic probes; got none")
        words = run.layout.words_of(ids)
        states, changed, exchanged = self._text_states(run), ids.clone(), []
        for number, label in enumerate(labels):
            columns = words[number].nonzero()[:, 0].tolist()
            if not columns:
                self._left_out["linguistic"] += 1
                continue
            self._texts.append((states[number], ids[number, columns].tolist(), label.sentence))
            neighbours = zip(columns, columns[1:], strict=False)
            pairs = [i for i, j in neighbours if j == i + 1 and ids[number, i] != ids[number, j]]
            if not pairs:
                self._left_out["word_order"] += 1
                continue
            place = int(self._random("word_order", self.count + number).choice(pairs))
            changed[number, place], changed[number, place + 1] = ids[number, place + 1], ids[number, place]
            exchanged.append(number)
        if exchanged:
            again = self._text_states(stream.run({**inputs, "input_ids": changed}, statistics=False))
            for number in exchanged:
                self._orders += [(states[number], 0, self.count + number), (again[number], 1, self.count + number)]

    def _text_states(self, run: ForwardPass) -> list[Array]:
        """The state (L, C) of each sample's text."""
        if self.position == "cls":
            positions = enumerate(run.layout.position)
            return [
                np.stack([state[number, position].double().cpu().numpy() for state in run.states])
                for number, position in positions
            ]
        weight = run.layout.words[:, : run.states[0].shape[1]].double()  # with two streams, the states of the text
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        means = [torch.einsum("bn,bnc->bc", weight, state.double().cpu()).numpy() for state in run.states]
        return [np.stack([mean[number] for mean in means]) for number in range(len(weight))]

    def table(self) -> list[dict[str, Any]]:
        """See `ProbeReport`."""
        makers = {"modality": self._of_heads, "cross_modal": self._of_heads, "fusion": self._of_fusion}
        makers |= {"linguistic": self._of_texts, **dict.fromkeys(_OF_TRACES, self._of_traces)}
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
            return [_entry(test, note=self._reason("no words together with image tokens"), **counts)]
        means = enumerate(np.array(self._fusion).mean(0))  # (L, 2)
        return [_entry(test, None, i, value=float(value), control=float(control), **counts) for i, (value, control) in means]

    def _of_texts(self, test: str) -> list[dict[str, Any]]:
        left_out = self._left_out[test]
        if not self._texts:
            return [_entry(test, note="no words", left_out=left_out)]
        states = np.stack([text[0] for text in self._texts])  # (S, L, C)
        texts = [text[1] for text in self._texts]
        counts = Counter(word for text in texts for word in set(text))
        # the id whose number of texts is nearest to half of them; the smallest of several
        word = min(counts, key=lambda word: (abs(counts[word] - len(texts) / 2), word))
        lengths, groups = _length_classes([len(text) for text in texts]), range(len(states))
        entries = _of_task("length", states, lengths, groups, self.seed, left_out)
        entries += _of_task("word_content", states, [word in text for text in texts], groups, self.seed, left_out)
        without = 2 * (left_out + self._left_out["word_order"])  # two samples per text: one with exchanged words
        order_scores, exchanged, inputs = (np.array([one[index] for one in self._orders]) for index in range(3))
        entries += _of_task("word_order", order_scores, exchanged, inputs, self.seed, without)
        for task in dict.fromkeys(name for text in self._texts for name in text[2]):
            having = [index for index, text in enumerate(self._texts) if task in text[2]]
            classes = [self._texts[index][2][task] for index in having]
            entries += _of_task(task, states[having], classes, having, self.seed, left_out + len(states) - len(having))
        return entries


def _of_task(task: str, states: Array, classes: Any, groups: Any, seed: int, left_out: int) -> list[dict[str, Any]]:
    layers = range(states.shape[1] if states.ndim == 3 else 0)
    fitted = with_progress(layers, f"fitting probes of {task}", leave=False)
    probes = [linear_probe(states[:, layer], classes, groups, seed) for layer in fitted]
    if not probes or probes[0].value is None:
        first = probes[0] if probes else Probed(None, None, None, 0, "no samples")
        return [_entry("linguistic", task, left_out=left_out, **vars(first))]
    return [_entry("linguistic", task, layer, left_out=left_out, **vars(one)) for layer, one in enumerate(probes)]


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
