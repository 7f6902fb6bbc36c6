"""Operators on DTensors that are sharded over the batch or the heads: each process runs the operator on its part.

Processes exchange only means over heads: one all-reduce of the result. The placements of the first tensor say how a call is
divided; the other tensors have the same placements, or are replicated and cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import describe, is_dtensor
from vlattn_fast.ops._dimensions import DIMENSIONS

Dims = tuple[int, int | None]  # the dimensions of batch and heads, counted from the last


class Shards:
    """Divides a call on the mesh of its first tensor.

    Args:
        name, first, dims: that tensor's name in the call, the tensor, and the dimensions of its batch and heads.
    """

    def __init__(self, name: str, first: Any, dims: Dims) -> None:
        self.name, self.first, self.dims, self.mesh = name, first, dims, first.device_mesh
        self.kinds = [self._kind(placement) for placement in first.placements]

    def _kind(self, placement: Any) -> str:
        """The part that one dimension of the mesh divides: "batch", "heads", or nothing ("whole")."""
        if placement.is_replicate():
            return "whole"
        if placement.is_shard():
            for kind, dim in zip(("batch", "heads"), self.dims, strict=True):
                if dim is not None and placement.dim % self.first.ndim == self.first.ndim + dim:
                    return kind
        allowed = "batch" if self.dims[1] is None else "batch or heads"
        raise ValueError(f"{self.name} must be replicated or sharded over {allowed}; got {_layout(self.first)}")

    def _divided(self, kind: str, dims: Dims) -> tuple[int | None, int | None]:
        """The dimensions that `kind` divides in a tensor with `dims` and in the first tensor; None = absent."""
        return {"batch": (dims[0], self.dims[0]), "heads": (dims[1], self.dims[1])}.get(kind, (None, None))

    @property
    def by_heads(self) -> bool:
        return "heads" in self.kinds

    @property
    def share(self) -> float:
        """This process's part of the heads."""
        dim = self.dims[1]
        return 1.0 if dim is None else self.first.to_local().shape[dim] / self.first.shape[dim]

    def check_heads(self) -> None:
        """Raises unless each process has a head: one without heads would raise later, while the others wait in an all-reduce."""
        fewest = self.first.shape[self.dims[1]]
        for kind, processes in zip(self.kinds, self.mesh.shape, strict=True):
            if kind == "heads":  # torch makes equal parts, and the last are smaller
                fewest = max(0, fewest - (processes - 1) * -(-fewest // processes))
        if fewest == 0:
            raise ValueError(f"{self.name} must have heads for every process that shares them; got {_layout(self.first)}")

    def local(self, name: str, x: Any, dims: Dims) -> Tensor:
        """This process's part of `x`.

        Raises:
            TypeError: `x` is not a DTensor.
            ValueError: `x` lies on another mesh, or has other placements than the first tensor.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard

        if not is_dtensor(x):
            raise TypeError(f"{name} must be a DTensor, like {self.name}; got {describe(x)}")
        if x.device_mesh != self.mesh:
            raise ValueError(f"{name} must be on {self.name}'s mesh {self.mesh}; got {x.device_mesh}")
        placements: list[Any] = []
        grad_placements: list[Any] = []
        for kind, placement, size in zip(self.kinds, x.placements, self.mesh.shape, strict=True):
            dim, first_dim = self._divided(kind, dims)
            cut = dim is not None and x.ndim >= -dim and (x.shape[dim] != 1 or self.first.shape[first_dim] == 1)
            local: Any = Shard(x.ndim + dim) if cut and dim is not None else Replicate()
            current = Shard(placement.dim % x.ndim) if placement.is_shard() else placement  # without a negative dimension
            if current not in (local, Replicate()):
                raise ValueError(
                    f"{name} must be replicated, or sharded like {self.name}, {_layout(self.first)}; got {_layout(x)}"
                )
            if cut and kind == "heads" and x.shape[dim] != self.first.shape[self.dims[1]] and x.shape[dim] % size:
                raise ValueError(f"{name} must have a number of heads that {size} processes can share; got {tuple(x.shape)}")
            placements.append(local)
            grad_placements.append(local if cut or kind == "whole" else Partial())
        summed = any(placement.is_partial() for placement in grad_placements)
        if list(x.placements) == placements and not summed:  # the backward pass of redistribute sums the gradient
            return x.to_local(grad_placements=grad_placements)
        return Defined.apply(x.redistribute(placements=placements).to_local(grad_placements=grad_placements))

    def over_heads(self, x: Tensor, operation: str = "sum", *, goes_on: bool = False) -> Tensor:
        """The sum, largest or least of `x` over the processes that share the heads.

        Args:
            goes_on: each process uses the result in its own way, so the gradients add up. Else the result is the
                call's, and each process gets its whole gradient. If processes tie for the largest or the least, they share
                the gradient evenly.
        """
        return _OverHeads.apply(x, self, operation, goes_on)

    def whole(self, x: Tensor, dims: Dims) -> Tensor:
        """The DTensor whose part in this process is `x`; without heads, replicated among processes that share heads."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = list(x.shape)
        placements: list[Any] = []
        for kind in self.kinds:
            dim, first_dim = self._divided(kind, dims)
            if dim is None or first_dim is None:
                placements.append(Replicate())
            else:
                placements.append(Shard(x.ndim + dim))
                shape[dim] = self.first.shape[first_dim]
        order = sorted(range(x.ndim), key=lambda i: (-x.stride()[i], i))
        stride, step = [0] * x.ndim, 1
        for i in reversed(order):
            stride[i], step = step, step * max(shape[i], 1)
        return DTensor.from_local(x, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


class Defined(torch.autograd.Function):
    """The identity. It turns an undefined gradient into zeros, since the backward pass of redistribute needs a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _OverHeads(torch.autograd.Function):
    """The result of `Shards.over_heads`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, operation: str, goes_on: bool) -> Tensor:
        import torch.distributed as dist

        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        result = x.clone(memory_format=torch.contiguous_format)
        for dim, kind in enumerate(shards.kinds):
            if kind == "heads":
                dist.all_reduce(result, operations[operation], group=shards.mesh.get_group(dim))
        ctx.shards, ctx.goes_on, ctx.selects = shards, goes_on, operation != "sum"
        if ctx.selects:
            ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.shards.over_heads(grad, goes_on=True) if ctx.goes_on else grad
        if ctx.selects:
            x, result = ctx.saved_tensors
            taken = (x == result).to(grad.dtype)
            grad = grad * taken / ctx.shards.over_heads(taken)
        return grad, None, None, None


def _layout(x: Any) -> str:
    return f"placements {tuple(x.placements)} of shape {tuple(x.shape)}"


Local = dict[str, Any]  # arguments of a call, with the tensors of this process
Run = Callable[[Callable[..., Any], Shards, Local], Any]


def _dims(dimensions: str) -> Dims:
    letters = dimensions.partition(":")[0]
    return -len(letters), letters.index("h") - len(letters) if "h" in letters else None


def over_shards(call: Callable[..., Any], x: Local, outputs: Sequence[str], run: Run | None = None) -> Any:
    """The result of a public call on DTensors. Its query, or else its first tensor, says how the call is divided.

    Args:
        x: the arguments of the call by name, `locals()` at the start of its body: a wrapper would cost every call a microsecond.
        outputs: the dimensions of each output, as in DIMENSIONS.
        run: run(call, shards, arguments) computes the outputs of this process; default call(**arguments).
    """
    tensors = {each: _dims(DIMENSIONS[each]) for each in x if each in DIMENSIONS and isinstance(x[each], Tensor)}
    name = "query" if "query" in tensors else next(iter(tensors))
    shards = Shards(name, x[name], tensors[name])
    arguments = x | {each: shards.local(each, x[each], dims) for each, dims in tensors.items()}
    result: Any = call(**arguments) if run is None else run(call, shards, arguments)
    if isinstance(result, Tensor):
        return shards.whole(result, _dims(outputs[0]))
    parts = [
        None if part is None else shards.whole(part, _dims(dims)) for part, dims in zip(result, outputs, strict=False)
    ]  # or fewer
    return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
