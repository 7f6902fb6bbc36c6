"""The kinds of core scores, in one table. Operators compute these of features of query and key; `Core.kind` names one.

A kind is an entry here, its arithmetic for PyTorch in backends/streaming/_scores.py, and if kernels have it, its arithmetic in
csrc/cpu/scores.h and kernels/_scores.py. Limits of backends and the choice between kernels follow from this table, and C++ tells
Python by which number it knows a name.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Kind(NamedTuple):
    """A core score of features q (A) and k (A), with a vector u (A) per head if it sums over hidden units, and a number p.

    `of`: what it is computed of, by which kernels choose their tiles and loops. "product": a function of q . k, pair by pair.
    "norms": q . k and both norms. "units": a sum over hidden units a of u_a f(q_a, k_a), which needs the vector.

    `kernels`: the backends whose kernels have it, besides those that compute any kind.
    """

    formula: str
    of: Literal["product", "norms", "units"]
    kernels: tuple[str, ...] = ("cpu", "triton")


_EACH = ("cpu", "triton", "cuda")
KINDS = {
    "dot": Kind("q . k", "product"),
    "dot_relu": Kind("relu(q . k)", "product"),
    "dot_leaky_relu": Kind("q . k, or p q . k where that is negative", "product"),
    "dot_tanh": Kind("tanh(q . k)", "product"),
    "dot_sigmoid": Kind("sigmoid(q . k)", "product"),
    "dot_softcap": Kind("tanh(p q . k)", "product"),
    "cosine": Kind("q . k / max(|q| |k|, p)", "norms"),
    "additive": Kind("sum_a u_a tanh(q_a + k_a)", "units", _EACH),
    "hadamard_tanh": Kind("sum_a u_a tanh(q_a k_a)", "units", _EACH),
    "hadamard_sigmoid": Kind("sum_a u_a sigmoid(q_a k_a)", "units", _EACH),
}
UNIT_KINDS = tuple(name for name, kind in KINDS.items() if kind.of == "units")


def kind_of(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"the kind of a core score must be one of {tuple(KINDS)}; got {name!r}: add it to {__name__}")
    return KINDS[name]


def in_kernels(backend: str) -> tuple[str, ...]:
    """The kinds that this backend's kernels have."""
    return tuple(name for name, kind in KINDS.items() if backend in kind.kernels)
