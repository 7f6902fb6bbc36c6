"""A model's answers to whole and to perturbed inputs: whether the target comes first, and its probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.attach.session import at_rest
from vlattn_fast.interpret.evaluating.perturbation import Sample
from vlattn_fast.interpret.explaining.inputs import is_empty, prepare_inputs
from vlattn_fast.interpret.records.record import UNRECORDED, Family

Measure = Callable[[Any], Tensor]
Key = tuple[int, str, tuple[int, ...]]  # row, part, the entries that stay


@dataclass(frozen=True)
class Question:
    """A batch and what is asked of it.

    Args:
        inputs, target: as `explain` takes them, the target resolved to one index a row unless it is a callable.
        rows: how many explanations there are.
        rows_inputs: the inputs with one text for each image, where images are matched with texts; otherwise `inputs`.
        logits: (rows, texts) of the whole inputs, where images are matched with texts.
    """

    inputs: Mapping[str, Any]
    target: Any
    rows: int
    rows_inputs: Mapping[str, Any]
    logits: Tensor | None = None


class Judge:
    """Runs a model (`record` None = of no known family) in batches, in eval mode and without gradients."""

    def __init__(
        self, model: nn.Module, record: Family | None, accuracy: Measure | None, probability: Measure | None, batch_size: int
    ) -> None:
        self.model, self.record, self.batch_size = model, record, batch_size
        self._accuracy, self._probability = accuracy, probability
        self._recorded = UNRECORDED if record is None else record

    def ask(self, inputs: Mapping[str, Any], target: Any) -> Question | None:
        """The question of one item; None for an empty batch."""
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs must be a mapping of the model's keyword arguments; got {type(inputs).__name__}")
        if is_empty(inputs):
            return None
        if self._recorded.scoring.pairs and not callable(target):
            return self._ask_pair(inputs, target)
        outputs, arguments = self._call(inputs, target)
        if callable(target):
            return Question(inputs, target, len(_scores(target(outputs), "target")), inputs)
        logits = self._logits(outputs, arguments)
        return Question(inputs, self._recorded.scoring.pick(logits, target), len(logits), inputs)

    def _ask_pair(self, inputs: Mapping[str, Any], target: Any) -> Question:
        for name in ("pixel_values", "input_ids"):
            if not isinstance(inputs.get(name), Tensor):
                raise ValueError(f"inputs must contain '{name}' for the similarity of an image and a text; got {sorted(inputs)}")
        images, texts = inputs["pixel_values"].shape[0], inputs["input_ids"].shape[0]
        if texts < 2 and self._needs_choice:
            raise ValueError(
                "inputs must have two texts or more, which the model tells apart, unless accuracy and probability are given; "
                f"got {texts} for {images} images"
            )
        outputs, _ = self._call(inputs)
        logits = outputs.logits_per_image
        chosen = self._recorded.scoring.pick(logits, target)
        paired, _ = prepare_inputs(self.model, inputs, self._recorded, chosen)
        paired = {name: value for name, value in paired.items() if name in inputs}
        return Question(inputs, chosen, images, paired, logits.cpu())

    @property
    def _needs_choice(self) -> bool:
        return self._accuracy is None or self._probability is None

    def run(self, question: Question, samples: list[Sample], keys: list[Key]) -> tuple[list[float], list[float]]:
        """Accuracy and probability of each perturbed input."""
        accuracy, probability = [0.0] * len(keys), [0.0] * len(keys)
        for places in self._batches(question, samples, keys):
            parts = [samples[row].keeping(part, entries) for row, part, entries in (keys[place] for place in places)]
            rows = [keys[place][0] for place in places]
            if question.logits is not None and self._needs_choice:
                part = keys[places[0]][1]
                whole = torch.tensor([len(keys[place][2]) == samples[rows[0]].count(part) for place in places])
                correct, likely = self._choice(question, rows[0], part, parts, whole)
            else:
                correct, likely = self._measures(question, rows, parts)
            for place, one, two in zip(places, correct.tolist(), likely.tolist(), strict=True):
                accuracy[place], probability[place] = one, two
        return accuracy, probability

    def _batches(self, question: Question, samples: list[Sample], keys: list[Key]) -> Iterator[list[int]]:
        """Places of inputs with the same shapes; of matched images and texts, of one row and part alone."""
        groups: dict[Any, list[int]] = {}
        for place, (row, part, entries) in enumerate(keys):
            shapes = tuple((name, tuple(v.shape)) for name, v in samples[row].inputs.items() if isinstance(v, Tensor))
            alone = (row,) if question.logits is not None else ()
            # Patches that go leave the shapes as they are. The words that go shorten them, and the regions that stay are all.
            regions = samples[row].regions is not None
            size = samples[row].count(part) - len(entries) if part == "text" else len(entries) if regions else 0
            groups.setdefault((part, size, shapes, *alone), []).append(place)
        for places in groups.values():
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _measures(self, question: Question, rows: list[int], parts: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        target = question.target
        outputs, arguments = self._call(_stacked(parts), target)
        correct, likely = (None if measure is None else measure(outputs) for measure in (self._accuracy, self._probability))
        if correct is None or likely is None:
            if callable(target):
                defaults = (target(outputs),) * 2
            else:
                logits = self._logits(outputs, arguments)
                defaults = _of_logits(logits, torch.tensor([target[row] for row in rows], device=logits.device))
            correct, likely = (new if value is None else value for value, new in zip((correct, likely), defaults, strict=True))
        return _scores(correct, "accuracy", len(rows)), _scores(likely, "probability", len(rows))

    def _choice(
        self, question: Question, row: int, part: str, parts: list[dict[str, Any]], whole: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One row's target among all texts of the batch, where images are matched with texts.

        A perturbed image meets all texts. A perturbed text takes the place of the whole one. Where nothing is taken away, `whole`
        (B,), all logits are those of the batch: of the target alone another rounding would decide between equal texts.
        """
        assert question.logits is not None
        target = question.target[row]
        if part == "image":
            texts = {name: value for name, value in question.inputs.items() if not name.startswith(("pixel", "spatial"))}
            images = _stacked([{k: v for k, v in one.items() if k.startswith(("pixel", "spatial"))} for one in parts])
            logits = self._call({**texts, **images})[0].logits_per_image.cpu().float()
        else:
            texts = _stacked([{k: v for k, v in one.items() if not k.startswith(("pixel", "spatial"))} for one in parts])
            images = {name: value for name, value in parts[0].items() if name.startswith(("pixel", "spatial"))}
            logits = question.logits[row].float().repeat(len(parts), 1)
            logits[:, target] = self._call({**texts, **images})[0].logits_per_image[0].cpu().float()
        logits[whole] = question.logits[row].float()
        correct, likely = _of_logits(logits, torch.full((len(parts),), target))
        if self._accuracy is not None or self._probability is not None:
            outputs, _ = self._call(_stacked(parts))
            correct = correct if self._accuracy is None else _scores(self._accuracy(outputs), "accuracy", len(parts))
            likely = likely if self._probability is None else _scores(self._probability(outputs), "probability", len(parts))
        return correct, likely

    def _call(self, inputs: Mapping[str, Any], target: Any = None) -> tuple[Any, Mapping[str, Any]]:
        """Outputs, and the arguments that gave them."""
        if self.record is None:
            arguments: Mapping[str, Any] = inputs
        elif self._recorded.scoring.pairs:
            arguments = {**inputs, "return_dict": True}
        else:
            # A decoder computes the logits of one position, unless a measure may read other positions.
            measures = [measure for measure in (target, self._accuracy, self._probability) if callable(measure)]
            arguments, _ = prepare_inputs(self.model, inputs, self.record, measures[0] if measures else None)
        with torch.no_grad(), at_rest(self.model):
            return self.model(**arguments), arguments

    def _logits(self, outputs: Any, arguments: Mapping[str, Any]) -> Tensor:
        """(B, classes), of a decoder those after the last real token."""
        scoring = self._recorded.scoring
        return scoring.per_row(outputs if isinstance(outputs, Tensor) else scoring.logits(outputs), arguments)


def _of_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """1 where the target has the largest logit, else 0, and its softmax; both (B,). NaN where logits are."""
    correct = (logits.argmax(-1) == target).double().where(~logits.isnan().any(-1), torch.nan)
    return correct, logits.double().softmax(-1).gather(1, target[:, None])[:, 0]


def _scores(values: Any, name: str, rows: int | None = None) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must return a tensor of scores; got {type(values).__name__}")
    if values.ndim != 1 or (rows is not None and len(values) != rows):
        expected = "(B,)" if rows is None else f"(B,) = ({rows},)"
        raise ValueError(f"{name} must return scores of shape {expected}; got {tuple(values.shape)}")
    return values.detach().double().cpu()


def _stacked(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of single rows as a batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return {
        name: torch.cat([part[name] for part in parts]) if isinstance(value, Tensor) and value.ndim else value
        for name, value in first.items()
    }
