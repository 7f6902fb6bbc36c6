"""A data set for `evaluate` from a file or a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.dataset.items import Items
from vlattn_fast.interpret.explaining.answer import with_prompts
from vlattn_fast.interpret.explaining.loading import build_inputs, generate, on_device
from vlattn_fast.interpret.result.figures.photos import read_mask


def samples(
    model: Any, processor: Any, source: str | Path, texts: Sequence[str] = (), answer: str | None = None, most: int | None = None
) -> Iterator[Mapping[str, Any]]:
    """ "inputs", "boxes", "text_truth", and "target" or "answer", of each input of `source`, see `Items`; `texts` and `answer`
    are for inputs without any. `most`: the most tokens of the model's own answer, if an input has none.

    "boxes" is a list of [x1, y1, x2, y2], relative to the image as the model sees it, or the path of a mask, an image of the same
    extent: its pixels that are not black are inside. A ValueError names the input that is wrong.
    """
    for item in Items(source):
        try:
            if item.problem is not None:
                raise ValueError(item.problem)
            boxes = json.loads(item.boxes) if isinstance(item.boxes, str) else item.boxes  # text in a .csv
            if isinstance(boxes, list):
                boxes = torch.tensor(boxes, dtype=torch.float32)
            elif boxes is not None:
                boxes = read_mask(boxes)
            truth = item.text_truth
            if isinstance(truth, str) and truth.lstrip().startswith("["):  # in a .csv
                truth = json.loads(truth)
            inputs = on_device(build_inputs(model, processor, item.load_image(), item.texts or texts), model)
            asked: dict[str, Any] = {"target": item.target} if item.target is not None else {"answer": item.answer or answer}
            if most is not None and asked.get("answer", 0) is None:
                asked["answer"] = with_prompts(generate(model, inputs, most), inputs, find_adapter(model))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}, in input {item.id!r} of the dataset") from error
        yield {"inputs": inputs, "boxes": boxes, "text_truth": truth, **asked}
