"""The vlattn command as tests run it, in their own process."""

import re
from typing import Any

from typer.testing import CliRunner

from vlattn_fast import cli


def vlattn(*arguments: Any) -> Any:
    # wide, so that no message is broken into lines
    return CliRunner().invoke(cli.app, [str(x) for x in arguments], env={"COLUMNS": "400", "TERM": "dumb"})


def said(result: Any) -> str:
    """What the command printed, without the frames around errors."""
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", "", result.output))
