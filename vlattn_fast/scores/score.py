"""The base class of all score functions: the call, the reference, the layers and the checks ask it for all that they need.

A score is an activation of a dot product of features, score(q, k) = act(phi(q) . psi(k)). Each class turns query and key into
features and names its core score, one of the kinds in vlattn_fast/_ground/score_kinds.py.

Shapes: query (B, H, N, Dq), key (B, Hkv, M, Dk). A parameter with a leading (H, ...) is per query head, otherwise shared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_floating, check_tensor, describe

ACTIVATIONS = (None, "relu", "leaky_relu", "tanh", "sigmoid")


class Core(NamedTuple):
    """Holds a core score and its arguments: features (B, H, N, A) and (B, Hkv or H, M, A), the vector (H, A), and an offset."""

    kind: str
    query: Tensor
    key: Tensor
    vector: Tensor | None = None
    parameter: float = 0.0  # of the kind
    offset: float | Tensor = 0.0  # a number or (B, H, N): cancels in the softmax, not in the log-sum-exp
    keeps_dtype: bool = False  # features that autocast must not round


def softcapped(scale: float, softcap: float | None) -> tuple[str, float, float]:
    """Returns kind and parameter of a core score, and its scale: scale * q . k, or softcap * tanh(scale * q . k / softcap)."""
    return ("dot", 0.0, scale) if softcap is None else ("dot_softcap", scale / softcap, float(softcap))


class Parameter(NamedTuple):
    """Describes a learned tensor of a score for heads of size D. With `per_head` in a layer each head has its own."""

    rank: int  # 0: one number; 1: (D); 2: (D, D)
    first: Callable[[int], tuple[float, float]]  # of D: first values in a layer are uniform between these two
    random: Callable[[Tensor, int], Tensor]  # of normal numbers and D: values for tests

    def shape(self, head_dim: int, heads: tuple[int, ...] = ()) -> tuple[int, ...]:
        return (*heads, *(head_dim,) * self.rank)


def _keeping_variance(head_dim: int) -> tuple[float, float]:
    bound = math.sqrt(3.0 / head_dim)
    return -bound, bound


MATRIX, VECTOR = (Parameter(rank, _keeping_variance, lambda x, head_dim: x / math.sqrt(head_dim)) for rank in (2, 1))
BIAS = Parameter(1, lambda head_dim: (0.0, 0.0), lambda x, head_dim: x / 4)


class Layer(NamedTuple):
    """Describes a name of nn.ScoreAttention: the class, its learned tensors, and options instead of the class's defaults."""

    score: type[Score]
    learned: tuple[str, ...]
    options: Mapping[str, Any] = {}


class Dice(Protocol):
    """Draws the choices and normal numbers of a random score."""

    def pick(self, name: str, options: Any) -> Any: ...

    def randn(self, *shape: int) -> Tensor: ...


class Score:
    """Defines a score function: a frozen dataclass whose fields are its parameters and options.

    `SCORES` finds a class with a `name` in a file of this folder. Callers ask the class; only limits of single kernels
    and timed examples name one.
    """

    name: ClassVar[str] = ""
    parameters: ClassVar[Mapping[str, Parameter]] = {}  # what a layer learns; a score without any needs only its name
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # values that the fuzzer draws
    masked_key: ClassVar[float] = 0.0  # what score_attention writes into the keys of padding
    is_plain: ClassVar[bool] = False  # query and key are themselves the features of a dot product: such a score takes a softcap
    ignores_lengths: ClassVar[bool] = False  # vectors may be as long or short as their dtype holds, so the fuzzer draws such

    @property
    def kind(self) -> str:
        """Returns the kind of the core score, "dot" only if it is one for all data: torch's SDPA supports that."""
        return "dot"

    @property
    def is_dot_product(self) -> bool:
        return self.kind == "dot"

    def to(self, dtype: torch.dtype) -> Score:
        """Returns the score with its tensors in `dtype`."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}  # type: ignore[arg-type]
        tensors = {name: x.to(dtype) for name, x in values.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **tensors) if tensors else self  # type: ignore[type-var]

    @property
    def is_linear(self) -> bool:
        """Returns whether `linear_features` exist: the score is a product of features of the query only, and of the key only."""
        return self.is_dot_product

    def features(self, query_dim: int, key_dim: int) -> int | None:
        """Returns the largest number of features; None if it depends on the data."""
        return query_dim

    def check(self, query: Tensor, key: Tensor) -> None:
        """Raises ValueError or TypeError if parameters, query and key do not fit.

        It uses no tensor's values: a call whose plan is cached skips it.
        """
        raise NotImplementedError

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        """Computes the score (B, H, N, M) of query (B, H, N, Dq) and key (B, H, M, Dk). Every backend is compared with it."""
        raise NotImplementedError

    def core(self, query: Tensor, key: Tensor) -> Core:
        """Returns the core score and its features, differentiable in query, key and every parameter."""
        raise NotImplementedError

    def linear_features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Returns phi (B, H, N, F) and psi (C, H, M, F), whose products are scores of any two samples with the default scale."""
        core = self.core(query, key)
        phi, psi = core.query * self.default_scale(query.shape[-1]), core.key
        if isinstance(core.offset, Tensor) or core.offset != 0.0:
            offset = torch.zeros_like(phi[..., 0]) + core.offset
            phi, psi = torch.cat([phi, offset[..., None]], -1), torch.cat([psi, torch.ones_like(psi[..., :1])], -1)
        return phi, psi

    def default_scale(self, head_dim: int) -> float:
        """Returns the scale if the caller passes none."""
        return 1.0

    @classmethod
    def layers(cls) -> dict[str, Layer]:
        """Returns the names under which nn.ScoreAttention makes this class."""
        return {cls.name: Layer(cls, tuple(cls.parameters))}

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        """Returns options of the calls that `vlattn verify` and the tests check, by name."""
        return {cls.name: {}}

    @classmethod
    def random(cls, dice: Dice, heads: int, head_dim: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns random tensors and options of this class, by name, for query and key of one size."""
        options = {name: dice.pick(name, values) for name, values in cls.options.items()}
        per_head = (heads,) if cls.parameters and dice.pick("parameters per head", (False, False, True)) else ()
        optional = {field.name for field in dataclasses.fields(cls) if field.default is None}  # type: ignore[arg-type]
        tensors = {
            name: parameter.random(dice.randn(*parameter.shape(head_dim, per_head)), head_dim)
            for name, parameter in cls.parameters.items()
            if name not in optional or dice.pick(name, (False, True))
        }
        return tensors, options


def check_parameter(name: str, x: Any, shape: tuple[int, ...], query: Tensor) -> None:
    """`x` has `shape`, or (H, *shape) for one per query head."""
    check_tensor(name, x, shape=shape)
    if x.shape != shape and x.shape != (query.shape[1], *shape):
        per_head = (query.shape[1], *shape)
        raise ValueError(f"{name} must have shape {shape}, or {per_head} for one per head; got {describe(x)}")
    if x.dtype != query.dtype or x.device != query.device:
        check_floating(**{"query": query, name: x})
