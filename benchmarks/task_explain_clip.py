"""Explain the pictures of a batch with a vision tower of CLIP ViT-L/14@336's size: see _explain.py."""

from vlattn_fast.benchmarks._explain import build
from vlattn_fast.benchmarks._measure import Benchmark
from vlattn_fast.benchmarks._workloads import CLIP_TOWER

BENCHMARKS = [Benchmark(__name__, "relevancy", CLIP_TOWER, build)]
