"""The commands of docs/command_line.md: what `vlattn COMMAND --help` says, with each option's value and default."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

VALUES = {int: "N", float: "X", Path: "PATH", str: "TEXT"}  # a flag takes none
IN_CODE = re.compile(r"(`[^`]*`)|(--[a-z][\w-]*)")


def commands() -> str:
    """Returns a section a command, in the order of `vlattn --help`."""
    import typer.main

    from vlattn_fast import cli

    group: Any = typer.main.get_command(cli.app)
    return "\n\n".join("\n".join(_section(name, command)) for name, command in group.commands.items())


def _section(name: str, command: Any) -> Iterator[str]:
    kinds = get_type_hints(inspect.unwrap(command.callback))
    yield f"## vlattn {name}\n"
    yield f"{_prose(command.help)}\n"
    yield "| argument or option | what it is |"
    yield "| --- | --- |"
    for parameter in command.params:
        yield f"| `{_usage(parameter, kinds[parameter.name])}` | {_described(parameter)} |"


def _usage(parameter: Any, kind: Any) -> str:
    """Returns how it is typed, such as `--text TEXT ...`; dots if it may be repeated."""
    kinds = [kind, *get_args(kind), *(inner for each in get_args(kind) for inner in get_args(each))]
    repeated = ["..."] if list in map(get_origin, kinds) else []
    if not parameter.opts[0].startswith("-"):
        return " ".join([parameter.name.upper(), *repeated])
    value = [word for taken, word in VALUES.items() if taken in kinds]
    return " ".join(["/".join([*parameter.opts, *parameter.secondary_opts]), *value, *repeated])


def _described(parameter: Any) -> str:
    """Returns its help; whether it must be given, or its default if the help names none."""
    text, default = _prose(parameter.help or ""), parameter.default
    if parameter.required:
        return f"**Required.** {text}"
    if default is None or default is False or "efault" in text:
        return text
    return f"{text} Default: `{parameter.opts[0] if default is True else default}`."


def _prose(text: str) -> str:
    """Returns help as Markdown: options in code, no tag of HTML, and no bar that would end a cell."""
    in_code = IN_CODE.sub(lambda match: match[1] or f"`{match[2]}`", text.replace("|", "\\|"))
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", in_code)
