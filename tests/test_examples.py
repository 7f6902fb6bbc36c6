"""The scripts of examples/ run, and what they print is true; what is public has an example."""

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vlattn_fast as va
from vlattn_fast.attach.training import TrainingContext

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = {
    "relevancy_in_your_transformer", "relevancy_behind_sdpa", "swap_score_function", "train_with_cacr",
    "decoder_statistics", "train_on_relevancy",
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
    named = re.findall(r"\[(\w+\.py)\]", "".join(re.findall(r"^\| (.+) \| .+ \|$", page, re.M)))
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_relevancy_in_your_transformer(run):
    got, printed = run("relevancy_in_your_transformer")
    assert got["accuracy"] > 0.95 and got["pointing"] > 0.9
    assert f"in {got['pointing']:.0%} of 200" in printed


def test_relevancy_behind_sdpa(run):
    """r is the row of (I + Abar_L) ... (I + Abar_1) with the whole maps of the formula."""
    got, printed = run("relevancy_behind_sdpa")
    product = torch.eye(50)
    with torch.no_grad():
        for (query, key, value, _), gradient in zip(got["calls"], got["gradients"], strict=True):
            abar = va.reference.attention_map(query, key, value, gradient, rule="gradient")
            product = product + abar @ product
    torch.testing.assert_close(got["relevancy"][:, 0], product[:, 0])
    assert f"token {int(product[0, 0, 1:].argmax()) + 1:2}:" in printed.splitlines()[2]


@pytest.mark.slow
def test_swap_score_function(run):
    pytest.importorskip("sklearn")
    got, printed = run("swap_score_function")
    assert set(got["accuracy"]) == set(got["SCORES"])
    assert min(got["accuracy"].values()) > 0.85, got["accuracy"]
    torch.manual_seed(0)
    start = got["Classifier"](got["SCORES"][-1]).attention.score.vector
    assert not torch.equal(got["model"].attention.score.vector, start), "the score's parameters are not trained"
    assert f"{got['accuracy']['additive']:.1%}" in printed


@pytest.mark.slow
def test_train_with_cacr(run):
    got, printed = run("train_with_cacr")
    (plain_accuracy, plain), (accuracy, cacr) = got["results"]["without CACR"], got["results"]["with CACR"]
    assert plain_accuracy > 0.95 and accuracy > 0.95
    assert cacr < plain / 5
    assert f"{cacr:.1e} nats" in printed


@pytest.mark.slow
def test_train_on_relevancy(run):
    got, printed = run("train_on_relevancy")
    assert got["guided"] > got["plain"] + 0.15 and got["guided_inside"] > got["plain_inside"] + 0.2
    assert f"{got['guided']:.0%} right" in printed


def test_decoder_statistics(run):
    """The shares are those of the maps that eager attention returns."""
    pytest.importorskip("transformers")
    got, printed = run("decoder_statistics")
    model = got["model"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(inputs_embeds=got["embeddings"], use_cache=False, output_attentions=True).attentions
    assert len(maps) == len(got["statistics"]) == 3
    for attention, statistics in zip(maps, got["statistics"], strict=True):
        torch.testing.assert_close(statistics.mass[..., 0], attention[..., :16].sum(-1))
        torch.testing.assert_close(statistics.received, attention.sum(2))
    assert f"{maps[1][0, 3, -1, :16].sum():.2f}" in printed.splitlines()[2]


PUBLIC: dict[str, Any] = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (va, va.models, va.nn, va.scores, va.train)
    for name in package.__all__
}
OPERATORS = {name for name, x in PUBLIC.items() if inspect.isfunction(x) and x.__module__.startswith("vlattn_fast.ops.")}
CLASSES = {name for name, x in PUBLIC.items() if inspect.isclass(x) and issubclass(x, (nn.Module, TrainingContext))}
SCORES = {f"vlattn_fast.scores.{score.__name__}" for score in va.scores.SCORES.values()}


@pytest.mark.parametrize("name", sorted(OPERATORS | CLASSES | SCORES))
def test_has_an_example(name: str) -> None:
    """In its docstring; `--doctest-modules` runs it."""
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or "")
