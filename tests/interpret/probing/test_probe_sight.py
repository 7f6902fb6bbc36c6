"""Which tokens `probe` counts as cross-modal: those that see words and the whole image."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import vlattn_fast as va
from tests.interpret.probing.test_probe import case
from vlattn_fast.interpret.probing.layout import Layout
from vlattn_fast.interpret.probing.visibility import sees_both


def test_patches_behind_a_causal_mask_see_no_word_behind_them() -> None:
    """With the start token alone in front of the image every head would seem to look at the text."""
    model, inputs, _, _ = case("LLaVA")
    start_first = {**inputs, "input_ids": inputs["input_ids"][:1, [0, *range(2, 22)]]}
    start_first |= {"attention_mask": torch.ones(1, 21).long(), "pixel_values": inputs["pixel_values"][:1]}
    for special in (True, False):
        report = va.probe(model, [(start_first, None), (inputs, None)], tests=("modality", "cross_modal"), special=special)
        rows = [row for row in report.table if row["test"] == "cross_modal"]
        assert {(row["samples"], row["left_out"]) for row in rows} == {(2, 1)}
        (row,) = (row for row in va.probe(model, [(start_first, None)], special=special).table if row["test"] == "cross_modal")
        assert (row["value"], row["samples"], row["left_out"]) == (None, 0, 1)
        assert row["note"] == "no image token sees a word and the whole image"
    with pytest.raises(ValueError, match="Test 'cross_modal' is impossible .*: no image token sees a word and the whole image"):
        va.probe(model, [(start_first, None)], tests=("cross_modal",))


def test_masks_tell_which_tokens_see_both() -> None:
    """Of two words and three image tokens: causal, boolean and float masks, per head, and padding, beside a loop."""
    layout = Layout(
        torch.tensor([[0, 0, 1, 1, 1], [0, -1, 1, 1, -1]]), torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2), 0, []
    )
    generator = torch.Generator().manual_seed(3)
    boolean = torch.rand(2, 3, 5, 5, generator=generator) < 0.8
    float_mask = torch.zeros(2, 1, 5, 5).masked_fill(~boolean[:, :1], torch.finfo(torch.float32).min) + torch.arange(5.0)
    padding = layout.parts >= 0
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for masks, visible in (
        ({"is_causal": True, "attn_mask": None}, causal.expand(2, 1, 5, 5)),
        ({"attn_mask": boolean, "key_mask": padding}, boolean & padding[:, None, None]),
        ({"attn_mask": float_mask, "is_causal": False}, boolean[:, :1]),
        ({"attn_mask": padding[:, None, None]}, padding[:, None, None].expand(2, 1, 5, 5)),
        ({"attn_mask": causal}, causal.expand(2, 1, 5, 5)),
    ):
        got = sees_both(masks, layout, layout.parts)
        for b, h, i in np.ndindex(2, visible.shape[1], 5):
            keys = visible[b, h, i].nonzero()[:, 0].tolist()
            image = [j for j in range(5) if layout.parts[b, j] == 1]
            want = i in image and set(image) <= set(keys) and any(layout.parts[b, j] == 0 for j in keys)
            assert bool(got.expand(2, visible.shape[1], 5)[b, h, i]) == want, (masks, b, h, i)
