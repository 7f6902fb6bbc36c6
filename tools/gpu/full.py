"""Calls of the sizes of models, whose formulas run in float64 on a device, those of attention in blocks
(vlattn_fast/checking/blocks.py).

In a rehearsal they have a sample or two, few heads and fewer tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlattn_fast.checking import blocks, verify
from vlattn_fast.checking.cases import Example, Sizes
from vlattn_fast.checking.cases._attention import carried, grad_output, plain
from vlattn_fast.ops import OPERATORS

SIZES = {
    "clip": Sizes(577, 577, 64, 64, batch=64, heads=16, rows=1),  # CLIP ViT-L/14@336
    "siglip": Sizes(729, 729, 72, 72, batch=32, heads=16, rows=1),
    "llava": Sizes(704, 704, 128, 128, batch=4, heads=32, rows=1),
    "2048": Sizes(2048, 2048, 128, 128, batch=1, heads=4, rows=1),
    "4096": Sizes(4096, 4096, 64, 64, batch=1, heads=1, rows=1),
    "8192": Sizes(8192, 8192, 64, 64, batch=1, heads=1, rows=1),
    "16384": Sizes(16384, 16384, 128, 128, batch=1, heads=1, rows=1),
    "colpali": Sizes(regions=1030, words=32, features=128, images=64),
    "llama": Sizes(1024, 4096, 128, 128, heads=8),
}
CASES = ("maxsim", "paged_attention_statistics")  # their maps are small, and need no blocks
DTYPES = {"float16": torch.float16, "float32": torch.float32}
SHARED = 4  # query heads of a key head, where heads are grouped
DROPOUT = 0.1
WITHOUT_CUDNN = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Full(NamedTuple):
    """A call. `what`: words of "causal", "grouped", "padding", "dropout", a dtype, "by cuDNN", and "without cuDNN", whose forward
    pass is ours in any case; for an operator of CASES the name of a case."""

    operator: str
    what: str
    sizes: str

    @property
    def name(self) -> str:
        return f"full {self.what}".strip()

    @property
    def dtype(self) -> torch.dtype:
        return next((dtype for name, dtype in DTYPES.items() if name in self.what.split()), torch.bfloat16)

    def example(self, rehearsed: bool) -> Example:
        sizes, words = SIZES[self.sizes], self.what.split()
        if rehearsed:
            short = min(sizes.queries, 150)
            sizes = sizes._replace(queries=short, keys=short, batch=min(sizes.batch, 2), heads=min(sizes.heads, SHARED))
            sizes = sizes._replace(regions=min(sizes.regions, 150), images=min(sizes.images, 4))
        if self.operator in CASES:
            (case,) = [one for one in verify.cases(3, sizes, [self.operator]) if one.name == self.what]
            return replace(case, name=self.name)
        generator = torch.Generator().manual_seed(3)
        tensors = plain(sizes, functools.partial(torch.randn, generator=generator))
        options: dict[str, Any] = {"is_causal": "causal" in words}
        if "grouped" in words:
            tensors |= {name: tensors[name][:, ::SHARED].contiguous() for name in ("key", "value")}
            options["enable_gqa"] = True
        if "padding" in words:  # down to a sample without a key
            lengths = torch.linspace(sizes.keys, 0, sizes.batch).long()
            options["key_mask"] = torch.arange(sizes.keys) < lengths[:, None]
        if "dropout" in words:
            options["dropout_p"] = DROPOUT
        match self.operator:
            case "score_attention":
                options["return_lse"] = True
            case "relevancy_attention":
                tensors["carrier"] = carried(sizes)
            case "attention_map":
                tensors["grad_output"] = grad_output(sizes)
                options["rule"] = "gradient"
            case "attention_statistics":
                del tensors["value"]
        call = in_blocks(OPERATORS[self.operator].call)
        call = WITHOUT_CUDNN(call) if "without" in words else call
        return Example(call, self.name, tensors, options, in_float32=("carrier",))


FULL = [
    Full(operator, what, sizes)
    for sizes, operator, kinds in (
        ("clip", "score_attention", ("", "padding", "dropout", "float16", "float32")),
        ("clip", "relevancy_attention", ("", "padding")),
        ("llava", "score_attention", ("causal", "causal grouped", "causal grouped dropout", "causal padding")),
        ("llava", "relevancy_attention", ("causal", "causal grouped", "causal padding")),
        ("16384", "score_attention", ("", "causal by cuDNN", "causal by cuDNN float16", "causal without cuDNN")),
        ("16384", "relevancy_attention", ("causal",)),
        ("2048", "relevancy_attention", ("causal", "causal float16", "causal float32")),
        ("8192", "score_attention", ("",)),
        ("8192", "relevancy_attention", ("causal",)),
        ("4096", "score_attention", ("", "causal dropout")),
        ("4096", "relevancy_attention", ("",)),
        ("siglip", "score_attention", ("",)),
        ("siglip", "relevancy_attention", ("",)),
        ("clip", "attention_map", ("",)),
        ("clip", "attention_statistics", ("padding",)),
        ("colpali", "maxsim", ("masks",)),
        ("llama", "paged_attention_statistics", ("requests", "softcap and window", "new tokens")),
    )
    for what in kinds
]


def in_blocks(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call whose backend "reference" is the formula in blocks. Each call draws its dropout from the same seed."""
    formula = blocks.formula(call.__name__)

    @functools.wraps(call)
    def run(*, backend: str = "auto", **arguments: Any) -> Any:
        if "dropout_p" in arguments:
            torch.manual_seed(0)
        return formula(**arguments) if backend == "reference" else call(**arguments, backend=backend)

    return run
