"""Options of vLLM's server, which limit what clients may ask for. They travel to the server's processes as variables of the
environment."""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

from vlattn_vllm.wrapping import wrap


class Limit(NamedTuple):
    option: str
    default: int  # of a server; an engine in Python has no limit of its own
    help: str


ASKS = Limit(
    "--vlattn-max-asks",
    32,
    "Requests that ask vlattn_vllm for attention, or edit it, and run at the same time in a process of the API server: further "
    "ones get the status 429. 0 refuses all of them.",
)
BYTES = Limit(
    "--vlattn-max-bytes",
    1 << 18,
    "Bytes of numbers for each token that a request may ask for, 4 for each layer, head and group or further statistic: requests "
    "for more get the status 400.",
)
EDITS = Limit("--vlattn-edits", 0, "Lets requests edit attention (steer). Without it they get the status 400.")
_serving = False


def serve() -> None:
    """From here on, this process is one of a server, which has limits by default."""
    global _serving
    _serving = True


def most(limit: Limit) -> int | None:
    """None: no limit."""
    value = os.environ.get(_variable(limit))
    return int(value) if value else limit.default if _serving else None


def _variable(limit: Limit) -> str:
    return limit.option.strip("-").replace("-", "_").upper()


def install() -> None:
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "add_cli_args", _with_options)


def _with_options(original: Any, parser: Any) -> Any:
    parser = original(parser)
    for limit in (ASKS, BYTES):
        parser.add_argument(limit.option, type=int, metavar="N", action=_Store, help=f"{limit.help} Default: {limit.default}.")
    parser.add_argument(EDITS.option, nargs=0, action=_Store, help=EDITS.help)
    return parser


class _Store(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        value = 1 if self.nargs == 0 else value
        if value < 0:
            parser.error(f"{self.option_strings[0]} must be at least 0; got {value}")
        os.environ[self.dest.upper()] = str(value)
        setattr(namespace, self.dest, value)
