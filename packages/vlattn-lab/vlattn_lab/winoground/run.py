"""The command line: scores a saved model of transformers on a local copy of Winoground."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.extras import with_progress
from vlattn_fast.measuring.records import grouped, markdown
from vlattn_lab.winoground import SCORES, PairScore, judge, pair_of, read_examples, shares

TAGS = ("collapsed_tag", "num_main_preds", "secondary_tag")  # of a line of examples.jsonl: the groups of the paper's table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlattn_lab.winoground",
        description="Scores a saved model of transformers on a local copy of Winoground: text, image and group, also by tag.",
    )
    parser.add_argument("directory", type=Path, help="examples.jsonl and images/, from the files of Winoground")
    parser.add_argument("--model", type=Path, required=True, help="folder of a dual encoder, or a model with a matching head")
    chosen = parser.parse_args(arguments)
    try:
        examples = list(read_examples(chosen.directory))
        score = load_score(chosen.model)
        bar = with_progress(enumerate(examples, 1), "winoground", total=len(examples))
        hits = [judge(score, pair_of(chosen.directory, example), number) for number, example in bar]
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


def _shown(hits: Sequence[dict[str, bool]]) -> list[str]:
    return [f"{share:.3f}" for share in shares(hits).values()]
