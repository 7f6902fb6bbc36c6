"""PTX text -> kernels: variables, scopes, places in the source, operands, functions; what is not known stops with its line."""

from __future__ import annotations

import pytest
import torch

from ptx.reading.reader import SHARED_BASE, Address, Constant, Kernel, Module, PtxError, Symbol, integer, literal, split
from ptx.reading.translate import read_kernel
from ptx.running.launch import launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import Options

HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n"


def kernel(body: str, parameters: str = ".param .u64 a, .param .u32 n", before: str = "", directives: str = "") -> Kernel:
    text = f"{HEAD}{before}.visible .entry k({parameters}) {directives}\n{{\n{body}\nret;\n}}\n"
    return read_kernel(Module(text))


def run(text: str, count: int = 32, threads: int = 32, dynamic: int = 0) -> list[int]:
    """Launches the only kernel of a text with one output of `count` words."""
    out = torch.zeros(count, dtype=torch.int32)
    memory = Memory()
    done = launch(Program(HEAD + text), [memory.place(out, "out")], (1,), (threads,), dynamic, memory, Options())
    assert done.findings == []
    memory.back()
    return out.tolist()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("0x1F", 31),
        ("010", 8),
        ("0b101", 5),
        ("7U", 7),
        ("0", 0),
        ("7.0", None),
        ("%r1", None),
        ("0xg", None),
    ],
)
def test_integers(text: str, value: int | None):
    assert integer(text) == value


@pytest.mark.parametrize(
    ("text", "kind", "bits"),
    [
        ("0f3F800000", "f32", 0x3F800000),
        ("0d3FF0000000000000", "f64", 0x3FF0000000000000),
        ("0f3F800000", "f64", None),
        ("1.5", "f32", 0x3FC00000),
        ("-1.5", "f64", 0xBFF8000000000000),
        ("-1", "s16", 0xFFFF),
        ("300", "u8", 44),
        ("1", "f32", None),
        ("true", "pred", 1),
        ("0", "pred", 0),
        ("-1", "pred", 1),
    ],
)
def test_literals(text: str, kind: str, bits: int | None):
    assert literal(text, kind) == bits


def test_operands_split_outside_of_brackets():
    assert split("{%r1, %r2}, [%rd1+8], %r3") == ["{%r1, %r2}", "[%rd1+8]", "%r3"]
    assert split("") == []


def test_parameters_have_offsets_and_alignments():
    k = kernel("", ".param .u32 x, .param .u64 .ptr .global .align 1 p, .param .align 8 .b8 s[12], .param .f32 y")
    assert [(p.offset, p.size, p.alignment) for p in k.parameters] == [(0, 4, 4), (8, 8, 8), (16, 12, 8), (28, 4, 4)]


def test_sizes_of_blocks():
    assert kernel("", directives=".reqntid 128").threads == 128
    k = kernel("", directives=".maxntid 16, 8, 2 .minnctapersm 1")
    assert (k.threads, k.max_threads) == (None, 256)


def test_addresses_and_constants():
    k = kernel(".reg .b32 %r<4>; .reg .b64 %rd<4>; ld.param.u64 %rd1, [a]; ld.param.u32 %r1, [n+0]; st.global.u32 [%rd1+-8], -1;")
    loads, second, store = k.instructions[:3]
    assert loads.values == [["%rd1"], Address(Constant(0, 8), 8, 0)]
    assert second.values[1] == Address(Constant(8, 8), 8, 0)
    assert store.values == [Address("%rd1", 8, -8), [Constant(0xFFFFFFFF, 4)], None]


def test_variables_of_shared_memory_follow_one_another_and_dynamic_memory_comes_last():
    before = ".shared .align 16 .b8 small[20]; .shared .align 8 .b64 large; .extern .shared .align 16 .b8 dynamic[];\n"
    k = kernel(".reg .b32 %r<4>; mov.u32 %r1, small; mov.u32 %r2, large; mov.u32 %r3, dynamic+4;", before=before)
    assert [one.values[1] for one in k.instructions[:2]] == [Constant(SHARED_BASE, 4), Constant(SHARED_BASE + 24, 4)]
    assert k.instructions[2].values[1] == Symbol("dynamic", 4, 4)
    assert (k.shared, k.extern_shared) == (32, True)


def test_variables_that_a_kernel_does_not_name_take_no_shared_memory():
    k = kernel("", before=".shared .align 16 .b8 unused[512];\n")
    assert (k.shared, k.extern_shared) == (0, False)


