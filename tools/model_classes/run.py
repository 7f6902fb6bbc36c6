"""One process a class, so that a hang or a crash costs its own row; outcomes go into table.json here."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tools.model_classes import edited, held, unchanged
from tools.model_classes.compare import Judge, Row, compared, outcome_of

EDITS = Path(__file__).with_name("edits.json")
HELD = Path(__file__).with_name("held.json")
UNCHANGED = Path(__file__).with_name("unchanged.json")
TABLE = Path(__file__).with_name("table.json")
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "zero-shot": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "text": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


def classes(mapping: str) -> dict[str, str]:
    """The class of each model type."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, MAPPINGS[mapping])
    return {kind: cls if isinstance(cls, str) else cls[0] for kind, cls in names.items()}


def in_a_process(mapping: str, name: str, seconds: float, judge: Judge) -> Row:
    context = multiprocessing.get_context("fork")  # which has transformers already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, mapping, name, judge))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else Row("cannot be built", f"more than {seconds:.0f} s")
    except EOFError:
        return Row("cannot be built", "its process died")
    finally:
        process.kill()
        process.join()


def _child(sender: Any, mapping: str, name: str, judge: Judge) -> None:
    sender.send(outcome_of(mapping, name, judge))


def _name_operators_of_torchvision() -> None:
    """timm imports torchvision, whose library fits torch for CUDA alone. Without it two of its operators have no name."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("mappings", nargs="*", default=[*MAPPINGS], help=f"of {', '.join(MAPPINGS)}")
    options.add_argument("--only", nargs="*", default=[], help="model types")
    options.add_argument("--seconds", type=float, default=120, help="for one class")
    options.add_argument("--show", action="store_true", help="print and store nothing")
    options.add_argument("--edits", action="store_true", help="edited attention in place of explanations, into edits.json")
    options.add_argument("--held", action="store_true", help="gradients and rows with norms held fixed instead, into held.json")
    options.add_argument("--unchanged", action="store_true", help="functions that change nothing, into unchanged.json")
    options.add_argument("--missing", action="store_true", help="only model types that the file lacks")
    asked = options.parse_args()
    checks = {"edits": (EDITS, edited.compared), "held": (HELD, held.compared), "unchanged": (UNCHANGED, unchanged.compared)}
    chosen = [name for name in checks if getattr(asked, name)]
    if len(chosen) > 1:
        options.error(f"--edits, --held and --unchanged must be given in runs of their own; got {' and '.join(chosen)}")
    path, judge = checks[chosen[0]] if chosen else (TABLE, compared)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    _name_operators_of_torchvision()
    import transformers

    transformers.logging.set_verbosity_error()
    for preloaded in ("LlamaForCausalLM", "LlavaForConditionalGeneration", "CLIPModel", "AutoProcessor"):
        getattr(transformers, preloaded)
    table = json.loads(path.read_text()) if path.exists() else {}
    table["transformers"] = transformers.__version__
    for mapping in asked.mappings:
        begun = time.time()
        rows = table.setdefault(mapping, {})
        named = classes(mapping)
        for kind, name in named.items():
            if (asked.only and kind not in asked.only) or (asked.missing and kind in rows):
                continue
            row = in_a_process(mapping, name, asked.seconds, judge)
            rows[kind] = [name, row.outcome, row.reason]
            print(f"{mapping} {kind} {name}: {row.outcome} {row.reason}"[:300], flush=True)
            if not asked.show:
                write(path, table)
        table[mapping] = {kind: rows[kind] for kind in named if kind in rows}
        counts = Counter(outcome for _, outcome, _ in table[mapping].values())
        print(f"{mapping}: {dict(counts)} of {len(named)}, {time.time() - begun:.0f} s", flush=True)
        if not asked.show:
            write(path, table)


def write(path: Path, table: dict[str, Any]) -> None:
    """A stopped run keeps what it measured."""
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
