"""The navigation of mkdocs.yml: pages by section."""

from __future__ import annotations

import re

ENTRY = re.compile(r"^( +)- (.+?):(?: ([\w/]+\.md))?$")


def sections_of(configuration: str) -> dict[str, list[str]]:
    """Returns the pages of each section at the top of the navigation, those of its groups included."""
    lines = configuration.partition("\nnav:\n")[2].splitlines()
    sections: dict[str, list[str]] = {}
    for line in lines:
        match = ENTRY.match(line)
        if match is None:
            raise ValueError(f"a line of the navigation must be '- Title: page.md' or '- Title:'; got {line!r}")
        if len(match[1]) == 2:
            sections[match[2]] = []
        if match[3]:
            [*sections.values()][-1].append(match[3])
    return sections


def pages_of(configuration: str) -> list[str]:
    """Returns all pages of the navigation, in its order."""
    return [page for pages in sections_of(configuration).values() for page in pages]