def test_lines_and_places_in_the_source():
    body = ".reg .b32 %r<3>;\n.loc 1 7 3\nmov.u32 %r1, 1;\n.loc 1 9 1, function_name $L__info, inlined_at 2 40 5\nmov.u32 %r2, 2;"
    text = f'{HEAD}.visible .entry k()\n{{\n{body}\nret;\n}}\n.file 1 "/a/one.cu"\n.file 2 "/b/two.cu"\n'
    k = read_kernel(Module(text))
    lines = text.splitlines()
    assert [(lines[one.line - 1], one.place) for one in k.instructions[:2]] == [
        ("mov.u32 %r1, 1;", "one.cu:7"),
        ("mov.u32 %r2, 2;", "one.cu:9 in two.cu:40"),
    ]


def test_comments_and_several_lines_keep_the_lines():
    k = kernel("/* one\n two */ .reg .b32 %r<3>; // three ; }\nmov.u32\n%r1,\n 5;")
    assert k.instructions[0].values == ["%r1", Constant(5, 4)]
    assert k.instructions[0].line == 8


def test_scopes_of_inline_assembly_have_registers_and_labels_of_their_own():
    part = (
        "{{ .reg .pred p; .reg .b32 t; "
        "setp.lt.u32 p, %r0, {n}; mov.u32 t, 0; @!p bra skip; mov.u32 t, {n}; skip: add.u32 %r1, %r1, t; }}"
    )
    text = f"""
.visible .entry k(.param .u64 out)
{{
.reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .b32 t;
mov.u32 %r0, %tid.x; mov.u32 %r1, 0; mov.u32 t, 1000;
{part.format(n=4)}
{part.format(n=8)}
add.u32 %r1, %r1, t;
ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r0, 4, %rd1; st.global.u32 [%rd2], %r1; ret;
}}"""
    assert run(text) == [1012] * 4 + [1008] * 4 + [1000] * 24


FUNCTIONS = """
.func (.param .b32 result) twice(.param .b32 twice_x, .param .align 8 .b8 twice_s[8])
{
.reg .b32 %r<8>; .reg .pred %p<2>;
ld.param.u32 %r1, [twice_x];
ld.param.v2.u32 {%r2, %r3}, [twice_s];
setp.gt.u32 %p1, %r1, 20;
@%p1 bra large;
add.u32 %r4, %r1, %r3;
st.param.b32 [result], %r4;
ret;
large:
st.param.b32 [result+0], %r2;
ret;
}
.visible .entry k(.param .u64 out)
{
.reg .b32 %r<9>; .reg .b64 %rd<4>;
mov.u32 %r1, %tid.x;
mov.u32 %r5, 0;
"""
CALL = """
{ // callseq
.reg .b32 temp_param_reg;
.param .b32 param0; st.param.b32 [param0+0], %r1;
.param .align 8 .b8 param1[8]; st.param.v2.b32 [param1+0], {first, 7};
.param .b32 retval0;
call.uni (retval0), twice, (param0, param1);
ld.param.b32 %r4, [retval0+0];
}
add.u32 %r5, %r5, %r4;
"""


def test_functions_have_registers_of_their_own_at_each_call():
    end = "ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r5; ret; }"
    text = FUNCTIONS + CALL.replace("first", "100") + CALL.replace("first", "200") + end
    assert run(text) == [2 * (n + 7) if n <= 20 else 300 for n in range(32)]


def test_variables_with_values():
    text = """
.global .align 4 .u32 table[4] = {10, 20, 0x1E, 40};
.const .align 4 .f32 one = 0f3F800000;
.visible .entry k(.param .u64 out)
{
.reg .b32 %r<8>; .reg .b64 %rd<8>;
mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 3;
mov.u64 %rd1, table; mad.wide.u32 %rd2, %r1, 4, %rd1; ld.global.u32 %r2, [%rd2];
ld.const.b32 %r3, [one]; shr.u32 %r3, %r3, 23; add.u32 %r2, %r2, %r3;
ld.param.u64 %rd3, [out]; mad.wide.u32 %rd4, %r0, 4, %rd3; st.global.u32 [%rd4], %r2; ret;
}"""
    assert run(text) == [value + 127 for value in (10, 20, 30, 40)] * 8


