"""Vision-language models in plain PyTorch whose attention the package can explain and change.

In: pixels, token ids, region features.
Out: logits.
Imports: _ground.
"""

from vlattn_fast.models.clip_mapper import CLIPMapper, CLIPMapperOutput
from vlattn_fast.models.uniter import UNITER, UNITERConfig, UNITEROutput

__all__ = ["CLIPMapper", "CLIPMapperOutput", "UNITER", "UNITERConfig", "UNITEROutput"]
