"""Batches, heads, queries, keys, features and carried rows of size 0: every operator, forward and backward, as the formula."""

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import each, on
from tests.helpers.ops.every_call import gradients, leaves, outputs_of
from tests.helpers.ops.properties import BACKENDS, Turn, every_choice, supported
from vlattn_fast.checking.cases import Example, Sizes, cases_of

SIZES = Sizes(3, 4, 8, 8, regions=3, words=4, features=8, rows=2, images=2, captions=2)
LETTERS = {
    **{"B": ("batch", "images"), "H": ("heads", "captions"), "N": ("queries", "regions"), "M": ("keys", "words")},
    **{"D": ("head_dim", "features"), "V": ("value_dim",), "T": ("rows",)},
}
EMPTY = ("B", "H", "N", "M", "D", "V", "DV", "T", "BH", "NM", "BHNMDVT")


def of_sizes(operator: str, empty: str) -> dict[str, Example]:
    zero = dict.fromkeys([size for letter in empty for size in LETTERS[letter]], 0)
    return {example.title: example for example in cases_of(operator).examples(SIZES._replace(**zero))}


def run(example: Example, backend: str) -> list[Tensor]:
    """Outputs and gradients."""
    x = leaves(example, example.in_dtype(torch.float32))
    outputs = outputs_of(example.run(x, backend=backend))
    return [*outputs, *(gradients(outputs, x) if any(y.requires_grad for y in outputs) else [])]


@every_choice(EMPTY, *BACKENDS[:4])  # sdpa's limits refuse some: tests/ops/test_sdpa.py
def test_as_the_formula(backend: str, operator: str, turn: Turn) -> None:
    whole = supported(list(of_sizes(operator, "").values()), backend, torch.float32)
    for call, empty in turn.meet(whole):
        torch.manual_seed(0)
        example = of_sizes(operator, empty)[call.title]
        reduces = operator in ("attention_map", "indexer_divergence") or example.options.get("head_mean", False)
        if reduces and "H" in empty:  # there is no maximum and no mean of no heads
            with pytest.raises(ValueError, match="query must have at least one head to reduce; got"):
                run(example, backend)
            continue
        want = run(example, "reference")
        for name in (backend, "auto") if backend == "streaming" else (backend,):
            got = run(example, name)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype, (example.title, empty)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
                assert not a.isnan().any(), (example.title, empty)


@on("streaming", "cpu")
@pytest.mark.parametrize("empty", ("D", "V", "DV"))
def test_no_features_beside_padding(backend: str, empty: str) -> None:
    """Rows of size 0 have no pointer, which a sanitizer sees where zeros are written to one."""
    x = leaves(of_sizes("score_attention", empty)["score_attention"])
    padding = torch.tensor([[True, False, True, False]] * SIZES.batch)
    results = []
    for name in (backend, "reference"):
        outputs = outputs_of(va.score_attention(**x, key_mask=padding, return_lse=True, backend=name))
        results.append([*outputs, *gradients(outputs, x)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


WITHOUT_HEADS = ("score_attention, additive", "relevancy_attention", "attention_statistics")


@each("name", streaming=WITHOUT_HEADS, cpu=WITHOUT_HEADS, triton=WITHOUT_HEADS, cuda=WITHOUT_HEADS[:1])
def test_keys_that_no_query_head_shares(backend: str, name: str) -> None:
    """0 query heads share 2 key heads: the gradients of keys and values are zero."""
    none, two = (of_sizes(name.partition(",")[0], empty)[name] for empty in ("H", ""))
    x = leaves(two, {key: (two if key in ("key", "value") else none).tensors[key] for key in two.tensors})
    outputs = outputs_of(two.run(x, enable_gqa=True, backend=backend))
    for grad in gradients(outputs, x)[:3]:
        assert not grad.any()
