"""The numbers that the tests gather from each forward pass, and the table made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlattn_fast.interpret.probing.labels import Labels, regions_of, tokens_of
from vlattn_fast.interpret.probing.layout import IMAGE, SPECIAL, TEXT, Layout
from vlattn_fast.interpret.probing.linear import Array, Probed, fusion, linear_probe
from vlattn_fast.interpret.probing.watched import Seen, Sets, Watched

KINDS = {TEXT: "text", IMAGE: "image", SPECIAL: "special"}
_NO_INPUTS = "no inputs in the data set"
_CROSSING = 0.5  # a head with more attention on the text is cross-modal
_CLASSES = 6  # of lengths
_OF_TRACES = {"coreference": "phrases", "relation": "relations"}


class Gathered:
    """Numbers of the tests by sample.

    Args:
        tests, special, read, seed: see `probe`.
    """

    def __init__(self, tests: Sequence[str], special: bool, read: str, seed: int) -> None:
        self.tests, self.special, self.read, self.seed = tests, special, read, seed
        self.count = 0  # inputs
        self._without_image = 0
        self._two_streams = False
        self._mass: list[Array] = []  # (L, H, 3) each
        self._crossing: list[Array] = []  # (L, H)
        # For "coreference" and "relation": traces (L, H, 2), classes, inputs, and the number of unusable labels.
        self._traces: dict[str, list[tuple[Array, Any, int]]] = {name: [] for name in _OF_TRACES}
        self._left_out: Counter[str] = Counter()
        self._fusion: list[list[tuple[float, float]]] = []  # per input and layer
        self._texts: list[tuple[Array, list[int], dict[str, Any]]] = []  # states (L, C), ids of the words, classes by task
        self._orders: list[tuple[Array, int, int]] = []  # states (L, C), exchanged or not, input

    def _random(self, test: str, number: int) -> np.random.Generator:
        """A generator per test and input, so that no result depends on the batches or on other tests."""
        return np.random.default_rng([self.seed, *test.encode(), number])

    def add(self, watched: Watched, inputs: Mapping[str, Any], labels: Sequence[Labels]) -> None:
        """Runs the model over a batch and gathers the numbers."""
        asked: list[list[tuple[str, Any, Sets]]] = []

        def sets(layout: Layout) -> list[list[Sets]]:
            if not asked:  # equal for all layers
                asked.extend(self._asked(layout, row, label) for row, label in enumerate(labels))
            return [[one[2] for one in row] for row in asked]

        of_labels = sets if any(name in self.tests for name in _OF_TRACES) else None
        attends = of_labels is not None or any(name in self.tests for name in ("modality", "cross_modal"))
        seen = watched.run(inputs, of_labels, statistics=attends)
        batch = len(seen.layout.parts)
        self._two_streams = seen.mass is None
        for row in range(batch):
            self._attention(seen, row, asked[row] if asked else [], attends)
            if "fusion" in self.tests and not self._two_streams:
                self._clusters(seen, row)
        if "linguistic" in self.tests:
            self._linguistic(watched, inputs, seen, labels)
        self.count += batch

    def _asked(self, layout: Layout, row: int, label: Labels) -> list[tuple[str, Any, Sets]]:
        """The sets of tokens that a row's labels name: (test, class, sets)."""
        asked: list[tuple[str, Any, Sets]] = []
        number = self.count + row
        random = self._random("coreference", number)
        for columns, regions in label.phrases if "coreference" in self.tests else ():
            tokens, named = tokens_of(layout, row, columns, number), regions_of(layout, row, regions, number)
            unnamed = [place for place in layout.regions[row] if place not in named and layout.parts[row, place] == IMAGE]
            if len(unnamed) < len(named):
                self._left_out["coreference"] += 2  # samples: too few other regions to tell apart
                continue
            drawn = sorted(random.choice(unnamed, len(named), replace=False).tolist())
            asked += [("coreference", 1, (tokens, named)), ("coreference", 0, (tokens, drawn))]
        for one, two, relation in label.relations if "relation" in self.tests else ():
            first, second = (regions_of(layout, row, [region], number) for region in (one, two))
            asked.append(("relation", relation, (first, second)))
        return asked

    def _attention(self, seen: Seen, row: int, asked: Sequence[tuple[str, Any, Sets]], attends: bool) -> None:
        if not attends:
            return
        if seen.mass is None or seen.crossing is None:
            pass
        elif bool((seen.layout.parts[row] == IMAGE).any()):
            self._mass.append(seen.mass[:, row].numpy())
            self._crossing.append(seen.crossing[:, row].numpy())
        else:
            self._without_image += 1
        for index, (test, kind, _) in enumerate(asked):
            trace = seen.maxima[row][index].numpy()
            if len(trace):
                self._traces[test].append((trace, kind, self.count + row))
            else:
                self._left_out[test] += 1

    def _clusters(self, seen: Seen, row: int) -> None:
        parts = seen.layout.groups(self.special)[row]
        taken = (parts == TEXT) | (parts == IMAGE)
        image = (parts[taken] == IMAGE).numpy()
        if image.all() or not image.any():
            self._left_out["fusion"] += 1
            return
        states = [_numbers(state[row][taken.to(state.device)]) for state in seen.states]
        shuffled = self._random("fusion", self.count + row).permutation(image)
        self._fusion.append([fusion(state, image, self.seed, shuffled) for state in states])

    # --- texts ---

    def _linguistic(self, watched: Watched, inputs: Mapping[str, Any], seen: Seen, labels: Sequence[Labels]) -> None:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError("inputs must contain 'input_ids' for linguistic probes; got none")
        columns = seen.layout.words_of(ids)
        states, changed, exchanged = self._text_states(seen), ids.clone(), []
        for row, label in enumerate(labels):
            mine = columns[row].nonzero()[:, 0].tolist()
            spelt = ids[row, mine].tolist()
            if not mine:
                self._left_out["linguistic"] += 1
                continue
            self._texts.append((states[row], spelt, label.sentence))
            pairs = [i for i, j in zip(mine, mine[1:], strict=False) if j == i + 1 and ids[row, i] != ids[row, j]]
            if not pairs:
                self._left_out["word_order"] += 1
                continue
            place = int(self._random("word_order", self.count + row).choice(pairs))
            changed[row, place], changed[row, place + 1] = ids[row, place + 1], ids[row, place]
            exchanged.append(row)
        if exchanged:
            again = self._text_states(watched.run({**inputs, "input_ids": changed}, statistics=False))
            for row in exchanged:
                self._orders += [(states[row], 0, self.count + row), (again[row], 1, self.count + row)]

    def _text_states(self, seen: Seen) -> list[Array]:
        """The state (L, C) of each row's text."""
        layout, rows = seen.layout, range(len(seen.layout.parts))
        if self.read == "cls":
            return [np.stack([_numbers(state[row, layout.row[row]]) for state in seen.states]) for row in rows]
        weight = layout.words[:, : seen.states[0].shape[1]].double()  # with two streams, the states of the text
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        means = [torch.einsum("bn,bnc->bc", weight, state.double().cpu()).numpy() for state in seen.states]
        return [np.stack([mean[row] for mean in means]) for row in rows]

    def _reason(self, otherwise: str) -> str:
        if not self.count:
            return _NO_INPUTS
        return "words and image in two streams" if self._two_streams else otherwise

    # --- the table ---

    def table(self) -> list[dict[str, Any]]:
        """See `ProbeReport`."""
        rows: list[dict[str, Any]] = []
        for test in self.tests:
            if test in ("modality", "cross_modal"):
                rows += self._of_heads(test)
            elif test in _OF_TRACES:
                rows += self._of_traces(test)
            else:
                rows += self._of_fusion() if test == "fusion" else self._of_texts()
        return rows

    def _of_heads(self, test: str) -> list[dict[str, Any]]:
        samples = len(self._mass)
        if not samples:
            return [_row(test, note=self._reason("no image tokens"), left_out=self._without_image)]
        if test == "cross_modal":
            values = {None: (np.stack(self._crossing) > _CROSSING).mean(0)}
        else:
            mass = np.stack(self._mass).mean(0)
            kinds = KINDS if not self.special else {TEXT: "text", IMAGE: "image"}
            values = {name: mass[..., kind] for kind, name in kinds.items()}  # type: ignore[misc]
        rows = []
        for kind, cells in values.items():
            for (layer, head), value in np.ndenumerate(cells):
                rows.append(_row(test, kind, layer, head, float(value), samples=samples, left_out=self._without_image))
        return rows

    def _of_traces(self, test: str) -> list[dict[str, Any]]:
        left_out = self._left_out[test]
        if not self._traces[test]:
            missing = "no attention both ways" if self._two_streams and left_out else f"no {_OF_TRACES[test]} in the labels"
            return [_row(test, note=missing if self.count else _NO_INPUTS, left_out=left_out)]
        traces, classes, groups = zip(*self._traces[test], strict=True)
        stacked = np.stack(traces)  # (S, L, H, 2)
        whole = linear_probe(stacked.reshape(len(stacked), -1), classes, groups, self.seed)
        rows = [_probed(test, None, None, None, whole, left_out)]
        for layer, head in np.ndindex(*stacked.shape[1:3]) if whole.value is not None else ():
            one = linear_probe(stacked[:, layer, head], classes, groups, self.seed, control=False)
            rows.append(_probed(test, None, layer, head, one, left_out))
        return rows

    def _of_fusion(self) -> list[dict[str, Any]]:
        left_out = self._left_out["fusion"]
        if not self._fusion:
            return [_row("fusion", note=self._reason("no words beside image tokens"), left_out=left_out)]
        means = np.array(self._fusion).mean(0)  # (L, 2)
        return [
            _row("fusion", None, layer, None, float(value), control=float(control), samples=len(self._fusion), left_out=left_out)
            for layer, (value, control) in enumerate(means)
        ]

    def _of_texts(self) -> list[dict[str, Any]]:
        left_out = self._left_out["linguistic"]
        if not self._texts:
            return [_row("linguistic", note="no words" if self.count else _NO_INPUTS, left_out=left_out)]
        states = np.stack([text[0] for text in self._texts])  # (S, L, C)
        groups = range(len(states))
        rows = []
        word = _middle_word([set(text[1]) for text in self._texts])
        tasks: dict[str, list[Any]] = {
            "length": _length_classes([len(text[1]) for text in self._texts]),
            "word_content": [word in text[1] for text in self._texts],
        }
        for task, classes in tasks.items():
            rows += self._of_task(task, states, classes, groups, left_out)
        orders = [np.array([one[index] for one in self._orders]) for index in range(3)]
        without = 2 * (left_out + self._left_out["word_order"])  # two samples per text: one with exchanged words
        rows += self._of_task("word_order", orders[0], orders[1], orders[2], without)
        for task in dict.fromkeys(name for text in self._texts for name in text[2]):
            having = [index for index, text in enumerate(self._texts) if task in text[2]]
            classes = [self._texts[index][2][task] for index in having]
            rows += self._of_task(task, states[having], classes, having, left_out + len(states) - len(having))
        return rows

    def _of_task(self, task: str, states: Array, classes: Any, groups: Any, left_out: int) -> list[dict[str, Any]]:
        layers = states.shape[1] if states.ndim == 3 else 0
        probes = [linear_probe(states[:, layer], classes, groups, self.seed) for layer in range(layers)]
        if not probes or probes[0].value is None:
            first = probes[0] if probes else Probed(None, None, None, 0, "no samples")
            return [_probed("linguistic", task, None, None, first, left_out)]
        return [_probed("linguistic", task, layer, None, one, left_out) for layer, one in enumerate(probes)]


