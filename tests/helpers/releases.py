"""What goes by another name, or is not there, in older releases of torch and transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlattn_fast._ground import extras

OLDER = bool(extras.missing("transformers", 5, 23))  # than the release that `make test` installs, which has all that tests name


def checkpointing(model: nn.Module, *arguments: Any) -> None:
    """The model runs its layers again in the backward pass."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*arguments)
