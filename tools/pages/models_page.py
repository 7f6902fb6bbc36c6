"""The tables of docs/models.md: the listed classes, and what `python -m tools.model_classes` stored."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from tools.model_classes.compare import BOUND
from tools.model_classes.edited import WITHOUT
from tools.model_classes.held import KEPT
from tools.model_classes.run import EDITS, HELD, TABLE, UNCHANGED
from tools.model_classes.unchanged import LOSS, WAYS
from vlattn_fast.interpret import Adapter
from vlattn_fast.interpret.adapters.decoders import DECODERS
from vlattn_fast.interpret.adapters.encoders import ENCODERS
from vlattn_fast.interpret.adapters.two_towers import LINKED

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
SHOWN = {"refused": "not supported"}  # the others are shown under their stored names
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


def rows(name: str, adapter: Adapter) -> list[str]:
    """The rows of a class and of its models with a vocabulary."""
    more = [] if adapter.generating is None else [row(f"{name}(vocab_size=...)", adapter.generating)]
    return [row(name, adapter), *more]


def row(name: str, adapter: Adapter) -> str:
    towers = [tower for tower in adapter.towers if tower.layers]
    read = towers[:1] if adapter.bimodal else towers
    shown_rows = ", ".join(f"{tower.name}: {tower.rule.label}" for tower in read)
    seen = {"patches": "patches", "packed_patches": "patches", "text_patches": "patches", "patches_text": "patches"}
    seen |= {"regions": "boxes", "boxes": "boxes", "features": "features"}
    maps = [seen.get(tower.tokens) or ("image tokens" if tower.grid is not None else None) for tower in adapter.towers]
    shown = ", ".join(dict.fromkeys(part for part in maps if part)) or "–"
    kind = "decoded" if towers[0].tokens == "decoded" else adapter.score
    score = SCORES["states" if kind == "class" and name.endswith(WITHOUT_LOGITS) else kind]
    return f"| `{name}` | {shown_rows} | {score} | {shown} | {'yes' if adapter.vision else '–'} |"


def measured(table: dict[str, Any]) -> str:
    """The stored outcomes of `python -m tools.model_classes`."""
    text = f"""## Classes of transformers {table["transformers"]}

`python -m tools.model_classes` builds a small random model of each class, from the class's default config with small sizes
and the values that only configs of checkpoints have, and explains it without further arguments in float64. It compares the
relevancy vectors with the published rule on the maps of eager attention. *Equal* is a difference of at most {BOUND:.0e} of a
vector's largest value. An image must change the logits. *Not supported* is an error that names its reason. A class *cannot be
built* if its default config with small sizes does not run. It *cannot be compared* if the model returns no maps, or if only
`explain` says which position is explained.
"""
    return text + outcomes(table)


def edited(table: dict[str, Any]) -> str:
    """The stored outcomes of `python -m tools.model_classes --edits`."""
    equal = [reason for mapping in MAPPED for _, outcome, reason in table.get(mapping, {}).values() if outcome == "equal"]
    both = sum(WITHOUT not in reason for reason in equal)
    text = f"""## Edited attention and states

`python -m tools.model_classes --edits` uses the same models. With `va.intervene` it cuts edges of two heads in all layers
and steers a layer (`Knockout`, `Steer`), and scales states after this layer and outputs of its MLP at some positions (`Residual`,
`Mlp`). It compares the logits with those of eager attention with edited maps and of hooks on the modules. *Equal* is a difference
of at most {BOUND:.0e} of what the edits change; {both} of {len(equal)} equal model types have both kinds of states. A class
*cannot be compared* if no tower of three tokens attends to itself, or if the edits change no logit.
"""
    return text + outcomes(table, names_equal=False)


def held(table: dict[str, Any], explained: dict[str, Any]) -> str:
    """The stored outcomes of norms held fixed, and the classes that take a root which keeps its derivative."""
    kept: dict[str, str] = {}
    for mapping in (mapping for mapping in MAPPED if mapping in table):
        for name, _, reason in table[mapping].values():
            parts = [_short(part) for part in reason.partition(KEPT)[2].split(", ") if part not in ("", name)]
            if KEPT in reason:
                kept[name] = f"`{name}`" + (f" ({', '.join(parts)})" if parts else "")
    text = f"""## Norms held fixed

