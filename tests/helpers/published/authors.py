"""The published code of the papers, and what it computed.

Numbers that functions and classes of the authors' repositories compute are stored in `recorded.json`, and every machine compares
with them. None of the code is part of this repository. With clones at hand, the tests run it again:

    VLATTN_PUBLISHED=/folder/of/clones python -m pytest tests/published
    VLATTN_PUBLISHED=/folder/of/clones python -m tools.published --record

The commits below are those that were compared.
"""

import ast
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

COMMITS = {
    "hila-chefer/Transformer-MM-Explainability": "58eaea85ac9c34aff052f368514b35d2e4c8dd3c",
    "adlnlp/Attention_VL": "a315448df88263b3042e91f550fbe3b502dc2b58",
    "KhoomeiK/CACR": "aad503d3e8a94524191b2c50b964dfb0919a321a",
    "kuanghuei/SCAN": "806355736e3c9158c9bcf2f0501ed1e961a893e9",
    "taoxugit/AttnGAN": "0d000e652b407e976cb88fab299e8566f3de8a37",
}
# float32 against float64 over a few layers; float64 differs by the order of sums alone
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}


FILE = Path(__file__).with_name("recorded.json")
LIVE, RECORDING = "VLATTN_PUBLISHED" in os.environ, "VLATTN_RECORD" in os.environ
WHOLE, SUMS = 12, 3  # a tensor of more numbers is recorded by so many weighted sums


class Recorded(NamedTuple):
    """A tensor of the authors' code: its shape, its largest number, and its numbers or their `sums`."""

    shape: list[int]
    largest: float
    numbers: list[float]


def published(name: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `compute` returns by the authors' code: tensors, or what JSON holds. Without clones their records, each a `Recorded`.
    Inputs and weights must come from seeds, and not from their code."""
    if not LIVE:
        return {key: Recorded(*value["tensor"]) if "tensor" in value else value["json"] for key, value in records()[name].items()}
    found = {key: value.detach().double() if isinstance(value, Tensor) else value for key, value in compute().items()}
    if RECORDING:
        records()[name] = {
            key: {"tensor": record(value)} if isinstance(value, Tensor) else {"json": value} for key, value in found.items()
        }
        lines = [f"{json.dumps(each)}: {json.dumps(value)}" for each, value in sorted(records().items())]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return found


@functools.cache
def records() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def record(x: Tensor) -> Recorded:
    return Recorded(list(x.shape), float(x.abs().max()), x.flatten().tolist() if x.numel() <= WHOLE else sums(x))


def sums(x: Tensor) -> list[float]:
    """Some weighted sums, as large as a number of `x`. A fault in one number shows in all of them."""
    place = torch.arange(x.numel(), dtype=torch.float64)
    return [float((x.flatten().double() * torch.cos((0.7 + k) * place)).sum()) / x.numel() ** 0.5 for k in range(SUMS)]


def drawn(shapes: Mapping[str, list[int]], scale: Callable[[str], float]) -> dict[str, Tensor]:
    """Float64 weights of the names and shapes of the authors' model, as large as those of a trained one."""
    torch.manual_seed(0)
    return {name: scale(name) * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def clone(repository: str) -> Path:
    folder = Path(os.environ["VLATTN_PUBLISHED"]) / repository.rpartition("/")[2]
    if not folder.is_dir():
        pytest.fail(f"clone {repository} at {COMMITS[repository]} to {folder}")
    return folder


def defined(repository: str, file: str, *names: str, **imports: Any) -> SimpleNamespace:
    """Functions and classes of a file, without its imports, which ask for old packages; `imports` stands for those they use."""
    path = clone(repository) / file
    tree = ast.parse(path.read_text())
    wanted = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names]
    namespace = dict(imports)
    exec(compile(ast.Module(wanted, []), str(path), "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


@contextmanager
def on_cpu() -> Iterator[None]:
    """`.cuda()` does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cuda", lambda x, *args, **options: x)
        yield


def assert_equal(got: Tensor, published: Tensor | Recorded, what: str = "") -> None:
    """Within the tolerance of `got`'s dtype, of the largest number that the authors' code gives in float64.

    Gradients of a bias that cancels in the softmax are zero but for rounding, hence the least scale.
    """
    if isinstance(published, Recorded):
        assert list(got.shape) == published.shape, what
        here, largest = record(got.detach().double()).numbers, published.largest
        error = max(abs(x - y) for x, y in zip(here, published.numbers, strict=True)) / max(largest, 1e-2)
    else:
        assert got.shape == published.shape, what
        error = float((got.double() - published).abs().max()) / max(float(published.abs().max()), 1e-2)
    assert error <= TOLERANCE[got.dtype], f"{what}: {error:.1e}"