def test_local_memory_is_each_threads():
    text = """
.visible .entry k(.param .u64 out)
{
.local .align 8 .b8 depot[16];
.reg .b32 %r<8>; .reg .b64 %rd<8>;
mov.u64 %rd1, depot; cvta.local.u64 %rd2, %rd1;
mov.u32 %r0, %tid.x; st.u32 [%rd2+4], %r0; ld.local.u32 %r1, [%rd1+4];
ld.param.u64 %rd3, [out]; mad.wide.u32 %rd4, %r0, 4, %rd3; st.global.u32 [%rd4], %r1; ret;
}"""
    assert run(text) == list(range(32))


def test_indirect_branches():
    text = """
.visible .entry k(.param .u64 out)
{
.reg .b32 %r<8>; .reg .b64 %rd<8>;
mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 1;
targets: .branchtargets even, odd;
brx.idx %r1, targets;
even: mov.u32 %r2, 5; bra.uni end;
odd: mov.u32 %r2, 6;
end: ld.param.u64 %rd3, [out]; mad.wide.u32 %rd4, %r0, 4, %rd3; st.global.u32 [%rd4], %r2; ret;
}"""
    assert run(text) == [5, 6] * 16


def test_registers_wider_than_the_type():
    """Loads, stores and cvt may name a register that is wider than their type; a signed value fills all of it."""
    text = """
.visible .entry k(.param .u64 out)
{
.reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %rd<12>;
mov.u64 %rd1, 0x1FFFFFF80; cvt.s64.s8 %rd2, %rd1; cvt.u32.u64 %r1, %rd2;      // the low byte, 0x80
cvt.u32.u8 %r2, %rd1;                                                          // the same without a sign
mov.u32 %r3, 0x8001; cvt.s16.s32 %r4, %r3;                                     // 16 bits extended to 32
ld.param.u64 %rd3, [out];
st.global.u8 [%rd3+16], %r1; ld.global.s8 %r5, [%rd3+16]; ld.global.s8 %h1, [%rd3+16]; cvt.u32.u16 %r6, %h1;
st.global.v4.u32 [%rd3], {%r1, %r2, %r4, %r5}; st.global.u32 [%rd3+16], %r6; ret;
}"""
    assert [word & 0xFFFFFFFF for word in run(text, count=5, threads=1)] == [0xFFFFFF80, 0x80, 0xFFFF8001, 0xFFFFFF80, 0xFF80]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("fancy.u32 %r1, %r2;", "opcode fancy.u32 is not in the table"),
        ("add.u32 %r1, %r2;", "operands of add.u32"),
        ("add.u32 %r1, %r2, %rd1;", "%rd1 has 8 bytes, not 4"),
        ("add.f32 %r1, %r2, 1;", "operand 1"),
        ("add.u32 %r1, %r2, nowhere;", "operand nowhere"),
        ("mov.u32 %r1, %tid.w;", "operand %tid.w"),
        ("ld.global.u32 %r1, [nowhere];", r"address \[nowhere\]"),
        ("call.uni missing, ();", "call of missing, whose body is not there"),
        (".fancy 5;", "directive"),
        ("mov.b64 %rd1, {%r1, %r2, %r1};", "operand"),
        ("wgmma.mma_async.sync.aligned.m64n16k16.s32.s8.s8 {%r1}, %rd1, %rd1, 1, 1, 1;", "is not in the table"),
    ],
)
def test_what_is_not_known_stops_with_its_line(body: str, message: str):
    with pytest.raises(PtxError, match=message) as error:
        kernel(f".reg .b32 %r<4>; .reg .b64 %rd<4>;\n.loc 1 12 1\n{body}")
    assert "PTX line 8, 1:12: " + body.rstrip(";") in str(error.value)


def test_names_of_kernels_are_checked():
    module = Module(HEAD + ".entry one() { ret; } .entry two() { ret; }")
    with pytest.raises(PtxError, match="name must be one of one, two; got none"):
        read_kernel(module)
    with pytest.raises(PtxError, match="got three"):
        read_kernel(module, "three")
    assert read_kernel(module, "two").name == "two"


def test_a_branch_needs_its_label():
    with pytest.raises(PtxError, match="label nowhere"):
        kernel("bra nowhere;")


def test_recursion_is_refused():
    text = HEAD + ".func f() { call.uni f, (); ret; } .visible .entry k() { call.uni f, (); ret; }"
    with pytest.raises(PtxError, match="recursion of f"):
        read_kernel(Module(text))
