"""Counts of attention by AMX tiles, forward and backward, as the stand-in for their instructions takes them.

    python -m tools.tiles    a table: products, loads, stores, bytes packed

A call with dropout takes the schedule without panels (csrc/cpu/forward.h, backward_tile.h), with the same products.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import vlattn_fast as va
from tools import sanitize
from tools.building import instruction_sets
from vlattn_fast.backends import native

ROOT = Path(__file__).parents[1]
TILES, PAIRS = "tiles of 64 rows", "products of pairs"
HEADER = "| bfloat16, one head | call | schedule | tile products | loads | products per load | stores | bytes packed |"


Calls = dict[tuple[str, str], Callable[[], Tensor]]  # by operator and schedule


class Counts(NamedTuple):
    products: int
    loads: int
    stores: int
    packed_bytes: int


def counted(call: Callable[[], Tensor]) -> list[Counts]:
    """Those of a call, forward and backward, in this process, whose library has the stand-in."""
    assert native.instruction_set() == "amx"
    counts = (ctypes.c_uint64 * 4).in_dll(native.library.load(), "vlattn_tile_counts")
    counts[:] = [0] * 4
    out = call()
    forward = Counts(*counts)
    counts[:] = [0] * 4
    out.backward(torch.randn_like(out))
    return [forward, Counts(*counts)]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Calls:
    return {
        ("score_attention", TILES): lambda: va.score_attention(query, key, value, dropout_p=0.5, backend="cpu"),
        ("score_attention", "panels"): lambda: va.score_attention(query, key, value, backend="cpu"),
        ("attention_statistics", TILES): lambda: va.attention_statistics(query, key, backend="cpu").entropy,
    }


def others(query: Tensor, key: Tensor, value: Tensor) -> Calls:
    sets = query[0], key[0]  # one set of queries and one of contexts
    return {
        ("congruence_loss", PAIRS): lambda: va.congruence_loss((query, key), (value, key), backend="cpu"),
        ("stacked_cross_attention", PAIRS): lambda: va.stacked_cross_attention(*sets, backend="cpu").sum(),
        ("maxsim", PAIRS): lambda: va.maxsim(*sets, backend="cpu").sum(),
    }


SIZES = {(2048, 128): attention, (577, 64): attention, (160, 64): others}  # tokens and features of one head: its calls


def counted_lines(tokens: int, features: int) -> Iterator[str]:
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 1, tokens, features).to(torch.bfloat16))
    for (operator, schedule), call in SIZES[tokens, features](query, key, value).items():
        for name, x in zip(("forward", "backward"), counted(call), strict=True):
            if x.products == 0:  # congruence_loss makes its gradients with the loss; maxsim's are no products
                continue
            numbers = f"{x.products:,} | {x.loads:,} | {x.products / x.loads:.2f} | {x.stores:,} | {x.packed_bytes:,}"
            yield f"| {tokens:,} × {features} | `{operator}` {name} | {schedule} | {numbers} |"


def lines(*sizes: tuple[int, int]) -> list[str]:
    """Lines of the table from a process with the sanitized library."""
    folder = sanitize.sanitized("address", instruction_sets()[0], "amx")
    environment = {
        **sanitize.sanitizing("address"),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",  # more of them share a head, and each packs its keys
        "VLATTN_CPU_LIBRARY": str(folder / "libvlattn_cpu.so"),
        "VLATTN_CPU_ISA": "amx",
    }
    command = [sys.executable, "-m", "tools.tiles", json.dumps(sizes)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def main(arguments: list[str]) -> None:
    if not arguments:
        print(HEADER, "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |", *lines(*SIZES), sep="\n")
        return
    for tokens, features in json.loads(arguments[0]):
        print(*counted_lines(tokens, features), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
