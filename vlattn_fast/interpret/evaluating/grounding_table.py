"""The result of `token_grounding`, and `GroundingDetector`, which tells from it which words of an answer are grounded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_writable
from vlattn_fast._ground.extras import extra

if TYPE_CHECKING:
    import pandas as pd

SHARES = "share_image", "share_question", "share_answer"
BY_HEAD = (*SHARES, "attention_entropy", "diagonal", "received_less_diagonal")


_FORMAT = "vlattn_fast.grounding_detector.1"
# numbers that are low for a grounded word
_LOW = "log_probability_blank", "entropy", "attention_entropy", "components", "share_answer", "share_question"


@dataclass(frozen=True, eq=False)
class TokenGrounding:
    """The result of `va.token_grounding`: a line for each token of each answer.

    Args:
        tokens: the tokens of each answer, as strings if a tokenizer was given, else ids.
        numbers: (B, T) of each name; NaN after shorter answers, and where the model has no such number.
        by_head: (B, T, L, H), the attention's numbers by layer and head, NaN for layers without; `numbers` has their means.
    """

    tokens: list[list[str | int]]
    numbers: dict[str, Tensor]
    by_head: dict[str, Tensor] = field(repr=False)

    def __len__(self) -> int:
        return sum(map(len, self.tokens))

    def _rows(self) -> Iterator[tuple[int, int]]:
        return ((sample, index) for sample, row in enumerate(self.tokens) for index in range(len(row)))

    def column(self, name: str) -> Tensor:
        """Returns the numbers of a name, one for each token, answer after answer. ValueError for an unknown name."""
        if name not in self.numbers:
            raise ValueError(f"name must be one of {', '.join(map(repr, self.numbers))}; got {name!r}")
        return torch.tensor([float(self.numbers[name][at]) for at in self._rows()], dtype=torch.float64)

    def features(self) -> Tensor:
        """Returns (tokens, F): every number, and those of the attention by layer and head, in a fixed order."""
        columns = [self.column(name) for name in self.numbers if name not in BY_HEAD]
        rows = list(self._rows())
        for values in self.by_head.values():
            columns += [*torch.stack([values[at].flatten() for at in rows]).double().T] if rows else []
        return torch.stack(columns, -1)

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with a line for each token: sample, position in the answer, token, and each number.
        ModuleNotFoundError without pandas."""
        with extra("tables"):
            import pandas as pd
        rows = list(self._rows())
        lines: dict[str, list[Any]] = {"sample": [at[0] for at in rows], "position": [at[1] for at in rows]}
        lines["token"] = [self.tokens[sample][index] for sample, index in rows]
        return pd.DataFrame({**lines, **{name: self.column(name).tolist() for name in self.numbers}})

    def detector(self, name: str) -> GroundingDetector:
        """Returns a detector that takes this number alone, without training: a higher score is more grounded."""
        self.column(name)
        return GroundingDetector.of_column(name)

    def __str__(self) -> str:
        shown = [name for name in self.numbers if not self.column(name).isnan().all()]
        lines = ["  ".join([f"{'token':<16}", *shown])]
        for sample, index in self._rows():
            numbers = (f"{float(self.numbers[name][sample, index]):{max(len(name), 7)}.3g}" for name in shown)
            lines.append("  ".join([f"{self.tokens[sample][index]!s:<16.16}", *numbers]))
        return "\n".join(lines)


