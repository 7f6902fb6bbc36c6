"""What goes by another name, or is not there, in older releases of torch and transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlattn_fast._ground import extras

# than the releases that `make test` installs, which have all that tests name
OLDER = bool(extras.missing("transformers", 5, 23))
OLDER_TORCH = bool(extras.missing("torch", 2, 13))


def checkpointing(model: nn.Module, *arguments: Any) -> None:
    """The model runs its layers again in the backward pass."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*arguments)
