"""The backward pass of scores over hidden units: how keys are divided among programs, which the gradients may not show. And
relevancy through them: edges of tiles, many rows."""

import functools
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops import core_cases
from tests.helpers.ops.score_cases import check
from tests.helpers.ops.tile_edges import covering
from vlattn_fast import scores as S
from vlattn_fast.backends.inputs import Attention, ScoreAttentionBackwardInputs
from vlattn_fast.kernels import _units_backward, relevancy_attention, score_attention

KINDS = {
    "additive": lambda p: S.Additive(p["vector"]),
    "hadamard_tanh": lambda p: S.Hadamard(p["vector"], activation="tanh"),
    "hadamard_sigmoid": lambda p: S.Hadamard(p["vector"], activation="sigmoid"),
}


def tensors(heads_kv: int = 2, size: int = 5, rows: int = 35, heads: int = 2) -> dict[str, torch.Tensor]:
    """Heads of two tiles of queries and of keys in float32."""
    of_keys = {"key": (1, heads_kv, 37, size), "value": (1, heads_kv, 37, 3)}
    shapes = {"query": (1, heads, rows, size), **of_keys, "vector": (heads, size)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("programs, heads_kv, heads", [(1, 2, 2), (1, 1, 2), (2, 2, 2), (100, 2, 2), (100, 1, 2), (100, 2, 4)])
def test_a_program_takes_several_heads_one_or_a_part(
    programs: int, heads_kv: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where heads share keys."""
    monkeypatch.setattr(_units_backward, "PROGRAMS", 1)
    monkeypatch.setattr(_units_backward, "multiprocessors", lambda device: programs)
    check("triton", tensors(heads_kv, heads=heads), KINDS["additive"], is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, size", [(torch.float32, 70), (torch.bfloat16, 33)])
def test_sizes_that_groups_of_keys_depend_on(dtype: torch.dtype, size: int, kind: str) -> None:
    check("triton", as_dtype(tensors(1, size, 3), dtype), KINDS[kind], enable_gqa=True)


@pytest.mark.parametrize("kind, programs", [("additive", 1), ("hadamard_tanh", 100)])
@pytest.mark.slow
def test_the_same_bits_each_time_and_nothing_from_padding(kind: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_units_backward, "PROGRAMS", 1)
    monkeypatch.setattr(_units_backward, "multiprocessors", lambda device: programs)
    inputs = tensors()
    real = torch.rand(1, 37) > 0.4
    found = []
    for filler in (torch.nan, 0.5):
        for name in ("key", "value"):
            inputs[name] = inputs[name].masked_fill(~real[:, None, :, None], filler)
        leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out = va.score_attention(
            leaves["query"], leaves["key"], leaves["value"], score=KINDS[kind](leaves), key_mask=real, backend="triton"
        )
        found.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    for grads in zip(*found, strict=True):
        assert all(torch.equal(grad, grads[0]) for grad in grads)
    for grad in found[0][1:3]:
        assert not grad.masked_select(~real[:, None, :, None]).any() and grad.any()


def test_few_heads_are_divided_and_sums_stay_small() -> None:
    programs, numbers = 264, 577 * 64
    of = functools.partial(_units_backward._key_ranges, programs=programs)
    assert of(1024, 10, numbers) == (1, 10)  # one range of ten blocks
    assert of(16, 10, numbers) == (10, 1)
    assert of(programs // 4, 10, numbers) == (4, 3)
    assert of(5, 0, numbers) == (1, 0)
    for heads in (1, 7, 64, 200, 300, 1024):
        for blocks in (1, 2, 9, 256):
            for sums in (0, numbers, 2**24, 2**29):
                ranges, length = of(heads, blocks, sums)
                assert (ranges - 1) * length < blocks <= ranges * length
                assert ranges == 1 or heads * ranges * sums <= _units_backward.LARGEST


class Noted:
    """A kernel that notes its programs and the numbers of its sums, and runs another one, where there is one."""

    def __init__(self, kernel: Any = None) -> None:
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(**call: Any) -> None:
            self.seen.append((*grid, call["p_sums"].numel() if "p_sums" in call else 0))
            if self.kernel is not None:
                self.kernel[grid](**call)

        return launch


@pytest.mark.parametrize(
    "batch, heads, heads_kv, tokens, programs", [(64, 16, 16, 577, 264), (33, 64, 8, 16384, 16), (1, 8, 1, 2**19, 1)]
)
def test_sums_are_bounded(
    batch: int, heads: int, heads_kv: int, tokens: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By shapes alone: CLIP, heads that share keys at 16,384 tokens (17.7 GB for 264 programs), and one program at least."""
    for name in (
        "score_attention._prepare_kernel",
        "_units_backward._units_rows_kernel",
        "_units_backward._units_backward_kernel",
    ):
        monkeypatch.setattr(f"vlattn_fast.kernels.{name}", kernel := Noted())
    size = 64 if tokens == 577 else 128
    query = torch.empty(batch, heads, tokens, size, dtype=torch.bfloat16, device="meta")
    key = torch.empty(batch, heads_kv, tokens, size, dtype=torch.bfloat16, device="meta")
    inputs = ScoreAttentionBackwardInputs(
        grad_out=query,
        grad_lse=None,
        attention=Attention(
            query=query, key=key, vector=torch.empty(heads, size, dtype=torch.bfloat16, device="meta"), score="additive"
        ),
        value=key,
        out=query,
        lse=torch.empty(query.shape[:3], device="meta"),
        seed=None,
        dropout_p=0.0,
        backend="triton",
    )
    score_attention.backward(inputs)
    ((grid, numbers),) = kernel.seen
    assert grid == programs and numbers == programs * heads // heads_kv * -(-tokens // 64) * 64 * size
    assert numbers <= _units_backward.LARGEST or programs == 1


@pytest.mark.parametrize("heads_kv", [1, 2])
def test_fewer_programs_give_the_same(heads_kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Noted(_units_backward._units_backward_kernel)
    monkeypatch.setattr(_units_backward, "_units_backward_kernel", kernel)
    monkeypatch.setattr(_units_backward, "LARGEST", 1)
    check("triton", tensors(heads_kv), KINDS["additive"], enable_gqa=True)
    assert kernel.seen == [(1, 2 // heads_kv * 64 * 5)] * len(kernel.seen) != []


WEIGHTS = {
    "zeros": [0.0],
    "zeros at either place of a pair": [0.0, 1.0, 0.0, -1.0, 0.5, 0.0],
    "far apart": [1e-12, 1.0, -1.0, 1e-6, 3.0, -1e-3],
    "next to nothing": [2e-32, -1e-32],
    "large": [300.0, -1e-7],
}
SPREADS = (("additive", 0.5), ("additive", 4.0), ("additive", 30.0), ("hadamard_sigmoid", 4.0))


@pytest.mark.parametrize("name, spread, dtype", covering(tuple(WEIGHTS), SPREADS, (torch.float16, torch.bfloat16)), ids=str)
def test_any_weights_of_units(name: str, spread: tuple[str, float], dtype: torch.dtype) -> None:
    """One weight of two is inverted, in 16-bit dtypes. The spreads take every way to combine exponentials."""
    kind, factor = spread
    inputs = tensors(size=6, rows=3)
    inputs["query"] *= factor
    inputs["vector"] = torch.tensor(WEIGHTS[name]).repeat(6 // len(WEIGHTS[name])).expand(2, -1)
    check("triton", as_dtype(inputs, dtype), KINDS[kind], scale=1.0)


def test_all_tiles_of_a_head_take_tanh_alike() -> None:
    """The pass over rows has 16 keys a tile, the one over pairs 32. If the second 16, which are small, took tanh in another way,
    P of the two passes would differ by rounding, which a scale of 1000 shows."""
    inputs = tensors(size=8, rows=64)
    inputs["key"][:, :, 16:] /= 8
    check("triton", inputs, KINDS["hadamard_tanh"], scale=1e3)


@pytest.mark.parametrize("largest", [10.0, 10.25])
def test_the_largest_exponentials(largest: float) -> None:
    """Without a clamp and with one; by a weight's largest reciprocal their product overflows."""
    inputs = tensors(size=6, rows=3)
    inputs["query"], inputs["key"] = torch.full_like(inputs["query"], -largest), torch.full_like(inputs["key"], -largest)
    inputs["vector"] = torch.tensor([[0.0, 1.0, -0.5, 0.0, 0.0, 0.0]] * 2)
    for dtype in (torch.float16, torch.bfloat16):
        check("triton", as_dtype(inputs, dtype), KINDS["additive"], scale=1.0)


@pytest.mark.parametrize("n, m, causal", [(32, 64, False), (33, 65, False), (65, 33, False), (70, 70, True)])
def test_relevancy_either_side_of_a_tile(n: int, m: int, causal: bool) -> None:
    """Of 32 queries and 64 keys in 16 bits; maps have 64 queries and 32 keys."""
    inputs, make = core_cases.made("additive", n, m, b=1, h=1, kv=1, dtype=torch.bfloat16)
    core_cases.check("triton", inputs, make, is_causal=causal, row_normalize=causal)


@pytest.mark.parametrize("rows", (65, 130))
def test_many_rows_of_maps_that_are_too_large_to_be_stored(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes all heads, so that nothing is larger than the result."""
    monkeypatch.setattr(relevancy_attention, "_stored_maps", lambda *_: 0)
    inputs, make = core_cases.made("additive", 9, 20, h=4, kv=2, rows=rows, dtype=torch.bfloat16)
    core_cases.check("triton", inputs, make, maps=False)
