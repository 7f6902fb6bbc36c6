"""The folder of which the site is made: tables of the stored rows, the report, and links that lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("triton", reason="the tiles that a launch takes now are read off the kernels")
from tools.pages import site


def stand_in(*arguments: str) -> str:
    return "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With stand-ins for the tables of vlattn_lab, whose tests make them."""
    made = tmp_path_factory.mktemp("site") / "docs"
    (made / "old").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in site.TABLES.items():
            if function.startswith("vlattn_lab."):
                patch.setitem(site.TABLES, name, f"{__name__}.stand_in")
        site.build(made)
        yield made


@pytest.mark.slow
def test_every_page_is_there_and_nothing_else(folder: Path) -> None:
    pages = {
        path.relative_to(site.DOCS) for path in site.DOCS.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    made = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.parent.name != "report"}
    assert made == {*pages, Path(site.REPORT)} and not (folder / "old").exists()


def test_every_table_stands_on_one_page(folder: Path) -> None:
    named = [name for path in site.DOCS.rglob("*.md") for name in site.MARK.findall(path.read_text(encoding="utf-8"))]
    assert len({*named}) == len(named) and {line.partition(": ")[0] for line in named} == {*site.TABLES}
    assert not any(site.MARK.search(path.read_text(encoding="utf-8")) for path in folder.rglob("*.md"))
    for line in named:
        assert len(re.findall(r"^\|.+\|$", site.table(line), re.M)) > 3, line


def test_links_lead_somewhere(folder: Path) -> None:
    for path in folder.rglob("*.md"):
        prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", prose):
            assert (path.parent / target).exists(), (path.name, target)


def test_a_line_that_names_no_table() -> None:
    with pytest.raises(ValueError, match="must name one of measured kernels, .*; got 'gone'"):
        site.filled("# A page\n\n<!-- table: gone -->\n")
