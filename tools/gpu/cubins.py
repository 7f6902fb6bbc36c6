"""Compiles kernels ahead of their first call, into the archives kernels/compiled/sm_80.zip, sm_90.zip and sm_100.zip.

    python -m tools.gpu.cubins [OPERATOR ...] [--architecture 90 ...] [--out FOLDER] [--ptx]

The launches are those of the calls in tools/compiled/calls/, and of the calls of models in full.py. A launch is compiled once for
all sizes: only strides and addresses are specialised, as they are in these calls. sm_100 has PTX, which the driver compiles; with
--ptx all have, for a stand-in of the driver. Launches with tensor descriptors are left to Triton. No GPU is needed; a launch that
Triton's cache has takes no time. The launcher of csrc/launch/ is built as well. kernels/_archive.py uses all of it, and a wheel
that is built then has it inside.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from tools import building
from tools.compiled.triton import ARCHITECTURES, calls_of, check, launches_of, operators
from tools.gpu import full
from vlattn_fast.checking import verify
from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu
from vlattn_fast.kernels import _archive
from vlattn_fast.kernels._archive import members

FOLDER = Path(__file__).parents[2] / "kernels" / "compiled"
OPERATORS = ("score_attention", "relevancy_attention", "attention_statistics", "attention_map", "congruence_loss")
AS_PTX = (100,)


class Compiled(NamedTuple):
    """A launch as the manifest has it, without the name of its member, and the code."""

    form: tuple[Any, ...]
    facts: tuple[Any, ...]  # symbol, warps, bytes of shared memory, needs, parameters
    image: bytes


def compiled_launch(kernel: Any, named: dict[str, Any], as_ptx: bool) -> Compiled | None:
    """A launch; None if it has arguments that archives do not have."""
    try:
        leaves = _archive.leaves_of(kernel, named)
    except _archive.Uncovered:
        return None
    made = _compile(kernel, named)
    metadata = made.metadata
    scratch = [getattr(metadata, f"{name}_scratch_size", 0) for name in ("global", "profile")]
    if metadata.num_ctas != 1 or any(scratch) or getattr(metadata, "launch_cooperative_grid", False):
        return None
    types = _by_path(zip(kernel.arg_names, kernel.arg_names, made.src.signature.values(), strict=True), named)
    numbers = {leaf.path: n for n, leaf in enumerate(leaves)}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    parameters = [(numbers[path], kind) for path, kind in types if kind != "constexpr"]
    needs = {
        numbers[path]: 1
        for path, kind in types
        if kind == "constexpr" and path not in constant and leaves[numbers[path]].kind == "int"
    }
    divisible = {path for path, attributes in made.src.attrs.items() if ["tt.divisibility", 16] in attributes}
    needs |= {numbers[path]: 16 for path, place in _places(kernel, named) if place in divisible}
    parameters += [(-1, "i64")] * len(scratch)
    image = made.asm["ptx"].encode() if as_ptx else made.asm["cubin"]
    check(metadata.name, made.asm)
    facts = metadata.name, metadata.num_warps, metadata.shared, needs, parameters
    return Compiled(_archive.form_of(kernel, named, leaves), facts, image)


def _compile(kernel: Any, named: dict[str, Any]) -> Any:
    """What Triton compiles for a launch, without specialising it for sizes: no number that is no stride counts as 1 or as a
    multiple of 16."""
    from triton.runtime.driver import driver

    bind = kernel.device_caches[driver.active.get_current_device()]
    _, _, target, backend, binder = bind
    bound, specialisation, options = binder(**{"debug": False, **named})
    relaxed = [
        (kind, trait) if one.is_constexpr else _relaxed(one.name, bound[one.name], kind, trait)
        for one, (kind, trait) in zip(kernel.params, specialisation, strict=True)
    ]
    options, signature, constants, attributes = kernel._pack_args(backend, {"debug": False, **named}, bound, relaxed, options)
    source = kernel.ASTSource(kernel, signature, constants, attributes)
    return kernel.compile(source, target=target, options=options.__dict__)


def _relaxed(path: str, value: Any, kind: Any, trait: Any) -> tuple[Any, Any]:
    if isinstance(value, tuple):
        relaxed = [_relaxed(*one, *more) for one, *more in zip(members(path, value), kind, trait, strict=True)]
        kinds, traits = zip(*relaxed, strict=True)
        return (type(kind)(*kinds) if hasattr(kind, "_fields") else kinds), traits
    if type(value) is not int or "stride" in path:
        return kind, trait
    return ("i32" if kind == "constexpr" else kind), ""


def _by_path(parameters: Iterable[tuple[Any, str, Any]], named: dict[str, Any]) -> list[tuple[str, str]]:
    """Triton's type of each leaf."""

    def of(path: str, value: Any, kind: Any) -> list[tuple[str, str]]:
        if not isinstance(kind, tuple):
            return [(path, kind)]
        return [one for member, part in zip(members(path, value), kind, strict=True) for one in of(*member, part)]

    return [one for name, _, kind in parameters for one in of(name, named.get(name), kind)]


