"""Python imports this first where this folder is in PYTHONPATH: names for two operators of torchvision. Its Python registers them
and no processor calls them; its library, which would name them, is one for another torch."""

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
