"""Explain the pictures of a batch with a vision tower of CLIP ViT-L/14@336's size: see _explain.py."""

from ._explain import build
from ._measure import Benchmark
from ._workloads import CLIP_TOWER

BENCHMARKS = [Benchmark(__name__, "relevancy", CLIP_TOWER, build)]
