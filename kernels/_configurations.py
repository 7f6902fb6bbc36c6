"""Tiles, warps and stages of the launches: a table with a reason per line.

A launch takes the first of its kernel's lines whose conditions it meets. A reason that names an H100 was measured there: the
part "tiles" of benchmarks/results/gpu.json has 180 times of three kernels, and a reason "as for" carries them over to a similar
kernel. An SM should hold two programs or more. With one program, 64 features and products ahead a forward pass took twice as
long. No other line was measured. Their tiles are the largest of those tried that compile for sm_90 within 99 KB of shared
memory, which every GPU since sm_80 has, or, where the line names architectures, within theirs, and without register spills.
Backward passes spill all the same, as tools.compiled.triton shows, and some forward passes, 8 to 416 bytes: additive scores
in float32, and dot products of 65 to 128 features in float32, of 192 under Triton 3.6, of more than 128 in bfloat16 under a
float mask, and of about 200 keys that a program has all of. Tiles of theirs that do not spill take 13 to 20 % more
instructions, spills included. With more than 128 features in float32 score_attention's forward pass spills up to 992 bytes, 5 %
of its instructions on sm_90. None of the tiles tried was without spills, and the one with half of them took a third more
instructions. r Abar of one row of 64 features in float32 spills 136 bytes on sm_90: 32 keys instead of 64 do not, and take 60 %
more instructions. Behind cosine it spills 80 bytes, and maps behind other scores spill 8 to 80 in float32 or under a mask.
Additive scores in float32 keep one number out of registers while the loop over keys runs. Statistics of
paged keys in float32 spill 8 to 104 bytes with 128 features, in the smallest tiles, and up to 784 with 256. A reason says what
else decided. `make gpu PARTS=tiles` times others on a device, and stores what is faster in configurations.json, by architecture.
Those come before the lines here.

Sizes that follow from the data, as of tiles that hold whole rows, stay with the kernels, and so do the warps of small kernels.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from vlattn_fast._ground.score_kinds import UNIT_KINDS

Config = dict[str, int]
Launch = TypeVar("Launch")
# by architecture, as "sm_90"
MEASURED: dict[str, dict[str, Config]] = json.loads(Path(__file__).with_name("configurations.json").read_text())
OVERRIDES: dict[str, Config] = {}  # `make gpu PARTS=tiles` tries these
TARGET: str | None = None  # the architecture that kernels are compiled for without a device


class Line(NamedTuple):
    config: Config
    reason: str
    conditions: dict[str, Any]  # by fact: the largest number, one of a tuple, or the value itself

    def holds(self, facts: dict[str, Any]) -> bool:
        return all(_meets(facts[name], condition) for name, condition in self.conditions.items())


def _meets(fact: Any, condition: Any) -> bool:
    if isinstance(condition, tuple):
        return fact in condition
    return fact <= condition if type(condition) is int else fact == condition


def configuration(operator: str, kernel: str, **facts: Any) -> Config:
    """The configuration of a launch: as it was measured on this kind of device, or by the table. It is shared: do not change it.

    Measured ones have the metadata in their names, in the order of the call. A number stands there for all up to the next power
    of two.
    """
    architecture = _current()
    if not (OVERRIDES or MEASURED):
        return by_table(operator, kernel, architecture=architecture, **facts)
    shown = (1 << max(x - 1, 0).bit_length() if type(x) is int else x for x in facts.values())
    name = " ".join(map(str, (operator, kernel, *shown)))
    known = MEASURED.get(architecture or "", {}).get(name) or by_table(operator, kernel, architecture=architecture, **facts)
    return OVERRIDES.get(name, known) if known else known  # where no kernel is to run, none is tried


@functools.lru_cache(maxsize=4096)
def by_table(operator: str, kernel: str, **facts: Any) -> Config:
    return next(line.config for line in LINES[f"{operator} {kernel}"] if line.holds(facts))


def cached_launch(make: Callable[..., Launch]) -> Callable[..., Launch]:
    """Returns `make` with a cache: launches with the same metadata are computed once, since a model asks for the same in each of
    its layers. While OVERRIDES are tried, nothing is cached."""

    @functools.lru_cache(maxsize=4096)
    def kept(architecture: str | None, *facts: Any) -> Launch:
        return make(*facts)

    return lambda *facts: make(*facts) if OVERRIDES else kept(_current(), *facts)


def _current() -> str | None:
    """The architecture whose configurations hold."""
    return architecture(torch.cuda.current_device()) if torch.cuda.is_initialized() else TARGET


def multiplies_biases() -> bool:
    """Whether a product adds a bias of groups on the current device. On sm_80 the kernels would spill up to 528 bytes; on sm_100
    none was compiled. Triton's interpreter has no architecture."""
    return _current() in (None, "sm_90")


