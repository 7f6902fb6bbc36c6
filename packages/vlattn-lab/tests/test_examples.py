"""The scripts of examples/ and the notebook run, and what they print is true."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn_lab as lab

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = {
    "explain_clip", "match_images_and_captions", "score_swapped_pairs", "replace_attention", "intervene", "probe_heads",
    "prompt_maps",
}  # fmt: skip


@pytest.fixture
def run(capsys):
    def run(name: str) -> tuple[dict[str, Any], str]:
        """The variables that the script leaves and what it prints."""
        variables = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return variables, capsys.readouterr().out

    return run


def test_every_example_has_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_the_folders_page_names_each_example():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\[(\w+\.(?:py|ipynb))\]", "".join(re.findall(r"^\| (.+) \| .+ \|$", page, re.M)))
    assert sorted(named) == sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


def test_explain_clip(run):
    got, printed = run("explain_clip")
    logits = got["model"](**got["inputs"]).logits_per_image[0]
    torch.testing.assert_close(got["clip"].scores, logits.detach())
    assert (got["clip"].image > 0).any() and not torch.equal(got["clip"].image[0], got["clip"].image[1])
    row, column = map(int, re.search(r"row (\d), column (\d)", printed).groups())
    assert got["clip"].image[0, row, column] == got["clip"].image[0].max()
    assert got["pointing"] > 0.85 and f"{got['pointing']:.0%} of 100 scenes" in printed


def test_replace_attention(run):
    got, printed = run("replace_attention")
    assert got["before"] > 0.6 and got["trained"] > 0.7 and tuple(got["explanation"].image.shape) == (1, 4, 4)
    assert list(got["replaced"].scores) == ["vit.layers.1.attention"] and f"{got['trained']:.1%} after" in printed
    assert not any("attention_score" in name for name in got["model"].state_dict())


def test_match_images_and_captions(run):
    got, printed = run("match_images_and_captions")
    assert min(got["results"].values()) > 0.5, got["results"]
    assert f"{got['results']['SCAN']:.0%} of 50" in printed


def test_intervene(run):
    got, printed = run("intervene")
    shares = got["shares"]
    assert shares["as it is"] > 0.9 and shares["without the picture"] < 0.5
    assert f"without the picture  {shares['without the picture']:.0%} of 24 answers are right" in printed
    assert got["flow"].layers == (2, 3, 4) and float(got["flow"].curve[0]) > 0.1
    assert max(edge.effect for edge in got["true"]) > 1, "a cut that the first order did not foresee"


def test_probe_heads(run):
    got, printed = run("probe_heads")
    assert got["best"]["trained"]["value"] > 0.9 and got["best"]["untrained"]["value"] < 0.8
    assert f"best alone {got['best']['trained']['value']:.0%}" in printed


def test_score_swapped_pairs(run):
    """The scores are those of whole batches."""
    got, printed = run("score_swapped_pairs")
    assert got["results"]["UNITER"] == lab.winoground_scores(got["uniter"], count=100, seed=1)
    assert min(got["results"]["UNITER"].values()) > 0.8 and min(got["results"]["CLIP"].values()) > 0.6, got["results"]
    assert f"group {got['results']['CLIP']['group']:4.0%}" in printed


def test_prompt_maps(run):
    """The maps of all layers and steps have been seen, and words have those of their columns."""
    got, printed = run("prompt_maps")
    maps, explanation = got["maps"], got["explanation"]
    assert maps.steps == 4 and maps.grids == [(16, 24), (8, 12)] and maps.token_maps().shape == (2, 16, 16, 24)
    torch.testing.assert_close(maps.token_maps().sum(1), torch.ones(2, 16, 24))  # each place attends to the text alone
    torch.testing.assert_close(got["cat"], torch.stack([explanation.image[0, 1], explanation.image[1, 4]]))
    assert not torch.equal(*got["cat"])
    row, column = map(int, re.search(r"cat on.*row (\d+), column (\d+)", printed).groups())
    assert got["cat"][0, row, column] == got["cat"][0].max()


def notebook() -> dict[str, Any]:
    return json.loads((EXAMPLES / "explain_clip.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_is_a_notebook():
    book = notebook()
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and isinstance(book["metadata"], dict)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["metadata"], dict)
        assert ("outputs" in cell and "execution_count" in cell) == (cell["cell_type"] == "code")


def test_the_notebook_runs(capsys):
    """Its code cells run in order, and what they print is what the notebook stores, up to the digits."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook()["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"explain_clip.ipynb, cell {cell['id']}", "exec"), variables)
            stored = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
            assert words(capsys.readouterr().out) == words(stored)
    assert variables["pointing"] > 0.85


def words(text: str) -> str:
    return re.sub(r"[\d.]+", "#", text)
