"""Which way of testing notices which fault: `python -m tests.corpus.measure`, in packages/ptx, writes rows.csv.

One shape and boundary shapes compare with the formula as benchmarks do (allclose, atol 1e-5, rtol 1e-2), on memory as a GPU's:
around a tensor lie others, so an access that leaves it a little shows nothing by itself. Checks run on the tensors alone, and
only what the emulator says counts. Exact arithmetic takes whole numbers and asks for equal bits, of the kernels that then round
nothing. Two tilings compare BLOCK=32 with BLOCK=64, and know no formula.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import ptx
from ptx.running import memory
from tests.corpus.faults import HEAD, SECTIONS, Fault, faults

ROWS = Path(__file__).with_name("rows.csv")
ONE, BOUNDARY, ARCH, PADDING, JUNK = 128, (1, 33, 100, 128), 90, 4096, 7.0
WAYS = ("one shape", "boundary shapes", "checks, one shape", "checks, boundary shapes", "exact arithmetic", "two tilings")


def module_of(text: str, folder: Path) -> ModuleType:
    """A module of this text. Triton reads kernels from files."""
    path = folder / f"corpus{len(list(folder.iterdir()))}.py"
    path.write_text(HEAD + text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def among_others(*shape: int, values: Tensor | None = None) -> Tensor:
    """A tensor with others around it in its storage."""
    size = torch.Size(shape).numel()
    storage = torch.full((size + 2 * PADDING,), JUNK, dtype=torch.float32 if values is None else values.dtype)
    view = storage[PADDING : PADDING + size].view(shape)
    return view if values is None else view.copy_(values)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Kernels may touch the whole storage of a tensor."""
    place = memory.Memory.place

    def whole(self: memory.Memory, tensor: Tensor, name: str, writable: bool = True) -> int:
        address = place(self, tensor, name, writable)
        if tensor.numel():
            copy = self._copies[tensor.untyped_storage().data_ptr()]
            self.ranges[-1] = self.ranges[-1]._replace(begin=copy.start, end=copy.start + copy.size, initialised=0)
        return address

    memory.Memory.place = whole  # type: ignore[method-assign]
    try:
        yield
    finally:
        memory.Memory.place = place  # type: ignore[method-assign]


def made(module: ModuleType, n: int, whole_numbers: bool) -> list[Tensor]:
    torch.manual_seed(n)
    make: Callable[..., Tensor] = (lambda *s: torch.randint(0, 64, s).float()) if whole_numbers else torch.randn
    return list(module.inputs(make, n))


def result(module: ModuleType, n: int, BLOCK: int = 32, whole_numbers: bool = False) -> tuple[Tensor, Tensor]:
    """What a GPU would give, and the formula's. A launch that ends early raises."""
    values = made(module, n, whole_numbers)
    exact = module.formula(*(x.double() if x.is_floating_point() else x for x in values))
    with as_on_a_gpu(), ptx.emulated(ARCH, ptx.Options(limit=10**6), strict=False):
        output = module.launch(*(among_others(*x.shape, values=x) for x in values), empty=among_others, BLOCK=BLOCK)
    return output, exact


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), atol=1e-5, rtol=1e-2)


def noticed(way: Callable[[int], bool], sizes: tuple[int, ...]) -> bool:
    """Whether any size is wrong, or ends early."""
    for n in sizes:
        try:
            if not way(n):
                return True
        except (ptx.EmulationError, ptx.FindingsError):
            return True
    return False


def checked(module: ModuleType, n: int) -> bool:
    with ptx.emulated(ARCH, ptx.Options(limit=10**6)):
        module.launch(*made(module, n, False), empty=torch.empty, BLOCK=32)
    return True


def ways(module: ModuleType) -> dict[str, bool | None]:
    """By way of testing, whether it notices something; None where it does not apply."""

    def right(n: int) -> bool:
        return close(*result(module, n))

    def equal(n: int) -> bool:
        output, exact = result(module, n, whole_numbers=True)
        return torch.equal(output.double(), exact)

    def tilings(n: int) -> bool:
        return close(result(module, n)[0], result(module, n, 64)[0])

    return {
        "one shape": noticed(right, (ONE,)),
        "boundary shapes": noticed(right, BOUNDARY),
        "checks, one shape": noticed(lambda n: checked(module, n), (ONE,)),
        "checks, boundary shapes": noticed(lambda n: checked(module, n), BOUNDARY),
        "exact arithmetic": noticed(equal, BOUNDARY) if module.exact else None,
        "two tilings": noticed(tilings, BOUNDARY),
    }


def row(fault: Fault, folder: Path) -> dict[str, Any]:
    answers = ways(module_of(fault.text, folder))
    names = {"kernel": fault.kernel, "kind": fault.kind, "place": fault.place}
    return names | {way: "" if answer is None else int(answer) for way, answer in answers.items()}


def again(number: int) -> dict[str, str]:
    """The row of a fault, measured now."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return {name: str(value) for name, value in row(list(faults())[number], Path(folder)).items()}


def main() -> None:
    torch.set_num_threads(1)
    right = [Fault(name, "none", "", text) for name, text in SECTIONS.items()]
    with ROWS.open("w") as file, tempfile.TemporaryDirectory() as folder:
        rows = csv.DictWriter(file, ["kernel", "kind", "place", *WAYS], lineterminator="\n")
        rows.writeheader()
        for fault in [*right, *faults()]:
            rows.writerow(row(fault, Path(folder)))
            file.flush()


def table(rows: list[dict[str, str]]) -> str:
    """Of the stored rows: by kind, how many faults each way notices; in the last line, how many right kernels it accuses."""
    kinds = {one["kind"]: None for one in rows if one["kind"] != "none"}
    lines = [f"| kind | faults | {' | '.join(WAYS)} | any |", "| --- |" + " ---: |" * (len(WAYS) + 2)]
    for kind in [*kinds, "all", "none"]:
        chosen = [one for one in rows if kind == one["kind"] or (kind == "all" and one["kind"] != "none")]
        counts = [str(sum(one[way] == "1" for one in chosen)) for way in WAYS]
        name = {"all": "**all**", "none": "right kernels"}.get(kind, kind)
        lines.append(
            f"| {name} | {len(chosen)} | {' | '.join(counts)} | {sum('1' in [one[w] for w in WAYS] for one in chosen)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table(list(csv.DictReader(ROWS.open()))))
    else:
        main()
