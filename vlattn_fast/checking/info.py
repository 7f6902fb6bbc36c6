"""`vlattn info`: versions, devices, and tables of which backend supports which operator, with each reason once."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import platform
import textwrap
from collections.abc import Iterator, Mapping

import torch

from vlattn_fast.dispatch.call import CallShape, capability
from vlattn_fast.dispatch.choice import select
from vlattn_fast.dispatch.table import BACKEND_NAMES, refusals

PACKAGES = ("torch", "torchvision", "numpy", "triton", "transformers", "matplotlib", "scikit-learn")
DTYPES = ("float32", "bfloat16", "float16", "float64")
WIDTH = 118

Calls = Mapping[tuple[str, str], CallShape]  # by dtype and by the name of the case


def lines() -> Iterator[str]:
    """Yields the whole page, line by line: packages and devices, then the tables and their notes."""
    from vlattn_fast.backends import native
    from vlattn_fast.backends.cuda import _shared_library

    missing = []
    for name in ("vlattn_fast", *PACKAGES):
        try:
            yield f"{name:14}{importlib.metadata.version(name)}{_fault(name) if name == 'torchvision' else ''}"
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield f"{'python':14}{platform.python_version()} on {platform.system()} {platform.machine()}"
    if missing:
        yield f"{'not installed':14}{', '.join(missing)}"
    yield f"{'cpu':14}{torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield f"{f'cuda:{i}':14}{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield f"{'cuda':14}{'no device' if torch.version.cuda else 'this torch is built without it'}"
    yield f"{'CPU C++':14}{native.state()}"
    yield f"{'CUDA C++':14}{_shared_library.state()}"
    notes: dict[str, dict[str, None]] = {}
    for device_type, title in (("cpu", "On a CPU"), ("cuda", "On a CUDA device")):
        yield ""
        yield from _table(title, device_type, notes)
    yield ""
    for number, (reason, calls) in enumerate(notes.items(), 1):
        concerned = f" ({'; '.join(calls)})" if calls else ""
        yield from textwrap.wrap(f"{f'[{number}]':5}{reason}{concerned}", WIDTH, subsequent_indent=" " * 5)


def _fault(package: str) -> str:
    """What is wrong with a package that is installed: it has operators that only the torch of its own build runs."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return f", built for another torch: {error}. Install the one of torch {torch.__version__}, or none"
    return ""


def _table(title: str, device_type: str, notes: dict[str, dict[str, None]]) -> Iterator[str]:
    """Yields one line per operator, one column per backend and one for "auto"; adds the reasons to `notes`."""
    from vlattn_fast.checking.verify import cases
    from vlattn_fast.ops import OPERATORS

    here = capability(torch.device(device_type)) if device_type == "cuda" else None
    lines = [[title, *(name for name in BACKEND_NAMES if name != "auto"), "auto"]]
    for name, operator in OPERATORS.items():
        calls = {
            (dtype, case.name): operator.describe(**case.arguments(case.in_dtype(torch.float32)))._replace(
                dtype=getattr(torch, dtype), device_type=device_type, capability=here
            )
            for case in cases(operators=[name])
            for dtype in DTYPES
        }
        table = operator.backends
        cells = [
            _cell(name, calls, {key: refusals(table, backend, call) for key, call in calls.items()}, notes)
            for backend in lines[0][1:-1]
        ]
        chosen: dict[str, None] = {}
        for call in calls.values():
            try:
                chosen[select(table, call, "auto")] = None
            except ValueError:  # a variable names a library that does not exist, which the line of the library says
                chosen["error"] = None
        lines.append([name, *cells, "/".join(chosen)])
    widths = [max(len(row[column]) for row in lines) + 2 for column in range(len(lines[0]))]
    for row in lines:
        yield "".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _cell(operator: str, calls: Calls, refusals: Mapping[tuple[str, str], list[str]], notes: dict[str, dict[str, None]]) -> str:
    """Returns "yes", or which calls are not supported, with the numbers of the reasons."""
    unsupported = {key: reasons for key, reasons in refusals.items() if reasons}
    if not unsupported:
        return "yes"
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for key, reasons in unsupported.items():
        for reason in reasons:
            by_reason.setdefault(reason, []).append(key)
    if len(unsupported) == len(calls):
        # A reason that holds for every call hides the reasons of single calls.
        by_reason = {reason: keys for reason, keys in by_reason.items() if len(keys) == len(calls)} or by_reason
        what = "no"
    else:
        names = {name for _, name in calls}
        whole = [dtype for dtype in DTYPES if all((dtype, name) in unsupported for name in names)]
        rest = [dtype for dtype in DTYPES if dtype not in whole]
        only_dtypes = len(unsupported) == len(whole) * len(names)
        what = "some" if not only_dtypes else f"{rest[0]} only" if len(rest) == 1 else f"not {'/'.join(whole)}"
    numbers = []
    for reason, keys in by_reason.items():
        concerned = notes.setdefault(reason, {})
        cases = dict.fromkeys(name for _, name in keys)
        if len(cases) < len({name for _, name in calls}):
            concerned[f"{operator}: {', '.join(cases)}"] = None
        numbers.append(list(notes).index(reason) + 1)
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda place: place[1] - place[0])]
    return f"{what} [{','.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)}]"
