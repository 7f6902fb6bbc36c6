"""A plugin of pytest: the CPU kernels run on the threads of threads.cpp, in the library that VLATTN_OWN_THREADS names.

torch stays at one thread. Its own threads are not built for the sanitizer, which would report what they do to one another.
"""

import ctypes
import os

import torch

from vlattn_fast.backends import native


def pytest_configure() -> None:
    threads = ctypes.CDLL(os.environ["VLATTN_OWN_THREADS"])
    native._library().vlattn_set_threads(threads.own_parallel_for, threads.own_get_num_threads)
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None
