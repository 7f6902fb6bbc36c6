"""Checks the built site: `python -m tools.pages.check site build/docs build/site.log`. `make docs` ends with it.

`zensical build --strict` reports links and names that lead nowhere. It passes over a plug-in that it does not know, an image that
does not exist, a page outside the navigation, and what griffe says about a docstring. So this counts what each page of Markdown
has, headings, tables, formulas and documented names, and looks for as many in the page of the site.

A number in a sentence goes stale when its row changes. So each decimal number that docs/ has in a sentence must stand in a table
or a block of code of its page, or of a page or section that it links to, perhaps with more digits, unless it is a version.
"""

from __future__ import annotations

import posixpath
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from tools.navigation import pages_of
from tools.pages.site import DOCS, HOME, README, REPORT, ROOT, home

EXPECTED = re.compile(r"Build started|Build finished in .+|No issues found|\s*")  # lines of a build without a warning
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
VOID = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")
BLOCKS = re.compile(r"^ *(```+).*?^ *\1 *$|^ *\|.*?$", re.M | re.S)  # code, and lines of tables
LINKS = re.compile(r"\]\(([\w./-]*?)(?:#([\w-]+))?\)")
PACKAGES = "CUDA|cuDNN|glibc|[Nn]um[Pp]y|nvcc|Python|torch|transformers|Triton"
ARXIV = r"\b\d{4}\.\d{5}\b"
VERSION = rf"\b(?:{PACKAGES})(?:'s)?(?: before| below)? [\d.]+(?: and [\d.]+)?"
NO_SENTENCE = re.compile(rf"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<!--.*?-->|{ARXIV}|{VERSION}", re.S)
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)")
COUNTED = ("headings", "tables", "formulas")


@dataclass
class Counts:
    """What a page has, in Markdown or in HTML."""

    headings: int = 0
    tables: int = 0
    formulas: int = 0
    names: set[str] = field(default_factory=set)  # documented by mkdocstrings


def with_stored(markdown: str) -> str:
    """A page with its tables of costs."""
    return str(runpy.run_path(str(ROOT / "docs" / "extension.py"))["with_stored"](markdown))


def counts_of(markdown: str) -> Counts:
    """Counts a page's source, with its tables of costs."""
    text = re.sub(r"^ *(```+).*?^ *\1 *$", "", with_stored(markdown), flags=re.M | re.S)
    names = {*re.findall(r"^::: (\S+)$", text, re.M)}
    headings = len(re.findall(r"^#{1,6} ", text, re.M))
    tables = len(re.findall(r"^ *\|(?: *:?-+:? *\|)+ *$", text, re.M))
    text = re.sub(r"(`+).+?\1", "", text, flags=re.S)
    text, blocks = re.subn(r"\$\$.+?\$\$", "", text, flags=re.S)
    return Counts(headings, tables, blocks + len(re.findall(r"(?<![\\$\w])\$(?![\s$])[^$\n]*[^$\s\\]\$", text)), names)


def unmeasured(name: str, written: str, filled: dict[str, str]) -> Iterator[str]:
    """The decimal numbers in the sentences of a page as `written` that no table and no code has, of all pages as `filled`."""
    blocks = [filled[name]]
    for path, anchor in LINKS.findall(written):
        page = filled.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name, "")
        blocks += [part for part in re.split(r"^(?=#+ )", page, flags=re.M) if not anchor or slug(part) == anchor]
    exact = {number for block in BLOCKS.finditer("\n".join(blocks)) for number in DECIMAL.findall(block[0])}
    known = exact | {f"{float(number):.{digits}f}" for number in exact for digits in (1, 2, 3)}
    for number in DECIMAL.findall(NO_SENTENCE.sub("", BLOCKS.sub("", written))):
        if number not in known:
            yield f"{name}: {number} must stand in a table or code of its page, or of one that it links to"


def slug(section: str) -> str:
    """The anchor of the heading with which a section begins, up to punctuation."""
    return re.sub(r"[^\w -]", "", section.partition("\n")[0].strip("# ").lower()).replace(" ", "-")