def _places(kernel: Any, named: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """The path of each leaf, and where Triton has it: the number of the parameter, and of members of tuples."""

    def of(path: str, value: Any, place: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        if not isinstance(value, tuple):
            return [(path, place)]
        return [one for n, member in enumerate(members(path, value)) for one in of(*member, (*place, n))]

    parameters = [(one.num, one.name) for one in kernel.params if not one.is_constexpr and one.name in named]
    return [one for n, name in parameters for one in of(name, named[name], (n,))]


def calls(operator: str) -> dict[str, Callable[[], Any]]:
    """Those of tools/compiled/calls/, and those of models in 16 bits, of one sample, with and without a log-sum-exp."""

    def run(one: full.Full) -> None:
        case = one.example(rehearsed=False)
        for dtype in (torch.bfloat16, torch.float16):
            for asked in ({}, {"return_lse": False})[: 2 if "return_lse" in case.options else 1]:
                with_lse = replace(case, options=case.options | asked)
                verify._run(with_lse, case.in_dtype(dtype), "triton")

    single = patch.dict(full.SIZES, {name: sizes._replace(batch=1) for name, sizes in full.SIZES.items()})
    models = [one for one in full.FULL if one.operator == operator]
    return calls_of(operator) | {f"{one.name} {one.sizes}": functools.partial(single(run), one) for one in models}


def of_call(operator: str, name: str, architecture: int, as_ptx: bool) -> list[Compiled]:
    """The launches of such a call, each form once."""
    return launches_in(calls(operator)[name], f"{operator} {name}", architecture, as_ptx)


def launches_in(call: Callable[[], Any], title: str, architecture: int, as_ptx: bool) -> list[Compiled]:
    """The launches of any call, each form once."""
    made: dict[Any, Compiled] = {}

    def compile_one(kernel: Any, named: dict[str, Any]) -> None:
        if (one := compiled_launch(kernel, named, as_ptx)) is not None:
            made[one.form, str(one.facts)] = one

    before = run_gpu_kernels_on_cpu(OnCpu(divmod(architecture, 10)))
    try:
        launches_of(call, title, architecture, compile_one)
    finally:
        run_gpu_kernels_on_cpu(before)
    return list(made.values())


def write(path: Path, compiled: Iterable[Compiled], suffix: str) -> None:
    """The archive of these launches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries, images = {}, set[str]()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        for one in compiled:
            member = f"{hashlib.sha256(one.image).hexdigest()[:24]}.{suffix}"
            if member not in images:
                images.add(member)
                file.writestr(member, one.image)
            entries[one.form, str(one.facts[3:])] = (*one.form, member, *one.facts)
        manifest = {"sources": _archive.sources(), "entries": list(entries.values())}
        file.writestr(_archive.MANIFEST, json.dumps(manifest))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.cubins", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"default: {' '.join(OPERATORS)}")
    parser.add_argument("--architecture", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--ptx", action="store_true", help="PTX for every architecture")
    parser.add_argument("--workers", type=int, metavar="N", default=os.cpu_count())
    options = parser.parse_args()
    chosen = options.operators or OPERATORS
    if unknown := sorted(set(chosen) - set(operators())):
        parser.error(f"OPERATOR must be one of {', '.join(operators())}; got {', '.join(unknown)}")
    every = [(operator, name) for operator in chosen for name in calls(operator)]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for architecture in options.architecture:
            as_ptx = options.ptx or architecture in AS_PTX
            of_one: Callable[..., list[Compiled]] = functools.partial(of_call, architecture=architecture, as_ptx=as_ptx)
            compiled = []
            for (operator, name), made in zip(every, pool.map(of_one, *zip(*every, strict=True)), strict=True):
                compiled += made
                print(f"sm_{architecture} {operator} {name}: {len(made)} launches", flush=True)
            path = options.out / f"sm_{architecture}.zip"
            write(path, compiled, "ptx" if as_ptx else "cubin")
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    shutil.copy(building.launcher(), options.out)


if __name__ == "__main__":
    main()
