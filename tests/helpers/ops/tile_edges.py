"""The sizes at which tests of edges run: where tiles and blocks of each backend's kernels end, and why.

A size stands beside an edge for what a kernel may do wrong there: one less leaves a row over, one more begins a tile, and the
edge itself fills one. Pairs are (queries, keys). `covering` and `in_turn` combine further choices with them.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

Pairs = list[tuple[int, int]]

# csrc/cpu/: queries come in groups of 16, up to 64 a tile (48 without AVX-512, and where keys come in blocks); one or two queries
# are a case apart. Up to 768 keys are one block, more come in blocks of 512.
CPU_FEW: Pairs = [(1, 1), (1, 18), (2, 19)]
CPU_GROUPS: Pairs = [(15, 17), (16, 16), (17, 15)]
CPU_TILES: Pairs = [(47, 48), (48, 49), (49, 47), (63, 64), (65, 63), (96, 97), (97, 96), (128, 129)]
CPU_BLOCKS: Pairs = [(3, 767), (17, 768), (2, 769), (1, 1024), (5, 1025), (20, 1300), (49, 800), (65, 769)]
CPU = CPU_FEW + CPU_GROUPS + CPU_TILES + CPU_BLOCKS
CPU_SEVERAL = ((60, 70), (2, 70), (20, 800), (2, 800))  # several tiles, few queries, several blocks, both
CPU_COPIED = (100, 800)  # tiles, and blocks, of keys that are copied: halves, padding

# kernels/: a tile has 32 queries and 32 keys in float32, of hidden units 16. In 16 bits it has 64 of each, beyond 512 keys 128;
# those of maps hold whole rows of up to 64, 128 and 256 keys. 577 tokens are CLIP ViT-L/14@336's.
TRITON: Pairs = [(1, 1), (31, 33), (32, 32), (33, 64), (65, 31)]
TRITON_16_BIT: Pairs = [(64, 64), (63, 65), (65, 128), (129, 130), (65, 256), (33, 257), (20, 577)]

# csrc/cuda/: score_attention has tiles of 16 and of 32 queries and keys.
CUDA_FEW: Pairs = [(1, 1), (15, 17), (16, 31), (17, 32), (31, 33), (32, 63), (33, 64)]
CUDA: Pairs = [*CUDA_FEW, (63, 65), (64, 16), (65, 1), (100, 15), (160, 40), (40, 160)]


def in_turn(first: Sequence[Any], second: Sequence[Any], each: int = 2) -> list[tuple[Any, Any]]:
    """Each of `first` with `each` of `second`, which take turns: for choices that do not act on each other."""
    return [(one, second[(n * each + k) % len(second)]) for n, one in enumerate(first) for k in range(each)]


def covering(*choices: Sequence[Hashable]) -> list[tuple[Any, ...]]:
    """Few combinations of one choice each, in which every two choices of different kinds meet."""
    every = list(itertools.product(*choices))

    def pairs(row: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(enumerate(row), 2))

    left, chosen = set().union(*map(pairs, every)), []
    while left:
        chosen.append(max(every, key=lambda row: len(pairs(row) & left)))
        left -= pairs(chosen[-1])
    return chosen
