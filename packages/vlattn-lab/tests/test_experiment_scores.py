"""The experiment `scores`: its parts, its smoke run, and what the page says of the stored rows."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import vlattn_fast as va
import vlattn_lab as lab
from vlattn_fast.measuring.records import having
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments import run, scores
from vlattn_lab.experiments.experiment import Settings, spearman
from vlattn_lab.experiments.scores import (
    TASKS,
    answering,
    conditions,
    control,
    drawing,
    encoders,
    generation,
    matching,
    page,
    reading,
    scan,
)
from vlattn_lab.experiments.scores.attend import GENERAL, PLAIN, SCORES, UNIFORM, Attend, perturbation, weights_and_relevancy
from vlattn_lab.experiments.scores.material import FEATURES, reader
from vlattn_lab.processor import POSITION_DIM, DigitProcessor
from vlattn_lab.texts import ANSWERS, PAD, TEXT_VOCABULARY
from vlattn_lab.train.fit import seeded


def ids(count: int, length: int) -> torch.Tensor:
    return torch.randint(1, len(TEXT_VOCABULARY), (count, length))


def tokens(count: int) -> torch.Tensor:
    """Of four different digits each."""
    return torch.cat([torch.rand(count, 10).argsort(1)[:, :4, None], torch.randn(count, 4, POSITION_DIM)], dim=-1)


@pytest.mark.parametrize("arm", matching.ARMS)
@pytest.mark.parametrize(("heads", "smooth"), [(1, 1.0), (2, 3.0)])
def test_attend_is_the_formula(arm, heads, smooth):
    """Its output, and the weights and relevancy that are read from it, are those of a map that is stored."""
    torch.manual_seed(0)
    attend = Attend(arm, 8, heads=heads, smooth=smooth)
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = smooth * attend.score.formula(torch.zeros_like(q) if arm == UNIFORM else q, k)
    logits = logits / (8 / heads) ** 0.5 if arm == "scaled_dot" else logits
    weights = logits.masked_fill(~mask[:, None, None], -math.inf).softmax(-1).detach().requires_grad_()
    output = (weights @ v).transpose(1, 2).flatten(2)
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
    torch.testing.assert_close(relevancy[:, 0], rows, rtol=1e-4, atol=1e-5)


def test_a_bias_of_keys_cancels():
    """In the softmax over the keys, but not if the scores of a key are divided by their norm over the queries."""
    torch.manual_seed(0)
    query, key = torch.nn.functional.normalize(torch.randn(2, 2, 5, 8), dim=-1)
    for attention, cancels in ((Attend, True), (scan.Normalised, False)):
        general, biased = (seeded(0, functools.partial(attention, arm, 8)) for arm in ("general", "biased_key"))
        biased.made.bias.data += 1.0
        assert torch.allclose(general(query, key), biased(query, key), rtol=1e-4, atol=1e-5) == cancels
    one, other = scan.Normalised("cosine", 8), scan.Normalised("scaled_dot", 8)  # a factor does cancel there
    torch.testing.assert_close(one(query, key), other(query, key))


def test_forms_of_general():
    """Each is there as q . (W k) and as k . (W q); a general without a bias stands for the biased form of keys."""
    for form, pair in GENERAL.items():
        for side, arm in zip(("key", "query"), pair, strict=True):
            score = Attend(arm, 4).score
            assert (score.projects, score.activation) == (side, None if form in ("general", "biased") else form)
            assert (score.bias is None) == (form == "general" or (form, side) == ("biased", "key"))


@pytest.mark.parametrize("task", ["matching", "SCAN", "answering", "reading", "generation", "drawing"])
def test_arms_differ_in_the_score_alone(task):
    """All other weights begin the same, every parameter that has a part in the output gets a gradient, and outputs differ."""
    made = {
        "matching": lambda arm: (matching.Matcher(arm), (torch.randn(4, 4, FEATURES), ids(4, matching.WORDS))),
        "SCAN": lambda arm: (scan.Scan(arm), (torch.randn(4, 4, FEATURES), ids(4, matching.WORDS))),
        "answering": lambda arm: (answering.Mac(arm), (3 * torch.randn(40, 4, FEATURES), ids(40, answering.WORDS))),
        "reading": lambda arm: (reading.M4C(arm), (tokens(40), ids(40, reading.WORDS))),
        "generation": lambda arm: (
            generation.Generator(arm),
            (torch.randn(4, 5, encoders.SIZE), torch.randn(4, encoders.SIZE), torch.randn(4, generation.NOISE)),
        ),
        "drawing": lambda arm: (drawing.Painter(arm), (ids(4, drawing.WORDS), 3 * torch.randn(4, 2, POSITION_DIM))),
    }[task]
    torch.manual_seed(1)
    inputs = made("dot")[1]
    outputs, first = {}, None
    for arm in TASKS[task].ARMS:
        model = seeded(0, lambda arm=arm: made(arm)[0])
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("attend")}
        first = first or state
        assert state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in state)
        outputs[arm] = model(*inputs)
        outputs[arm].square().sum().backward()
        for name, parameter in model.named_parameters():
            if arm != UNIFORM:
                assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), (arm, name)
    names = list(outputs)
    for i, one in enumerate(names):
        for two in names[:i]:
            # the same as long as the bias is 0
            if {one, two} not in ({"general_query", "biased_general"}, {"general", "biased_key"}):
                assert not torch.allclose(outputs[one], outputs[two], rtol=1e-4, atol=1e-5), (one, two)


@pytest.mark.parametrize(
    "make",
    [
        lambda: matching.Matcher("additive"),
        lambda: matching.Matcher("cosine", heads=4, smooth=3.0, depth=3),
        *(lambda arm=arm: scan.Scan(arm) for arm in scan.ARMS),
    ],
)
def test_matching_of_pairs_is_a_row(make):
    """Of `stacked_cross_attention`, too, though it is computed with other formulas."""
    model, images, captions = seeded(0, make), torch.randn(6, 4, FEATURES), ids(6, matching.WORDS)
    with_one = model.pairs(images[1:2].expand(6, -1, -1), captions)
    torch.testing.assert_close(model(images[:3], captions)[1], with_one, rtol=1e-5, atol=1e-6)


def test_a_condition_changes_one_factor():
    """Each arm is a model with other outputs than its score's first, and the same weights but for those that depth adds."""
    images, captions = torch.randn(4, 4, FEATURES), ids(4, matching.WORDS)
    for score, options in conditions.OPTIONS.values():
        plain, other = (seeded(0, functools.partial(matching.Matcher, score, **changed)) for changed in ({}, options))
        first, state = plain.state_dict(), other.state_dict()
        assert len(options) <= 1 and all(torch.equal(state[name], first[name]) for name in first)
        same = torch.allclose(plain(images, captions), other(images, captions), rtol=1e-4, atol=1e-5)
        assert same == (not options)


