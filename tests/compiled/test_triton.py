"""The Triton kernels compile for sm_80, sm_90 and sm_100 with the registers, shared memory and spills of the stored table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("ptx", reason=WITHOUT_PTX)
from tools.compiled.table import read
from tools.compiled.triton import (
    ARCHITECTURES,
    TABLE,
    narrow_offsets,
    operators,
    overwritten_operands,
    rows_of,
    some_of,
    tasks_of,
    unknown_opcodes,
)

STORED = [(key, row) for rows in read(TABLE).values() for key, row in rows.items()]  # of every version of Triton
# none of their work is a matrix product
# in 16 bits _units_rows_kernel sums dO * O alone
NO_PRODUCTS = (
    "_group_bias_kernel",
    "_join_kernel",
    "_prepare_kernel",
    "_members_kernel",
    "_divergence_kernel",
    "_aggregate_kernel",
    "_weights_kernel",
    "_maps_kernel",
    "_query_gradient_kernel",
    "_units_rows_kernel",
)
BACKWARD = r"(backward|gradient|units)\w*_kernel|_divergence_kernel launch"  # that one's first launch is the forward pass's
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


def test_calls_compile_as_stored() -> None:
    """One for each architecture. `make table` compiles those whose sources have changed, and test_sources.py tells of them: the
    same Triton compiles the same from the same sources. Triton 3.9 warns of launches that do not say whether they fuse
    multiply-adds, which 3.10 will not do unasked."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tools.compiled.triton", "--some"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_some_calls_have_every_architecture() -> None:
    for rows in read(TABLE).values():
        assert [arch for *_, arch in some_of(tasks_of(operators()), rows)] == list(ARCHITECTURES)


def test_the_table_has_all_calls() -> None:
    """Of the newest version; of others no row of a call that is none any more."""
    table, tasks = read(TABLE), tasks_of(operators())
    newest = max(table, key=lambda version: [int(part) for part in version.split(".")])
    assert all(rows_of(tasks, rows) == rows for rows in table.values())
    assert [task for task in tasks if not rows_of([task], table[newest])] == []


def test_an_opcode_that_the_emulator_lacks_is_seen() -> None:
    text = (
        "loop:\n\t@!%p1 bra loop;\n\t{ mov.b32 \t%r1, 0; }\n\tstrange.b32 \t%r1, %r2;\n\tfence.proxy.async.shared::cta;\n\tret;\n"
    )
    assert unknown_opcodes(text) == ["strange.b32"]


def test_forward_kernels_do_not_spill_on_sm_90() -> None:
    """But for those that kernels/_configurations.py names, whose smaller tiles would take more instructions."""
    dot = ("bf16 197", "masked bf16 256", "bf16 192", "masked fp32 256", "fp32 256", "fp32 192", "fp32 96")
    named = (*(f"score_attention dot {call} " for call in dot), "score_attention additive fp32 64 ")
    named += ("relevancy_attention step fp32 64 _step_kernel ", "attention_map gradient groups bf16 577 64 _map_kernel ")
    named += tuple(f"paged_attention_statistics {queries} fp32 128 " for queries in ("tokens", "prompt"))
    forward = [(key, row) for key, row in STORED if key.endswith("sm_90") and not re.search(BACKWARD, key)]
    assert len(forward) > 50
    assert [key for key, row in forward if row["spills"] > 0 and not key.startswith(named)] == []
    assert max(row["spills"] for key, row in forward if " fp32 " not in key) <= 512
    assert max(row["spills"] for key, row in forward) <= 992


def test_no_product_is_computed_by_two_warps() -> None:
    """Warps whose layout is larger than the tile do. On sm_90, which the tiles are chosen for: heads of 256 features, and of 192,
    which are padded to 256, leave no registers for fewer warps, nor does the divergence, whose smallest product, of 32 rows and
    columns, is repeated, nor do sums over hidden units in float32. `_step_kernel` repeats products of the first tile alone, few
    rows over paged keys those with the groups, of 16 columns."""
    excepted = (" 256 ", " 192 ", " _divergence_kernel ", " fp32 64 _units_rows_kernel ", " bf16 64 _step_kernel ")
    groups = re.compile(r"paged_attention_statistics (tokens|\S+ fp32) .*_rows_kernel")
    rows = [(key, row) for key, row in STORED if key.endswith("sm_90") and not any(words in key for words in excepted)]
    rows = [(key, row) for key, row in rows if not groups.match(key)]
    assert [key for key, row in rows if row["repeated"] > 1] == []


def test_no_kernel_waits_for_each_product_alone() -> None:
    """ptxas may serialise a kernel, and says so in a remark that Triton drops (C7515): each wgmma instruction then has a wait of
    its own. Else the instructions of a product share one. Excepted are products of one instruction: the empty one that gives
    additive scores their layout, and those of `_attend_kernel` in float32, over 16 keys."""
    excepted = re.compile(r"stacked_\w+ \w+ fp32 _attend_kernel|score_attention additive .* _rows_kernel")
    counted = [(key, row) for key, row in STORED if "wgmma" in row["tensor_cores"]]
    assert len(counted) > 250
    assert [key for key, row in counted if row["waits"] >= row["products"] and not excepted.match(key)] == []


def test_loops_over_tiles_of_16_bit_copy_ahead_of_use() -> None:
    """The forward kernels of dot products load the next tile of keys while they compute this one, up to 128 features."""
    pattern = r"score_attention (dot|cosine)\S* bf16 (?!192|256).*_forward_kernel"
    hot = [row for key, row in STORED if re.match(pattern, key)]
    assert len(hot) > 10 and all(row["cp_async"] for row in hot)


def test_products_run_on_tensor_cores() -> None:
    """Those of float32 in three bfloat16 parts. A kernel without any may be one of which the compiler left nothing."""
    products = [(key, row) for key, row in STORED if not any(name in key for name in NO_PRODUCTS)]
    assert len(products) > 200
    assert [key for key, row in products if not row["tensor_cores"]] == []


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
