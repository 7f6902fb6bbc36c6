"""Explain the next token of a causal decoder of LLaVA-7B's size: see _explain.py."""

from vlattn_fast.benchmarks._explain import build
from vlattn_fast.benchmarks._measure import Benchmark
from vlattn_fast.benchmarks._workloads import LLAVA_DECODER

BENCHMARKS = [Benchmark(__name__, "relevancy", LLAVA_DECODER, build)]
