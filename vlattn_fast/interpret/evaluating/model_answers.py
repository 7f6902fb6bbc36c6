"""A model's answers to whole and to perturbed inputs: whether the target comes first, and its probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import call_on
from vlattn_fast._ground.extras import with_progress
from vlattn_fast.attach.session import at_rest
from vlattn_fast.interpret.adapters.adapter import WITHOUT_ADAPTER, Adapter
from vlattn_fast.interpret.adapters.derived import generates
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.evaluating.perturbation import Sample, Stays
from vlattn_fast.interpret.evaluating.ties import coarsest, equal_samples, levelled
from vlattn_fast.interpret.explaining.answer import encoder_decoder
from vlattn_fast.interpret.explaining.inputs import check_inputs, is_empty, prepare_inputs

Measure = Callable[..., Tensor]  # of outputs, or of outputs and inputs
Key = tuple[int, Stays]  # of a sample


@dataclass(frozen=True)
class Question:
    """A batch and its target."""

    inputs: Mapping[str, Any]  # as for `explain`
    target: Any  # the same, as one index per sample unless it is a callable
    count: int  # of explanations
    paired: Mapping[str, Any]  # as transformers names them; with one text for each image, if images are matched with texts
    logits: Tensor | None = None  # (count, texts) of the whole inputs, if images are matched with texts


def judged_adapter(model: nn.Module) -> Adapter | None:
    """A model's adapter, or that of an encoder-decoder that generates; None for other models of a class without one."""
    return find_adapter(model) or (encoder_decoder(model) if generates(model) else None)


