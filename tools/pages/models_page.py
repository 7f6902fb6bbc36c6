"""docs/models.md, from the records and the tests that name their classes: `python -m tools.pages.models_page` writes it."""

from __future__ import annotations

from pathlib import Path

from vlattn_fast.interpret.records.decoders import DECODERS
from vlattn_fast.interpret.records.encoders import ENCODERS
from vlattn_fast.interpret.records.record import Family
from vlattn_fast.interpret.records.two_towers import LINKED

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "models.md"
KINDS = {"Encoders": ENCODERS, "Decoders": DECODERS, "Towers that attend to one another": LINKED}
SCORES = {
    "pair": "similarity of image i and text i",
    "class": "largest logit",
    "token": "next token, or `answer=`",
    "query": "surest object query",
    "decoded": "next token",
    "states": "none",
}
WITHOUT_LOGITS = ("Model", "WithProjection")  # endings of classes that give states or projections and no logits
ROWS = {
    "cls": "first token",
    "eot": "end-of-text token",
    "last": "last position",
    "target": "position that predicts the token",
    "before_sep": "token before [SEP]",
    "mean": "mean of all",
    "patch_mean": "mean of the patches",
    "pool": "pooling head",
    "query": "object query",
}

HEAD = """# Models

`va.explain(model, inputs)` takes these classes of transformers, and UNITER and CLIPMapper of this package, without further
arguments. Any other model needs `read=` and `target=` ([Explain a model](guides/explain_a_model.md)). A script writes this page
from the package's records. A test names each class: it compares a small random model with the published rule on stored maps, or
runs every method on a class with the same kind of tower.

- *default score*: *none* means that the outputs have no logits, so a method that takes a gradient needs `target=`, a callable.
- *maps*: the parts of the image that have a map, which are patches, a backbone's features, image tokens on their grid, or boxes.
- *weighted*: whether the record names the residual branch that `method="weighted"` needs.
- *connector*: whether `through_connector=True` carries relevancy into the vision tower.

`explain` refuses two kinds of attention by name, which a config can ask for: attention sinks, and soft-capped logits, as in
Google's checkpoints of Gemma 2. `Gemma2ForCausalLM` works with `attn_logit_softcapping=None`.

BLIP-2 and InstructBLIP over OPT and Vicuna need no further arguments. Over Flan-T5 they need `answer=` or `read=`, as other
encoder-decoders do.
"""


def rows(name: str, family: Family) -> list[str]:
    """The rows of a class and of its models with a vocabulary."""
    more = [] if family.generating is None else [row(f"{name}(vocab_size=...)", family.generating)]
    return [row(name, family), *more]


def row(name: str, family: Family) -> str:
    towers = [tower for tower in family.towers if tower.layers]
    read = towers[:1] if family.bimodal else towers
    shown_rows = ", ".join(f"{tower.name}: {ROWS[tower.readout]}" for tower in read)
    seen = {"patches": "patches", "packed_patches": "patches", "text_patches": "patches", "patches_text": "patches"}
    seen |= {"regions": "boxes", "boxes": "boxes", "features": "features"}
    maps = [seen.get(tower.tokens) or ("image tokens" if tower.grid is not None else None) for tower in family.towers]
    shown = ", ".join(dict.fromkeys(part for part in maps if part)) or "–"
    weighted = "yes" if all(tower.branch and (tower.sums or not tower.further) for tower in family.towers) else "no"
    kind = "decoded" if towers[0].tokens == "decoded" else family.score
    score = SCORES["states" if kind == "class" and name.endswith(WITHOUT_LOGITS) else kind]
    return f"| `{name}` | {shown_rows} | {score} | {shown} | {weighted} | {'yes' if family.vision else '–'} |"


def page() -> str:
    parts = [HEAD]
    for kind, families in KINDS.items():
        parts.append(f"## {kind}\n\n| class | row that is read | default score | maps | weighted | connector |")
        parts[-1] += "\n| --- | --- | --- | --- | --- | --- |\n"
        parts[-1] += "\n".join(line for name, family in sorted(families.items()) for line in rows(name, family)) + "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
