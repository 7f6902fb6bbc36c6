"""A plugin of pytest: the CPU kernels run on the threads of threads.cpp, in the library that VLATTN_OWN_THREADS names."""

from __future__ import annotations

import ctypes
import os

from vlattn_fast import _native


def pytest_configure() -> None:
    threads = ctypes.CDLL(os.environ["VLATTN_OWN_THREADS"])
    _native._library().vlattn_set_threads(threads.own_parallel_for, threads.own_get_num_threads)