def _numbers(states: Tensor) -> Array:
    return states.double().cpu().numpy()


def _middle_word(texts: Sequence[set[int]]) -> int:
    """The id whose number of texts is nearest to half of them; the smallest of several."""
    counts = Counter(word for text in texts for word in text)
    return min(counts, key=lambda word: (abs(counts[word] - len(texts) / 2), word))


def _length_classes(lengths: Sequence[int]) -> list[int]:
    """A class per length or, for too many lengths, classes of about equal size."""
    if len(set(lengths)) <= _CLASSES:
        return list(lengths)
    edges = np.quantile(lengths, np.linspace(0, 1, _CLASSES + 1)[1:-1])
    return np.searchsorted(edges, lengths, side="left").tolist()


def _probed(test: str, kind: str | None, layer: int | None, head: int | None, one: Probed, left_out: int) -> dict[str, Any]:
    return _row(test, kind, layer, head, one.value, one.chance, one.control, one.samples, left_out, one.reason)


def _row(
    test: str,
    kind: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    value: float | None = None,
    chance: float | None = None,
    control: float | None = None,
    samples: int = 0,
    left_out: int = 0,
    note: str | None = None,
) -> dict[str, Any]:
    return {
        "test": test,
        "kind": kind,
        "layer": layer,
        "head": head,
        "value": value,
        "chance": chance,
        "control": control,
        "samples": samples,
        "left_out": left_out,
        "note": note,
    }
