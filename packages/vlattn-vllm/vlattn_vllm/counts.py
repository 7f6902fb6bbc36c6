"""What asks cost a server, in its /metrics."""

from __future__ import annotations

from typing import Any

# why asks are refused, as the label of a counter
REASONS = {
    "ask": "the ask itself is wrong, or the request is of a kind that has no numbers",
    "bytes": "it asks for more than --vlattn-max-bytes",
    "busy": "--vlattn-max-asks requests run already, or it is 0",
    "edits": "it edits, without --vlattn-edits",
    "endpoint": "the endpoint has no place for numbers",
    "engine": "the engine's configuration, or a feature of the model",
    "worker": "only the running engine could tell: a layer, or a fault",
}
_SECONDS = tuple(a * 10**b for b in (-3, -2, -1, 0, 1) for a in (1, 2.5, 5))
_metrics: dict[str, Any] = {}


def count(name: str, by: float = 1, **labels: str) -> None:
    """Adds to a counter, or to the histogram of seconds, which the workers took for an answer that has ended."""
    if _metrics:
        metric = _metrics[name].labels(**labels) if labels else _metrics[name]
        (metric.observe if name == "seconds" else metric.inc)(by)


def install() -> None:
    """In the server."""
    from prometheus_client import Counter, Histogram

    if _metrics:
        return
    refusals = Counter("vlattn:refused", "Requests that ask for attention or edit it and were refused, by reason.", ["reason"])
    for reason in REASONS:
        refusals.labels(reason=reason)  # 0 until then
    _metrics.update(
        refused=refusals,
        asks=Counter("vlattn:asks", "Requests that ask for attention or edit it."),
        seconds=Histogram("vlattn:seconds", "Seconds of the workers for the numbers and edits of a request.", buckets=_SECONDS),
        bytes=Counter("vlattn:bytes", "Bytes of the numbers in the answers."),
    )
