"""A plugin of pytest: the CPU kernels of `amx` on a processor without AMX, by the library that VLATTN_TRAPPED_TILES names."""

import ctypes
import os

from vlattn_fast.backends import native


def pytest_configure() -> None:
    traps, others = _traps(), native._available()
    traps.trap_tiles()
    native._available = lambda: ["amx", *others]
    native.instruction_set.cache_clear()
    assert native.library.function("vlattn_amx_is_right", ctypes.c_bool)()


def pytest_sessionfinish() -> None:
    print(f"\nproducts of tiles: {_traps().products_of_tiles()}")


def _traps() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["VLATTN_TRAPPED_TILES"])
    library.products_of_tiles.restype = ctypes.c_uint64
    return library
