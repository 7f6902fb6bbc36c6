"""The page of the command line has each command, each option, and each default that `--help` shows."""

import re

import pytest

pytest.importorskip("typer")
import typer.main

from tools.pages.commands import commands
from vlattn_fast import cli


def test_each_option_has_its_line() -> None:
    sections = dict(re.findall(r"^## vlattn (\w+)\n(.*?)(?=^## |\Z)", commands(), re.M | re.S))
    known = typer.main.get_command(cli.app).commands
    assert [*sections] == [*known]
    for name, command in known.items():
        rows = re.findall(r"^\| `([\w-]+).*` \| (.+) \|$", sections[name], re.M)
        assert [option.lower() for option, _ in rows] == [parameter.opts[0] for parameter in command.params], name
        for (_, text), parameter in zip(rows, command.params, strict=True):
            assert text.startswith("**Required.** ") == parameter.required
            assert parameter.default in (None, False, True) or str(parameter.default) in text


def test_how_options_are_typed() -> None:
    page = commands()
    for usage in (
        "--model TEXT",
        "--text TEXT ...",
        "--out PATH",
        "--batch-size N",
        "--quick",
        "OPERATOR ...",
        "--costs/--no-costs",
    ):
        assert f"\n| `{usage}` | " in page, usage
    assert " Default: 0. |" in page and " Default: `--costs`. |" in page  # from the help, and of an option whose help has none
    assert "&lt;device>.json" in page and "<device>" not in page
