"""The entry point of the group vllm.general_plugins, which vLLM calls in each of its processes."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

from vlattn_vllm import counts, engine, front, guard, limit, server, worker
from vlattn_vllm.ask import KEY
from vlattn_vllm.wrapping import wrap

# vLLM's internal names change with each release; the tests run with these
SUPPORTED = ("0.31.0", "0.32.0", "0.33.0")
# where requests come in, in these and other versions
ENTRANCES = {"vllm.v1.engine.input_processor": "InputProcessor", "vllm.v1.engine.processor": "Processor"}


def register() -> None:
    """Wraps the methods of vLLM by which requests come in, batches run and outputs leave.

    Another version of vLLM runs as it is, and refuses the requests that ask.
    """
    import vllm

    if refused := refused_version(vllm.__version__):
        warnings.warn(refused, stacklevel=2)
        _refuse(refused)
        return
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.worker.worker_base import WorkerBase

    if "vllm.engine.arg_utils" in sys.modules:  # which calls this before it adds the server's options
        limit.install()
    guard.install()
    front.install()
    engine.install()
    wrap(AsyncLLM, "__init__", _begin_front_end)
    wrap(WorkerBase, "__init__", _begin_worker)  # front ends do not import what runs a model


def refused_version(version: str) -> str:
    """Why this version is not served; empty for a supported one."""
    if version.split("+")[0] in SUPPORTED:
        return ""
    return (
        f"vlattn_vllm needs vLLM {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]} and found {version}: requests with {KEY!r} are "
        f"refused. Install one of these, or set VLLM_PLUGINS to the plug-ins without vlattn_vllm"
    )


def _refuse(reason: str) -> None:
    """In Python, and in the server.

    Raises:
        ImportError: this version has none of the ENTRANCES, so requests that ask would be answered without numbers.
    """

    def process_inputs(original: Any, *args: Any, **kwargs: Any) -> Any:
        if any(front.asks(value) for value in (*args, *kwargs.values())):
            raise ValueError(reason)
        return original(*args, **kwargs)

    owners = [owner for module, name in ENTRANCES.items() if (owner := _class(module, name)) is not None]
    if not owners:
        raise ImportError(f"{reason}. No place to refuse them was found in this version")
    for owner in owners:
        wrap(owner, "process_inputs", process_inputs)
    guard.install(reason)


def _class(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _begin_front_end(original: Any, *args: Any, **kwargs: Any) -> None:
    if any(name.startswith("vllm.entrypoints.openai") for name in sys.modules):
        server.install()
        counts.install()
    original(*args, **kwargs)


def _begin_worker(original: Any, begun: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    from vllm.platforms import current_platform

    front.warn(vllm_config)
    if current_platform.device_type in worker.LAYERS:  # elsewhere requests that ask are refused
        worker.install(current_platform.device_type, vllm_config.use_v2_model_runner)
    original(begun, vllm_config, *args, **kwargs)
