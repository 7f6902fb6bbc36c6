"""Vision-language models in plain PyTorch whose attention the package can explain and change."""

from vlattn_fast.models.uniter import UNITER, UNITERConfig, UNITEROutput

__all__ = ["UNITER", "UNITERConfig", "UNITEROutput"]
