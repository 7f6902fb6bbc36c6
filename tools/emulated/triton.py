"""The package's Triton kernels on CPU tensors: ptx.triton emulates their launches.

with tools.emulated.triton.emulated(90) as launches:
    va.score_attention(query, key, value, backend="triton")
print(launches[0].executed)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ptx.triton
from ptx.running.launch import Launch
from ptx.running.reports import Options
from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu
from vlattn_fast.kernels import _configurations


@contextmanager
def emulated(
    architecture: int, options: Options | None = None, *, strict: bool = True, keep: bool = True
) -> Iterator[list[Launch]]:
    """Within it backend="triton" takes CPU tensors, and tiles are those of the GPU. See ptx.triton.emulated."""
    with ExitStack() as stack:
        launches = stack.enter_context(ptx.triton.emulated(architecture, options, strict=strict, keep=keep))
        stack.callback(run_gpu_kernels_on_cpu, run_gpu_kernels_on_cpu(OnCpu(divmod(architecture, 10))))
        stack.callback(setattr, _configurations, "TARGET", _configurations.TARGET)
        _configurations.TARGET = f"sm_{architecture}"
        yield launches
