"""`ProbeReport.plot_patterns`: which heads it draws, and which weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

import vlattn_fast as va
from tests.helpers.interpret.probe_cases import REGIONS, planted, quick_fits, scenes
from tests.helpers.nn import models

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def report() -> va.ProbeReport:
    (inputs, labels), *_ = scenes(40)
    x = torch.arange(REGIONS) / REGIONS
    inputs["region_positions"][..., :4] = torch.stack([x, x / 2, x + 0.1, x / 2 + 0.2], -1)
    for label in labels:
        label["relations"] = [(0, 3, "on")]
    with quick_fits():
        return va.probe(planted(1), [(inputs, labels)], tests=("coreference", "relation_detection", "linguistic"))


def drawn(axis: Any) -> list[tuple[str, float]]:
    """(colour, opacity) of the arrows of a panel, darkest first."""
    arrows = [text.arrow_patch for text in axis.texts if getattr(text, "arrow_patch", None) is not None]
    return sorted(((to_hex(arrow.get_edgecolor()), arrow.get_alpha()) for arrow in arrows), key=lambda one: -one[1])


def test_the_best_heads_stand_beside_random_ones(report: va.ProbeReport) -> None:
    figure = report.plot_patterns(best=2, random=3)
    titles = [axis.get_title() for axis in figure.axes if axis.axison and axis.get_title()]
    assert titles[0] == f"layer 0, head 1: {report.value('coreference', 0, 1):.2f}" and len(titles) == 5
    values = [row["value"] for row in report.table if row["test"] == "coreference" and row["head"] is not None]
    assert [title.split(": ")[1] for title in titles[:2]] == [f"{x:.2f}" for x in sorted(values, reverse=True)[:2]]
    assert [title.startswith("at random: ") for title in titles] == [False, False, True, True, True]
    assert len({title.split("layer")[1] for title in titles}) == 5
    again = [axis.get_title() for axis in report.plot_patterns(best=2, random=3, seed=1).axes if axis.axison]
    assert again[:2] == titles[:2] and again[2:5] != titles[2:]
    assert [axis.get_title() for axis in report.plot_patterns((1, 3), random=0).axes][0].startswith("layer 1, head 3: ")
    assert len(report.plot_patterns([(1, 3), (0, 0), (1, 3)], random=0).axes) == 2


def test_arrows_are_the_weights_of_the_map(report: va.ProbeReport) -> None:
    """Two phrases of one word to all six regions, and their regions to all four tokens of the text."""
    model, ((inputs, labels), *_) = planted(1), scenes(40)
    layer = model.uniter.encoder.layer[0].attention.self
    states: list[torch.Tensor] = []
    layer.query.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        model(**{**inputs, "region_positions": report._drawn.inputs["region_positions"]})  # type: ignore[attr-defined]
        query, key = (linear(states[0])[3, :, 8:16] for linear in (layer.query, layer.key))
    weights = (query @ key.T / 8**0.5).softmax(-1)
    regions = [4 + one for (_, one) in [labels[3]["phrases"][0]]] + [4 + labels[3]["phrases"][1][1][0]]
    there = weights[[1, 2]][:, 4:].flatten().tolist()
    back = weights[regions][:, :4].flatten().tolist()
    expected = sorted((w for w in (*there, *back) if w >= 0.02), reverse=True)
    axis = report.plot_patterns((0, 1), random=0, sample=3).axes[0]
    arrows = drawn(axis)
    np.testing.assert_allclose([weight for _, weight in arrows], expected, atol=1e-5)
    assert max(back) > 0.4 and arrows[0][0] == "#1f66b0", "regions look at their word"
    frames = sum(patch.get_linewidth() == 2.0 for patch in axis.patches)
    assert frames == 2 and len([patch for patch in axis.patches if patch.get_linewidth() < 1]) == REGIONS - 2


def test_words_photos_and_pairs_of_regions(report: va.ProbeReport) -> None:
    class Words:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"w{one}" for one in ids]

    photo = np.zeros((8, 8, 3), dtype=np.uint8)
    axis = report.plot_patterns((0, 1), test="relation_detection", random=0, image=photo, processor=Words()).axes[0]
    ids = report._drawn.inputs["input_ids"][0].tolist()  # type: ignore[attr-defined]
    assert [text.get_text() for text in axis.texts if text.get_text()] == [f"w{one}" for one in ids] and len(axis.images) == 1
    assert len(drawn(axis)) <= 2 * (REGIONS - 1), "from each of two regions to the others"


@pytest.mark.slow
def test_patches_and_two_streams() -> None:
    labels = [{"phrases": [((1, 3), 2)], "word_relations": [((1, 2), (2, 3), "a"), ((2, 3), (3, 4), "b")]}, None]
    model, inputs = models.vilt()
    report = va.probe(model, [(inputs, labels)] * 6, tests=("coreference",))
    axis = report.plot_patterns(best=1, random=0).axes[0]
    corners = sorted({patch.get_xy() for patch in axis.patches})
    assert len(corners) == 16 and corners[1] == (0, 0.25)
    model, inputs = models.lxmert()
    report = va.probe(model, [(inputs, labels)] * 6, tests=("coreference", "word_relation"))
    assert len(report.plot_patterns(best=1, random=2).axes[0].patches) == models.BOXES
    assert not report.plot_patterns(test="word_relation", best=1, random=2).axes[0].patches
    model, inputs = models.visual_bert()
    report = va.probe(model, [(inputs, labels)] * 6, tests=("coreference",))
    with pytest.raises(ValueError, match="boxes must be given for a model whose inputs do not tell"):
        report.plot_patterns()
    assert report.plot_patterns(boxes=torch.rand(models.BOXES, 4), best=1, random=0).axes[0].patches
    with pytest.raises(ValueError, match=r"boxes must be x1, y1, x2, y2 from 0 to 1 of 7 image tokens; got \(2, 4\)"):
        report.plot_patterns(boxes=torch.rand(2, 4))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"test": "fusion"}, "test must be one of .* got 'fusion'"),
        ({"test": "relation"}, "test must have values for single heads; got 'relation' without: it was not among tests="),
        ({"head": (2, 0)}, r"head must be \(layer, head\) of 2 layers with 4 heads in 'coreference'; got \(2, 0\)"),
        ({"head": 3}, r"head must be \(layer, head\), a sequence of these, or None; got 3"),
        ({"head": [(1, "a")]}, r"head must be \(layer, head\), a sequence"),
        ({"best": 0, "random": 0}, "head, best and random must name at least one head"),
        ({"best": -1}, "best must be"),
        ({"sample": 40}, "sample must be"),
        ({"processor": 3}, "processor must have convert_ids_to_tokens"),
        ({"image": "none.png"}, "image must be a file; got none.png"),
    ],
)
def test_bad_arguments(report: va.ProbeReport, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        report.plot_patterns(**arguments)


def test_a_sample_without_labels_and_a_report_from_a_file(report: va.ProbeReport, tmp_path: Path) -> None:
    (inputs, labels), *_ = scenes(20)
    other = va.probe(planted(1), [(inputs, [None, *labels[1:]])], tests=("coreference",))
    with pytest.raises(ValueError, match="sample must have labels for 'coreference'; got none in sample 0 of the first item"):
        other.plot_patterns()
    loaded = va.ProbeReport.load(report.save(tmp_path / "report.json"))
    assert loaded.table == report.table
    with pytest.raises(ValueError, match="plot_patterns needs the model and its inputs, which no file holds"):
        loaded.plot_patterns()
