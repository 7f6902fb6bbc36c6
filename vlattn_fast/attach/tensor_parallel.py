"""Models whose attention heads several processes share (tensor parallelism): their mesh, means over all heads, and
the heads of all processes in order.

Inside such a model each process sees its own heads as plain tensors; the parameters of the projections are DTensors, whose
placements say how the heads are divided. FSDP's parameters are whole while the layer that they belong to runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlattn_fast._ground.checks import is_dtensor
from vlattn_fast.ops._shards import Defined

_OF_QUERIES = re.compile(r"q[^.]*\.weight$|in_proj_weight$")  # q_proj, query, to_q, Wqkv, query_key_value, in_proj_weight
_FUSED = re.compile(r"kv|key_value|in_proj")  # of query, key and value


def has_dtensors(model: nn.Module) -> bool:
    return any(is_dtensor(parameter) for parameter in model.parameters())


def heads_mesh(module: nn.Module, query: Tensor, key: Tensor) -> Any:
    """The one-dimensional mesh that divides the heads of query (B, H, N, D) and key, that `module` attends with; None = this
    process has all heads. ValueError if the placements of the module's parameters contradict the size of `query`."""
    query_size = query.shape[1] * query.shape[3]
    fused = query_size + 2 * key.shape[1] * key.shape[3]
    for name, parameter in module.named_parameters():
        if not (is_dtensor(parameter) and _OF_QUERIES.search(name)):
            continue
        weight: Any = parameter
        mesh = weight.device_mesh
        divided = [dim for dim, place in enumerate(weight.placements) if place.is_shard(0) and mesh.size(dim) > 1]
        size = fused if _FUSED.search(name) else query_size
        if not divided or weight.shape[0] == size:
            continue
        if len(divided) > 1 or weight.to_local().shape[0] != size or weight.shape[0] != size * mesh.size(divided[0]):
            raise ValueError(
                "model must divide whole heads among processes, the same number to each, along one dimension of a mesh; got "
                f"'{name}' of shape {tuple(weight.shape)} with placements {weight.placements} for {query.shape[1]} heads of "
                f"{query.shape[3]}"
            )
        return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[divided[0]]]
    return None


def on_mesh(mesh: Any, heads: Sequence[Tensor | None], masks: Mapping[str, Any], *carried: Tensor | None) -> tuple[Any, ...]:
    """`heads`, `masks` and each of `carried` as DTensors; without a mesh, unchanged. heads: (B, H, N, D), this process's part.
    carried: equal in all processes."""
    if mesh is None:
        return heads, masks, *carried
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def placed(x: Any, placement: Any) -> Any:
        return DTensor.from_local(x, mesh, [placement], run_check=False) if isinstance(x, Tensor) else x

    def divided(mask: Any) -> bool:
        """Whether a mask has an entry for each head of this process."""
        return mask.ndim > 2 and heads[0] is not None and mask.shape[-3] == heads[0].shape[1] > 1

    def place_of(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        return Shard(0) if name == "sink" else Shard(x.ndim - 3) if name == "group_bias" or divided(x) else Replicate()

    return (
        tuple(placed(x if x is None else Defined.apply(x), Shard(1)) for x in heads),
        {name: placed(x, place_of(name, x)) for name, x in masks.items()},
        *(placed(x, Replicate()) for x in carried),
    )


def local(x: Any) -> Tensor:
    """A tensor, or this process's part of a DTensor."""
    return x.to_local() if is_dtensor(x) else x


def mean_over(mesh: Any, mean: Tensor) -> Tensor:
    """The mean over all heads, from `mean` over this process's heads."""
    if mesh is None:
        return mean
    import torch.distributed as dist

    dist.all_reduce(mean, group=mesh.get_group())
    return mean.div_(mesh.size())


@dataclass(frozen=True, eq=False)
class HeadShare:
    """The heads of one attention call that this process has: an equal part of all `heads`, in the order of the processes of
    `mesh`; without a mesh, all of them."""

    heads: int
    mesh: Any = None

    @property
    def count(self) -> int:
        return self.heads if self.mesh is None else self.heads // self.mesh.size()

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's heads among all of them, which lie along dimension `dim`. Each process gets the whole gradient."""
        return x if self.mesh is None else _Part.apply(x, self, dim)

    def indices(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some heads (K,), int64, that this process has: their indices in `heads`, and their numbers in this process."""
        if self.mesh is None:
            return torch.arange(len(heads)), heads
        first = self.mesh.get_local_rank() * self.count
        places = ((heads >= first) & (heads < first + self.count)).nonzero()[:, 0]
        return places, heads[places] - first

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All heads, of this process's heads `x`. All processes have to call it."""
        if self.mesh is None:
            return x
        import torch.distributed as dist

        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.mesh.size())]
        dist.all_gather(parts, x.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, dim)


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: HeadShare, dim: int) -> Tensor:
        ctx.share, ctx.dim = share, dim
        return x.chunk(share.mesh.size(), dim)[share.mesh.get_local_rank()].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.share.whole(grad, ctx.dim), None, None
