"""Clusters: blocks that read, write and signal in each other's shared memory (clusters.cu), and Triton's num_ctas.

Right kernels are right in each order of the blocks, and their twins, which lack one wait, are reported.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ptx
from ptx.running.launch import Launch
from ptx.testing import compiling

SEEDS = range(4)
SOURCE = Path(__file__).with_name("clusters.cu")
RACE = "race in a cluster's shared memory"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("nvcc") is None:
        pytest.skip("CUDA C++ kernels are not tested: nvcc is not installed")
    target = tmp_path_factory.mktemp("clusters") / "clusters.ptx"
    subprocess.run(["nvcc", "-std=c++17", "--ptx", "-lineinfo", "-arch=sm_90", "-o", target, SOURCE], check=True)
    return target.read_text()


def run(text: str, name: str, seed: int, grid: int, *arguments: torch.Tensor, **more: int) -> Launch:
    return ptx.run(text, grid, *arguments, block=32, name=name, strict=False, options=ptx.Options(seed=seed), **more)


def kinds(launch: Launch) -> set[str]:
    return {one.kind for one in launch.findings}


def sums(text: str, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, Launch]:
    x, out = torch.arange(32.0), torch.zeros(2)
    return out, x.view(2, 16).sum(1), run(text, name, seed, 8, x, out)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_reads_what_others_summed(text: str, seed: int) -> None:
    out, exact, launch = sums(text, "sums", seed)
    assert torch.equal(out, exact) and launch.findings == []


@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_barrier_of_the_cluster_the_sums_race(text: str, seed: int) -> None:
    _, _, launch = sums(text, "sums_too_early", seed)
    races = [one for one in launch.findings if one.kind.startswith(RACE)]
    assert races and all(one.source.startswith("clusters.cu:") for one in races)


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_of_a_block_that_has_ended(text: str, seed: int) -> None:
    """The values are still there, as they may be on a device: results are right, and only the finding tells."""
    out, exact, launch = sums(text, "sums_of_ended", seed)
    assert torch.equal(out, exact) and kinds(launch) == {"access to shared memory of a block that has ended"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [2, 3])
def test_stores_and_atomics_in_another_block(text: str, size: int, seed: int) -> None:
    """The launch says how large a cluster is."""
    x, out, count = torch.arange(10, 16), torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch = run(text, "passed", seed, 6, x.int(), out, count, cluster=size)
    assert torch.equal(out.long(), x.view(-1, size).roll(1, 1).flatten())
    assert int(count) == 32 * size and launch.findings == []


@pytest.mark.parametrize("seed", SEEDS)
def test_an_arrival_without_its_wait_orders_nothing(text: str, seed: int) -> None:
    x, out, count = torch.arange(3).int(), torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch = run(text, "passed_unwaited", seed, 3, x, out, count, cluster=3)
    assert any(kind.startswith(RACE) for kind in kinds(launch))


@pytest.mark.parametrize("seed", SEEDS)
def test_an_mbarrier_of_another_block(text: str, seed: int) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    assert run(text, "signalled", seed, 2, out).findings == [] and (out == 7).all()
    assert kinds(run(text, "signalled_too_early", seed, 2, out)) == {f"{RACE}: read after write"}


def test_refusals(text: str) -> None:
    with pytest.raises(ptx.EmulationError, match="the grid is not a multiple of the cluster"):
        run(text, "sums", 0, 6, torch.zeros(24), torch.zeros(2))
    with pytest.raises(ptx.EmulationError, match="mapa to block 1 of a cluster of 1"):
        run(text, "passed", 0, 3, *torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(ptx.EmulationError, match="a cluster has more than 16 blocks"):
        run(text, "passed", 0, 17, *torch.zeros(3, 17, dtype=torch.int32), cluster=17)


DEADLOCK = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry alone() .explicitcluster .reqnctapercluster 2
{
    .reg .pred %p<2>; .reg .b32 %r<2>;
    mov.u32 %r0, %cluster_ctarank; setp.eq.u32 %p0, %r0, 0;
    @%p0 bra END;
WAIT:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
END:
    @!%p0 ret;
    LOOP
}
"""


