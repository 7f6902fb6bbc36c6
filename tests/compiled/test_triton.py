"""The Triton kernels that matter compile for sm_80, sm_90 and sm_100 within tests/compiled/thresholds.json."""

import re
import warnings
from typing import Any

import pytest

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.testing import compiling
from tools.compiled.table import Row, programs
from tools.compiled.thresholds import beyond, thresholds, worst
from tools.compiled.triton import Task, calls_of, compile_call, narrow_offsets, operators, overwritten_operands, unknown_opcodes

ROW = {
    "registers": 128,
    "spills": 0,
    "shared": 32768,
    "warps": 4,
    "repeated": 1,
    "tensor_cores": "wgmma",
    "products": 4,
    "waits": 1,
}
THRESHOLD = {"spills": 0, "repeated": 1, "programs": 4}
TTIR = """
    %a = tt.get_program_id x : i32 loc(#loc2)
    %b = arith.muli %a, %stride : i32 loc(#loc3)
    %c = tt.addptr %p, %b : !tt.ptr<f32>, i32 loc(#loc4)
"""
TTGIR = """
    %buffer = ttg.local_alloc : () -> !ttg.memdesc<1x32x16xbf16, #shared, #smem, mutable> loc(#loc5)
    %tile = ttg.memdesc_index %buffer[%i] : !ttg.memdesc<1x32x16xbf16> -> !ttg.memdesc<32x16xbf16> loc(#loc5)
    %b = ttg.memdesc_subslice %tile[16, 0] : !ttg.memdesc<32x16xbf16> -> !ttg.memdesc<16x16xbf16> loc(#loc5)
    %d = ttng.warp_group_dot %a, %b, %c {isAsync = true} : tensor<64x16xbf16> * !ttg.memdesc<16x16xbf16> loc(#loc5)
    %e:2 = ttng.warp_group_dot_wait %d, %b {pendings = 1 : i32} : tensor<64x16xf32>, !ttg.memdesc<16x16xbf16> loc(#loc5)
"""


