"""docs/models.md, from the records and the tests that name their classes: `python -m vlattn_lab.pages.models_page` writes it."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from vlattn_fast.interpret.records.decoders import DECODERS
from vlattn_fast.interpret.records.encoders import ENCODERS
from vlattn_fast.interpret.records.record import Family
from vlattn_fast.interpret.records.two_towers import LINKED
from vlattn_lab.checkout import ROOT
from vlattn_lab.models.compare import BOUND
from vlattn_lab.models.held import KEPT
from vlattn_lab.models.run import EDITS, HELD, TABLE

PAGE = ROOT / "docs" / "models.md"
KINDS = {"Encoders": ENCODERS, "Decoders": DECODERS, "Towers that attend to one another": LINKED}
MAPPED = {
    "causal": "Causal language models",
    "image-text": "Image-text-to-text",
    "zero-shot": "Zero-shot image classification",
    "sequence": "Sequence to sequence",
    "image": "Image classification",
    "text": "Sequence classification",
}
OUTCOMES = ("equal", "refused", "cannot be built", "cannot be compared", "wrong")
SCORES = {
    "pair": "similarity of image i and text i",
    "class": "largest logit",
    "token": "next token, or `answer=`",
    "query": "surest object query",
    "decoded": "next token",
    "states": "none",
    "velocity": "none, see [Explain a robot policy](guides/explain_a_robot_policy.md)",
}
WITHOUT_LOGITS = ("Model", "WithProjection")  # endings of classes that give states or projections and no logits
HEAD = """# Models

`va.explain(model, inputs)` takes language models, vision-language decoders, encoder-decoders, dual encoders, classifiers that
read one token or a mean, and the classes listed below, without further arguments. Any other model needs `read=` and `target=`
([Explain a model](guides/explain_a_model.md)), or `like=`, the name of a listed class with the same towers, whose record it
borrows.
`vlattn info --model DIR` prints what is known of a model before a run. A script writes this page.

## How a record is made

A *record* says which row is read, which score is explained, and what the tokens stand for. Where the class of a model has no
listed record, one is derived:

- **A language model** is a class of transformers that generates from `input_ids` and has no encoder. The tower is
  `get_decoder()`, and its layers are the list of modules with attention in it. The row is that of the last real token, wherever
  the padding is. `target=None`, ints and `answer=` work.
- **A vision-language decoder** has an `image_token_id` in its config as well. This id, `video_token_id` and `audio_token_id` say
  which tokens are words.
- **The grid** of image tokens follows from `image_grid_thw` and the side of a merged square; from `image_sizes` and the grids of
  tiles in the config; or from the size of the pixels, one token for a patch or for a square of patches whose side the config
  names. Where the number of image tokens is another one, nothing is guessed: `image` is None, and `relevancy["language"]` holds
  the entries of all tokens.

- **An encoder-decoder** is a class of transformers whose config says so and that generates. A run finds its towers. The row is
  the decoder's, that of the position which predicts the next token behind `decoder_input_ids`, or behind the start token where
  the inputs have none. The rules for two modalities give what the encoder's tokens count for it.
- **A model of block diffusion** generates too, and its decoder takes `decoder_input_ids`, all of which it predicts at once. The
  row of the last of them is read. `answer=` is refused.
- **A dual encoder** has `logits_per_image` among its outputs, a `vision_model` and a `text_model`. Patches are the last tokens of
  the vision model. Or it has the parts of CLIP as its authors and open_clip write it (`visual`, `encode_image`, `encode_text`,
  `logit_scale`) and takes `image` and `text`: both of open_clip's classes, with its own attention or torch's, a vision tower of
  timm, and SigLIP's pooling head. Heads of several learnt queries (CoCa) are refused, and so are convolutional towers.
- **A classifier** is a class of transformers whose outputs have `logits` (B, classes), or a model with timm's `patch_embed`,
  `blocks` and `num_classes`. A run finds its towers (`"tower0"`).

