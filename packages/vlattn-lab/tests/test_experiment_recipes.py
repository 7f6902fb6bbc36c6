"""The recipes against words that do not rest on the image: what their statistics choose, by maps computed in the open."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import vlattn_fast as va
from vlattn_lab import recipes
from vlattn_lab.experiments import recipes as experiment
from vlattn_lab.experiments.run import main
from vlattn_lab.hybrid import IMAGE, PATCHES, build, config, inputs
from vlattn_lab.questions import digit_prompts
from vlattn_lab.texts import START

ANSWER = [[5, 20, 21, 9, 6], [7, 22, 21, 9, 8]]


@pytest.fixture(scope="module")
def asked() -> tuple[Any, dict[str, Tensor], Tensor]:
    """A captioner, its prompts, and the attention (L, B, H, T, N) of the tokens that predict an answer."""
    torch.manual_seed(0)
    model = build(config("transformer")).double().eval()
    scenes = digit_prompts(2, seed=0, kind="caption")
    given = inputs(scenes.images.double(), torch.full((2, 1), START))
    whole = torch.cat([given["input_ids"], torch.tensor(ANSWER)], 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=whole, pixel_values=given["pixel_values"], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return model, given, torch.stack(maps)[..., -6:-1, :].double()


def test_evidence_is_what_patches_gain_from_layer_to_layer(asked: tuple[Any, dict[str, Tensor], Tensor]) -> None:
    model, given, maps = asked
    found = recipes.evidence(model, given, ANSWER, threshold=1.1)
    for sample in range(2):
        salient = []
        for layer in maps[:, sample, :, :, :PATCHES]:  # (H, T, patches)
            best = layer.sum((1, 2)).argsort()[-3:]  # the median of four is the second: three are not below
            mean = layer[best].sum((0, 1))
            salient.append((mean > 1.1 * mean.mean()).double())
        counts = sum((b - a).clamp(min=0) for a, b in zip(salient, salient[1:], strict=False))
        assert isinstance(counts, Tensor) and counts.max() > 0
        torch.testing.assert_close(found[sample], counts / counts.max())
    edits = recipes.raise_evidence(found, given["input_ids"] == IMAGE, 3.0)
    weight = torch.ones(2, PATCHES, dtype=torch.double)
    for edit in edits:
        weight[edit.keys[:, :PATCHES]] *= edit.weight
    torch.testing.assert_close(weight, (3 * found).exp())


def test_even_heads_have_the_largest_entropy(asked: tuple[Any, dict[str, Tensor], Tensor]) -> None:
    model, given, maps = asked
    image = maps[..., :PATCHES] / maps[..., :PATCHES].sum(-1, keepdim=True)
    entropy = -(image * image.log()).sum(-1).mean((1, 3))  # (L, H)
    best = entropy.flatten().topk(4).indices.tolist()
    chosen = recipes.even_heads(model, given, ANSWER, 0.25)
    assert {(layer, head) for layer, heads in chosen.items() for head in heads} == {divmod(i, 4) for i in best}
    layers = {edit.layers[0] for edit in recipes.cut_even_heads(chosen)}
    assert layers == {*chosen} and recipes.cut_even_heads(chosen, ("text", "vision"))[0].factor == 0


def test_the_sink_with_the_largest_share_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def sink(index: int, share: float, tower: str = "language") -> Any:
        return SimpleNamespace(tower=tower, reader="language", index=index, shares={0: 0.1, 1: share})

    found = [[sink(2, 0.3), sink(5, 0.4), sink(0, 0.9, "vision")], []]
    monkeypatch.setattr(va, "find_sinks", lambda model, inputs: found)
    (edit,) = recipes.cut_sinks(None, {}, 6)
    assert edit.keys.nonzero().tolist() == [[0, 5]] and edit.queries == "last"
    found[0] = []
    assert recipes.cut_sinks(None, {}, 6) == []


def test_a_smoke_run_has_every_recipe(tmp_path, capsys) -> None:
    out = tmp_path / "rows.json"
    main(["recipes", "--smoke", "--seeds", "1", "--out", str(out), "--figures", str(tmp_path), "--processes", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert {(row["kind"], row["shade"]) for row in rows} == {(k, s) for k in experiment.KINDS for s in experiment.SHADES}
    assert all(set(row["recipes"]) == {*experiment.RECIPES} for row in rows)
    assert "evidence" in capsys.readouterr().out and (tmp_path / "recipes.png").is_file()
