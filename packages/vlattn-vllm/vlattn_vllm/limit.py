"""`--vlattn-max-asks`, an option of vLLM's server. It travels to the server's processes as a variable of the environment."""

from __future__ import annotations

import argparse
import os
from typing import Any

from vlattn_vllm.wrapping import wrap

OPTION, _VARIABLE = "--vlattn-max-asks", "VLATTN_MAX_ASKS"
_HELP = (
    "Requests that ask vlattn_vllm for attention, or edit it, and run at the same time in a process of the API server: further "
    "ones get the status 429. 0 refuses all of them. Default: no limit."
)


def most() -> int | None:
    """None: no limit."""
    value = os.environ.get(_VARIABLE)
    return int(value) if value else None


def install() -> None:
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "add_cli_args", _with_option)


def _with_option(original: Any, parser: Any) -> Any:
    parser = original(parser)
    parser.add_argument(OPTION, type=int, metavar="N", action=_Store, help=_HELP)
    return parser


class _Store(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if value < 0:
            parser.error(f"{OPTION} must be at least 0; got {value}")
        os.environ[_VARIABLE] = str(value)
        setattr(namespace, self.dest, value)