In dual encoders and classifiers the gradient of the score names the row. Where one token's state behind the last attention has a
gradient, its row is read. Where several have, and the gradient of a later state is the same for all of them, the score is read
from their mean, and so is the row. Where it differs, as behind a pooling head or a convolution, `read=` is asked for. The same
holds for a score that a callable target takes from the outputs of a listed class, and for a class of yours that is built on a
listed one and has a forward of its own.

A derived record has no connector, so `through_connector=True` refuses the model.
Layers that recur, as the gated delta rule of Qwen3.5 does, stand beside attention: with queries, keys and gates held fixed their
outputs are a map of their values (`va.reference.recurrent_map`). A layer in which neither is seen, a convolution over tokens in
front of attention, tokens that are pooled in front of attention and attention outside of the layers are refused by name. Where a
call attends to its own tower's tokens and to another tower's in one softmax, both towers are one sequence, and equations 5 and 6
hold.

{measured}
## Listed records

UNITER and CLIPMapper are models of this package. A test names each class: it compares a small random model with the published
rule on stored maps, or runs every method on a class with the same kind of tower.

- *default score*: *none* means that the outputs have no logits, so a method that takes a gradient needs `target=`, a callable.
- *maps*: the parts of the image that have a map, which are patches, a backbone's features, image tokens on their grid, or boxes.
- *connector*: whether `through_connector=True` carries relevancy into the vision tower.

Learnt attention sinks and soft-capped logits, as in gpt-oss and Gemma 2, are part of what each method reads.

BLIP-2 and InstructBLIP over Flan-T5 are encoder-decoders, over OPT and Vicuna decoders. Neither needs further arguments.
"""


def rows(name: str, family: Family) -> list[str]:
    """The rows of a class and of its models with a vocabulary."""
    more = [] if family.generating is None else [row(f"{name}(vocab_size=...)", family.generating)]
    return [row(name, family), *more]


def row(name: str, family: Family) -> str:
    towers = [tower for tower in family.towers if tower.layers]
    read = towers[:1] if family.bimodal else towers
    shown_rows = ", ".join(f"{tower.name}: {tower.row.label}" for tower in read)
    seen = {"patches": "patches", "packed_patches": "patches", "text_patches": "patches", "patches_text": "patches"}
    seen |= {"regions": "boxes", "boxes": "boxes", "features": "features"}
    maps = [seen.get(tower.tokens) or ("image tokens" if tower.grid is not None else None) for tower in family.towers]
    shown = ", ".join(dict.fromkeys(part for part in maps if part)) or "–"
    kind = "decoded" if towers[0].tokens == "decoded" else family.score
    score = SCORES["states" if kind == "class" and name.endswith(WITHOUT_LOGITS) else kind]
    return f"| `{name}` | {shown_rows} | {score} | {shown} | {'yes' if family.vision else '–'} |"


def measured(table: dict[str, Any]) -> str:
    """The stored outcomes of `make models`."""
    text = f"""## Classes of transformers {table["transformers"]}

`make models` builds a small random model of each class, from the class's default config with small sizes and the values that
only configs of checkpoints have, and explains it as it is in float64. It compares the rows with the published rule on the maps of
eager attention: *equal* is a difference of at most {BOUND:.0e} of a row's largest value. A picture must change the logits.
*Refused* is an error that names its reason. A class *cannot be built* where its default config with small sizes does not run, and
*cannot be compared* where the model gives no maps, or nothing but `explain` says which row is read.
"""
    return text + outcomes(table)


def edited(table: dict[str, Any]) -> str:
    """The stored outcomes of `make models ARGS="--edits"`."""
    text = f"""## Edited attention

