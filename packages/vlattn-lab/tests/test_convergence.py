"""Small models trained for some steps with torch's attention and with this package's: the losses agree step by step."""

from __future__ import annotations

import json

import pytest

from vlattn_lab.train import convergence

STEPS = 30


@pytest.mark.parametrize("dtype", convergence.DTYPES)
@pytest.mark.parametrize("name", ["decoder", "UNITER with CACR"])
def test_losses_agree(name: str, dtype: str) -> None:
    theirs, ours = (convergence.losses(name, kind, convergence.DTYPES[dtype], STEPS) for kind in ("torch", "vlattn_fast"))
    assert theirs[-1] < theirs[0]
    assert convergence.difference(theirs, ours) <= convergence.BOUND[dtype]


def test_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "ours", lambda query, *args, **named: convergence.written_out(1.5 * query, *args, **named))
    theirs, wrong = (
        convergence.losses("decoder", kind, convergence.DTYPES["float32"], STEPS) for kind in ("torch", "vlattn_fast")
    )
    assert convergence.difference(theirs, wrong) > convergence.BOUND["float32"]


def test_the_stored_rows_are_of_every_model_and_within_the_bound() -> None:
    stored = json.loads(convergence.ROWS.read_text(encoding="utf-8"))
    assert {(row["model"], row["dtype"]) for row in stored} == {(a, b) for a in convergence.TRAININGS for b in convergence.DTYPES}
    assert all(row["steps"] == convergence.STEPS and row["difference"] <= convergence.BOUND[row["dtype"]] for row in stored)