def compiled(task: Task, kernels: list[str]) -> dict[str, Row]:
    """In the process that compiles. Triton 3.9 warns of launches that do not say whether they fuse multiply-adds, which 3.10 will
    not do unasked."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return compile_call(*task, kernels)


def tasks() -> dict[Task, list[str]]:
    """Each call and architecture, with the kernels that the thresholds name."""
    of_tasks: dict[Task, list[str]] = {}
    for name, of_kernel in thresholds().items():
        call, _, kernel = name.rpartition(" ")
        operator, _, case = call.partition(" ")
        for architecture in of_kernel:
            of_tasks.setdefault((operator, case, int(architecture.removeprefix("sm_"))), []).append(kernel)
    return of_tasks


def cases() -> list[Any]:
    """One call for each architecture is not slow."""
    quick = "attention_map", "attention bf16 577 64"
    return [
        pytest.param(task, kernels, id=" ".join(map(str, task)), marks=[] if task[:2] == quick else pytest.mark.slow)
        for task, kernels in tasks().items()
    ]


@pytest.mark.parametrize(("task", "kernels"), cases())
def test_a_kernel_stays_within_its_thresholds(task: Task, kernels: list[str]) -> None:
    """No copy overwrites what a product reads, no product of 32 bits reaches an address, and the emulator knows all opcodes."""
    call, architecture = f"{task[0]} {task[1]}", f"sm_{task[2]}"
    rows = compiling(f"{__name__}.compiled", task, kernels)
    assert {one for one in kernels if f"{call} {one} {architecture}" in rows} == {*kernels}
    for name, row in rows.items():
        kernel = re.sub(r"( launch \d+)? sm_\d+$", "", name)
        assert beyond(row, architecture, thresholds()[kernel][architecture]) == [], name
        if re.match(r"score_attention (dot|cosine)\S* bf16 .*_forward_kernel", name):
            assert row["cp_async"], f"{name} does not load the next tile of keys while it computes this one"


def test_thresholds_are_of_calls() -> None:
    multiply = {*operators()} - {"relevancy_residual"}
    assert len(thresholds()) == 29 and {operator for operator, *_ in tasks()} == multiply
    for operator, call, _ in tasks():
        assert call in calls_of(operator), f"{operator} {call}"
    assert {architecture for *_, architecture in tasks()} == {80, 90, 100}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"spills": 8}, ["spills 8, at most 0"]),
        ({"repeated": 2}, ["repeated 2, at most 1"]),
        ({"registers": 129}, ["3 programs an SM, at least 4"]),
        ({"shared": 57 * 1024}, ["3 programs an SM, at least 4"]),
        ({"tensor_cores": ""}, ["no product runs on tensor cores"]),
        ({"waits": 4}, ["each of 4 wgmma instructions has its own wait: ptxas serialised the kernel"]),
    ],
)
def test_what_is_beyond_a_threshold(change: dict[str, object], words: list[str]) -> None:
    assert beyond({**ROW, **change}, "sm_90", THRESHOLD) == words


def test_programs_of_an_sm() -> None:
    """By registers, by shared memory, by warps."""
    assert programs(ROW, "sm_90") == 4 and programs({**ROW, "registers": 121}, "sm_90") == 4
    assert programs({**ROW, "registers": 32}, "sm_90") == 6 and programs({**ROW, "registers": 32}, "sm_80") == 4
    assert programs({**ROW, "registers": 16, "shared": 0}, "sm_90") == 16


def test_a_threshold_is_the_worst_of_the_table() -> None:
    table = {
        "3.6.0": {"x a sm_90": ROW},
        "3.9.0": {"x a sm_90": ROW, "x a launch 2 sm_90": {**ROW, "spills": 4, "registers": 168}},
    }
    assert worst(table, "x a", "sm_90") == {"spills": 4, "repeated": 1, "programs": 3} and worst(table, "x a", "sm_80") is None


def test_an_opcode_that_the_emulator_lacks_is_seen() -> None:
    text = (
        "loop:\n\t@!%p1 bra loop;\n\t{ mov.b32 \t%r1, 0; }\n\tstrange.b32 \t%r1, %r2;\n\tfence.proxy.async.shared::cta;\n\tret;\n"
    )
    assert unknown_opcodes(text) == ["strange.b32"]


def test_products_of_32_bits_that_reach_an_address_are_seen() -> None:
    assert narrow_offsets(TTIR) == ["%b = %a * %stride"]
    assert narrow_offsets("%stride = arith.constant 64 : i32\n" + TTIR) == []
    assert narrow_offsets("%a = arith.constant 2 : i32\n" + re.sub(r".*%a = .*\n", "", TTIR)) == ["%b = %a * %stride"]
    assert narrow_offsets(TTIR.replace("i32 loc(#loc4)", "i64 loc(#loc4)")) == []
    of_loop = re.sub(r"( *)(%c = )", r"\1scf.for %b = %lower to %upper step %step : i32 {\n\1\2", TTIR)
    assert narrow_offsets(of_loop) == []
    beside = TTIR + "    %b = arith.addi %a, %a : i32 loc(#loc3)\n"  # another region's %b
    assert narrow_offsets(beside) == ["%b = %a * %stride"]
    tiles = TTIR.replace("i32 loc(#loc4)", "tensor<64xi32> loc(#loc4)").replace("!tt.ptr<f32>", "tensor<64x!tt.ptr<f32>>")
    assert narrow_offsets(tiles) == ["%b = %a * %stride"]


def test_an_operand_that_a_copy_overwrites_is_seen() -> None:
    assert overwritten_operands(TTGIR) == ["%b"]
    assert overwritten_operands(TTGIR.replace("<1x32", "<2x32")) == []
    assert overwritten_operands(TTGIR.replace("pendings = 1", "pendings = 0")) == []
