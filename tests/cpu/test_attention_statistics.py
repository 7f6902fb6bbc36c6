"""attention_statistics by the CPU kernels: few queries, keys that are alike, groups in any order."""

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops.map_cases import check_statistics, groups, statistics_inputs
from tests.helpers.ops.masks import real_keys
from vlattn_fast.ops.attention_map import HEAD_REDUCTIONS


# either dtype with each number of queries, and each number of keys once
@pytest.mark.parametrize(
    "n, m, dtype",
    [
        (1, 769, torch.bfloat16),
        (16, 1100, torch.float32),
        (17, 1100, torch.bfloat16),
        (2, 32768, torch.float32),
        (2, 32768, torch.bfloat16),
        (2, 32769, torch.float32),
    ],
)
def test_few_queries_over_many_keys(n: int, m: int, dtype: torch.dtype) -> None:
    """Up to 16 queries keep their exponentials up to 32,768 keys."""
    check_statistics("cpu", as_dtype(statistics_inputs(n, m, 3, b=1, h=2), dtype), key_mask=torch.rand(1, m) > 0.3, **groups(m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 8, 16, 17])
def test_the_first_of_alike_keys(n: int, dtype: torch.dtype) -> None:
    """Products with alike keys are equal, wherever the keys stand, also in another block of keys."""
    for m in (2, 5, 47, 515, 900):
        inputs = as_dtype(statistics_inputs(n, m, 20, b=1), dtype)
        inputs["key"] = inputs["key"][:, :, :1].expand(inputs["key"].shape)
        assert va.attention_statistics(**inputs, backend="cpu").argmax.eq(0).all()


@pytest.mark.parametrize("keys", [1025, 1032])
def test_the_last_of_alike_keys_fill_no_tile(keys: int) -> None:
    """Their products have the bits of the others', also those of AMX: the first key is the largest, and has maxsim's gradient."""
    query, key = torch.randn(1, 2, 40, 64).bfloat16(), torch.randn(1, 2, 1, 64).bfloat16().expand(-1, -1, keys, -1)
    assert not va.attention_statistics(query, key, statistics=["argmax"], backend="cpu").argmax.any()
    documents = key[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(va.maxsim(query[0], documents, backend="cpu").sum(), documents)
    assert grad[:, 0].any() and not grad[:, 1:].any()


@pytest.mark.parametrize("n, group", [(1, 32), (3, 8), (8, 2), (16, 2)])
def test_few_queries_of_shared_keys(n: int, group: int) -> None:
    """Query heads that share a key head meet its keys together, up to 16 rows at once; in any order of groups, with any mask."""
    m = 70
    inputs = as_dtype(statistics_inputs(n, m, 24, b=2, h=2 * group, kv=2), torch.float32)
    options = {"enable_gqa": True, **groups(m)}
    check_statistics("cpu", inputs, **options)
    check_statistics("cpu", inputs, attn_mask=torch.rand(2, 1, n, m) > 0.3, key_mask=real_keys(2, m), **options)
    mask = torch.randn(n, m, dtype=torch.float64).masked_fill(torch.rand(n, m) > 0.7, -torch.inf)
    check_statistics("cpu", inputs, attn_mask=mask, softcap=2.0, is_causal=True, **options)


def test_many_queries_that_are_alike() -> None:
    """All parts of the attention that a key receives are rounded the same way."""
    inputs = as_dtype(statistics_inputs(16384, 33, 3, b=1, h=2), torch.float32)
    row = dict.fromkeys(("query", "row_weight"), 1)
    alike = {name: x.narrow(2 if x.dim() == 4 else 1, 0, 1).expand(x.shape) if name in row else x for name, x in inputs.items()}
    check_statistics("cpu", alike, only="received")


def test_infinite_row_weights() -> None:
    """A sum that is Inf stays Inf with the tiles that follow, as in the formula."""
    inputs = as_dtype(statistics_inputs(300, 33, b=1), torch.float32)
    inputs["row_weight"] = inputs["row_weight"].abs()
    inputs["row_weight"][0, 3] = torch.inf
    assert va.attention_statistics(**inputs, backend="cpu").received.eq(torch.inf).all()


@pytest.mark.parametrize("num_groups", [1, 2, 50, 900])
def test_groups_in_runs_and_in_any_order(num_groups: int) -> None:
    inputs = as_dtype(statistics_inputs(20, 900, b=1), torch.float32)
    index = torch.randint(-1, num_groups, (900,))
    for key_groups in (index, index.sort().values, torch.arange(900).clamp_max(num_groups - 1)):
        check_statistics("cpu", inputs, key_groups=key_groups, num_groups=num_groups)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("reduction", HEAD_REDUCTIONS)
def test_nan_in_a_head_of_another_thread(reduction: str) -> None:
    query, key = (torch.randn(1, 6, length, 8) for length in (3, 40))
    for head in (0, 5):
        broken = query.clone()
        broken[0, head, 1] = torch.nan
        torch.set_num_threads(4)
        found = va.attention_map(broken, key, head_reduction=reduction, backend="cpu")
        assert found[0, 1].isnan().all() and not found[0, (0, 2)].isnan().any()
