"""Layer-wise relevance propagation by the package lxt (AttnLRP, Achtibat et al., ICML 2024), measured beside the methods.

Its licence grants no patents, and its authors call the technique patented. So it is an external row of a table, and neither a
method of this package nor in its code: what is called here is the installed package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from vlattn_lab.weights import package

PACKAGE = "lxt"


def patches() -> Any:
    """The package's module of rules, without the `__init__` beside it: that imports names which transformers 5 no longer has."""
    parent = f"{PACKAGE}.efficient"
    if parent not in sys.modules:
        sys.modules[parent] = ModuleType(parent)
        sys.modules[parent].__path__ = [str(package(PACKAGE) / "efficient")]
    return import_module(f"{parent}.patches")


@contextmanager
def rules() -> Iterator[None]:
    """Within it a model's input times its gradient is the relevancy: the package's rules stand in place of LayerNorm, GELU and
    attention, as it sets them for language models. On exit all of these are as they were."""
    lxt, attention = patches(), nn.functional.scaled_dot_product_attention
    wrapped = lxt.wrap_attention_forward(lambda module, *args, **options: attention(*args, **options))
    norm, gelu = nn.LayerNorm.forward, nn.GELU.forward
    try:
        lxt.patch_method(lxt.layer_norm_forward, nn.LayerNorm)
        lxt.patch_method(lxt.non_linear_forward, nn.GELU, keep_original=True)
        nn.functional.scaled_dot_product_attention = lambda *args, **options: wrapped(None, *args, **options)
        yield
    finally:
        nn.functional.scaled_dot_product_attention = attention
        nn.LayerNorm.forward, nn.GELU.forward = norm, gelu  # type: ignore[method-assign]
        if "original_forward" in vars(nn.GELU):
            del nn.GELU.original_forward
