"""Sound among a model's inputs: waves and spectrograms, which tokens hear it, and what of it is padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_number

# The inputs' names in transformers; for each the number of dimensions of sound in time, and its steps a second.
SOUNDS = {"input_features": (3, 100.0), "input_values": (2, 16000.0)}


@dataclass(frozen=True)
class Seconds:
    """The stretch of a sound from `begin` to `end`, in seconds: a group of tokens for `va.Knockout` and all that takes groups.

    A token belongs to it if its middle does. Spectrograms have 100 frames a second, and waves 16,000 samples.

    Examples:
        >>> import vlattn_fast as va
        >>> va.Knockout(keys=va.Seconds(1.2, 1.8)).keys
        Seconds(begin=1.2, end=1.8)
    """

    begin: float
    end: float

    def __post_init__(self) -> None:
        check_number("begin", self.begin, low=0)
        check_number("end", self.end, low=0)
        if not self.begin < self.end:
            raise ValueError(f"end must be after begin; got {self}")


@dataclass(frozen=True)
class Sound:
    """The steps of a sound's tensor in time, `size` of which are `seconds` long in all, and how many of each sample are no
    padding."""

    name: str  # of the input
    dim: int  # of time
    size: int
    seconds: float
    real: tuple[int, ...]
    silence: float  # in spectrograms their smallest number, in waves 0

    def ends(self, count: int) -> list[int]:
        """How many of `count` tokens hear the sound of each sample."""
        return [max(1, ceil(steps * count / self.size)) for steps in self.real]


def sound_in(inputs: Mapping[str, Any], shape: tuple[int, int]) -> Sound | None:
    """The sound among inputs that tokens (B, N) may hear in the order of time; None without one, or with an image."""
    found = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if any(name.startswith("pixel_values") for name in found):
        return None
    for name, (dims, per_second) in SOUNDS.items():
        if name in found and found[name].ndim == dims and len(found[name]) == shape[0]:
            value = found[name]
            dim = max(range(1, dims), key=lambda one: value.shape[one])
            size = value.shape[dim]
            if 1 < shape[1] <= size:
                real = _real_steps(value.movedim(dim, -1), inputs.get("attention_mask"))
                silence = float(value.min()) if dims == 3 and value.numel() else 0.0
                return Sound(name, dim, size, size / per_second, real, silence)
    return None


def silenced(inputs: Mapping[str, Any], stays: Tensor, seconds: float) -> dict[str, Tensor]:
    """The sound of a sample with silence in place of the equal stretches (n,) of its first `seconds` that do not stay."""
    sound = sound_in(inputs, (1, len(stays)))
    assert sound is not None
    steps = min(sound.size, round(seconds * sound.size / sound.seconds))
    kept = torch.ones(sound.size, dtype=torch.bool)
    kept[:steps] = stays[torch.arange(steps) * len(stays) // steps]
    value = inputs[sound.name]
    shape = [sound.size if dim == sound.dim else 1 for dim in range(value.ndim)]
    return {sound.name: value.masked_fill(~kept.view(shape).to(value.device), sound.silence)}


def _real_steps(value: Tensor, mask: Any) -> tuple[int, ...]:
    """How many steps of each sample (B, ..., T) are no padding: what `attention_mask` says, or without the last steps if they are
    all the same, as silence is after a sound."""
    size = value.shape[-1]
    if isinstance(mask, Tensor) and mask.shape == (len(value), size):
        differs = mask.bool()
    else:
        differs = (value != value[..., -1:]).reshape(len(value), -1, size).any(1)
    last = size - differs.flip(-1).int().argmax(-1)
    ends = [int(end) if bool(row.any()) else size for end, row in zip(last, differs, strict=True)]
    return tuple(size if end >= size - 1 else end for end in ends)
