"""A score function is one class in one file of vlattn_fast/scores/: all that takes scores finds it there."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.derivative_formulas import FORMULAS
from vlattn_fast import scores
from vlattn_fast.checking import fuzz, verify
from vlattn_fast.checking.cases import Sizes, _dice, cases_of
from vlattn_fast.nn import ScoreAttention

ROOT = Path(__file__).resolve().parents[2]
TOY = '''
from dataclasses import dataclass

from torch import Tensor

from vlattn_fast.scores.score import VECTOR, Core, Score, check_parameter


@dataclass(frozen=True, eq=False)
class Toy(Score):
    """s = (q + a) . k"""

    shift: Tensor

    name = "toy"
    parameters = {"shift": VECTOR}

    def check(self, query, key):
        check_parameter("shift", self.shift, (key.shape[-1],), query)

    def formula(self, query, key):
        return query @ key.mT + (key * self.shift[..., None, :]).sum(-1)[..., None, :]

    def core(self, query, key):
        return Core("dot", query + self.shift[..., None, :], key)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    """The class, in a file of a folder that the package also looks into."""
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setattr(scores, "__path__", [*scores.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    for name, kind in scores.scores_in_folder().items():
        monkeypatch.setitem(scores.SCORES, name, kind)
    yield scores.SCORES["toy"]
    del sys.modules["vlattn_fast.scores.toy"]


def test_a_class_in_a_file_is_all_that_a_score_needs(toy: type[Any]) -> None:
    made = toy(torch.randn(4))
    assert scores.resolve(made) is made
    with pytest.raises(ValueError, match=r"got 'toy'. It has parameters: pass va.scores.Toy\(...\)"):
        scores.resolve("toy")
    query, key, value = torch.randn(3, 2, 3, 5, 4).unbind(0)
    torch.testing.assert_close(
        va.score_attention(query, key, value, score=made, return_lse=True),
        va.reference.score_attention(query, key, value, score=made, return_lse=True),
    )
    with pytest.raises(ValueError, match=r"shift must have shape \(4,\), or \(3, 4\) for one per head"):
        va.score_attention(query, key, value, score=toy(torch.randn(5)))

    layer = ScoreAttention(12, 3, "toy", per_head=True)
    assert dict(layer.score.named_parameters())["shift"].shape == (3, 4)  # type: ignore[union-attr]
    layer(torch.randn(2, 5, 12)).sum().backward()

    assert [case.name for case in verify.cases() if case.name == "toy"] == ["toy"]
    assert "toy" in {drawn_score(seed) for seed in range(100)}
    for outcome in fuzz.fuzz(10, backends=("streaming",), score="toy"):
        assert outcome.passed and "score=toy" in outcome.drawn, outcome


def drawn_score(seed: int) -> str:
    dice = _dice.Dice(f"score {seed}")
    cases_of("score_attention").draw(dice, torch.float32)
    return str(dice.drawn["score"])


def test_two_scores_of_one_name_are_refused(toy: type[Any], tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(TOY, encoding="utf-8")
    with pytest.raises(ValueError, match="scores must have names of their own; got 'toy' in vlattn_fast.scores.twin"):
        scores.scores_in_folder()
    del sys.modules["vlattn_fast.scores.twin"]


def test_the_page_and_the_layer_name_each_score() -> None:
    page = (ROOT / "docs/operators/score_attention.md").read_text(encoding="utf-8")
    shown = [f"`scores.{kind.__name__}(" if kind.parameters else f'"{kind.name}"' for kind in scores.SCORES.values()]
    missing = (
        [name for name in shown if name not in page],
        [x for x in scores.layers() if f'"{x}"' not in inspect.getdoc(ScoreAttention)],
    )
    assert missing == ([], []), "docs/operators/score_attention.md, and the docstring in vlattn_fast/nn/score_attention.py"


def test_each_score_is_verified_and_has_its_second_formula_with_the_default_scale() -> None:
    formula, seen = FORMULAS["score_attention"], {"dot"}
    for each in cases_of("score_attention").verify(torch.Generator().manual_seed(0), Sizes(3, 5, 4)):
        arguments = {name: x for name, x in each.arguments(each.tensors).items() if name != "scale"}
        seen.add(scores.resolve(arguments.get("score", "scaled_dot")).name)
        ours = va.score_attention(**arguments, backend="streaming")
        torch.testing.assert_close(
            ours[0] if isinstance(ours, tuple) else ours,
            formula(**arguments)[0],
            msg=lambda text, each=each: f"{each.title}: {text}",
        )
    assert seen == {*scores.SCORES}, "a call of each score in vlattn_fast/checking/cases/score_attention.py"


def test_a_limit_of_features_counts_those_that_a_score_adds() -> None:
    query = torch.randn(1, 1, 2, 256)
    score = scores.Distance(torch.tensor(1.0))
    assert_refused(
        "triton", "at most 256 features", lambda: va.score_attention(query, query, query, score=score, backend="triton")
    )


@pytest.mark.parametrize("name", scores.SCORES)
def test_no_core_has_more_features_than_its_class_says(name: str) -> None:
    """And the kind of core score that it says; cosine's is a dot product where its clamp does not act."""
    kind, dice = scores.SCORES[name], _dice.Dice(name)
    query, key = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 5, 6)
    for _ in range(20):
        tensors, options = kind.random(dice, 4, 6)
        score = kind(**{key: x.float() for key, x in tensors.items()}, **options)
        score.check(query, key)
        core, features = score.core(query, key), score.features(6, 6)
        assert features is not None and core.query.shape[-1] == core.key.shape[-1] <= features
        assert core.kind == score.kind or (name == "cosine" and core.kind == "dot")
