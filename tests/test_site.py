"""The folder of which the site is made: tables of the stored rows, the report, and links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("triton", reason="the tiles that a launch takes now are read off the kernels")
from tools.pages import site

DRAW = site.draw  # which has a stand-in below


def stand_in(*arguments: str) -> str:
    return "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n"


def shown(page: Path) -> set[str]:
    """The figures that a page shows of its own folder."""
    return set(re.findall(rf"\]\(({page.stem}/[\w.-]+)\)", page.read_text(encoding="utf-8")))


def blank(page: Path) -> None:
    """Empty files in place of a page's figures, which the tests of vlattn_lab draw."""
    for name in shown(page):
        (page.parent / name).parent.mkdir(exist_ok=True)
        (page.parent / name).touch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With stand-ins for the tables of vlattn_lab, whose tests make them."""
    made = tmp_path_factory.mktemp("site") / "docs"
    (made / "old").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in site.TABLES.items():
            if function.startswith("vlattn_lab."):
                patch.setitem(site.TABLES, name, f"{__name__}.stand_in")
        patch.setattr(site, "draw", blank)
        site.build(made)
        yield made


@pytest.mark.slow
def test_every_page_is_there_and_nothing_else(folder: Path) -> None:
    pages = {
        path.relative_to(site.DOCS) for path in site.DOCS.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    made = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.parent.name != "report"}
    drawn = {Path(name) for page in site.DRAWN for name in shown(site.DOCS / page)}
    assert made == {*pages, *drawn, Path(site.REPORT), Path(site.HOME)} and not (folder / "old").exists()


NAMED = [name for path in site.DOCS.rglob("*.md") for name in site.MARK.findall(path.read_text(encoding="utf-8"))]


def test_every_table_stands_on_one_page() -> None:
    assert len({*NAMED}) == len(NAMED) and {line.partition(": ")[0] for line in NAMED} == {*site.TABLES}


@pytest.mark.slow
def test_tables_are_filled(folder: Path) -> None:
    assert not any(site.MARK.search(path.read_text(encoding="utf-8")) for path in folder.rglob("*.md"))
    for line in NAMED:
        assert len(re.findall(r"^\|.+\|$", site.table(line), re.M)) > 3, line


@pytest.mark.slow  # tests/test_docs.py has the links of the pages as they are written
def test_links_lead_somewhere(folder: Path) -> None:
    for path in folder.rglob("*.md"):
        prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", prose):
            assert (path.parent / target).exists(), (path.name, target)


def test_a_line_that_names_no_table() -> None:
    with pytest.raises(ValueError, match="must name one of measured kernels, .*; got 'gone'"):
        site.filled("# A page\n\n<!-- table: gone -->\n")


def test_figures_are_drawn_by_the_code_of_their_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nsize = 3\n```\n\n```python\nopen('figure.png', 'wb').write(b'.' * size)\n```\n")
    DRAW(page)
    assert (tmp_path / "page" / "figure.png").read_bytes() == b"..."
    page = tmp_path / "broken.md"
    page.write_text("```python\nraise ValueError\n```\n")
    with pytest.raises(subprocess.CalledProcessError):
        DRAW(page)