def test_the_control_unit_follows_the_earlier_words():
    """Against MAC's equations, a question and a word at a time; padding has no part. Without the unit no parameter differs."""
    model, asked = seeded(0, lambda: control.ControlUnit("dot")), ids(3, answering.WORDS)
    asked[1, 5:] = PAD
    words, sentence = model.text(asked)
    model.first.data.normal_()
    found = [*model.controls(words, sentence, torch.where(asked == PAD, -torch.inf, 0.0))]
    assert len(found) == answering.STEPS
    for i, count in enumerate((7, 5, 7)):
        before = model.first
        for ask, got in zip(model.ask, found, strict=True):
            step = model.step(torch.cat([before, ask(sentence[i])]))
            chances = torch.stack([model.weigh(step * words[i, j])[0] for j in range(count)]).exp()
            before = sum(chance * words[i, j] for j, chance in enumerate(chances)) / chances.sum()
            torch.testing.assert_close(got[i], before, rtol=1e-5, atol=1e-6)
    plain, unit = (seeded(0, functools.partial(make, "dot")).state_dict() for make in (answering.Mac, control.ControlUnit))
    assert all(torch.equal(unit[name], tensor) for name, tensor in plain.items()) and len(unit) == len(plain) + 5


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


@pytest.mark.parametrize("arm", ["dot", UNIFORM])
def test_an_answer_is_a_fixed_word_or_a_token(arm):
    """No other answer has a chance, and none that is masked; as the gate opens, the weights are the chances."""
    model, seen, words = seeded(0, lambda: reading.M4C(arm)), tokens(20), ids(20, reading.WORDS)
    mask = torch.rand(20, 4) < 0.5
    mask[0] = False
    allowed = torch.tensor([answer in reading.FIXED for answer in ANSWERS]).repeat(20, 1)
    for shown in (mask, torch.ones_like(mask)):
        allowed.scatter_(1, seen[..., 0].long(), allowed.gather(1, seen[..., 0].long()) | shown)
        chances = model(seen, words, shown).exp()
        assert torch.equal(chances > 1e-6, allowed)
        torch.testing.assert_close(chances[shown.any(1)].sum(1), torch.ones(int(shown.any(1).sum())))
    model.copies.bias.data += 100.0
    [(weights, _)] = weights_and_relevancy(model.attend, lambda: model(seen, words).sum(1))
    copied = model(seen, words).exp().gather(1, seen[..., 0].long())
    torch.testing.assert_close(copied, weights[:, 0, 0], rtol=1e-5, atol=1e-6)


