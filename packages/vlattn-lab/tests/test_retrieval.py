"""Recall on a made-up folder of precomputed features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vlattn_fast as va
from vlattn_lab.retrieval import load_features, recall


@pytest.mark.parametrize("repeats", [1, 5])
def test_recall_of_scan_on_precomputed_features(repeats, tmp_path):
    """Each caption's words are its image's first regions, but those of image 2 are image 0's."""
    regions = np.random.RandomState(0).standard_normal((3, 4, 8)).astype(np.float32)
    np.save(tmp_path / "test_ims.npy", regions.repeat(repeats, 0))
    (tmp_path / "test_caps.txt").write_text("".join(f"a caption of {i}\n" for i in (0, 1, 0) for _ in range(5)))
    images, captions = load_features(tmp_path)
    assert torch.equal(images, torch.from_numpy(regions)) and len(captions) == 15
    words = torch.stack([images[int(caption[-1])][:3] for caption in captions])
    blocks = [
        torch.stack([va.stacked_cross_attention(images[i : i + 1], words[j : j + 1])[0, 0] for j in range(15)]) for i in range(3)
    ]
    got = recall(torch.stack(blocks), at=(1, 5, 10))
    # image 0 ties with the captions of image 2, which count as ahead; image 2's own captions are image 0's
    assert got["text@1"] == pytest.approx(1 / 3) and got["image@1"] == pytest.approx(2 / 3)
    assert got["image@5"] == 1 and got["text@10"] >= got["text@5"]


def test_a_tie_is_no_hit_and_bad_input_is_named(tmp_path):
    assert recall(torch.zeros(2, 10), at=(1, 2)) == {"text@1": 0.0, "text@2": 0.0, "image@1": 0.0, "image@2": 1.0}
    with pytest.raises(ValueError, match=r"similarity must be \(images, 5 x images\); got \(2, 9\)"):
        recall(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="got NaN"):
        recall(torch.full((1, 5), torch.nan))
    with pytest.raises(ValueError, match="directory must hold dev_ims.npy and dev_caps.txt"):
        load_features(tmp_path, "dev")
    np.save(tmp_path / "dev_ims.npy", np.zeros((2, 4, 8)))
    (tmp_path / "dev_caps.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match=r"with 5 captions an image; got \(2, 4, 8\) and 3 captions"):
        load_features(tmp_path, "dev")
