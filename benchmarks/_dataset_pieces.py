"""Times the host's work per image in `vlattn explain --dataset`: `python -m vlattn_fast.benchmarks._dataset_pieces`."""

from __future__ import annotations

import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import torch

from vlattn_fast.interpret.dataset.store import SHARDS, ShardWriter
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.figures.photos import open_image


def _milliseconds(act: Callable[[], object], rounds: int) -> float:
    return timeit.timeit(act, number=rounds) / rounds * 1e3


def main() -> None:
    import numpy as np
    import transformers
    from PIL import Image

    torch.set_num_threads(1)
    size = {"shortest_edge": 336}
    prepare = transformers.CLIPImageProcessor(size=size, crop_size={"height": 336, "width": 336})
    relevancy = torch.rand(1, 577)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / SHARDS).mkdir()
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / "photo.jpg", quality=90)
        photo = open_image(folder / "photo.jpg")
        print(f"read a JPEG of 640 x 480: {_milliseconds(lambda: open_image(folder / 'photo.jpg'), 30):.2f} ms")
        print(f"resize and crop to 336 x 336: {_milliseconds(lambda: prepare(images=photo, return_tensors='pt'), 30):.2f} ms")
        writer = ShardWriter(folder, 0)

        def shard() -> None:
            for number in range(256):
                maps = relevancy[:, 1:].reshape(1, 24, 24)
                explanation = Explanation({"vision": relevancy}, maps, [0], scores=torch.rand(1), target=[1])
                writer.add(number, str(number), f"{number}.jpg", 16 * "0", explanation)
            writer.flush()

        each = _milliseconds(shard, 4) / 256
        stored = sum(file.stat().st_size for file in (folder / SHARDS).iterdir()) / (4 * 256)
        print(f"store an explanation: {each:.2f} ms, {stored:.0f} bytes")


if __name__ == "__main__":
    main()