def test_tokens_are_the_digits_of_the_scene():
    """The classifier reads nearly all of them; places are those of the boxes."""
    scenes = lab.digit_scenes(60, seed=3)
    read = reading.tokens_of(reader(4, "train"), scenes.images, scenes.boxes)
    assert float((read[..., 0] == scenes.digits).double().mean()) > 0.9
    assert torch.equal(read[..., 1:], DigitProcessor().regions(scenes.images, scenes.boxes)["region_positions"])


def test_drawing_is_of_the_two_named_digits():
    """Either box may be the first; each has the pixels, digit and word of one of them, and the classifier sees the places."""
    scenes, made = lab.digit_scenes(60, seed=3, pairs="held_out"), drawing.scenes_of(60, 3, "test", "held_out")
    assert 0 < int((made.said[:, 0] == 0).sum()) < 60
    for i, (caption, digits, said) in enumerate(zip(scenes.captions, made.digits.tolist(), made.said.tolist(), strict=True)):
        assert [caption.split()[place] for place in said] == [lab.processor.DIGIT_WORDS[digit] for digit in digits]
        for pixels, corner, digit in zip(made.pixels[i], made.corners[i].tolist(), digits, strict=True):
            region = scenes.digits[i].tolist().index(digit)
            assert scenes.boxes[i, region, :2].tolist() == corner
            assert torch.equal(scenes.images[i, corner[1] : corner[1] + 8, corner[0] : corner[0] + 8].flatten(), pixels)
    real = drawing.found(made.pixels, made, 3, drawing.SMOKE)
    swapped = drawing.found(made.pixels.flip(1), made, 3, drawing.SMOKE)
    assert real["accuracy"] > 0.9 and swapped["accuracy"] < 0.1 and swapped["drawn"] == real["drawn"]


def test_equal_weights_cannot_tell_places():
    """Attention is the only way from a word to a pixel: with equal weights both boxes are painted alike, whichever digit is named
    first."""
    words, positions = ids(3, drawing.WORDS), torch.randn(3, 2, POSITION_DIM)
    for arm, alike in ((UNIFORM, True), ("dot", False)):
        model = seeded(0, lambda arm=arm: drawing.Painter(arm))
        painted, exchanged = model(words, positions), model(words[:, [4, 1, 2, 3, 0]], positions)
        for other in (painted.flip(1), exchanged):
            assert torch.allclose(painted, other, rtol=1e-5, atol=1e-6) == alike


def test_equal_weights_point_by_chance():
    """A tie is shared, and does not go to the key that comes first."""
    model = seeded(0, lambda: drawing.Painter(UNIFORM))
    found = drawing.measure(model, 0, drawing.SMOKE)
    assert found["pointing"] == pytest.approx(1 / drawing.WORDS) == found["share"]


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