@functools.cache
def architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{0 if major == 10 else minor}"  # 10.3 has the tensor memory and the shared memory of 10.0


def _line(tile: tuple[int, ...], reason: str, names: str = "BLOCK_Q BLOCK_KV num_warps num_stages", **conditions: Any) -> Line:
    return Line(dict(zip(names.split(), tile, strict=True)), reason, conditions)


_ahead = functools.partial(_line, names="BLOCK_Q BLOCK_KV num_warps num_stages AHEAD")
_whole = functools.partial(_line, names="BLOCK_Q num_warps num_stages")  # a tile has all keys
_attend = functools.partial(_line, names="BLOCK_Q BLOCK_KV BLOCK_D num_warps num_stages")
_matmul = functools.partial(_line, names="BLOCK_I BLOCK_J BLOCK_K num_warps num_stages")
FLOAT32 = torch.float32

_ASYNCHRONOUS = ("sm_90", "sm_100")  # products run beside other instructions; a block may have 227 KB of shared memory

# `size` counts the features of a row, `masked` says that there is an attn_mask.
_FLOAT32 = "three parts of each operand take shared memory and registers"
_PARTS = "parts of wide rows are split again for each tile of pairs, which is large therefore; some of the sums spill"
_MASK = "addresses of attn_mask take registers"
_ONCE = "four warps compute a tile of 64 rows once, eight would compute it twice"
_AHEAD = "products of 128 features take longer than instructions: the next tile's scores are computed under this one's softmax"
_FOUR = "measured on an H100: an SM has three or four programs, which fill one another's waits"
_TWO = "norms take registers: an SM would have one program of eight warps, and it should have two"
_ESTIMATED = "an SM holds two programs or three, which by the estimate of tools/compiled/tile_times.py take less time"
_TENSOR_MEMORY = "64 rows have their products in tensor memory: eight warps spill nothing, and 32 rows 560 to 704 bytes"
_AS_DIVERGENCE = "as for attention_divergence, whose kernels have the same products"
_THREE = "estimated: 0.231 cycles a pair by three programs an SM of 164 registers a thread, 0.294 by one of 128 x 64"
_THIRD = "as for dot products on an H100: a third stage saves an eighth of the time or more"
_LONG = "16,384 tokens took 5,962 µs on an H100, and 3,405 by cuDNN; between 704 and these none was measured"
_FEWER = "64 keys take fewer instructions a pair than 32"
_HALF = "128 keys read Q and dO half as often as 64, copied two tiles ahead, since an SM holds one block; it spills a few bytes"
_TWO_ROWS = "queries and their tangents stay in registers"
_FOUR_TILES = "keys, values and their tangents: of 64 keys of 128 features a stage would have 64 KB"
_WIDE = "sums over rows of 128 features take twice the registers of 64"
_WIDER = "sums over rows of 256 features take four times the registers of 64"
_UNITS = "reciprocals of many pairs a thread hide one another's latency"
_STAGED_NORMS = "norms are staged as well, and a third stage of them takes instructions"
_NORMS = "gradients of the norms take registers"
_NORMS_READ = "norms take registers"
_SHORT, _SHORT_KEYS = (f"128 {what} would be padding in short sequences" for what in ("rows", "keys"))
_ONE_WARP = "heads of a token fill 16 rows at most in most models: more warps would repeat them. Keys and their blocks are staged"
_OWNED = "a thread has one unit of 32 keys: it spills, but not in the loops over units. One stage: the launch says why"