def test_a_barrier_waits_for_the_lanes_that_run() -> None:
    """A block that has ended is not waited for; one that waits for something else is a deadlock."""
    assert ptx.run(DEADLOCK.replace("LOOP", "ret;"), 2, block=32).findings == []
    with pytest.raises(ptx.EmulationError, match="deadlock"):
        ptx.run(DEADLOCK.replace("LOOP", "bar.sync 1, 64; ret;"), 2, block=32)
    with pytest.raises(ptx.EmulationError, match=r"barrier\.cluster\.wait without barrier\.cluster\.arrive"):
        ptx.run(DEADLOCK.replace("LOOP", "barrier.cluster.wait.aligned;"), 2, block=32)


PLACES = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry places(.param .u64 p0) .explicitcluster .reqnctapercluster 2, 2, 1
{
    .reg .pred %p<2>; .reg .b32 %r<30>; .reg .b64 %rd<9>;
    .shared .align 4 .b8 mine[4];
    mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %nctaid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
    ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd0, %r3, 32, %rd0;
    mov.u32 %r4, %cluster_ctarank; mov.u32 %r5, %clusterid.x; mov.u32 %r6, %clusterid.y; mov.u32 %r7, %cluster_ctaid.x;
    mov.u32 %r8, %nclusterid.x; mov.pred %p0, %is_explicit_cluster; selp.u32 %r9, 1, 0, %p0;
    st.shared.u32 [mine], %r3;
    barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
    xor.b32 %r10, %r4, 3;                               // the block across
    mov.u32 %r11, mine; mapa.shared::cluster.u32 %r12, %r11, %r10; ld.shared::cluster.u32 %r13, [%r12];
    cvt.u64.u32 %rd1, %r11; cvta.shared.u64 %rd1, %rd1; mapa.u64 %rd2, %rd1, %r10; ld.u32 %r14, [%rd2];
    isspacep.shared::cluster %p1, %rd2; selp.u32 %r19, %r14, 99, %p1;
    getctarank.shared::cluster.u32 %r15, %r12; getctarank.u64 %r16, %rd2; getctarank.u64 %r17, %rd1;
    shl.b32 %r16, %r16, 4; shl.b32 %r17, %r17, 8; or.b32 %r18, %r15, %r16; or.b32 %r18, %r18, %r17;
    st.global.v4.u32 [%rd0], {%r4, %r5, %r6, %r7};
    st.global.v4.u32 [%rd0 + 16], {%r8, %r13, %r19, %r18};
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
    ret;
}
"""


def test_where_a_block_is_in_its_cluster() -> None:
    """A grid of 4 x 2 blocks, in clusters of 2 x 2; each reads the number of the block across, by both kinds of addresses."""
    out = torch.zeros(8, 8, dtype=torch.int32)
    assert ptx.run(PLACES, (4, 2), out, block=1).findings == []
    for number, row in enumerate(out.tolist()):
        x, y = number % 4, number // 4
        rank, across = x % 2 + 2 * y, (x // 2 * 2 + 1 - x % 2) + 4 * (1 - y)
        assert row == [rank, x // 2, 0, x % 2, 2, across, across, (rank ^ 3) * 17 + 256 * rank]


@pytest.mark.parametrize("arch", [90, 100])
def test_programs_of_two_blocks_in_triton(arch: int) -> None:
    """A softmax whose row lies in two blocks, which exchange their parts of its sum, and a product of matrices."""
    pytest.importorskip("triton")
    outcomes = compiling("tests.helpers.kernels.of_two_blocks", arch)
    assert all(0 < ratio <= 1 and findings == [] for ratio, findings, _ in outcomes)
    assert [mapped for *_, mapped in outcomes] == [False, True]
