"""The emulation (csrc/cuda/host/emulation.h, the stand-ins in csrc/cuda/mma.h): what it runs is right, what is wrong it shows."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.cuda.building import HOST, SANITIZED, THREADS, build, sanitizing

SEEDS = range(1, 4)
FAILED = 719  # cudaErrorLaunchFailure
INVALID = 9  # cudaErrorInvalidConfiguration
FLAWS = ("none", "no wait", "wrong group", "no commit", "no barrier", "no barrier after")  # Flaw in emulation.cu
Small = Callable[..., int]


@pytest.fixture(scope="module")
def small() -> Small:
    """run(name, arguments...): the status; tensors are passed by address."""
    loaded = ctypes.CDLL(str(build("host", *HOST, target="emulation") / "libemulation.so"))

    def run(name: str, *arguments: Tensor | int | bool) -> int:
        given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int64(x) for x in arguments]
        return getattr(loaded, f"run_{name}")(*given)

    return run


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("VLATTN_EMULATION_SEED", str(request.param))
    return request.param


@pytest.mark.parametrize("threads", (32, 256, 1024))
def test_blocks_with_barriers(small: Small, seed: int, threads: int) -> None:
    x, sums = torch.randint(0, 9, (3, threads)).float(), torch.full((3,), torch.nan)
    assert small("block_sum", x, sums, 3, threads, True) == 0
    assert torch.equal(sums, x.sum(1))


def test_a_missing_barrier_shows(small: Small, seed: int) -> None:
    x, sums = torch.randint(1, 9, (3, 256)).float(), torch.full((3,), torch.nan)
    assert small("block_sum", x, sums, 3, 256, False) == 0
    assert not torch.equal(sums, x.sum(1))


def test_a_missing_barrier_of_a_warp_shows(small: Small, seed: int) -> None:
    x = torch.arange(64.0)
    right = x.view(2, 32).roll(-1, 1).flatten()
    with_barrier, without = x.clone(), x.clone()
    assert small("neighbours", with_barrier, True) == small("neighbours", without, False) == 0
    assert torch.equal(with_barrier, right) and not torch.equal(without, right)


def test_asynchronous_copies(small: Small, seed: int) -> None:
    """They are there after the wait for their group and a barrier, and before that some are not."""
    x = torch.rand(1024) + 1.0
    for flaw in FLAWS:
        y = torch.zeros(1024)
        assert small("through_tiles", x, y, FLAWS.index(flaw)) == 0
        assert torch.equal(x, y) == (flaw == "none"), flaw
        assert y.isnan().any() == (flaw != "none")


def test_some_asynchronous_copies_come_early(small: Small, seed: int) -> None:
    x, y = torch.rand(1024) + 1.0, torch.zeros(1024)
    assert small("through_tiles", x, y, FLAWS.index("no wait")) == 0
    assert 0.1 < (x == y).float().mean() < 0.5


@pytest.mark.parametrize("numbers", range(5))
def test_asynchronous_copies_end_with_zeros(small: Small, seed: int, numbers: int) -> None:
    x, y = torch.rand(32, 4) + 1.0, torch.full((32, 4), torch.nan)
    assert small("copy_some", x, y, 4 * numbers) == 0
    x[:, numbers:] = 0.0
    assert torch.equal(x, y)


def test_asynchronous_copies_of_places_that_are_not_aligned(small: Small, capfd: pytest.CaptureFixture[str]) -> None:
    x, y = torch.rand(33 * 4), torch.zeros(32 * 4)
    assert small("copy_some", x[1:], y, 16) == FAILED
    assert "an address that is no multiple of 16" in capfd.readouterr().err


def test_the_order_of_threads_depends_on_the_seed_alone(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(seed: int) -> list[bool]:
        monkeypatch.setenv("VLATTN_EMULATION_SEED", str(seed))
        x = torch.arange(64.0)
        small("neighbours", x, False)
        return x.isnan().tolist()  # whose neighbour came later

    assert wrong(1) == wrong(1)
    assert len({str(wrong(seed)) for seed in SEEDS}) > 1


def test_waiting_for_what_cannot_come_is_an_error(small: Small, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert small("barrier_for_some", 64) == 0
    assert small("barrier_for_some", 33) == FAILED
    assert "of 64 threads 31 returned, 33 wait at a barrier" in capfd.readouterr().err
    assert small("shuffle_for_some", torch.zeros(64, dtype=torch.int32)) == FAILED
    assert small("barrier_for_some", 0) == 0  # and the next launch is none the worse


def test_threads_that_wait_in_different_places_are_an_error(small: Small, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A shuffle would take its value from another, and only the count of those that wait is right."""
    x = torch.zeros(64, dtype=torch.int32)
    assert small("shuffle_here_or_there", x, False) == small("wait_here_or_there", False) == 0
    assert (x == 31).all()
    place = r"tests/cuda/emulation\.cu:\d+ \(number 1\)"
    for name, arguments, what in (("shuffle", (x, True), "instructions of a warp"), ("wait", (True,), "barriers")):
        assert small(f"{name}_here_or_there", *arguments) == FAILED
        assert re.search(rf"block 0: threads meet at different {what}: \S*{place} and \S*{place}", capfd.readouterr().err)