def test_correlations_are_of_scores_of_one_commit():
    """A measure that follows the accuracy, and one that runs against it; forms of `general`, of another commit, do not count."""
    rows = [
        {"task": "matching", "arm": arm, "seed": seed, "trained": {"accuracy": i + 0.1 * seed, "pointing": i, "agreement": -i}}
        for i, arm in enumerate(SCORES)
        for seed in range(3)
    ]
    assert page.means_of(rows, "matching", "pointing") == {arm: i for i, arm in enumerate(PLAIN)}
    stored = json.loads((ROOT / "benchmarks/results/experiment-scores.json").read_text())["rows"]
    for task in page.tasks(stored):
        assert (
            len({row["commit"] for row in having(stored, stage=1, task=task) if row["arm"] in page.compared(stored, task)}) == 1
        )
    found = {effect.measured: effect for effect in page.effects(rows)}
    for name, sign in (("pointing", 1), ("agreement", -1)):
        effect = found[f"accuracy and {name}"]
        assert effect.effect == pytest.approx(sign) and effect.p == pytest.approx(2 / math.factorial(8))
        assert effect.low < effect.high and effect.seeds == 3


def test_tables_of_made_rows():
    """Differences are those of the pairs: of k . (W q) from q . (W k), and of a condition from its score without one."""
    arms = dict.fromkeys(arm for pair in GENERAL.values() for arm in pair)
    rows = [
        {"task": "matching", "arm": arm, "seed": seed, "trained": {"accuracy": i + seed}}
        for i, arm in enumerate(arms)
        for seed in (0, 1)
    ]
    line = next(line for line in page.forms_table(rows, "matching").splitlines() if "| tanh |" in line)
    assert "5.500 ± 0.707 | 6.500 ± 0.707" in line and "+1.000 ± 0.000" in line
    rows = [
        {"task": "conditions", "arm": arm, "seed": seed, "trained": {"accuracy": i + seed, "pointing_head": 0.25}}
        for i, arm in enumerate(conditions.ARMS)
        for seed in (0, 1)
    ]
    lines = page.conditions_table(rows).splitlines()
    assert "pointing of a head" in lines[0] and any("heads 4 | 2.500 ± 0.707 | +2.000 ± 0.000" in line for line in lines)
    assert len(lines) == 2 + len(conditions.ARMS)


def test_rates_are_chosen_by_validation():
    rows = [
        {"task": task, "arm": arm, "rate": rate, "validation": {"accuracy": accuracy}}
        for task, arm, rate, accuracy in [
            ("matching", "dot", 1, 0.2),
            ("matching", "dot", 2, 0.4),
            ("matching", "additive", 3, 0.9),
            ("matching", "activated_general", 4, 0.9),
        ]
    ]
    cells = scores.trainings(Settings(2), rows)
    chosen = {(cell["task"], cell["arm"], cell["seed"]): cell["rate"] for cell in cells if "rate" in cell}
    assert chosen["matching", "dot", 0] == chosen["matching", "dot", 1] == 2 and chosen["matching", "additive", 0] == 3
    assert chosen["matching", "tanh_key", 0] == 4 and chosen["answering", "tanh_key", 0] == answering.RATES[0]
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
        *((task, arm) for task, module in TASKS.items() for arm in module.ARMS),
        ("answering", "frequent"),
        ("generation", "real"),
        ("drawing", "real"),
    }
    for row in rows:
        for name in ("trained", "untrained"):
            found = row.get(name, {})
            assert all(math.isfinite(value) for value in found.values()), row
            assert all(0 <= found[key] <= 1 for key in ("accuracy", "share", "pointing", "auc_most") if key in found), row
        if row["arm"] == UNIFORM and "trained" in row:
            assert row["trained"]["share"] == pytest.approx(row["trained"]["chance"], abs=1e-3)
    assert {row["what"] for row in rows if "what" in row} == {"matching", "answering", "generation", "SCAN"}
    printed = capsys.readouterr().out
    assert all(f"`{arm}`" in printed for arm in SCORES) and all(f"| {arm} |" in printed for arm in conditions.ARMS)
    assert (tmp_path / "scores.png").stat().st_size > 10_000
    assert (tmp_path / "scores-conditions.png").stat().st_size > 10_000
    if not run.commit().endswith("+dirty") and run.commit() != "unknown":
        run.main(asked)
        assert json.loads(out.read_text())["rows"] == rows
