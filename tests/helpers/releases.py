"""What goes by another name, or is not there, in older releases of torch, transformers and Triton."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
from torch import nn

from vlattn_fast._ground import extras

# than the releases that `make test` installs, which have all that tests name
OLDER = bool(extras.missing("transformers", 5, 23))
OLDER_TORCH = bool(extras.missing("torch", 2, 13))
# the forward pass of transformers 5.24's Llama 4 asks its own output for a field that it lacks
LLAMA4_FAILS = find_spec("transformers") is not None and version("transformers").startswith("5.24.")
OLDER_TRITON = bool(extras.missing("triton", 3, 8))
WITHOUT_FENCES = "Triton before 3.8 leaves out fences on sm_90, has races on sm_100, and brings the tools of CUDA 12"
needs_interpreted_loops = pytest.mark.skipif(
    bool(extras.missing("triton", 3, 7)) and not extras.missing("numpy", 2, 5),
    reason="Triton 3.6 takes an array of one number for a Python number, which numpy 2.5 refuses",
)
# the package beside this one, which also has its plugin of pytest
WITHOUT_PTX = "ptx, which emulates compiled kernels, is not installed: pip install packages/ptx"
needs_ptx = pytest.mark.skipif(find_spec("ptx") is None, reason=WITHOUT_PTX)


def checkpointing(model: nn.Module, *arguments: Any) -> None:
    """The model runs its layers again in the backward pass."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*arguments)
