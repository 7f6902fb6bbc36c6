"""The rates of a machine, a second: operations of large products, bytes, exponentials. A CPU's are measured: those of arithmetic
once a process and number type, that of memory at each call, since other programs share it. Those of GPUs are constants of their
data sheets."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vlattn_fast._ground.origin import device_name
from vlattn_fast.backends import native

CLOCK, SMS = 1.83e9, 132  # of an H200 and an H100; docs/developers/kernels.md names the sources
OPERATIONS_OF_TILES = 2 * 16 * 16 * 32  # a product of AMX tiles
SIDE, CHANNELS = 2048, 256  # of the products and the convolution that are measured
LEAST_SECONDS, LEAST_CALLS = 0.3, 5  # of a measurement, whose fastest call counts


class Rates(NamedTuple):
    products: float  # FLOP/s
    memory: float  # bytes/s
    exponentials: float
    peaks: Mapping[str, float] = MappingProxyType({})  # FLOP/s of instructions on registers, of which the most may be `products`

    def limit(self, passes: Sequence[Sequence[float]]) -> tuple[float, str]:
        """The least seconds of passes, each a Pass of _measure.py, and the rate, or the peak, that most of them is due to."""
        by = dict.fromkeys(self._fields[:3], 0.0)
        for work in passes:
            seconds, rate = max(zip((x / rate for x, rate in zip(work, self[:3], strict=True)), by, strict=True))
            by[rate] += seconds
        most = max(by, key=by.__getitem__)
        reached = (name for name, peak in self.peaks.items() if most == "products" and peak == self.products)
        return sum(by.values()), next(reached, most)


# In bfloat16, by torch: a product of 8,192 rows, and a copy
H200 = Rates(790e12, 4.3e12, 16 * CLOCK * SMS)
# Of the data sheets, which no program reaches: products of 16 bits on tensor cores without sparsity, and memory
TENSOR_CORES = 989e12
GPUS = {
    name: Rates(TENSOR_CORES, memory, H200.exponentials, {"tensor cores": TENSOR_CORES})
    for name, memory in (("H200", 4.8e12), ("H100 80GB HBM3", 3.35e12))
}


def rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """None for a GPU that GPUS does not have."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        products, exponentials = _arithmetic(dtype, threads)
        peaks = {name: peak * threads for name, peak in _peaks(dtype).items()}
        return Rates(max([products, *peaks.values()]), _memory(), exponentials, peaks)
    known = next((known for name, known in GPUS.items() if name in device_name(device)), None)
    return known and known._replace(peaks={**known.peaks, "torch's product": _product_on_gpu()})


@functools.cache
def _product_on_gpu() -> float:
    """FLOP/s of torch's product of 8,192 rows in bfloat16."""
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def product() -> None:
        square @ square
        torch.cuda.synchronize()

    return 2 * len(square) ** 3 / _fastest(product)


@functools.cache
def _arithmetic(dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """Products by torch's large matrix product or convolution (on an AMD EPYC the float32 product has half of the convolution's
    rate), and exponentials by torch's exp2 in the cache. Where torch has no instruction for products of this type (one of SIDE
    rows then takes half a minute), the numbers are widened, as kernels do."""
    small = torch.randn(256, 256)
    narrow = small.to(dtype)
    if narrow.itemsize < small.itemsize and _fastest(lambda: narrow @ narrow) > 2 * _fastest(lambda: small @ small):
        dtype = torch.float32
    square, numbers = torch.randn(SIDE, SIDE).to(dtype), torch.rand(2**18)
    image, weight = torch.randn(2, CHANNELS, 32, 32).to(dtype), torch.randn(CHANNELS, CHANNELS, 3, 3).to(dtype)
    product = 2 * len(square) ** 3 / _fastest(lambda: square @ square)
    convolution = 2 * image.numel() * weight[0].numel() / _fastest(lambda: F.conv2d(image, weight, padding=1))
    powers = torch.empty_like(numbers)
    return max(product, convolution), len(numbers) / _fastest(lambda: torch.exp2(numbers, out=powers))


@functools.cache
def _peaks(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of one core by loops over registers: of FMA, which takes every number type as float32, and in bfloat16 of pairs
    and of AMX tiles, where the kernels take them. Torch's product has 0.4 of the last."""
    if not native.library.exists:
        return {}

    def measured(name: str) -> float:
        return float(native.library.function(f"vlattn_{name}", ctypes.c_double)())

    peaks = {"FMA": 2 * measured("multiply_adds_a_second")}
    if dtype == torch.bfloat16:
        peaks["pairs"] = peaks["FMA"] * measured("rate_of_pairs")
        if native.instruction_set() == "amx":
            peaks["AMX"] = OPERATIONS_OF_TILES * measured("amx_tile_products_a_second")
    return {name: peak for name, peak in peaks.items() if peak}


def _memory() -> float:
    """Bytes by torch's sum over more than the caches hold."""
    numbers = torch.ones(2**26)
    return numbers.nbytes / _fastest(numbers.sum)


def _fastest(call: Callable[[], Any]) -> float:
    times: list[float] = []
    while len(times) < LEAST_CALLS or sum(times) < LEAST_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
