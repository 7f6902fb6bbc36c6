"""Compiles launches of Triton's kernels ahead of their first call, and writes them into an archive, which archive.py reads.

A launch is compiled once for all sizes: only strides and addresses are specialised, as they are in the call that launches it.
With `as_ptx` the archive has PTX, which the driver compiles. Launches with tensor descriptors are left to Triton. No GPU is
needed; a launch that Triton's cache has takes no time.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu
from vlattn_fast.kernels import _configurations
from vlattn_native import archive
from vlattn_native.archive import members

Check = Callable[[str, dict[str, Any]], Any]  # of the name of a kernel and its code in all of Triton's forms


class Compiled(NamedTuple):
    """A launch as the manifest has it, without the name of its member, and the code."""

    form: tuple[Any, ...]
    facts: tuple[Any, ...]  # symbol, warps, bytes of shared memory, needs, parameters
    image: bytes


def compiled_launch(kernel: Any, named: dict[str, Any], as_ptx: bool, check: Check) -> Compiled | None:
    """A launch; None if it has arguments that archives do not have. check: raises if it finds a fault in the code."""
    try:
        leaves = archive.leaves_of(kernel, named)
    except archive.Uncovered:
        return None
    made = _compile(kernel, named)
    metadata = made.metadata
    check(metadata.name, made.asm)
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
    # for sm_100f a driver compiles it on 10.3, too
    image = made.asm["ptx"].replace(".target sm_100a", ".target sm_100f").encode() if as_ptx else made.asm["cubin"]
    facts = metadata.name, metadata.num_warps, metadata.shared, needs, parameters
    return Compiled(archive.form_of(kernel, named, leaves), facts, image)


def _compile(kernel: Any, named: dict[str, Any]) -> Any:
    """What Triton compiles for a launch, without specialising it for sizes: no number that is no stride counts as 1 or as a
    multiple of 16."""
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


def launches_in(
    call: Callable[[], Any], architecture: int, as_ptx: bool, check: Check = lambda name, asm: None
) -> list[Compiled]:
    """The launches of a call on CPU tensors as on a device of this architecture, each form once. The process stays with it."""
    made: dict[Any, Compiled] = {}

    def compile_one(kernel: Any, *, grid: Any, warmup: bool, **named: Any) -> None:
        if (one := compiled_launch(kernel, named, as_ptx, check)) is not None:
            made[one.form, str(one.facts)] = one

    target = GPUTarget("cuda", architecture, 32)
    device = {"get_current_device": architecture, "get_current_stream": 0, "get_current_target": target}
    driver.set_active(SimpleNamespace(**{name: lambda *_, x=x: x for name, x in device.items()}))
    _configurations.TARGET = f"sm_{architecture}"
    before, run = run_gpu_kernels_on_cpu(OnCpu(divmod(architecture, 10))), JITFunction.run
    JITFunction.run = compile_one
    try:
        call()
    finally:
        JITFunction.run = run
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
        manifest = {"sources": archive.sources(), "entries": list(entries.values())}
        file.writestr(archive.MANIFEST, json.dumps(manifest))
