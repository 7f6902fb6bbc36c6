"""The published code of the papers, run as it is: functions and classes out of clones of the authors' repositories.

    VLATTN_PUBLISHED=/folder/of/clones python -m pytest tests/published

None of it is part of this repository. The commits below are those that were compared.
"""

import ast
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

COMMITS = {
    "hila-chefer/Transformer-MM-Explainability": "58eaea85ac9c34aff052f368514b35d2e4c8dd3c",
    "adlnlp/Attention_VL": "a315448df88263b3042e91f550fbe3b502dc2b58",
    "KhoomeiK/CACR": "aad503d3e8a94524191b2c50b964dfb0919a321a",
    "kuanghuei/SCAN": "806355736e3c9158c9bcf2f0501ed1e961a893e9",
    "taoxugit/AttnGAN": "0d000e652b407e976cb88fab299e8566f3de8a37",
    "castorini/daam": "09564e048cf5ffc1523aa0605736e7f178ca505a",
}
# float32 against float64 over a few layers; float64 differs by the order of sums alone
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}


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


def assert_equal(got: Tensor, published: Tensor, what: str = "") -> None:
    """Within the tolerance of `got`'s dtype, of the largest number that the authors' code gives in float64.

    Gradients of a bias that cancels in the softmax are zero but for rounding, hence the least scale.
    """
    assert got.shape == published.shape, what
    error = float((got.double() - published).abs().max()) / max(float(published.abs().max()), 1e-2)
    assert error <= TOLERANCE[got.dtype], f"{what}: {error:.1e}"