`make models ARGS="--edits"` takes the same models, cuts edges of two heads in all layers and steers a layer, by `va.intervene`
with `Knockout` and `Steer`, and compares the logits with those of eager attention with edited maps. *Equal* is a difference of at
most {BOUND:.0e} of what the edits change. A class *cannot be compared* where no tower of three tokens attends to itself, or the
edits change no logit.
"""
    return text + outcomes(table, names_equal=False)


def held(table: dict[str, Any], explained: dict[str, Any]) -> str:
    """The stored outcomes of `make models ARGS="--held"`, and the classes that take a root which keeps its derivative."""
    kept: dict[str, str] = {}
    for mapping in (mapping for mapping in MAPPED if mapping in table):
        for name, _, reason in table[mapping].values():
            parts = [_short(part) for part in reason.partition(KEPT)[2].split(", ") if part not in ("", name)]
            if KEPT in reason:
                kept[name] = f"`{name}`" + (f" ({', '.join(parts)})" if parts else "")
    text = f"""## Norms held fixed

`make models ARGS="--held"` takes the same models, holds the denominators of norms fixed (`freeze=("norms",)`), and compares the
gradient of the score by all embeddings with that of a plain implementation, in which each norm is written out with a detached
denominator. Where rows can be compared, those of `va.methods.Gradient(freeze=("norms",))` and of
`va.methods.Gradient(freeze=("norms", "attention"))` are compared with the published rule on the plain implementation's maps.
*Equal* is a difference of at most {BOUND:.0e} of the largest value, in all that was compared.

{_compared(table, explained)}
A root that is taken in the code of a larger module keeps its derivative, with `freeze` as without, be it of a norm or not. These
classes have one (in brackets the module, where it is not the model's own): {", ".join(kept.values()) or "none"}.
"""
    return text + outcomes(table, names_equal=False)


def _compared(table: dict[str, Any], explained: dict[str, Any]) -> str:
    """How many model types were measured, and how many of them have rows that are equal as well."""
    lines = ""
    for mapping, title in MAPPED.items():
        rows = table.get(mapping, {}).values()
        equal = [reason for _, outcome, reason in rows if outcome == "equal"]
        whole = sum("e-" in reason.partition("rows ")[2].partition(KEPT)[0] for reason in equal)
        numbers = (len(explained[mapping]), len(rows), len(equal), whole)
        lines += f"| {title} | {' | '.join(map(str, numbers))} |\n"
    return f"| | model types | measured | gradients equal | rows equal too |\n| --- | ---: | ---: | ---: | ---: |\n{lines}"


def outcomes(table: dict[str, Any], names_equal: bool = True) -> str:
    """The counts of each mapping, and a table of the classes that are not equal."""
    text = ""
    for mapping, title in MAPPED.items():
        if mapping not in table:
            continue
        rows = table[mapping]
        counts = Counter(outcome for _, outcome, _ in rows.values())
        shown = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
        equal = sorted({name for name, outcome, _ in rows.values() if outcome == "equal"})
        text += f"\n### {title}\n\n{len(rows)} model types: {shown}.\n\n"
        text += f"Equal: {', '.join(f'`{name}`' for name in equal)}.\n\n" if names_equal else ""
        text += "| class | outcome | reason |\n| --- | --- | --- |\n"
        others = sorted({(name, outcome, reason) for name, outcome, reason in rows.values() if outcome != "equal"})
        text += "".join(f"| `{name}` | {outcome} | {_short(reason)} |\n" for name, outcome, reason in others)
    return text


def _short(reason: str) -> str:
    plain = re.sub(r"[|<>{}*_`\[\]]", lambda mark: f"&#{ord(mark[0])};", reason)
    return plain if len(reason) <= 160 else f"{plain[:160].rpartition(' ')[0]} …"


def page() -> str:
    explained, of_edits, of_held = (json.loads(path.read_text(encoding="utf-8")) for path in (TABLE, EDITS, HELD))
    parts = [HEAD.replace("{measured}", f"{measured(explained)}\n{edited(of_edits)}\n{held(of_held, explained)}")]
    for kind, families in KINDS.items():
        parts.append(f"### {kind}\n\n| class | row that is read | default score | maps | connector |")
        parts[-1] += "\n| --- | --- | --- | --- | --- |\n"
        parts[-1] += "\n".join(line for name, family in sorted(families.items()) for line in rows(name, family)) + "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
