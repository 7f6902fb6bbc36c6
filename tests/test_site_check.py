"""`make docs` fails if a page of the site lacks what its Markdown has: each fault that Zensical passes over is reported."""

from pathlib import Path

import pytest

from tools.pages import check

MARKDOWN = """# Home

The value $x$ of `$no$`, an ![image](a.png) and a [link](other.md#part).

$$
y = x
$$

| a | b |
| --- | ---: |
| 1 | 2 |

```
# no heading $x$
| --- |
```

::: vlattn_fast.explain
"""
HTML = """<html><body><a href="#home">skip</a><article>
<h1 id="home">Home</h1><p>The value <span class="arithmatex"><math>x</math></span>, an <img src="a.png" /> and a
<a href="other/#part">link</a>, <a href="https://example.org/#x">elsewhere</a>.</p>
<div class="arithmatex"><math display="block">y</math></div>
<table><tr><td>1</td></tr></table>
<div class="doc doc-object"><h3 id="vlattn_fast.explain" class="doc doc-heading">explain</h3><table></table><math></math></div>
</article></body></html>"""
OTHER = '<article><h1 id="other">Other</h1><br><h2 id="part">Part</h2></article>'
NAVIGATION = ["index.md", "other.md"]


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, Path]:
    """A site of two pages, and its Markdown."""
    site, docs = tmp_path / "site", tmp_path / "docs"
    for path, text in {
        site / "index.html": HTML,
        site / "other" / "index.html": OTHER,
        site / "404.html": '<a href="/nowhere/">home</a>',
        site / "search.json": '{"location": "other/"}',
        site / "a.png": "",
        docs / "index.md": MARKDOWN,
        docs / "other.md": "# Other\n\n## Part\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return site, docs


def test_a_whole_site_has_no_problem(built: tuple[Path, Path]) -> None:
    assert list(check.problems(*built, NAVIGATION)) == []


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("<math>x</math>", "x", "index.md: formulas must be 2; got 1"),
        ("<table><tr><td>1</td></tr></table>", "| 1 |", "index.md: tables must be 1; got 0"),
        ('<h1 id="home">Home</h1>', '<p id="home"></p>', "index.md: headings must be 1; got 0"),
        ('<h1 id="home">', '<a id="home"></a><h1>', "index.md: headings without an id must be 0; got 1"),
        ("vlattn_fast.explain", "vlattn_fast.evaluate", "index.md: vlattn_fast.explain is not documented"),
        ("<p>The", "<!-- table: measured --><p>The", "index.md: nothing replaced <!-- table: measured -->"),
        ("a.png", "b.png", "site: b.png does not exist"),
        ("other/#part", "others/#part", "site: others/#part does not exist"),
        ("other/#part", "other/#parts", "site: other/#parts has no such anchor"),
    ],
)
def test_each_fault_is_reported(built: tuple[Path, Path], old: str, new: str, problem: str) -> None:
    site, docs = built
    assert old in HTML
    (site / "index.html").write_text(HTML.replace(old, new))
    assert list(check.problems(site, docs, NAVIGATION)) == [problem]


def test_pages_are_those_of_the_navigation(built: tuple[Path, Path]) -> None:
    site, docs = built
    (docs / "new.md").write_text("# New\n")
    assert list(check.problems(site, docs, [*NAVIGATION, "old.md", "old.md"])) == [
        "old.md: the navigation has it twice",
        "new.md: the navigation does not have it",
        "old.md: the navigation has it, and docs does not",
        "new.md: the site does not have it",
    ]


@pytest.mark.parametrize(
    "sentence, missing",
    [
        ("Half of it, 0.91.", []),  # of the page's own table, rounded
        ("Half of it, 0.92.", ["0.92"]),
        ("Half of it, 0.25, says [a page](../costs.md).", []),
        ("Half of it, 0.25, says [a section](../costs.md#of-an-h100).", ["0.25"]),
        ("Half of it, 0.75, says [a section](../costs.md#of-an-h100).", []),
        ("[One](../costs.md#of-an-h100) and 0.914.\n\n```\n0.9136\n```\n", []),
        ("With transformers before 5.18 (arXiv 2602.08241), `x==0.3` and $0.4 y$ too.", []),
        ("With others before 5.18.", ["5.18"]),
    ],
)
def test_a_decimal_of_a_sentence_stands_in_a_table(sentence: str, missing: list[str]) -> None:
    page = f"# One\n\n{sentence}\n\n| a |\n| --- |\n| 0.912 |\n"
    costs = "# Costs\n\n| b |\n| --- |\n| 0.25 |\n\n## Of an H100\n\nThis is 0.5.\n\n| c |\n| --- |\n| 0.75 |\n"
    problems = [*check.unmeasured("guides/one.md", page, {"guides/one.md": page, "costs.md": costs})]
    assert problems == [
        f"guides/one.md: {number} must stand in a table or code of its page, or of one that it links to" for number in missing
    ]


def test_the_search_index_is_there(built: tuple[Path, Path]) -> None:
    (built[0] / "search.json").unlink()
    assert list(check.problems(*built, NAVIGATION)) == ["the search index does not have other.md"]


def test_a_warning_of_the_build_is_reported() -> None:
    quiet = "Build started\nNo issues found\nBuild finished in 24.82s\n"
    warning = "griffe: vlattn_fast/ops/maxsim.py:42: No type or annotation for parameter 'nothing'"
    assert check.warnings(quiet) == [] and check.warnings(f"{warning}\n{quiet}") == [warning]
