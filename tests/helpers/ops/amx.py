"""A stand-in for torch's products of 16-bit numbers on a CPU with AMX, which read beyond the rows (docs/developers/bugs.md)."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OPS = torch.ops.aten
_FIRST_OPERAND = {_OPS.mm: 0, _OPS.bmm: 0, _OPS.addmm: 1, _OPS.baddbmm: 1}
TILE = 32  # numbers of 16 bits in a row of a tile


class AmxProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it a row of a product in 16 bits is NaN where Inf or NaN stands in memory behind the row of the operand, up to a
    multiple of 32 numbers. An operand whose rows do not lie along the sum is copied by the kernel, and has no such fault.

    `products`: how many products in 16 bits there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vlattn":  # an operator of ours is Python: the products are within it
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        place = _FIRST_OPERAND.get(func.overloadpacket)
        if place is not None and result.dtype.itemsize == 2:
            self.products += 1
            a, b = args[place : place + 2]
            result = torch.where(_reads_no_number(a)[..., :, None] | _reads_no_number(b.mT)[..., None, :], torch.nan, result)
        return result


def _reads_no_number(x: Tensor) -> Tensor:
    """(..., n): whether the kernel reads an Inf or a NaN behind a row of x (..., n, K)."""
    nothing = torch.zeros(x.shape[:-1], dtype=torch.bool)
    size = x.shape[-1]
    if size % TILE == 0 or x.numel() == 0 or x.stride(-1) != 1:
        return nothing
    memory = x.detach().new_empty(0).set_(x.untyped_storage())
    place = torch.arange(memory.numel()).as_strided(x.shape[:-1], x.stride()[:-1], x.storage_offset())
    behind = place[..., None] + torch.arange(size, size + -size % TILE)
    return (~memory[behind.clamp(max=memory.numel() - 1)].isfinite() & (behind < memory.numel())).any(-1)