class Page(HTMLParser):
    """Reads a page of the site. Headings, tables and formulas count if they are of the page itself and not of a docstring."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.counts = Counts()
        self.ids: set[str] = set()
        self.links: list[str] = []  # also the addresses of images
        self.without_id = 0  # headings that no link can reach
        self.comments: list[str] = []
        self._open: list[tuple[str, str]] = []  # the elements around the current one, with their classes
        self.feed(html)

    def _inside(self, word: str) -> bool:
        """Whether an element around the current one has this name or this class."""
        return any(word in (name, *classes.split()) for name, classes in self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        self.links += [values[name] for name in ("href", "src") if name in values]
        if self._inside("article"):
            own = not self._inside("doc-object")
            self.without_id += tag in HEADINGS and "id" not in values
            self.counts.headings += own and tag in HEADINGS
            self.counts.tables += own and tag == "table"
            self.counts.formulas += own and tag == "math"
            if tag in HEADINGS and "doc-heading" in values.get("class", "").split():
                self.counts.names.add(values.get("id", ""))
        if tag not in VOID:
            self._open.append((tag, values.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_comment(self, data: str) -> None:
        self.comments.append(data.strip())


def problems(site: Path, docs: Path, navigation: list[str]) -> Iterator[str]:
    """What the site lacks that its Markdown in `docs` has."""
    sources = {str(path.relative_to(docs)): path.read_text(encoding="utf-8") for path in sorted(docs.rglob("*.md"))}
    yield from (f"{page}: the navigation has it twice" for page in sorted({x for x in navigation if navigation.count(x) > 1}))
    yield from (f"{page}: the navigation does not have it" for page in sorted(sources.keys() - {*navigation}))
    yield from (f"{page}: the navigation has it, and docs does not" for page in sorted({*navigation} - sources.keys()))
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for name, markdown in sources.items():
        place = site / name.removesuffix(".md").removesuffix("index") / "index.html"
        page = pages.get(place.resolve())
        if page is None:
            yield f"{name}: the site does not have it"
            continue
        wanted = counts_of(markdown)
        for what in COUNTED:
            if getattr(wanted, what) != getattr(page.counts, what):
                yield f"{name}: {what} must be {getattr(wanted, what)}; got {getattr(page.counts, what)}"
        yield from (f"{name}: {missing} is not documented" for missing in sorted(wanted.names - page.counts.names))
        if page.without_id:
            yield f"{name}: headings without an id must be 0; got {page.without_id}"
        yield from (
            f"{name}: nothing replaced <!-- {text} -->" for text in page.comments if text.startswith(("table", "cost", "fuzz"))
        )
    for path, page in pages.items():
        if path != (site / "404.html").resolve():  # its links begin at the root
            yield from broken(path, page, pages)
    if sources and f'"{max(sources).removesuffix(".md")}/' not in index_of(site):
        yield f"the search index does not have {max(sources)}"


def broken(path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    """The links and images of a page that lead nowhere."""
    for link in sorted({*page.links}):
        if re.match(r"\w+:|//", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file.partition("?")[0]).resolve() if file else path
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"{path.parent.name}: {link} does not exist"
        elif anchor and target in pages and anchor not in pages[target].ids:
            yield f"{path.parent.name}: {link} has no such anchor"


def index_of(site: Path) -> str:
    """The text of the index that the search field reads."""
    index = site / "search.json"
    return index.read_text(encoding="utf-8") if index.exists() else ""


def warnings(log: str) -> list[str]:
    """The lines of a build's output that a build without a warning does not have."""
    return [line for line in log.splitlines() if not EXPECTED.fullmatch(line)]


def main(site: str, docs: str, log: str) -> None:
    found = warnings(Path(log).read_text(encoding="utf-8"))
    paths = {str(path.relative_to(docs)): path for path in sorted(Path(docs).rglob("*.md"))}
    del paths[REPORT]  # among its thousands of numbers is almost any
    filled = {name: with_stored(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    for name in paths:
        text = (DOCS / name if name != HOME else ROOT / README).read_text(encoding="utf-8")
        found += unmeasured(name, home(text) if name == HOME else text, filled)
    found += problems(Path(site), Path(docs), pages_of((ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    sys.exit("\n".join([*found, f"the site has {len(found)} problems"]) if found else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
