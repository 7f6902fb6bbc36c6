"""The experiment `scores`: its parts, its smoke run, and what the page says of the stored rows."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import vlattn_fast as va
import vlattn_lab as lab
from vlattn_lab.experiments import run, scores
from vlattn_lab.experiments.experiment import Settings, spearman
from vlattn_lab.experiments.scores import TASKS, answering, encoders, generation, matching, page
from vlattn_lab.experiments.scores.attend import ARMS, SCORES, UNIFORM, Attend, perturbation, weights_and_relevancy
from vlattn_lab.experiments.scores.material import FEATURES
from vlattn_lab.texts import TEXT_VOCABULARY
from vlattn_lab.train.fit import seeded


def ids(count: int, length: int) -> torch.Tensor:
    return torch.randint(1, len(TEXT_VOCABULARY), (count, length))


@pytest.mark.parametrize("arm", ARMS)
def test_attend_is_the_formula(arm):
    """Its output, and the weights and relevancy that are read from it, are those of a map that is stored."""
    torch.manual_seed(0)
    attend, query, key, value = Attend(arm, 8), torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    score = attend.score() if isinstance(attend.score, torch.nn.Module) else attend.score
    logits = va.scores.resolve(score).formula(torch.zeros_like(query) if arm == UNIFORM else query, key)
    logits = logits / 8**0.5 if arm == "scaled_dot" else logits
    weights = logits.masked_fill(~mask[:, None], -math.inf).softmax(-1).detach().requires_grad_()
    output = weights @ value
    torch.testing.assert_close(attend(query, key, value, mask), output, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(output.square().sum(), weights)
    value.requires_grad_()
    [(got, relevancy)] = weights_and_relevancy(attend, lambda: attend(query, key, value, mask).square().sum((1, 2)))
    torch.testing.assert_close(got, weights.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(relevancy, (weights * gradient).clamp(min=0).detach(), rtol=1e-4, atol=1e-5)
    assert attend.seen is None


def test_relevancy_is_that_of_relevancy_step():
    """The rule that the operator has for dot products."""
    torch.manual_seed(0)
    attend, query, key = Attend("dot", 8), torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 5, 8)
    [(_, relevancy)] = weights_and_relevancy(attend, lambda: attend(query, key).square().sum((1, 2)))
    gradient = 2 * va.score_attention(query[:, None], key[:, None], key[:, None], score="dot").detach()
    heads = [x.detach()[:, None] for x in (query, key, key)]
    rows = va.relevancy_step(torch.eye(3).expand(2, 3, 3), *heads, gradient, scale=1.0)
    torch.testing.assert_close(relevancy, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", list(TASKS))
def test_arms_differ_in_the_score_alone(task):
    """All other weights begin the same, every parameter that has a part in the output gets a gradient, and outputs differ."""
    made = {
        "matching": lambda arm: (matching.Matcher(arm), (torch.randn(4, 4, FEATURES), ids(4, matching.WORDS))),
        "answering": lambda arm: (answering.Mac(arm), (torch.randn(4, 4, FEATURES), ids(4, answering.WORDS))),
        "generation": lambda arm: (
            generation.Generator(arm),
            (torch.randn(4, 5, encoders.SIZE), torch.randn(4, encoders.SIZE), torch.randn(4, generation.NOISE)),
        ),
    }[task]
    torch.manual_seed(1)
    inputs = made("dot")[1]
    outputs, first = {}, None
    for arm in ARMS:
        model = seeded(0, lambda arm=arm: made(arm)[0])
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("attend.")}
        first = first or state
        assert state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in state)
        outputs[arm] = model(*inputs)
        outputs[arm].square().sum().backward()
        for name, parameter in model.named_parameters():
            if arm != UNIFORM:
                assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), (arm, name)
    names = list(ARMS)
    for i, one in enumerate(names):
        for two in names[:i]:
            if {one, two} != {"general", "biased_general"}:  # the same as long as the bias is 0, but for its transpose
                assert not torch.allclose(outputs[one], outputs[two], rtol=1e-4, atol=1e-5), (one, two)


def test_matching_of_pairs_is_the_diagonal():
    model, images, captions = seeded(0, lambda: matching.Matcher("additive")), torch.randn(6, 4, FEATURES), ids(6, matching.WORDS)
    torch.testing.assert_close(model(images, captions).diagonal(), model.pairs(images, captions), rtol=1e-5, atol=1e-6)


def test_regions_that_are_said_and_asked_about():
    scenes = lab.digit_scenes(50, seed=3)
    said = scenes.digits.gather(1, matching.said_regions(scenes))
    assert torch.equal(said, lab.clip.words_of(scenes)[:, ::2])
    asked = lab.digit_questions(80, seed=3)
    for kind, question, answer, digits, aim in zip(
        asked.kinds, asked.questions, asked.answers, asked.digits.tolist(), answering.aims(asked).tolist(), strict=True
    ):
        aimed = [lab.processor.DIGIT_WORDS[digit] for digit, yes in zip(digits, aim, strict=True) if yes]
        assert aimed == {"what": [answer], "there": [question.split()[-1]] if answer == "yes" else []}.get(kind, [])


def test_spearman_shares_ranks():
    from scipy.stats import spearmanr

    one, two = torch.randint(0, 4, (20, 6)).double(), torch.randint(0, 4, (20, 6)).double()
    one[:, 0], two[:, 0] = 5, 7  # no row of one value
    want = [spearmanr(a, b).statistic for a, b in zip(one, two, strict=True)]
    torch.testing.assert_close(spearman(one, two), torch.tensor(want, dtype=torch.float64))
    assert float(spearman(torch.ones(6), two[0])) == 0.0


def test_perturbation_takes_the_largest_first():
    """Of rows that are right as long as their entry 0 is there."""
    values = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.8, 0.3, 0.2, 0.1]])
    areas = perturbation(values, lambda mask: float(mask[:, 0].double().mean()), 0)
    assert areas["auc_most"] == pytest.approx(1 / 8) and areas["auc_least"] == pytest.approx(7 / 8)
    assert 1 / 8 <= areas["auc_random"] <= 7 / 8


def test_statistics_of_made_rows():
    """A measure that follows the accuracy correlates with it, one that runs against it does so too."""
    rows = [
        {"task": "matching", "arm": arm, "seed": seed, "trained": {"accuracy": i + 0.1 * seed, "pointing": i, "agreement": -i}}
        for i, arm in enumerate(SCORES)
        for seed in range(3)
    ]
    assert page.correlation(rows, "matching", "pointing")["rho"] == pytest.approx(1)
    against = page.correlation(rows, "matching", "agreement")
    assert against["rho"] == against["low"] == against["high"] == pytest.approx(-1)
    assert page.best(rows, "matching", "accuracy") == list(SCORES)[-1] and page.best(rows, "matching", "agreement") == "dot"


def test_rates_are_chosen_by_validation():
    rows = [
        {"task": task, "arm": arm, "rate": rate, "validation": {"accuracy": accuracy}}
        for task, arm, rate, accuracy in [
            ("matching", "dot", 1, 0.2),
            ("matching", "dot", 2, 0.4),
            ("matching", "additive", 3, 0.9),
        ]
    ]
    cells = scores.trainings(Settings(2), rows)
    chosen = {(cell["task"], cell["arm"], cell["seed"]): cell["rate"] for cell in cells if "rate" in cell}
    assert chosen["matching", "dot", 0] == chosen["matching", "dot", 1] == 2 and chosen["matching", "additive", 0] == 3
    assert chosen["generation", "dot", 1] == generation.RATES[0]
    assert all(cell["seed"] == scores.CHOICE_SEED for cell in scores.choices(Settings(2), []))


def test_smoke(tmp_path, capsys, monkeypatch):
    """Everything once, and nothing a second time."""
    monkeypatch.setattr(answering, "RATES", answering.RATES[:1])  # one task with a choice is enough
    out = tmp_path / "rows.json"
    asked = ["scores", "--smoke", "--out", str(out), "--figures", str(tmp_path), "--seeds", "1", "--processes", "1"]
    run.main(asked)
    rows = json.loads(out.read_text())["rows"]
    assert {(row["task"], row["arm"]) for row in rows if "task" in row} == {
        *((task, arm) for task in TASKS for arm in ARMS),
        ("answering", "frequent"),
        ("generation", "real"),
    }
    for row in rows:
        for name in ("trained", "untrained"):
            found = row.get(name, {})
            assert all(math.isfinite(value) for value in found.values()), row
            assert all(0 <= found[key] <= 1 for key in ("accuracy", "share", "pointing", "auc_most") if key in found), row
        if row["arm"] == UNIFORM and "trained" in row:
            assert row["trained"]["share"] == pytest.approx(row["trained"]["chance"], abs=1e-3)
    assert {row["what"] for row in rows if "what" in row} == {*TASKS, "SCAN"}
    printed = capsys.readouterr().out
    assert all(f"`{arm}`" in printed for arm in SCORES) and (tmp_path / "scores.png").stat().st_size > 10_000
    if not run.commit().endswith("+dirty") and run.commit() != "unknown":
        run.main(asked)
        assert json.loads(out.read_text())["rows"] == rows