_UNITS_ROWS = [
    _line((32, 16, 4, 1), "float32 sums more exactly, in more registers", score=UNIT_KINDS, dtype=FLOAT32, size=64),
    _line((32, 16, 8, 1), "float32 sums more exactly, in more registers", score=UNIT_KINDS, dtype=FLOAT32),
    _line((64, 32, 4, 1), _UNITS, score=UNIT_KINDS, size=128),
    _line((32, 16, 8, 1), _WIDER, score=UNIT_KINDS),
]
# Tiles of 64 rows for sm_90 alone: on sm_100 they take tensor memory, and Triton 3.6 compiles backward passes to empty kernels
_FLOAT32_128 = [
    _line((64, 32, 4, 1), _FLOAT32, architecture="sm_90", dtype=FLOAT32, size=128),
    _line((32, 32, 4, 1), _FLOAT32, dtype=FLOAT32, size=128),
]
_FLOAT32_WHOLE = [*_FLOAT32_128, _line((16, 16, 4, 1), _FLOAT32, dtype=FLOAT32)]
_FLOAT32_ROWS = [
    *_FLOAT32_128,
    _line((64, 64, 4, 1), _PARTS, architecture="sm_90", dtype=FLOAT32),
    _line((32, 64, 4, 1), _PARTS, dtype=FLOAT32),
]
_FLOAT32_64 = _line((64, 32, 4, 1), _FLOAT32, dtype=FLOAT32, size=64)
_FLOAT32_TWO_SIDES = [_FLOAT32_64, _line((64, 16, 4, 1), _FLOAT32, architecture="sm_90", dtype=FLOAT32, size=128)]
_FLOAT32_FORWARD, _FLOAT32_WHOLE_FORWARD = [_FLOAT32_64, *_FLOAT32_ROWS], [_FLOAT32_64, *_FLOAT32_WHOLE]
_FLOAT32_KEYS = [
    _line((32, 64, 4, 1), _FLOAT32, architecture="sm_90", dtype=FLOAT32, size=128),
    _FLOAT32_128[1],
    _line((64, 64, 4, 1), _PARTS, architecture="sm_90", dtype=FLOAT32),
    _line((64, 32, 4, 1), _PARTS, dtype=FLOAT32),
]
_FLOAT32_BACKWARD_KV = [
    *_FLOAT32_KEYS[:2],
    # two sums of 64 rows of 192 features are 192 numbers a thread: beside 64 x 64 pairs ptxas has too few registers
    _line((32, 128, 8, 1), "a tile of more pairs makes ptxas serialise products", architecture="sm_90", dtype=FLOAT32, size=192),
    _line((64, 128, 8, 1), _PARTS, architecture="sm_90", dtype=FLOAT32),
    _FLOAT32_KEYS[-1],
]
_ALL = "all keys of a head: one kernel has all gradients, and five products for seven"
_READ_ONCE = "a program reads all keys of a head once"
# a program goes over all queries: with more of them there are too few programs
_WHOLE: dict[str, Any] = {"architecture": (None, "sm_90"), "dtype": (torch.bfloat16, torch.float16), "N": 256}
_RELEVANCY_ROWS = [
    *_FLOAT32_ROWS,
    _line((64, 32, 4, 2), _MASK, masked=True, size=128),
    _line((64, 64, 4, 2), _ONCE, size=64),
    _line((64, 32, 4, 2), _WIDE, size=128),
    _line((32, 32, 4, 1), _WIDER),
]
_CONGRUENCE_TILES = [  # rows are longer than a tile
    *_FLOAT32_WHOLE_FORWARD,
    _line((64, 64, 4, 1), _ONCE, size=128),
    _line((32, 32, 4, 1), _WIDER),
]

