"""Models whose attention heads several processes share (tensor parallelism): which mesh shares them, and means over all heads.

Inside such a model each process sees its own heads as plain tensors; the parameters of the projections are DTensors, whose
placements say how the heads are divided. FSDP's parameters are whole while the layer that they belong to runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlattn_fast.ops._shards import Defined, is_dtensor

_OF_QUERIES = re.compile(r"q[^.]*\.weight$|in_proj_weight$")  # q_proj, query, to_q, Wqkv, query_key_value, in_proj_weight
_FUSED = re.compile(r"kv|key_value|in_proj")  # of query, key and value


def has_dtensors(model: nn.Module) -> bool:
    return any(is_dtensor(parameter) for parameter in model.parameters())


def heads_mesh(module: nn.Module, query: Tensor, key: Tensor) -> Any:
    """The one-dimensional mesh that divides the heads of query (B, H, N, D) and key, which `module` attends with; None = this
    process has all heads. ValueError where the placements of the module's parameters contradict the size of `query`."""
    of_queries = query.shape[1] * query.shape[3]
    fused = of_queries + 2 * key.shape[1] * key.shape[3]
    for name, parameter in module.named_parameters():
        if not (is_dtensor(parameter) and _OF_QUERIES.search(name)):
            continue
        weight: Any = parameter
        mesh = weight.device_mesh
        divided = [dim for dim, place in enumerate(weight.placements) if place.is_shard(0) and mesh.size(dim) > 1]
        size = fused if _FUSED.search(name) else of_queries
        if not divided or weight.shape[0] == size:
            continue
        if len(divided) > 1 or weight.to_local().shape[0] != size:
            raise ValueError(
                f"model must divide whole heads among processes, along one dimension of a mesh; got '{name}' of shape "
                f"{tuple(weight.shape)} with placements {weight.placements} for {query.shape[1]} heads of {query.shape[3]}"
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
        return isinstance(mask, Tensor) and mask.ndim > 2 and heads[0] is not None and mask.shape[-3] == heads[0].shape[1] > 1

    def place_of(name: str, x: Any) -> Any:
        return Shard(0) if name == "sink" else Shard(x.ndim - 3) if divided(x) else Replicate()

    return (
        tuple(placed(x if x is None else Defined.apply(x), Shard(1)) for x in heads),
        {name: placed(x, place_of(name, x)) for name, x in masks.items()},
        *(placed(x, Replicate()) for x in carried),
    )


def local(x: Any) -> Tensor:
    """A tensor, or this process's part of a DTensor."""
    return x.to_local() if is_dtensor(x) else x


def mean_over(mesh: Any, mean: Tensor) -> Tensor:
    """The mean over all heads, in place of `mean` over this process's heads."""
    if mesh is None:
        return mean
    import torch.distributed as dist

    dist.all_reduce(mean, group=mesh.get_group())
    return mean.div_(mesh.size())
