"""Robot policies by flow matching: the action that is explained, its score, and the tokens of its chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.adapters.adapter import TargetScore
from vlattn_fast.interpret.adapters.tokens import Tokens

_NEEDED = {
    "state": "the robot's state (B, entries)",
    "noise": "the noisy actions (B, steps, dimensions), without which the policy draws new ones in each forward pass",
}


@dataclass(frozen=True)
class Action:
    """Names one dimension of a robot policy's actions, as `target` of `explain`.

    The score is the velocity at a noise level from the noise towards the action, which is minus the policy's output: what raises
    the score raises the action.

    Examples:
        >>> import vlattn_fast as va
        >>> va.Action(dimension=2, step=5, time=0.5)  # pass it as va.explain(..., target=...)
        Action(dimension=2, step=5, time=0.5)

    Args:
        dimension: the dimension of the action, counted from 0.
        step: the step of the chunk of actions, counted from 0. None = the sum over all steps.
        time: the noise level, from 0 (the action) to 1 (noise). None = the `timestep` of the inputs.

    Raises:
        TypeError, ValueError: a number has a wrong type, or is out of range.
    """

    dimension: int
    step: int | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        check_integer("dimension", self.dimension, low=0)
        if self.step is not None:
            check_integer("step", self.step, low=0)
        if self.time is not None:
            if isinstance(self.time, bool) or not isinstance(self.time, (int, float)):
                raise TypeError(f"time must be a number from 0 to 1, or None; got {type(self.time).__name__}")
            if not 0 <= self.time <= 1:
                raise ValueError(f"time must be from 0 (the action) to 1 (noise); got {self.time}")


class Velocity(TargetScore, name="velocity"):
    """A policy's action; its logits (B, steps, dimensions) are the velocity towards the noise."""

    among_logits = False

    among = "action dimensions"

    def prepared(self, inputs: Mapping[str, Any], target: Any) -> Mapping[str, Any]:
        """The inputs with the noise level of the target."""
        if not isinstance(target, Action) and not callable(target):
            raise TypeError(
                f"target must be a va.Action, which names a dimension, or a callable, for a robot policy; got {target!r}"
            )
        for name, meaning in _NEEDED.items():
            if not isinstance(inputs.get(name), Tensor):
                raise ValueError(f"inputs must hold '{name}', {meaning}; got {sorted(inputs)}")
        noise, time = inputs["noise"], target.time if isinstance(target, Action) else None
        if noise.ndim != 3:
            raise ValueError(f"noise must be (B, steps, dimensions); got {tuple(noise.shape)}")
        if isinstance(target, Action):
            for name, size in zip(("step", "dimension"), noise.shape[1:], strict=True):
                if (getattr(target, name) or 0) >= size:
                    raise ValueError(f"{name} must be from 0 to {size - 1}, the last one in noise; got {getattr(target, name)}")
        if (time is None) == (inputs.get("timestep") is None):
            way = "neither" if time is None else "both"
            raise ValueError(f"noise level must be given as time of the Action, or as 'timestep' (B,) in inputs; got {way}")
        if time is None:
            return inputs
        dtype = torch.promote_types(noise.dtype, torch.float32)
        return {**inputs, "timestep": torch.full((len(noise),), time, dtype=dtype, device=noise.device)}

    def measured(self, inputs: Mapping[str, Any], target: Any) -> tuple[Mapping[str, Any], Any]:
        """The score of an action as a callable, and the inputs with the noise level."""
        prepared = self.prepared(inputs, target)
        if not isinstance(target, Action):
            return prepared, target

        def velocity(outputs: Any, arguments: Mapping[str, Any]) -> Tensor:
            return self.choose(outputs, target, arguments)[0]

        return prepared, velocity

    def choose(self, outputs: Any, target: Any, arguments: Mapping[str, Any], position: Any = None) -> tuple[Tensor, None]:
        velocity, noise = self.logits(outputs), arguments["noise"]
        if velocity is None or velocity.shape[1:] != noise.shape[1:]:
            got = None if velocity is None else tuple(velocity.shape)
            raise ValueError(
                f"noise must have the steps and dimensions of the policy's actions; got {tuple(noise.shape)} for {got}"
            )
        towards = -velocity[..., target.dimension]
        return towards.sum(1) if target.step is None else towards[:, target.step], None


class Actions(Tokens, name="actions"):
    """The state, as one token or as one for each of its entries, then a token for each step of the chunk."""

    def real(self) -> Tensor | None:
        return None

    def image_mask(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.bool)

    def fields(self, row: Tensor) -> dict[str, Any]:
        steps = self.inputs["noise"].shape[1]
        before = self.shape[1] - steps
        joints = [f"joint {number}" for number in range(before)] if before == self.inputs["state"].shape[-1] else ["state"]
        return {"token_names": [*joints, *(f"action {step}" for step in range(steps))]}