class Auroc(NamedTuple):
    """The chance that a grounded token scores above another one, and its 95 % interval over answers."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GroundingDetector:
    """Scores the tokens of answers: the higher, the more grounded.

    `TokenGrounding.detector(name)` takes one number as it is; `fit` learns from labelled answers.

    Args:
        column: the number that is taken alone; "" = all of them, and those of the attention by layer and head.
        weights, means, deviations: of each feature, after training; a feature without a number counts as its mean.
        bias: what is added.
    """

    column: str
    weights: tuple[float, ...]
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()
    bias: float = 0.0

    @staticmethod
    def of_column(name: str) -> GroundingDetector:
        return GroundingDetector(name, (-1.0 if name in _LOW else 1.0,))

    @staticmethod
    def fit(tables: Sequence[TokenGrounding], labels: Sequence[Sequence[bool]]) -> GroundingDetector:
        """Returns a logistic regression on all numbers of the tokens, those of the attention by layer and head among them.

        Needs scikit-learn. Test it on answers that it was not fitted on: there are often more features than tokens.

        Args:
            tables: one or more results of `va.token_grounding` for the same model.
            labels: for each table, whether each of its tokens is grounded, answer after answer.

        Raises:
            ValueError: labels that do not fit, of one kind alone, or tables of several models.
        """
        with extra("probe"):
            from sklearn.linear_model import LogisticRegression
        wanted = _labels(tables, labels)
        try:
            features = torch.cat([table.features() for table in tables])
        except RuntimeError:
            sizes = sorted({table.features().shape[1] for table in tables})
            raise ValueError(f"tables must be of one model, with as many layers and heads; got {sizes} features") from None
        is_number = ~features.isnan()
        means = torch.where(is_number, features, 0.0).sum(0) / is_number.sum(0).clamp(min=1)
        features = torch.where(is_number, features, means)
        deviations = features.std(0, correction=0)
        deviations = torch.where(deviations > 0, deviations, 1.0)
        fitted = LogisticRegression(max_iter=1000).fit(((features - means) / deviations).numpy(), wanted.numpy())
        weights, center, spread = (tuple(x.tolist()) for x in (fitted.coef_[0], means, deviations))
        return GroundingDetector("", weights, center, spread, float(fitted.intercept_[0]))

    def score(self, table: TokenGrounding) -> Tensor:
        """Returns a score for each token, answer after answer: the higher, the more grounded; NaN without its number."""
        if self.column:
            return self.weights[0] * table.column(self.column)
        features = table.features()
        if features.shape[1] != len(self.weights):
            raise ValueError(
                f"table must have the {len(self.weights)} features of the model that the detector was fitted on; got "
                f"{features.shape[1]}"
            )
        weights, means, deviations = (torch.tensor(x, dtype=torch.float64) for x in (self.weights, self.means, self.deviations))
        return (torch.where(features.isnan(), means, features) - means) / deviations @ weights + self.bias

    def auroc(self, tables: Sequence[TokenGrounding], labels: Sequence[Sequence[bool]], *, draws: int = 1000) -> Auroc:
        """Returns the area under the ROC curve over all tokens that have a score, with a 95 % interval from `draws` bootstrap
        samples of whole tables: tokens of an answer are not independent. Give a table for each answer.

        Raises:
            ValueError: labels that do not fit, or of one kind alone.
        """
        wanted = _labels(tables, labels)
        sizes = [len(table) for table in tables]
        scores = torch.cat([self.score(table) for table in tables])
        pieces = [*zip(scores.split(sizes), wanted.split(sizes), strict=True)]
        value = _area([*pieces])
        generator = torch.Generator().manual_seed(0)
        areas = []
        for _ in range(draws):
            drawn = torch.randint(len(pieces), (len(pieces),), generator=generator).tolist()
            areas.append(_area([pieces[number] for number in drawn]))
        finite = torch.tensor(areas, dtype=torch.float64)
        finite = finite[~finite.isnan()]  # a draw may have tokens of one kind alone
        low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist() if len(finite) else (value, value)
        return Auroc(value, low, high)

    def save(self, path: str | Path) -> Path:
        """Writes the detector as JSON; `load` reads it."""
        check_writable("path", Path(path))
        Path(path).write_text(json.dumps({"format": _FORMAT, **asdict(self)}))
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> GroundingDetector:
        """Reads the file of `save`. ValueError for another file."""
        try:
            stored: Any = json.loads(Path(path).read_text())
        except json.JSONDecodeError:
            stored = None
        if not isinstance(stored, dict) or stored.pop("format", None) != _FORMAT:
            raise ValueError(f"path must be a file of GroundingDetector.save; got {str(path)!r}")
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()}
        return GroundingDetector(**fields)


def _labels(tables: Sequence[TokenGrounding], labels: Sequence[Sequence[bool]]) -> Tensor:
    """bool (tokens)."""
    sizes, counts = [len(table) for table in tables], [len(row) for row in labels]
    if sizes != counts:
        raise ValueError(f"labels must have one for each token of each table, {sizes}; got {counts}")
    wanted = torch.tensor([bool(label) for row in labels for label in row])
    if not len(wanted) or bool(wanted.all()) or not bool(wanted.any()):
        raise ValueError("labels must name grounded tokens and others; got one kind alone")
    return wanted


def _area(pieces: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The chance that a score of a grounded token is above that of another one; equal ones count half. NaN of one kind alone."""
    scores, wanted = (torch.cat(x) for x in zip(*pieces, strict=True))
    is_number = ~scores.isnan()
    above, below = scores[is_number & wanted], scores[is_number & ~wanted].sort().values
    if not len(above) or not len(below):
        return float("nan")
    less = torch.searchsorted(below, above, right=False) + torch.searchsorted(below, above, right=True)
    return float(less.double().mean() / (2 * len(below)))