def test_blocks_come_in_an_order_that_depends_on_the_seed_alone(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> list[int]:
        monkeypatch.setenv("VLATTN_EMULATION_SEED", str(seed))
        x = torch.full((20,), -1, dtype=torch.int32)
        assert small("note_order", x, torch.zeros(1, dtype=torch.int32), 20) == 0
        return x.tolist()

    assert order(1) == order(1) and sorted(order(1)) == list(range(20))
    assert len({tuple(order(seed)) for seed in SEEDS}) == len(SEEDS)


def test_results_of_the_special_function_unit(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, or an ulp off, equal ones alike; subnormal ones are 0."""
    x = torch.linspace(1.0, 100.0, 256).repeat(2)
    x[-2:] = torch.tensor([-126.5, 1.5 * 2.0**126])

    def results() -> tuple[Tensor, Tensor]:
        powers, reciprocals = torch.zeros(512), torch.zeros(512)
        assert small("approximate", x, powers, reciprocals, 512) == 0
        return powers, reciprocals

    exact = x.double().exp2(), x.double().reciprocal()
    plain = results()
    monkeypatch.setenv("VLATTN_EMULATION_NOISE", "1")
    noisy = results()
    assert plain[0][-2] == plain[1][-1] == noisy[0][-2] == noisy[1][-1] == 0.0
    for right, wrong, true in zip(plain, noisy, exact, strict=True):
        ulps = (right[:-2].view(torch.int32) - wrong[:-2].view(torch.int32)).abs()
        torch.testing.assert_close(right[:-2].double(), true[:-2], rtol=2.0**-22, atol=0.0)
        assert ulps.max() == 1 and 0.5 < (ulps == 1).float().mean() < 0.8
        assert torch.equal(wrong[:254], wrong[256:-2])


def test_launches_that_cannot_be(small: Small) -> None:
    assert small("empty", 0, 32, 0) == small("empty", 1, 32, 99 * 1024) == 0
    for blocks, threads, shared in ((2**31, 32, 0), (1, 0, 0), (1, 33, 0), (1, 2048, 0), (1, 32, 99 * 1024 + 1)):
        assert small("empty", blocks, threads, shared) == INVALID


def test_shared_memory_comes_full_of_nan(small: Small) -> None:
    x = torch.zeros(64)
    assert small("uninitialised", x) == 0
    assert x.isnan().all()


def test_shuffles(small: Small, seed: int) -> None:
    x, lanes = torch.zeros(32, dtype=torch.int32), torch.arange(32)
    assert small("shuffles", x) == 0
    assert torch.equal(x.long(), (lanes ^ 5) + 100 * ((lanes * 7 + 3) % 32))


@pytest.mark.parametrize("in_order", (True, False))
@pytest.mark.parametrize("rows, columns", [(32, 64), (17, 50), (64, 128), (40, 97), (1, 1)])
@pytest.mark.parametrize("kind, dtype", [(0, torch.float32), (1, torch.bfloat16), (2, torch.float16)])
def test_products_of_tiles(small: Small, kind: int, dtype: torch.dtype, rows: int, columns: int, in_order: bool) -> None:
    """Small integers: sums are exact in float32, so that nothing but the right numbers at the right places passes."""
    x, y, z = (torch.randint(-2, 3, (n, columns)).to(dtype) for n in (rows, 32, 32))
    scores, out = torch.full((rows, 32), torch.nan), torch.full((rows, columns), torch.nan)
    assert small("products", kind, 64 if columns <= 64 else 128, x, y, z, scores, out, rows, columns, not in_order) == 0
    exact = (x.float() @ y.float().mT).to(dtype).float()
    assert torch.equal(scores, exact)
    assert torch.equal(out, exact @ z.float())


def run_sanitized(kind: str, options: tuple[str, ...], call: str) -> str:
    """What a sanitizer writes of one call on zeros."""
    library = build("asan" if kind == "address" else "tsan", *options, target="emulation") / "libemulation.so"
    code = (
        "import ctypes\n"
        "calloc = ctypes.CDLL(None).calloc\n"
        "calloc.restype = ctypes.c_void_p\n"
        "x, y, z, last, short = (ctypes.c_void_p(calloc(n, 4)) for n in (1024, 1024, 1024, 1024, 10))\n"
        f"assert ctypes.CDLL({str(library)!r}).run_{call} == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=sanitizing(kind), capture_output=True, text=True)
    assert (done.returncode == 0) == ("Sanitizer" not in done.stderr), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "call, words",
    [
        ("write_shared(31)", None),
        ("write_shared(32)", "heap-buffer-overflow"),
        ("write_shared(-1)", "heap-buffer-overflow"),
        ("write_global(short, 9)", None),
        ("write_global(short, 10)", "heap-buffer-overflow"),
    ],
)
def test_the_sanitizer_sees_what_lies_outside(call: str, words: str | None) -> None:
    written = run_sanitized("address", SANITIZED, call)
    assert words in written if words else written == ""


@pytest.mark.parametrize(
    "call, kernel",
    [
        ("block_sum(x, y, 3, 256, 1)", None),
        ("block_sum(x, y, 3, 32, 0)", "block_sum<false>"),
        ("neighbours(x, 1)", None),
        ("neighbours(x, 0)", "neighbours<false>"),
        ("shuffles(x)", None),
        ("neighbours_by_shuffle(x)", "neighbours_by_shuffle"),
        ("note_order(x, y, 1)", None),
        ("note_order(x, y, 2)", "note_order"),  # blocks
        ("products(1, 64, x, y, y, z, last, 32, 32, 0)", None),
        ("through_tiles(x, y, 0)", None),
        ("through_tiles(x, y, 4)", "through_tiles"),  # the wait of others
        ("through_tiles(x, y, 5)", "through_tiles"),  # a copy to what is still read
    ],
)
def test_the_sanitizer_sees_threads_that_do_not_wait(call: str, kernel: str | None) -> None:
    """In whatever order they ran: the results may be right."""
    written = run_sanitized("thread", THREADS, call)
    assert ("data race" in written and f"{kernel}" in written) if kernel else written == "", written