class Judge:
    """Runs a model (`adapter` None = of a class without an adapter) in batches, in eval mode and without gradients."""

    def __init__(
        self, model: nn.Module, adapter: Adapter | None, accuracy: Measure | None, probability: Measure | None, batch_size: int
    ) -> None:
        self.model, self.adapter, self.batch_size = model, adapter, batch_size
        self._accuracy, self._probability = accuracy, probability
        self._needs_choice = accuracy is None or probability is None
        self._adapter = WITHOUT_ADAPTER if adapter is None else adapter
        self._dtype = coarsest(model.parameters())

    def ask(self, inputs: Mapping[str, Any], target: Any) -> Question | None:
        """The question of one item; None for an empty batch."""
        check_inputs(self.model, inputs)
        if is_empty(inputs):
            return None
        inputs, target = self._adapter.scoring.measured(inputs, target)
        if self._adapter.scoring.pairs and not callable(target):
            return self._ask_pair(inputs, target)
        outputs, arguments = self._call(inputs, target)
        if callable(target):
            return Question(inputs, target, len(_scores(call_on("target", target, outputs, arguments), "target")), inputs)
        logits = self._logits(outputs, arguments)
        return Question(inputs, self._adapter.scoring.pick(levelled(logits, self._dtype), target), len(logits), inputs)

    def _ask_pair(self, inputs: Mapping[str, Any], target: Any) -> Question:
        for name in self._adapter.names:
            if not isinstance(inputs.get(name), Tensor):
                raise ValueError(f"inputs must contain '{name}' for the similarity of an image and a text; got {sorted(inputs)}")
        images, texts = (inputs[name].shape[0] for name in self._adapter.names)
        if texts < 2 and self._needs_choice:
            raise ValueError(
                "inputs must have at least two texts to choose from, unless accuracy and probability are given; "
                f"got {texts} for {images} images"
            )
        logits = self._match(inputs)
        chosen = self._adapter.scoring.pick(levelled(logits, self._dtype), target)
        paired, _ = prepare_inputs(self.model, inputs, self._adapter, chosen)
        paired = {name: value for name, value in paired.items() if name in inputs}
        return Question(inputs, chosen, images, self._adapter.standard(paired), logits)

    def run(self, question: Question, samples: list[Sample], keys: list[Key]) -> tuple[list[float], list[float]]:
        """Accuracy and probability of each perturbed input."""
        accuracy, probability = [0.0] * len(keys), [0.0] * len(keys)
        for indices in with_progress(list(self._batches(question, samples, keys)), "perturbing", leave=False):
            correct, likely = self._measured(question, samples, [keys[index] for index in indices])
            for index, one, two in zip(indices, correct.tolist(), likely.tolist(), strict=True):
                accuracy[index], probability[index] = one, two
        return accuracy, probability

    def _batches(self, question: Question, samples: list[Sample], keys: list[Key]) -> Iterator[list[int]]:
        """Indices of inputs with the same parts removed and the same shapes; if images are matched with texts, of one sample."""
        groups: dict[Any, list[int]] = {}
        for index, (number, stays) in enumerate(keys):
            sample = samples[number]
            shapes = tuple((name, tuple(v.shape)) for name, v in sample.inputs.items() if isinstance(v, Tensor))
            own_batch = (number,) if question.logits is not None else ()
            groups.setdefault((sample.sizes(stays), shapes, *own_batch), []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _measured(self, question: Question, samples: list[Sample], keys: list[Key]) -> tuple[Tensor, Tensor]:
        """Accuracy and probability of inputs that make one batch, by the caller's measures or else by the target's logit."""
        target = question.target
        parts = [samples[number].keeping(stays) for number, stays in keys]
        correct = likely = outputs = None
        arguments: Mapping[str, Any] = {}
        if question.logits is not None and self._needs_choice:
            correct, likely = self._choice(question, keys[0], parts)
        if correct is None or self._accuracy is not None or self._probability is not None:
            outputs, arguments = self._call(_stacked(parts), target)
        if correct is None and self._needs_choice:
            if callable(target):
                correct = likely = call_on("target", target, outputs, arguments)
            else:
                logits = self._logits(outputs, arguments)
                correct, likely = self._of_logits(logits, torch.tensor([target[key[0]] for key in keys], device=logits.device))
        correct = correct if self._accuracy is None else call_on("accuracy", self._accuracy, outputs, arguments)
        likely = likely if self._probability is None else call_on("probability", self._probability, outputs, arguments)
        return _scores(correct, "accuracy", len(keys)), _scores(likely, "probability", len(keys))

    def _choice(self, question: Question, key: Key, parts: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """One sample's target among all texts of the batch, if images are matched with texts.

        A perturbed image meets all texts. A perturbed text takes the place of the whole one. If nothing is removed, all
        logits are those of the batch.
        """
        assert question.logits is not None
        number, stays = key
        gone, target = {part for part, _ in stays}, question.target[number]
        images = _stacked([_side(one) for one in parts]) if "image" in gone else _side(parts[0])
        among = question.logits[number].float().repeat(len(parts), 1)
        if "image" in gone:
            whole = self._adapter.standard(question.inputs)
            among = self._match({**_side(whole, image=False), **images}).float()
        if "text" in gone:
            met = self._match({**_stacked([_side(one, image=False) for one in parts]), **images}).float()
            among[:, target] = met.diagonal() if "image" in gone else met[0]
        return self._of_logits(among, torch.full((len(parts),), target))

    def _match(self, inputs: Mapping[str, Any]) -> Tensor:
        """(images, texts), the similarity of each image and each text: one similarity for equal texts, whatever their bits."""
        logits = self._adapter.scoring.logits(self._call(inputs)[0])
        assert logits is not None
        texts = _side(self._adapter.standard(inputs), image=False)
        return logits.cpu()[:, equal_samples(texts, logits.shape[1])]

    def _of_logits(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """1 if the target has the largest logit, in a tie the first, else 0, and its softmax; both (B,). NaN if logits are
        NaN."""
        first = levelled(logits, coarsest([logits, torch.empty(0, dtype=self._dtype)])).argmax(-1)
        correct = (first == target).double().where(~logits.isnan().any(-1), torch.nan)
        return correct, logits.double().softmax(-1).gather(1, target[:, None])[:, 0]

    def _call(self, inputs: Mapping[str, Any], target: Any = None) -> tuple[Any, Mapping[str, Any]]:
        """Outputs, and the arguments that gave them."""
        if self.adapter is None:
            arguments: Mapping[str, Any] = inputs
        elif self._adapter.scoring.pairs:
            arguments = {**self._adapter.called(inputs), **({"return_dict": True} if hasattr(self.model, "config") else {})}
        else:
            # A decoder computes the logits of one position, unless a measure may use other positions.
            measure = next(filter(callable, (target, self._accuracy, self._probability)), None)
            arguments, _ = prepare_inputs(self.model, inputs, self.adapter, measure)
        with torch.no_grad(), at_rest(self.model):
            return self.model(**arguments), arguments

    def _logits(self, outputs: Any, arguments: Mapping[str, Any]) -> Tensor:
        """(B, classes), of a decoder those after the last real token."""
        scoring = self._adapter.scoring
        return scoring.per_row(outputs if isinstance(outputs, Tensor) else scoring.logits(outputs), arguments)


def _side(inputs: Mapping[str, Any], image: bool = True) -> dict[str, Any]:
    """The inputs with the image, or all others."""
    return {name: value for name, value in inputs.items() if name.startswith(("pixel", "spatial")) == image}


def _scores(values: Any, name: str, count: int | None = None) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must return a tensor of scores; got {type(values).__name__}")
    if values.ndim != 1 or (count is not None and len(values) != count):
        expected = "(B,)" if count is None else f"(B,) = ({count},)"
        raise ValueError(f"{name} must return scores of shape {expected}; got {tuple(values.shape)}")
    return values.detach().double().cpu()


def _stacked(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of single samples as a batch."""
    first, *rest = parts
    batched = [name for name, value in first.items() if rest and isinstance(value, Tensor) and value.ndim]
    return {**first, **{name: torch.cat([part[name] for part in parts]) for name in batched}}
