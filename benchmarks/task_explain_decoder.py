"""Explain the next token of a causal decoder of LLaVA-7B's size: see _explain.py."""

from ._explain import build
from ._measure import Benchmark
from ._workloads import LLAVA_DECODER

BENCHMARKS = [Benchmark(__name__, "relevancy", LLAVA_DECODER, build)]
