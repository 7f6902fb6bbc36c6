"""What four papers claim, and what the stored rows say: `python -m vlattn_lab.pages.claims` writes it into the package's README.

Effects are those of the experiments' pages, with their correction, or are taken of the rows here and corrected among those of
their paper. An effect is positive in the direction of its claim: it is reproduced if p is below 0.05 then, and not otherwise.
What is positive by construction has no p, and its result is stated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from vlattn_fast.measuring.records import having, markdown
from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments.congruence.training import value_name
from vlattn_lab.experiments.experiment import Effect, Record, effects_of, less
from vlattn_lab.experiments.scores.page import compared, tasks, values
from vlattn_lab.experiments.weighted_relevancy import PARTS, widths
from vlattn_lab.pages.experiment_page import report_of

README = ROOT / "packages" / "vlattn-lab" / "README.md"
BEGIN, END = "<!-- claims -->\n", "<!-- end of claims -->"
REPRODUCED, NOT, UNTESTED, UNCLAIMED = "reproduced", "not reproduced", "cannot be tested here", "not claimed by the paper"
HEAD = ["claim", "effect of", "mean, 95 % interval", "of", "p (Holm)", "detectable", "unlike the paper", "result"]


class Claim(NamedTuple):
    """effect: or what has none. result: None = what the effect says. positive: it is so by construction, so no test is of use."""

    text: str
    effect: Effect | str
    unlike: str
    result: str | None = None
    positive: bool = False


def line_of(claim: Claim) -> list[str]:
    if isinstance(effect := claim.effect, str):
        return [claim.text, effect, *["none"] * 4, claim.unlike, claim.result or UNTESTED]
    said = REPRODUCED if effect.effect > 0 and effect.holm < 0.05 else NOT
    p = "< 0.001" if effect.holm < 0.001 else f"{effect.holm:.3f}"
    tested = ("none", "none") if claim.positive else (p, f"{effect.detectable:.3f}")
    return [
        *(claim.text, f"{effect.claim}: {effect.measured}", f"{effect.effect:+.3f} ({effect.low:+.3f} to {effect.high:+.3f})"),
        *(f"{effect.seeds} seeds", *tested),
        *(claim.unlike, claim.result or said),
    ]


def weighted_relevancy(rows: Sequence[Record], stated: Sequence[Effect]) -> list[Claim]:
    trained, redrawn = (widths(rows, state) for state in ("trained", "untrained"))
    what = "width (5 % to 95 % of tokens) of the residual stream's share, mean of four models"
    [width] = effects_of([("trained", what, trained)])
    [learned] = effects_of([("trained less matrices drawn anew", what, less(trained, redrawn))])
    ours = {one.measured: one for one in of_claims(stated, "`contribution`, rows divided, published")}
    rest = [one for one in of_claims(stated, "`magnitude`", "gradient") if one.measured == "all models, mean"]
    unlike = "our reading of the equations; small models"
    fixed = "norms held fixed: published, a LayerNorm on the sum makes each share one half"
    bounded = f"{fixed}. A width is never negative, and redrawn matrices have more"
    tested = [(f"ahead in perturbation tests of {task}", f"{task}, {part}") for task in ("answers", "captions") for part in PARTS]
    return [
        Claim("the importance of tokens differs before and after attention", width, bounded, REPRODUCED, positive=True),
        Claim("training makes it differ", learned, "a control of ours", UNCLAIMED),
        Claim("weights distort less than equal accumulation", ours["all models, mean"], unlike),
        *(Claim(text, ours[measured], unlike) for text, measured in tested),
        Claim("CLIPMapper with self- and cross-attention", "whether a form of ours is the paper's", "no public code"),
        *(Claim("another rule is ahead of the plain rule", one, "rules of ours", UNCLAIMED) for one in rest),
    ]


def scores(rows: Sequence[Record], stated: Sequence[Effect]) -> list[Claim]:
    unlike = {
        "matching": "two small encoders, four regions",
        "answering": "MAC of three steps, four regions",
        "SCAN": "the published norms on small encoders",
        "reading": "a small model after M4C that reads digits as tokens",
        "generation": "AttnGAN's generator, in which equal weights do as well: the sentence is also an input",
        "drawing": "a task of ours",
    }

    def heads(name: str, sign: int = 1) -> list[float]:
        return less(*(values(rows, "conditions", arm, name) for arm in ("scaled_dot", "scaled_dot, heads 8")[::sign]))

    effects = effects_of(
        [
            (task, "accuracy, best less worst score, chosen by the other seeds", chosen_by_others(rows, task))
            for task in tasks(rows)
        ]
        + [(task, "pointing, trained less untrained, mean of the scores", pointing(rows, task)) for task in tasks(rows)]
        + [("one head less eight", "pointing", heads("pointing")), ("eight heads less one", "agreement", heads("agreement", -1))]
    )
    count, untested = len(tasks(rows)), {"generation": UNTESTED, "drawing": UNCLAIMED}
    together = [one for one in stated if one.measured == "accuracy and pointing"]
    return [
        *(
            Claim("the score changes what a model reaches", one, unlike[one.claim], untested.get(one.claim))
            for one in effects[:count]
        ),
        *(Claim("attention shows what counts", one, unlike[one.claim], untested.get(one.claim)) for one in effects[count:-2]),
        *(
            Claim("some conditions make attention easier to interpret", one, "matching only; ours to choose")
            for one in effects[-2:]
        ),
        *(
            Claim("the more accurate score points better", one, "rank correlation over eight scores", UNCLAIMED)
            for one in together
        ),
        Claim("the same in the published models", "models at full size", "no weights or images here"),
    ]


def chosen_by_others(rows: Sequence[Record], task: str) -> list[float]:
    """For each seed the accuracy of the best score less that of the worst, as the other seeds rank them: 0 on average if scores
    do not matter."""
    by_arm, gains = [values(rows, task, arm, "accuracy") for arm in compared(rows, task)], []
    for seed in range(len(by_arm[0])):
        ranked = sorted(by_arm, key=lambda accuracy: sum(accuracy) - accuracy[seed])
        gains.append(ranked[-1][seed] - ranked[0][seed])
    return gains


def pointing(rows: Sequence[Record], task: str) -> list[float]:
    gains = [
        less(*(values(rows, task, arm, "pointing", state) for state in ("trained", "untrained"))) for arm in compared(rows, task)
    ]
    return [sum(one) / len(one) for one in zip(*gains, strict=True)]


def value(rows: Sequence[Record], stated: Sequence[Effect]) -> list[Claim]:
    claims = {
        "i": "models attend to text more than to the image",
        "ii": "some heads serve cross-modal interaction",
        "iii": "attention agrees with the alignment of words and regions",
        "iv": "attention shows relations of regions",
        "v": "heads have linguistic knowledge",
    }
    unlike, found = "3 layers, 22 words, pre-trained on DigitScenes", list[Claim]()
    for (number, text), model in itertools.product(claims.items(), ("UNITER", "LXMERT")):
        related = ("; it learns no relations", UNTESTED) if number == "iv" else ("", None)
        effects = of_claims(stated, f"({number}) {model}")
        found += [Claim(text, one, unlike + related[0], related[1]) for one in effects]
        found += [] if effects else [Claim(text, f"({number}) {model}, pre-trained without locations", "no rows yet")]
    found.append(Claim("heads know sentence length, depth, tense and number", "(v) such sentences", "captions of one form"))
    return [*found, Claim("the same for each architecture", "ViLBERT", "transformers does not have it")]


def congruence(rows: Sequence[Record], stated: Sequence[Effect]) -> list[Claim]:
    kinds = ("singular", "distributed")
    of_arm = {arm: having(rows, what="training", loss=arm) for arm in ("none", "cacr", *(f"iais_{kind}" for kind in kinds))}
    group = {arm: [row["held_out"]["group"] for row in of_arm[arm]] for arm in of_arm}
    name = value_name("cacr", of_arm["cacr"][0]["layer"])
    falls = [
        math.log2(plain["held_out"][name] / row["held_out"][name])
        for plain, row in zip(of_arm["none"], of_arm["cacr"], strict=True)
    ]
    fall, *ahead = effects_of(
        [("no loss over CACR", "value of the loss, log2", falls)]
        + [(f"CACR less IAIS {kind}", "group score", less(group["cacr"], group[f"iais_{kind}"])) for kind in kinds]
    )
    small = "random weights and 360 scenes, no pre-trained UNITER"
    [gain] = of_claims(stated, "CACR less no loss")
    others = [one for one in stated if one is not gain and "IAIS" not in one.claim]
    return [
        Claim("congruent relations mean congruent attention", "a derivation, and a loop over pairs", "nothing", REPRODUCED),
        Claim("the loss makes attention congruent", fall, f"{small}; it can be near 0 for maps that differ"),
        Claim("it raises scores on swapped captions", gain, small),
        *(Claim("it is ahead of IAIS", one, f"{small}; neither is ahead of no loss") for one in ahead),
        *(Claim("the loss raises scores on swapped captions", one, small, UNCLAIMED) for one in others),
        Claim(
            "the gain of UNITER on Winoground",
            "UNITER's weights and Winoground's images",
            "neither is here; a command takes yours",
        ),
    ]


PAPERS = {
    "Weighted relevancy (Huang et al., 2023)": weighted_relevancy,
    "Attention scores (Cao et al., COLING 2022)": scores,
    "VALUE (Cao et al., ECCV 2020)": value,
    "CACR (Pandey et al., ACL 2023)": congruence,
}


def of_claims(effects: Sequence[Effect], *starts: str) -> list[Effect]:
    return [effect for effect in effects if effect.claim.startswith(starts)]


def tables() -> str:
    parts = []
    for paper, claims in PAPERS.items():
        report = report_of(claims.__name__)
        found = claims(report["rows"], [Effect(**one) for one in report["effects"]])
        page = f"[The experiment](../../docs/experiments/{claims.__name__}.md)"
        lines = [line_of(claim) for claim in found]
        parts.append(f"### {paper}\n\n{page}\n\n{markdown(HEAD, lines, words=(0, 1, 6, 7))}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    README.write_text(f"{before}{BEGIN}\n{tables()}\n{after}", encoding="utf-8")
