"""Sparse attention with an indexer: who learns from which loss, what it chooses, and that the experiment runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from vlattn_lab import sparse
from vlattn_lab.experiments import indexer as experiment
from vlattn_lab.experiments.run import main
from vlattn_lab.hybrid import build, config, inputs
from vlattn_lab.questions import digit_prompts
from vlattn_lab.texts import START


@pytest.fixture(scope="module")
def made() -> tuple[Any, dict[str, sparse.Indexer], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = build(config("transformer")).eval()
    given = inputs(digit_prompts(2, seed=0, kind="caption").images, torch.full((2, 3), START))
    with torch.no_grad():
        dense = model(**given).logits
    indexers = sparse.with_indexers(model)
    given["dense"] = dense
    return model, indexers, given


@pytest.mark.parametrize("keys", [None, 8])
def test_each_learns_from_its_own_loss(made: Any, keys: int | None) -> None:
    model, indexers, given = made
    logits = run(model, indexers, given, keys)
    losses = torch.stack([indexer.loss for indexer in indexers.values()])
    assert len(losses) == 4 and bool((losses > 0).all())
    for loss, learns in ((losses.sum(), True), (logits.square().sum(), False)):
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        moved = {name for name, x in model.named_parameters() if x.grad is not None and bool(x.grad.any())}
        assert moved and {".indexer." in name for name in moved} == {learns}


def test_all_keys_are_the_dense_attention(made: Any) -> None:
    model, indexers, given = made
    for keys in (None, 1000):
        torch.testing.assert_close(run(model, indexers, given, keys), given["dense"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(model, indexers, given, 8), given["dense"], rtol=1e-2, atol=1e-2)


def test_recall_of_an_indexer_that_is_the_attention() -> None:
    """One head, whose scores are the attention's own: all keys. With the opposite scores: worked by counting."""
    query, key = torch.rand(1, 1, 20, 16), torch.rand(1, 1, 20, 16)
    parts = query, key[:, 0], torch.ones(1, 1, 20)
    assert float(sparse.recall(query, key, parts, 1.0)) == 1.0
    scores = (query @ key.mT)[0, 0]
    rows = [scores[i, : i + 1] for i in range(8, 20)]
    shared = [len({*row.topk(8).indices.tolist()} & {*(-row).topk(8).indices.tolist()}) for row in rows]
    opposite = query, key[:, 0], -torch.ones(1, 1, 20)
    assert float(sparse.recall(query, key, opposite, 1.0)) == pytest.approx(sum(shared) / len(shared) / 8)


def run(model: Any, indexers: dict[str, sparse.Indexer], given: dict[str, torch.Tensor], keys: int | None) -> torch.Tensor:
    for indexer in indexers.values():
        indexer.keys = keys
    logits: torch.Tensor = model(**{name: x for name, x in given.items() if name != "dense"}).logits
    return logits


def test_a_smoke_run_has_both_arms(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    main(["indexer", "--smoke", "--seeds", "1", "--out", str(out), "--figures", str(tmp_path), "--processes", "1"])
    (row,) = json.loads(out.read_text())["rows"]
    assert [*row["arms"]] == [*experiment.ARMS] and all(arm["steps"] == [0, 1, 2, 3] for arm in row["arms"].values())
    assert "warm-up" in capsys.readouterr().out and (tmp_path / "indexer.png").is_file()
