"""The experiment of evidence in reinforcement learning: it runs, and its parts are what they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

import vlattn_fast as va
from vlattn_fast.measuring.records import having
from vlattn_lab.experiments.congruence.training import CAPTION, MASK_ID, new_model
from vlattn_lab.experiments.evidence import WEIGHTS, report, training
from vlattn_lab.experiments.evidence.training import ASKED, BATCH, SAMPLED, TERMS, Objective, Rollout, Sizes, Term
from vlattn_lab.experiments.run import main
from vlattn_lab.questions import Questions
from vlattn_lab.scenes import held_out_captions

SIZES = Sizes(questions=64, base=2, guessable=256, steps=8, test=12)


@pytest.fixture(scope="module")
def asked() -> Questions:
    return training.natural(BATCH, "fit", torch.Generator().manual_seed(0))


PLAIN = Term()


def rollout_of(model, asked, term=PLAIN) -> tuple[Rollout, tuple]:
    given = training.inputs_of(asked), training.answers_of(asked), asked.named
    return training.sample(model, *given, term, torch.Generator().manual_seed(0)), given


def test_it_runs(tmp_path, capsys):
    out = tmp_path / "rows.json"
    main(["evidence", "--smoke", "--seeds", "2", "--out", str(out), "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["term"] for row in having(rows, what="search")] == ["none", *TERMS]
    assert [(row["seed"], row["term"]) for row in having(rows, what="training")] == [
        (seed, term) for seed in range(2) for term in report.LABELS
    ]
    assert (tmp_path / "evidence.png").is_file() and "| an update with |" in capsys.readouterr().out
    assert set(WEIGHTS) == set(TERMS)


def test_words_tell_the_answer_of_guessable_questions_only(asked):
    table, allowed = training.favourites(), ~held_out_captions()
    for digit in range(10):
        for relation in range(4):
            assert table[digit, relation] != digit and allowed[table[digit, relation], digit, relation]
    given = training.guessable(40, "fit", torch.Generator().manual_seed(0))
    assert torch.equal(training.favourite(given), training.answers_of(given)) and len(given) == 40
    assert (training.favourite(asked) == training.answers_of(asked)).float().mean() < 0.4
    assert len(set(training.answers_of(given).tolist())) > 5, "an answer alone is no guess"


def test_a_question_hides_its_answer_and_names_two_digits(asked):
    ids = training.inputs_of(asked)["input_ids"]
    assert (ids[:, ASKED] == MASK_ID).all() and ids.shape[1] == CAPTION and (asked.named.sum(1) == 2).all()
    right = training.answers_of(asked)
    assert (asked.digits[asked.named].view(-1, 2) == right[:, None]).any(1).all()


def test_evidence_is_the_mass_of_stored_maps(asked):
    model, inputs = new_model(0), training.inputs_of(asked)
    with va.nn.capture_attention(model) as captured, torch.no_grad():
        model(**inputs)
    query, key = captured.query[:, :, ASKED : ASKED + 1], captured.key
    row = torch.softmax(captured.scale * query.double() @ key.double().mT, -1).mean(1)[:, 0]
    regions = row[:, CAPTION:]
    expected = torch.stack([(regions * asked.named).sum(1), (regions * ~asked.named).sum(1), row[:, :CAPTION].sum(1)], 1)
    torch.testing.assert_close(training.mass(query, key, asked.named).double(), expected, rtol=1e-5, atol=1e-7)
    share = training.evidence_share(query, key, asked.named).double()
    torch.testing.assert_close(share, expected[:, 0] / expected[:, :2].sum(1), rtol=1e-5, atol=1e-7)


def test_a_reward_of_evidence_is_for_right_answers(asked):
    model = new_model(0)
    plain, (_, right, _) = rollout_of(model, asked)
    assert torch.equal(plain.reward, (plain.answers == right[:, None]).float()) and 0 < plain.reward.sum() < plain.reward.numel()
    rewarded, _ = rollout_of(model, asked, Term("reward", 3.0))
    share = training.evidence_share(plain.query, plain.key, asked.named)[:, None]
    torch.testing.assert_close(rewarded.reward, plain.reward * (1 + 3.0 * share))


def test_the_divergence_is_zero_until_the_policy_moves(asked):
    """And with advantages within a question it would cancel, since an answer of one word has one row."""
    model = new_model(0)
    rollout, given = rollout_of(model, asked)

    def value():
        return (Objective(Term("divergence", 1.0))(model, *given, rollout) - Objective(Term())(model, *given, rollout)).item()

    gradients = []
    for term in (Term(), Term("divergence", 1e6)):
        model.zero_grad()
        Objective(term)(model, *given, rollout).backward()
        gradients.append(torch.cat([x.grad.flatten() for x in model.uniter.parameters() if x.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())
    assert value() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for x in model.uniter.encoder.layer[-1].attention.self.query.parameters():
            x.mul_(3.0)
    assert abs(value()) > 1e-4
    within = rollout.reward - rollout.reward.mean(1, keepdim=True)
    assert within.sum(1).abs().max() < 1e-5 < training.advantages(rollout.reward).mean(1).abs().max()


@pytest.mark.parametrize("name", TERMS)
def test_each_term_has_its_effect(name):
    def weights(term):
        model = training.first_training(3, replace(SIZES, base=0))
        training.second_training(model, 3, term, SIZES)
        return torch.cat([x.detach().flatten() for x in model.parameters()])

    plain = weights(Term())
    assert torch.equal(weights(Term(name, 0.0)), plain) and not torch.equal(weights(Term(name, 5.0)), plain)


def test_good_answers_become_likelier(asked):
    model = new_model(0)
    rollout, given = rollout_of(model, asked)
    logits = training.answer_logits(model, model(**given[0]).last_hidden_state).detach().requires_grad_()
    advantage = training.advantages(rollout.reward)
    training.policy_loss(logits, rollout, advantage).backward()
    log_probability = logits.log_softmax(1)
    expected = torch.autograd.grad(-(advantage * log_probability.gather(1, rollout.answers)).mean(), logits)[0]
    torch.testing.assert_close(logits.grad, expected)  # at a ratio of 1
    assert rollout.answers.shape == (BATCH, SAMPLED)
