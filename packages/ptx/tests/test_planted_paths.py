"""What ptx/planting/paths.py says of a barrier, a wait, a commit or a fence, each in a small kernel that needs it or not."""

from __future__ import annotations

import pytest

from ptx.planting.paths import COPIES, PRODUCTS, Paths
from ptx.running.program import Program

HEAD = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0)
{
.reg .pred %p<4>;
.reg .b32 %r<40>;
.reg .b64 %rd<8>;
.shared .align 16 .b8 area[2048];
ld.param.b64 %rd1, [kernel_param_0];
mov.b32 %r1, area;
mov.b32 %r2, 7;
setp.eq.b32 %p1, %r2, 7;
setp.eq.b32 %p2, %r2, 8;
"""
READ, WRITE, BARRIER = "ld.shared.b32 %r3, [%r1];\n", "st.shared.b32 [%r1], %r2;\n", "bar.sync 0;\n"
COPY, COMMIT = "cp.async.cg.shared.global [%r1], [%rd1], 16;\n", "cp.async.commit_group;\n"
FENCE, LOOP = "fence.proxy.async.shared::cta;\n", "again:\n"
SUMS = ", ".join(f"%r{n}" for n in range(20, 24))
PRODUCT = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{SUMS}}}, %rd2, %rd3, 1, 1, 1, 0, 0;\n"
OPEN, CLOSE = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"
BACK = "@%p1 bra again;\n"


def wait(groups: int) -> str:
    return f"cp.async.wait_group {groups};\n"


def done(groups: int) -> str:
    return f"wgmma.wait_group.sync.aligned {groups};\n"


def paths(*parts: str, mark: str) -> tuple[Paths, int]:
    """The kernel of these parts, and its instruction of the part that follows `mark`, an empty one."""
    body = "".join(parts)
    text = HEAD + body.replace("MARK\n", "") + "ret;\n}\n"
    line = (HEAD + body.partition("MARK\n")[0]).count("\n") + 1
    assert mark in text.splitlines()[line - 1]
    one = Paths(Program(text, "kernel"))
    (number,) = one.at(line)
    return one, number


M = "MARK\n"


@pytest.mark.parametrize(
    ("parts", "needless"),
    [
        ((WRITE, M, BARRIER, READ), False),
        ((READ, M, BARRIER, WRITE), False),
        ((READ, M, BARRIER, READ), True),
        ((WRITE, BARRIER, M, BARRIER, READ), True),
        ((WRITE, M, BARRIER, BARRIER, READ), True),
        ((LOOP, READ, M, BARRIER, BACK, BARRIER, WRITE), True),
        ((LOOP, READ, M, BARRIER, WRITE, BACK), False),
        ((WRITE, "@%p1 bra over;\n", BARRIER, "over:\n", M, BARRIER, READ), False),
    ],
)
def test_barriers(parts: tuple[str, ...], needless: bool) -> None:
    one, number = paths(*parts, mark="bar.sync")
    assert bool(one.barrier(number)) == needless


@pytest.mark.parametrize(
    ("parts", "needless"),
    [
        ((COPY, COMMIT, M, wait(0), BARRIER, READ), False),
        ((COPY, COMMIT, M, wait(1), BARRIER), True),  # leaves one, and there is one
        ((COPY, COMMIT, wait(0), M, wait(0), BARRIER, READ), True),
        ((COPY, COMMIT, M, wait(0), wait(0), BARRIER, READ), True),
        ((COPY, COMMIT, COPY, COMMIT, M, wait(0), wait(1), BARRIER, READ), False),  # the next one is less strict
        ((LOOP, COPY, COMMIT, M, wait(1), BARRIER, READ, BACK), False),  # the second time there are two
    ],
)
def test_waits_for_copies(parts: tuple[str, ...], needless: bool) -> None:
    one, number = paths(*parts, mark="cp.async.wait_group")
    assert bool(one.wait(number, COPIES)) == needless


@pytest.mark.parametrize(
    ("parts", "needless"),
    [
        ((COPY, M, COMMIT, COPY, COMMIT, wait(0), READ), True),
        ((COPY, M, COMMIT, COPY, COMMIT, wait(1), READ), False),
        ((COPY, M, COMMIT, wait(0), READ), False),
        ((COPY, M, COMMIT, "@%p1 bra over;\n", COPY, COMMIT, "over:\n", wait(0), READ), False),  # not on each path
        ((COPY, M, COMMIT), False),  # nothing waits
    ],
)
def test_commits_of_copies(parts: tuple[str, ...], needless: bool) -> None:
    one, number = paths(*parts, mark="cp.async.commit_group")
    assert bool(one.commit(number, COPIES)) == needless


@pytest.mark.parametrize(
    ("parts", "needless"),
    [
        ((WRITE, M, FENCE, BARRIER, OPEN, PRODUCT, CLOSE, done(0)), False),
        ((WRITE, FENCE, READ, M, FENCE, BARRIER, OPEN, PRODUCT, CLOSE, done(0)), True),
        ((WRITE, M, FENCE, READ, FENCE, BARRIER, OPEN, PRODUCT, CLOSE, done(0)), True),
        ((WRITE, M, FENCE, BARRIER, FENCE, OPEN, PRODUCT, CLOSE, done(0)), False),  # another warp's fence may come too late
        ((WRITE, M, FENCE, BARRIER, FENCE, BARRIER, OPEN, PRODUCT, CLOSE, done(0)), True),
    ],
)
def test_proxy_fences(parts: tuple[str, ...], needless: bool) -> None:
    one, number = paths(*parts, mark="fence.proxy")
    assert bool(one.proxy_fence(number)) == needless


@pytest.mark.parametrize(
    ("parts", "needless"),
    [
        ((M, OPEN, PRODUCT, CLOSE, done(0)), False),
        ((OPEN, PRODUCT, CLOSE, done(0), M, OPEN, PRODUCT, CLOSE, done(0)), True),
        ((OPEN, PRODUCT, CLOSE, done(0), "mov.b32 %r20, 0;\n", M, OPEN, PRODUCT, CLOSE, done(0)), False),
    ],
)
def test_product_fences(parts: tuple[str, ...], needless: bool) -> None:
    one, number = paths(*parts, mark="wgmma.fence")
    assert bool(one.product_fence(number)) == needless


AFTER = (BARRIER, OPEN, PRODUCT, CLOSE, done(0))


@pytest.mark.parametrize(
    ("parts", "needless"),
    [
        ((OPEN, PRODUCT, CLOSE, M, done(0), *AFTER, "add.u32 %r3, %r20, 1;\n"), True),
        ((OPEN, PRODUCT, CLOSE, M, done(0), "add.u32 %r3, %r20, 1;\n", *AFTER), False),
        ((OPEN, PRODUCT, CLOSE, M, done(0), BARRIER, WRITE, FENCE, *AFTER), False),
        ((OPEN, PRODUCT, CLOSE, M, done(0), *AFTER, WRITE), False),  # by a warp that is ahead
        ((OPEN, PRODUCT, CLOSE, M, done(0), *AFTER, BARRIER, WRITE), True),
    ],
)
def test_waits_for_products(parts: tuple[str, ...], needless: bool) -> None:
    one, number = paths(*parts, mark="wgmma.wait_group")
    assert bool(one.wait(number, PRODUCTS)) == needless


def test_a_commit_before_a_needless_wait() -> None:
    one, number = paths(OPEN, PRODUCT, M, CLOSE, done(0), *AFTER, mark="wgmma.commit_group")
    assert one.commit(number, PRODUCTS)