LINES: dict[str, list[Line]] = {
    # from how many tokens on cuDNN has the forward pass of plain dot products, as many queries as keys; none: ours always has it
    "score_attention cudnn": [
        _line((1024,), "not measured: its warps there copy or multiply", names="FROM", architecture="sm_100", size=128),
        _line((), "with 577 tokens cuDNN took 3 % longer on an H100; no other length was measured", names="", size=64),
        _line((8192,), _LONG, names="FROM", architecture="sm_90", is_causal=True, size=128),
        _line((), "not measured", names=""),
    ],
    "score_attention forward": [
        *_UNITS_ROWS,
        *_FLOAT32_FORWARD,
        _line((64, 64, 4, 1), _MASK, masked=True, size=64),
        _line((64, 32, 4, 1), _MASK, masked=True),
        _line((64, 64, 4, 2), _STAGED_NORMS, score="cosine", N=512, size=64),
        _line((64, 64, 4, 2), _TWO, architecture="sm_90", score="cosine", size=64),
        _line((128, 64, 8, 2), _STAGED_NORMS, score="cosine", size=64),
        _line((64, 64, 4, 3), _SHORT, N=512, size=64),
        _line((64, 64, 4, 2), _SHORT, N=512, size=128),
        _line((64, 64, 4, 3), _FOUR, architecture="sm_90", size=64),
        _ahead((64, 32, 4, 3, 1), _FOUR, architecture="sm_90", N=1024, size=128),
        _line((128, 64, 8, 3), "128 rows read K and V half as often as 64", size=64),
        _line((64, 32, 4, 3), _THREE, architecture="sm_90", size=128),
        _ahead((128, 64, 8, 2, 1), _AHEAD, architecture="sm_100", size=128),
        _line((128, 64, 8, 2), "as for 64 features, but a third stage exceeds shared memory", size=128),
        _line((64, 32, 4, 1), _WIDER),
    ],
    "score_attention backward_q": [
        *_UNITS_ROWS,
        *_FLOAT32_ROWS,
        _line((64, 32, 4, 2), _MASK, masked=True, size=128),
        _line((64, 64, 4, 3), _ONCE, score="dot", size=64),
        _line((64, 64, 4, 2), _NORMS, score="cosine", size=64),
        _line((64, 64, 4, 3), _THIRD, architecture="sm_90", size=64),
        _line((64, 64, 4, 2), _ONCE, size=64),
        _line((64, 64, 4, 2), _FEWER, score="dot", size=128),
        _line((64, 32, 4, 2), _WIDE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "score_attention backward_kv": [
        _line((32, 32, 4, 1), "float32 sums more exactly, in more registers", score=UNIT_KINDS, dtype=FLOAT32, size=64),
        _line((32, 16, 8, 1), "float32 sums more exactly, in more registers", score=UNIT_KINDS, dtype=FLOAT32),
        _line((64, 64, 4, 1), _OWNED, score=UNIT_KINDS, size=64),
        _line((64, 64, 8, 1), _OWNED, score=UNIT_KINDS, size=128),
        _line((32, 16, 8, 1), _WIDER, score=UNIT_KINDS),
        *_FLOAT32_BACKWARD_KV,
        _line((32, 32, 4, 2), _NORMS, score="cosine", masked=True, size=128),
        _line((32, 64, 4, 2), _MASK, masked=True, size=128),
        _line((64, 64, 4, 2), _NORMS, score="cosine", size=64),
        _line((32, 128, 4, 3), "measured on an H100; it spills 8 to 16 bytes", architecture="sm_90", score="dot", size=64),
        _line((32, 64, 4, 3), _THIRD, architecture="sm_90", size=64),
        _line((64, 64, 4, 2), _ONCE, size=64),
        _line((32, 64, 4, 3), _ESTIMATED, architecture="sm_90", score="dot", size=128),
        _line((64, 128, 8, 3), _HALF, architecture="sm_100", score="dot", size=128),
        _line((32, 32, 4, 2), _NORMS, score="cosine", size=128),
        _line((32, 64, 4, 2), _WIDE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "score_attention jvp": [  # masked: also by a bias of groups
        _line((64, 32, 4, 1), _FLOAT32, architecture="sm_90", dtype=FLOAT32),
        _line((32, 32, 4, 1), _FLOAT32, dtype=FLOAT32, masked=False, size=64),
        _line((16, 32, 4, 1), _TWO_ROWS, dtype=FLOAT32, size=128),
        _line((32, 64, 4, 1), _PARTS, dtype=FLOAT32),
        _line((64, 64, 4, 3), _THIRD, architecture="sm_90", masked=False, size=64),
        _line((64, 64, 4, 2), _ONCE, architecture="sm_100", masked=False, size=64),
        _line((64, 32, 4, 2), _FOUR_TILES, architecture=_ASYNCHRONOUS, size=128),
        _line((64, 32, 4, 3), _TWO_ROWS, masked=False, size=64),
        _line((64, 16, 4, 3), _TWO_ROWS, size=64),
        _line((32, 32, 4, 2), _TWO_ROWS, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    # of all keys of a head; relevancy_attention's, too. block_t: as below
    "score_attention forward_whole": [
        _whole((64, 4, 2), _READ_ONCE, **_WHOLE, M=256, size=64),
        _whole((64, 4, 2), _READ_ONCE, **_WHOLE, M=128, size=128),
        _line((), "tiles of keys", names=""),
    ],
    "score_attention backward_whole": [
        _line((32, 64, 4, 2), _ALL, **_WHOLE, block_t=1, M=64, size=64),
        _line((32, 128, 4, 2), _ALL, **_WHOLE, block_t=0, M=128, size=64),
        _line((32, 128, 8, 2), "and a row of r takes registers", **_WHOLE, block_t=1, M=128, size=64),
        _line((32, 256, 8, 2), _ALL, **_WHOLE, block_t=1, M=256, size=64),
        _line((32, 128, 8, 2), _ALL, **_WHOLE, block_t=1, M=128, size=128),
        _line((), "two kernels with tiles of keys", names=""),
    ],
    "relevancy_attention statistics": [*_UNITS_ROWS, *_RELEVANCY_ROWS],
    "relevancy_attention backward_q": [
        *_FLOAT32_ROWS,
        _line((64, 32, 4, 2), _MASK, masked=True, size=128),
        _line((64, 64, 4, 3), _THIRD, architecture="sm_90", size=64),
        _line((64, 64, 4, 2), _FEWER, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "relevancy_attention backward_kv": [  # block_t: rows of r in a program
        *_FLOAT32_BACKWARD_KV,
        _line((32, 64, 4, 3), _THIRD, architecture="sm_90", masked=False, block_t=1, size=64),
        _line((64, 64, 4, 2), _SHORT_KEYS, masked=False, block_t=1, M=512, size=64),
        _line((32, 64, 4, 2), "and a mask's addresses, or rows of r, take registers", M=512, size=64),
        _line((32, 64, 4, 3), _ESTIMATED, architecture="sm_90", size=64),
        _line((64, 128, 8, 2), "128 keys read Q and dO half as often as 64", masked=False, block_t=16, size=64),
        _line((32, 128, 8, 2), "a mask's addresses, or 64 rows of r, take registers", size=64),
        _line((32, 64, 4, 3), _ESTIMATED, architecture="sm_90", masked=False, block_t=1, size=128),
        _line((64, 128, 8, 3), _HALF, architecture="sm_100", masked=False, block_t=1, size=128),
        _line((32, 64, 4, 2), _WIDE, masked=False, block_t=1, size=128),
        _line((16, 64, 4, 2), "and a mask's addresses, or rows of r, take registers", size=128),
        _line((32, 32, 4, 1), _WIDER, block_t=16),
        _line((16, 32, 4, 1), "and 64 rows of r take registers"),
    ],
    "relevancy_attention step": [  # one row of r
        _line((32, 32, 4, 1), _NORMS_READ, score="cosine", dtype=FLOAT32, size=64),
        _line((64, 32, 4, 2), _NORMS_READ, score="cosine", masked=True, size=128),
        _line((64, 64, 4, 1), _FLOAT32, architecture="sm_90", dtype=FLOAT32, size=64),
        _line((32, 64, 4, 1), _FLOAT32, dtype=FLOAT32, size=64),
        *_FLOAT32_ROWS,
        _line((64, 64, 4, 2), _MASK, masked=True, size=128),
        _line((64, 64, 4, 2), _SHORT_KEYS, M=512, size=128),
        _line((64, 64, 4, 3), _ESTIMATED, architecture="sm_90", size=64),
        _line((64, 128, 8, 2), "128 keys read Q and dO half as often as 64", size=64),
        _line((64, 64, 4, 2), _ESTIMATED, architecture="sm_90", size=128),
        _line((64, 128, 8, 2), "128 keys read Q and dO half as often as 64", architecture="sm_100", size=128),
        _line((64, 64, 4, 2), _WIDE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "relevancy_attention step_units": [
        _line((32, 32, 4, 1), "float32 sums more exactly, in more registers", dtype=FLOAT32, size=64),
        _line((32, 16, 8, 1), "float32 sums more exactly, in more registers", dtype=FLOAT32),
        _line((32, 64, 4, 1), _UNITS, size=128),
        _line((32, 16, 8, 1), _WIDER),
    ],
    "relevancy_attention map_of_scores": [
        *_UNITS_ROWS,
        *_FLOAT32_FORWARD,
        _line((64, 32, 4, 1), _MASK, masked=True, size=128),
        _line((64, 64, 4, 2), _ONCE, size=64),
        _line((64, 32, 4, 2), _WIDE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "relevancy_attention map_backward_rows": [
        *_FLOAT32_ROWS,
        _line((64, 32, 4, 2), _MASK, masked=True, size=128),
        _line((64, 64, 4, 2), _ONCE, block_t=16, size=128),
        _line((64, 32, 4, 2), "64 rows of r take registers", size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "relevancy_attention map_backward_q": [
        *_FLOAT32_ROWS,
        _line((64, 32, 4, 2), _MASK, masked=True, size=64),
        _line((64, 64, 4, 2), _ONCE, size=64),
        _line((64, 32, 4, 2), _WIDE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "relevancy_attention map_backward_kv": [
        *_FLOAT32_KEYS,
        _line((32, 64, 4, 2), _MASK, masked=True, size=64),
        _line((64, 64, 4, 2), _ONCE, size=64),
        _line((32, 64, 4, 2), _WIDE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "relevancy_attention map_taken": [
        *_FLOAT32_FORWARD,
        _line((64, 32, 4, 1), "the largest map, its heads and their number take registers", size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    # a tile takes its rows and keys of all heads, so it should be large; one that holds whole rows saves the kernel `rows`
    "attention_map map": [
        *_FLOAT32_FORWARD,
        *(
            line
            # two stages of 128 features exceed shared memory in large tiles; the last two are of sm_90
            for size, stages, by_gradient, by_attention in ((64, 2, 2, 3), (128, 1, 1, 2))
            for line in (
                _line((64, 64, 4, stages), "holds whole rows", M=64, size=size),
                *[_line((64, 32, 4, 2), _ESTIMATED, architecture="sm_90", masked=True, size=64)][: size == 64],
                _line((128, 32, 8, 1), _MASK, masked=True, size=size),
                _line((64, 128, 8, stages), "holds whole rows; P and dP take registers", rule="gradient", M=128, size=size),
                _line((64, 128, 4, stages), "holds whole rows", M=128, size=size),
                _line((64, 64, 4, by_gradient), _ESTIMATED, architecture="sm_90", rule="gradient", size=size),
                _line((128, 64, 8, stages), "P and dP take registers", rule="gradient", size=size),
                _line((64, 256, 8, stages), "holds whole rows", M=256, size=size),
                _line((64, 64, 4, by_attention), _ESTIMATED, architecture="sm_90", size=size),
                _line((128, 128, 8, stages), "reads Q and K least often", size=size),
            )
        ),
        _line((32, 64, 8, 1), "rows of 256 features fill shared memory"),
    ],
    "attention_map rows": [
        *_FLOAT32_FORWARD,
        _line((64, 64, 4, 2), _MASK, masked=True, size=128),
        _line((128, 64, 4, 2), "128 rows read K half as often as 64", size=128),
        _line((32, 32, 4, 1), "rows of 256 features fill shared memory"),
    ],
    "attention_statistics rows": [
        *_FLOAT32_FORWARD,
        _line((64, 32, 4, 1), _MASK, masked=True, size=128),
        _line((64, 64, 4, 2), _SHORT, groups=32, N=512, size=128),
        _line((64, 64, 4, 3), _ESTIMATED, architecture="sm_90", groups=32, size=64),
        _line((128, 64, 8, 2), "128 rows read K half as often as 64", groups=32, size=128),
        _line((64, 64, 4, 2), _ESTIMATED, architecture="sm_90", size=128),
        _line((128, 32, 8, 2), "sums of 64 groups take registers", size=128),
        _line((32, 32, 4, 1), "rows of 256 features fill shared memory"),
    ],
    "attention_statistics received": [
        _line((64, 64, 4, 1), _FLOAT32, dtype=FLOAT32, size=64),
        *_FLOAT32_ROWS,
        _line((64, 64, 4, 2), _MASK, masked=True, size=128),
        _line((64, 64, 4, 2), _SHORT_KEYS, M=512, size=128),
        _line((64, 128, 4, 2), "128 keys read Q half as often as 64", size=128),
        _line((32, 32, 4, 1), "rows of 256 features fill shared memory"),
    ],
    "attention_statistics backward_q": [  # product: gradients of the groups' mass by a matrix product
        *_FLOAT32_WHOLE,
        _line((64, 32, 4, 1), _MASK, masked=True, size=128),
        _line((64, 32, 4, 1), "the product takes registers", product=True, size=128),
        _line((64, 64, 4, 2), _ONCE, size=64),
        _line((64, 64, 4, 1), "two stages of 128 features exceed shared memory", size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "attention_statistics backward_kv": [
        _line((64, 64, 4, 1), _FLOAT32, architecture="sm_90", dtype=FLOAT32, size=64),
        *_FLOAT32_WHOLE,
        _line((64, 64, 4, 1), _MASK, masked=True, size=64),
        _line((32, 64, 4, 1), _MASK, masked=True, size=128),
        _line((64, 32, 4, 1), "the product takes registers", product=True, size=128),
        _line((64, 64, 4, 2), _ONCE, size=64),
        _line((64, 64, 4, 1), "two stages of 128 features exceed shared memory", size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    # size: of the side with more features; two sides take twice the shared memory and registers of one
    "attention_divergence terms": [
        *_FLOAT32_TWO_SIDES,
        _line((64, 16, 8, 1), _TENSOR_MEMORY, architecture="sm_100", dtype=FLOAT32, size=128),
        *_FLOAT32_ROWS[1:],
        _line((64, 32, 4, 3), _ESTIMATED, size=64),
        _line((64, 32, 4, 2), _ESTIMATED, size=128),
        _line((32, 32, 4, 1), "rows of 256 features fill shared memory"),
    ],
    "attention_divergence backward_q": [
        *_FLOAT32_TWO_SIDES,
        *_FLOAT32_WHOLE[1:],
        _line((64, 32, 4, 3), _ESTIMATED, size=64),
        _line((64, 32, 4, 2), _ESTIMATED, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "attention_divergence backward_kv": [
        *_FLOAT32_WHOLE,
        _line((64, 32, 4, 2), _MASK, masked=True, size=64),
        _line((32, 64, 4, 1), _MASK, masked=True, size=128),
        _line((64, 64, 4, 2), _ESTIMATED, size=64),
        _line((64, 64, 4, 1), _ESTIMATED, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    # size: of the indexer. The kernels of attention_divergence, which run as well, have their own lines
    "indexer_divergence rows": [
        *_FLOAT32_TWO_SIDES,
        *_FLOAT32_ROWS[1:],
        _line((64, 64, 4, 2), _AS_DIVERGENCE, size=128),
        _line((32, 32, 4, 1), "rows of 256 features fill shared memory"),
    ],
    "indexer_divergence backward_q": [
        *_FLOAT32_TWO_SIDES,
        *_FLOAT32_WHOLE[1:],
        _line((64, 32, 4, 3), _AS_DIVERGENCE, size=64),
        _line((64, 32, 4, 2), _AS_DIVERGENCE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "indexer_divergence backward_kv": [
        *_FLOAT32_WHOLE,
        _line((64, 64, 4, 2), _AS_DIVERGENCE, size=64),
        _line((64, 64, 4, 1), _AS_DIVERGENCE, size=128),
        _line((32, 32, 4, 1), _WIDER),
    ],
    "indexer_divergence chosen": [
        _line((16, 64, 4, 2), "rows are heads of one query; gathered keys of two steps fit", size=64),
        _line((16, 32, 4, 1), _WIDER),
    ],
    "congruence_loss map": [  # whole: tiles hold the rows of a head
        _whole((64, 8, 2), "eight warps share the registers of whole rows", whole=True, size=64),
        _whole((64, 8, 1), "eight warps share the registers of whole rows", whole=True),
        *_CONGRUENCE_TILES,
    ],
    "congruence_loss gradient": [
        _whole((32, 8, 1), "gradients of the map and of its logarithm take registers", whole=True, kind="iais_singular"),
        _whole((64, 4, 1), _ONCE, whole=True, size=64),
        _whole((32, 4, 1), _WIDE, whole=True),
        *_CONGRUENCE_TILES,
    ],
    "maxsim largest": [
        _line((64, 32, 4, 1), _FLOAT32, architecture="sm_90", dtype=FLOAT32),
        _line((32, 32, 4, 1), _FLOAT32, dtype=FLOAT32),
        _line((64, 64, 4, 2), "a maximum and its place of every 64th token stay in registers", size=128),
        _line((64, 64, 8, 1), "rows of 256 features fill shared memory"),
    ],
    "maxsim query_gradient": [_whole((8, 4, 2), "estimated: 32 queries of 32 words make 128 programs")],
    "maxsim document_gradient": [
        _line((16, 8, 2, 1), "estimated: a tile of tokens is chosen about as often as it has tokens", size=128),
        _line((16, 8, 4, 1), _WIDER),
    ],
    "paged_attention_statistics rows": [  # few: most requests have a token or two
        _line(
            (64, 16, 4, 1), "other tiles of prompts spill", architecture=("sm_80", "sm_90"), dtype=FLOAT32, few=False, size=128
        ),
        _line((16, 16, 1, 1), _FLOAT32, dtype=FLOAT32),
        _line((16, 32, 1, 3), _ONE_WARP, few=True, size=128),
        _line((16, 16, 1, 3), _WIDER, few=True),
        _line((64, 32, 4, 2), "addresses of keys that lie anywhere take registers; an SM has three programs by these", size=128),
        _line((64, 32, 4, 1), "rows of 256 features fill shared memory"),
    ],
    "paged_attention_statistics received": [
        _line((4, 256, 4, 1), "reads logits; the heads of a token fill four rows or more in most models", few=True),
        _line((16, 32, 4, 1), _FLOAT32, dtype=FLOAT32),
        _line((64, 64, 4, 1), "addresses of keys that lie anywhere take registers", size=128),
        _line((64, 32, 4, 1), _WIDER),
    ],
    "stacked_cross_attention attend": [
        _attend((64, 16, 64, 4, 2), _FLOAT32, dtype=FLOAT32),
        *(_attend((128, keys, 64, 8, 2), "a tile holds a whole context", M=keys) for keys in (16, 32, 64)),
        _attend((64, 64, 64, 4, 2), "contexts of several tiles are summed, which takes registers"),
    ],
    "stacked_cross_attention matmul": [  # parts: how many numbers sum to a float32 of A
        _matmul((128, 128, 64, 8, 3), "as large products take elsewhere", parts=1),
        _matmul((128, 128, 32, 8, 3), "each part of A has a tile of its own in shared memory"),
    ],
}
