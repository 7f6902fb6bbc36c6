"""Which Triton kernels a call launches, and in which tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

Launch = Callable[[], Any]  # a launch with its arguments, which stay alive
SIZES = {*(f"BLOCK_{what}" for what in ("Q", "KV", "EDGE", "T", "G", "I", "J", "K")), "AHEAD"}
Tile = dict[str, Any]  # "kernel", its name, and the whole numbers that it is compiled with: BLOCK_Q, num_warps, num_stages, ...


@contextmanager
def watching(see: Callable[[Any, Mapping[str, Any], Launch], Any]) -> Iterator[None]:
    """`see(kernel, named arguments, launch)` in place of each launch."""
    from triton.runtime.jit import KernelInterface

    before = KernelInterface.__getitem__

    def watched(kernel: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **named: see(kernel, named, lambda: before(kernel, grid)(*args, **named))

    KernelInterface.__getitem__ = watched
    try:
        yield
    finally:
        KernelInterface.__getitem__ = before


@contextmanager
def recording() -> Iterator[list[Tile]]:
    """The list takes the tile of each launch inside, once; none where Triton is not installed."""
    tiles: list[Tile] = []
    if find_spec("triton") is None:
        yield tiles
        return

    def see(kernel: Any, named: Mapping[str, Any], launch: Launch) -> Any:
        tile = tile_of(kernel, named)
        if tile not in tiles:
            tiles.append(tile)
        return launch()

    with watching(see):
        yield tiles


def tile_of(kernel: Any, named: Mapping[str, Any]) -> Tile:
    """The whole numbers among a launch's options, and the sizes of its tiles. Sizes and strides of tensors are arguments."""
    constants: dict[str, Any] = getattr(named.get("C"), "_asdict", dict)()
    tile = {name: x.value for name, x in constants.items() if name in SIZES and x.value > 0}
    types = kernel.fn.__annotations__
    options = {
        name: x
        for name, x in named.items()
        if type(x) is int and (name not in kernel.arg_names or "constexpr" in str(types.get(name)))
    }
    return {"kernel": kernel.fn.__name__, **tile, **options}
