"""The namespace of the operators in torch.library. In the kernel hub's folder a module of the same names takes its place."""

from __future__ import annotations

NAMESPACE = "vlattn"


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's full name."""
    return f"{NAMESPACE}::{op_name}"
