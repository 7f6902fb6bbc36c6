"""The command line: scores a saved model of transformers, or published UNITER, on a local copy of Winoground."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.measuring.records import grouped, markdown
from vlattn_fast.models import UNITER
from vlattn_lab.winoground import SCORES, PairScore, judge, pair_of, read_examples, shares

TAGS = ("collapsed_tag", "num_main_preds", "secondary_tag")  # of a line of examples.jsonl: the groups of the paper's table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlattn_lab.winoground",
        description="Scores a saved model on a local copy of Winoground: text, image and group, also by tag.",
    )
    parser.add_argument("directory", type=Path, help="examples.jsonl and images/, from the files of Winoground")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model, or UNITER's file")
    parser.add_argument("--regions", type=Path, help="of UNITER: folder with a file NAME.npz of regions for each image")
    parser.add_argument("--tokenizer", type=Path, help="of UNITER: folder of its BERT tokenizer")
    chosen = parser.parse_args(arguments)
    try:
        examples = list(read_examples(chosen.directory))
        if (chosen.regions is None) != (chosen.tokenizer is None):
            raise ValueError("--regions and --tokenizer must be given together, for UNITER; got one of them")
        if chosen.regions is None:
            score = load_score(chosen.model)
        else:
            score = load_uniter_score(chosen.model, chosen.regions, chosen.tokenizer)
        bar = with_progress(enumerate(examples, 1), "winoground", total=len(examples))
        hits = [judge(score, pair_of(None if chosen.regions else chosen.directory, example), number) for number, example in bar]
        lines = [["all", str(len(hits)), *_shown(hits)]]
        for tag in TAGS:
            tagged = [(str(example[tag]), hit) for example, hit in zip(examples, hits, strict=True) if example.get(tag)]
            for value, members in sorted(grouped(tagged, lambda pair: pair[0]).items()):
                lines.append([f"{tag}: {value}", str(len(members)), *_shown([hit for _, hit in members])])
    except ValueError as error:
        parser.error(str(error))
    print(markdown(["pairs", "number", *SCORES], [["chance", "", "0.250", "0.250", "0.167"], *lines]))


def load_score(folder: str | Path) -> PairScore:
    """The score of a saved model of transformers, from a local folder: the logit of its image-text matching head, or the
    similarity of its two towers.

    The folder is what `save_pretrained` of the model and of its processor wrote. The class is the first of the config's
    "architectures", such as CLIPModel, BlipForImageTextRetrieval or ViltForImageAndTextRetrieval. Nothing is downloaded.

    Raises:
        ValueError: a folder without a model or a processor, or a class that transformers does not have. The score itself raises
            it if the model's output has no score of an image and a caption.
    """
    import transformers

    local = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model must be a folder with config.json, weights and processor; got {folder} without config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(**local)
        processor = transformers.AutoProcessor.from_pretrained(**local)
        name = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise ValueError(f"config.json must name a class of transformers {transformers.__version__}; got {name}")
        model = kind.from_pretrained(**local).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be a folder with config.json, weights and processor; got {folder}: {error}") from None
    # BLIP-2's matching head runs only if it is asked for. SigLIP learned captions that are all padded to one length.
    options = {"use_image_text_matching_head": True} if name.startswith("Blip2") else {}
    padding = "max_length" if config.model_type.startswith("siglip") else True

    @torch.no_grad()
    def score(image: Any, caption: str) -> Tensor:
        inputs = processor(images=[image], text=[caption], padding=padding, return_tensors="pt")
        output = model(**inputs, **options)
        names = ("itm_score", "logits", "logits_per_image")
        logits = next((output[name] for name in names if output.get(name) is not None), torch.empty(0))
        if logits.shape not in ((1, 1), (1, 2)):
            has = ", ".join(f"{name} {tuple(x.shape)}" for name, x in output.items() if isinstance(x, Tensor))
            raise ValueError(f"model must score an image and a caption, in {' or '.join(names)} (1, 1) or (1, 2); got {has}")
        return logits[0, -1] - logits[0, 0] if logits.shape[1] == 2 else logits[0, 0]  # of two classes, 1 is "match"

    return score


def load_uniter_score(weights: str | Path, regions: str | Path, tokenizer: str | Path) -> PairScore:
    """The score of UNITER's published weights for the name of an image and a caption: the logit of "matches" less that of "does
    not match".

    Args:
        weights: a checkpoint for `UNITER.from_published`, pre-trained or fine-tuned for retrieval, such as uniter-base.pt.
        regions: a folder with NAME.npz for each image: `features` (R, region_dim), and `norm_bb` (R, 6), the relative x1, y1, x2,
            y2, width and height, as UNITER's own region files have them. Their product is position 7.
        tokenizer: a folder of the BERT tokenizer, such as bert-base-cased.

    Raises:
        ValueError: a missing file, or one of another form.
    """
    import transformers

    if not Path(weights).is_file():
        raise ValueError(f"model must be a file of UNITER's weights; got {weights}, which does not exist")
    try:
        words = transformers.AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer must be a folder of a tokenizer; got {tokenizer}: {error}") from None
    model = UNITER.from_published(torch.load(weights, map_location="cpu", weights_only=True)).float()

    @torch.no_grad()
    def score(image: str, caption: str) -> Tensor:
        ids = words(caption, return_tensors="pt").input_ids
        logits = model(ids, **read_regions(Path(regions) / f"{image}.npz")).logits[0]
        return logits[1] - logits[0]

    return score


def read_regions(file: str | Path) -> dict[str, Tensor]:
    """UNITER's inputs of one of its region files: "region_features" (1, R, region_dim) and "region_positions" (1, R, 7).
    `explain` and `probe` accept them together with "input_ids"."""
    if not Path(file).is_file():
        raise ValueError(f"regions must have a file for each image; got none at {file}")
    with np.load(file) as found:
        if missing := {"features", "norm_bb"} - {*found}:
            raise ValueError(f"{file} must have features and norm_bb; got none of {sorted(missing)}")
        features, boxes = (torch.from_numpy(found[name]).float()[None] for name in ("features", "norm_bb"))
    if boxes.ndim != 3 or features.ndim != 3 or boxes.shape[1:] != (features.shape[1], 6):
        shapes = f"{tuple(features.shape[1:])} and {tuple(boxes.shape[1:])}"
        raise ValueError(f"{file} must have features (R, region_dim) and norm_bb (R, 6); got {shapes}")
    positions = torch.cat([boxes, boxes[..., 4:5] * boxes[..., 5:6]], -1)
    return {"region_features": features, "region_positions": positions}


def _shown(hits: Sequence[dict[str, bool]]) -> list[str]:
    return [f"{share:.3f}" for share in shares(hits).values()]
