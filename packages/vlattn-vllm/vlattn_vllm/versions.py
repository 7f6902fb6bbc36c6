"""The versions of vLLM that the plug-in answers under. Its internal names change with each release; the tests run with these."""

from __future__ import annotations

from vlattn_vllm.ask import KEY

SUPPORTED = ("0.31.0", "0.32.0", "0.33.0")
# where requests come in, in these and other versions
ENTRANCES = {"vllm.v1.engine.input_processor": "InputProcessor", "vllm.v1.engine.processor": "Processor"}


def refused_version(version: str) -> str:
    """Why this version is not served; empty for a supported one."""
    if version.split("+")[0] in SUPPORTED:
        return ""
    return (
        f"vlattn_vllm needs vLLM {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]} and found {version}: requests with {KEY!r} are "
        f"refused. Install one of these, or set VLLM_PLUGINS to the plug-ins without vlattn_vllm"
    )
