"""What asks cost a server: counters of its /metrics, and a line in its log."""

from __future__ import annotations

from typing import Any

from vlattn_vllm.wrapping import harmless, wrap

HELP = {
    "asks": "requests that ask for attention or edit it",
    "refused": "such requests that were refused",
    "seconds": "seconds of the workers for their numbers and edits",
    "bytes": "bytes of the numbers in the answers",
}
totals = dict.fromkeys(HELP, 0.0)
_counters: dict[str, Any] = {}
_logged = dict(totals)


def add(name: str, amount: float = 1) -> None:
    totals[name] += amount
    if name in _counters:
        _counters[name].inc(amount)


def install() -> None:
    """In the server: the counters vlattn:asks_total and so on, and a line with each of vLLM's own in which they changed."""
    from prometheus_client import Counter
    from vllm.v1.metrics.loggers import LoggingStatLogger

    for name, meaning in HELP.items():
        if name not in _counters:
            _counters[name] = Counter(f"vlattn:{name}", f"vlattn_vllm: {meaning}.")
    wrap(LoggingStatLogger, "log", harmless(_log))


def _log(original: Any, logger: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.logger import init_logger

    out = original(logger, *args, **kwargs)
    if totals != _logged:
        _logged.update(totals)
        init_logger("vllm.vlattn").info(
            "vlattn since the start: %d asks, %d refused, %.2f s of the workers, %d bytes of numbers", *totals.values()
        )
    return out