`python -m tools.model_classes --held` uses the same models. It holds the denominators of norms fixed (`freeze=("norms",)`)
and compares the gradient of the score at all embeddings with that of a plain implementation, in which each norm has a detached
denominator. If relevancy vectors can be compared, those of `va.methods.Gradient(freeze=("norms",))` and of
`va.methods.Gradient(freeze=("norms", "attention"))` are compared with the published rule on the plain implementation's maps.
*Equal* is a difference of at most {BOUND:.0e} of the largest value, in all that was compared.

{_compared(table, explained)}
A square root in the code of a larger module keeps its derivative, with and without `freeze`, even if it belongs to a norm. These
classes have one (in brackets the module, if it is not the model's own): {", ".join(kept.values()) or "none"}.
"""
    return text + outcomes(table, names_equal=False)


def unchanged(table: dict[str, Any]) -> str:
    """The stored outcomes of functions that must change nothing."""
    lines = ""
    for mapping in (mapping for mapping in MAPPED if mapping in table):
        reasons = [reason for _, _, reason in table[mapping].values()]
        counts = [Counter(match[1] for reason in reasons if (match := re.search(rf"{way}: ([a-z ]+),", reason))) for way in WAYS]
        cells = (", ".join(f"{n} {SHOWN.get(outcome, outcome)}" for outcome, n in count.most_common()) for count in counts)
        lines += f"| {MAPPED[mapping]} | {len(reasons)} | {' | '.join(cells)} |\n"
    text = f"""## Attention by a name

`python -m tools.model_classes --unchanged` uses the same models, with three functions that must change nothing: "scaled_dot"
*by name* (`va.nn.register_attention`), *edited* with `Steer(weight=1.0)` in `va.intervene`, and *replaced* by "scaled_dot"
(`va.nn.replace_attention`). Prompts are padded on either side; windows and indexers leave out keys. *Equal* is a difference from
eager attention, or from the model's default attention, of at most {BOUND:.0e} of the largest value in float64, and of {LOSS:.0f}
times the model's own error in float32 and bfloat16: of the logits, of the gradients of all parameters, and of the logits of three
tokens that the model generates without a cache, with a dynamic and with a static one. Models that write attention out by hand are
not supported by name.

| | model types | {" | ".join(WAYS)} |
| --- | ---: |{" --- |" * len(WAYS)}
{lines}"""
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
    return f"| | model types | measured | gradients equal | relevancy equal too |\n| --- | ---: | ---: | ---: | ---: |\n{lines}"


def outcomes(table: dict[str, Any], names_equal: bool = True) -> str:
    """The counts of each mapping, and a table of the classes that are not equal."""
    text = ""
    for mapping, title in MAPPED.items():
        if mapping not in table:
            continue
        rows = table[mapping]
        counts = Counter(outcome for _, outcome, _ in rows.values())
        shown = ", ".join(f"{counts[outcome]} {SHOWN.get(outcome, outcome)}" for outcome in OUTCOMES if counts[outcome])
        equal = sorted({name for name, outcome, _ in rows.values() if outcome == "equal"})
        text += f"\n### {title}\n\n{len(rows)} model types: {shown}.\n\n"
        text += f"Equal: {', '.join(f'`{name}`' for name in equal)}.\n\n" if names_equal else ""
        text += "| class | outcome | reason |\n| --- | --- | --- |\n"
        others = sorted({(name, outcome, reason) for name, outcome, reason in rows.values() if outcome != "equal"})
        text += "".join(f"| `{name}` | {SHOWN.get(outcome, outcome)} | {_short(reason)} |\n" for name, outcome, reason in others)
    return text


def _short(reason: str) -> str:
    plain = re.sub(r"[|<>{}*_`\[\]]", lambda mark: f"&#{ord(mark[0])};", reason)
    return plain if len(reason) <= 160 else f"{plain[:160].rpartition(' ')[0]} …"


def measured_models() -> str:
    """What `python -m tools.model_classes` stored, in four sections."""
    explained, *others = (json.loads(path.read_text(encoding="utf-8")) for path in (TABLE, EDITS, HELD, UNCHANGED))
    stored_edits, stored_held, stored_unchanged = others
    return "\n".join([measured(explained), edited(stored_edits), held(stored_held, explained), unchanged(stored_unchanged)])


def listed_models() -> str:
    """A section for each kind of listed class."""
    parts = []
    for kind, adapters in KINDS.items():
        parts.append(f"### {kind}\n\n| class | position | default score | maps | connector |")
        parts[-1] += "\n| --- | --- | --- | --- | --- |\n"
        parts[-1] += "\n".join(line for name, adapter in sorted(adapters.items()) for line in rows(name, adapter)) + "\n"
    return "\n".join(parts)
